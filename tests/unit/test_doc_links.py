"""Whatever a page or a line of code points at is there: pages and their headings, files, modules, targets of make."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from tests.pages import REPOSITORY, anchor, anchors, headings, prose

PAGES = (
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "deploy" / "README.md",
    *sorted((REPOSITORY / "stockflow").rglob("README.md")),
)
TEXTS = (".py", ".md", ".json", ".yaml", ".toml", ".html", ".css", ".js")
NAMING = (
    REPOSITORY / "Makefile",
    *(path for path in sorted(REPOSITORY.glob("*.*")) if path.suffix in TEXTS),
    *(
        path
        for folder in ("stockflow", "tests", "deploy", "docs")
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.is_file() and (path.suffix in TEXTS or path.name == "Dockerfile")
    ),
)
"""Every text that may name a page."""


def short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def fault(target: Path, heading: str) -> str:
    """Return what is wrong with a place that something points at; nothing if it is there."""
    if not target.exists():
        return "no such file"
    return f"no heading {heading}" if heading and heading not in anchors(target) else ""


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", prose(page))

    found = [(path, fault(page.parent / path if path else page, heading), heading) for path, heading in links]

    assert [each for each in found if each[1]] == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_headings_of_a_page_differ(page: Path) -> None:
    """An anchor is then the heading's words, and no number behind them."""
    names = anchors(page)

    assert sorted(names) == sorted(set(names))


def test_pages_that_code_and_messages_name_are_there() -> None:
    named = [
        (short(path), page, heading)
        for path in NAMING
        for page, heading in re.findall(r"(?<![\w/])(docs/[\w-]+\.\w+)#?([\w-]*)", path.read_text())
    ]

    assert len(named) > 30
    assert [each for each in named if fault(REPOSITORY / each[1], each[2])] == []


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", (REPOSITORY / "README.md").read_text()))

    assert linked == {short(page) for page in PAGES if page.parent.name == "docs"}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_files_modules_and_targets_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    files = re.findall(r"`((?:stockflow|tests|deploy)/[\w./-]+)`", text)
    modules = re.findall(r"python -m (tests[\w.]+)", text)
    targets = re.findall(r"(?:`|^    |^\$ )make ([\w-]+)", text, re.MULTILINE)
    made = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)

    assert [file for file in files if not (REPOSITORY / file).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    assert [target for target in targets if target not in made] == []


def test_every_marker_is_left_out_by_default_and_run_by_the_target_it_names() -> None:
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    named = {words.rpartition("make ")[2]: words.partition(":")[0] for words in options["markers"]}
    makefile = (REPOSITORY / "Makefile").read_text()

    assert len(named) == len(options["markers"])
    assert named == dict(re.findall(r"^([\w-]+):.*\n.* -m pytest -m (\w+)", makefile, re.MULTILINE))
    assert set(re.findall(r"not (\w+)", options["addopts"])) == set(named.values())


@pytest.mark.parametrize("page", [page for page in PAGES if "\n- [" in page.read_text()[:200]], ids=short)
def test_contents_of_a_page_are_its_headings(page: Path) -> None:
    lines = page.read_text().splitlines()
    named = [anchor(words) for _, level, words in headings(lines) if level in {2, 3}]

    first = next(number for number, level, _ in headings(lines) if level == 2)
    assert re.findall(r"\]\(#([^)]+)\)", "\n".join(lines[:first]))[: len(named)] == named
