"""What every registered method owes its users; a new method is tested here by being there."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.methods import METHODS, Method
from stockflow.methods.parameters import FROM_BASE
from stockflow.methods.protocol import Elementwise, Linear
from tests import checkpoints, runs
from tests.selection import by_name, diagonal

SHAPES = {
    "matrix": (37, 41), "long": (300_001,), "layers.0.experts": (3, 5, 20_000), "scalar": (), "empty": (0, 3)
}  # fmt: skip
"""Tensors of several spans and of less than one, in groups and not."""


DTYPES = by_name(torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param  # type: ignore[no-any-return]


def recipe_for(method: Method, family: checkpoints.Family, folder: Path) -> Path:
    """A recipe that gives every required parameter a value."""
    required = [each for each in method.parameters if each.default is None and each.name != FROM_BASE]
    values = [0.25 + 0.5 * index for index in range(len(family.tuned))]
    return checkpoints.write_recipe(
        folder / f"{method.name}.yaml",
        method.name,
        family,
        with_base=method.max_tuned != 1 or method.base == "required",
        per_model={parameter.name: values for parameter in required if parameter.per_model},
        parameters={parameter.name: 0.3 for parameter in required if not parameter.per_model},
    )


def function_of(method: Method) -> Callable[..., Any]:
    rule = method.rule
    assert isinstance(rule, Linear | Elementwise)
    return rule.coefficients if isinstance(rule, Linear) else rule.decide


def num_tuned(method: Method) -> int:
    return min(3, method.max_tuned or 3)


def test_it_says_where_its_formula_comes_from_and_what_it_returns(method: Method) -> None:
    function = function_of(method)

    assert method.source
    assert inspect.getdoc(function)


def test_every_parameter_has_a_default_of_its_kind_or_must_be_given(method: Method) -> None:
    kinds = {"number": float, "integer": int, "flag": bool, "word": str}

    for parameter in method.parameters:
        assert parameter.default is None or isinstance(parameter.default, kinds[parameter.kind])


def test_its_file_never_imports_torch(method: Method) -> None:
    """Planning imports every method; torch would cost it a second and a half."""
    function = function_of(method)
    tree = ast.parse(Path(inspect.getfile(function)).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }

    assert not any((name or "").split(".")[0] == "torch" for name in imported)


@pytest.mark.parametrize(("method", "dtype"), diagonal(METHODS, DTYPES))
def test_memory_and_threads_change_no_byte(method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    family = checkpoints.make_family(tmp_path, num_tuned(method), SHAPES, dtype)
    recipe = recipe_for(method, family, tmp_path)

    results = [
        runs.merge_here(recipe, tmp_path / f"out-{threads}", memory_bytes=memory * runs.MIB, num_threads=threads)
        for memory, threads in ((600, 1), (2048, 2))
    ]

    first, second = runs.expected_digests(results)
    assert first == second


def test_merging_copies_returns_them_bit_for_bit(method: Method, tmp_path: Path) -> None:
    tensor = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, 1e-40, -3e38])])
    folders = [
        checkpoints.write_checkpoint(tmp_path / name, {"weight": tensor})
        for name in ("base", *(f"tuned-{i}" for i in range(num_tuned(method))))
    ]
    recipe = recipe_for(method, checkpoints.Family(folders[0], tuple(folders[1:])), tmp_path)

    runs.merge_here(recipe, tmp_path / "out")

    expected, found = ((folder / "model.safetensors").read_bytes() for folder in (folders[0], tmp_path / "out"))
    assert expected[-tensor.nbytes :] == found[-tensor.nbytes :]
