"""Every promise in docs/promises.md names a test, and every test it names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.pages import section

TESTS = Path(__file__).parents[1]
PAGE = section("promises.md", "Promises")
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
ROWS = re.findall(r"^\|(?! ?-)(.*)\|$", PAGE, re.MULTILINE)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_the_tests_on_the_page_exist(file: str, test: str) -> None:
    assert test.startswith("test_")
    assert test in functions(file)


def test_every_promise_names_one_or_says_that_it_was_not_run() -> None:
    promises = [row for row in ROWS if "shown by" not in row and not set(row) <= set("-| ")]

    assert len(promises) > 30
    assert [row for row in promises if "::test_" not in row and "**not run**" not in row] == []
    assert PAGE.count("::") == len(NAMED)
