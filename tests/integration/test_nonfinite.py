"""NaN and infinity in an input: found by every method, in every dtype; named by tensor, checkpoint and first index."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow.errors import NumericsError
from stockflow.methods import METHODS
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.selection import by_name, diagonal

NAN, INFINITY = float("nan"), float("inf")
MERGING = [name for name in METHODS if name != "passthrough"]
"""Methods that compute; passthrough carries bytes over."""
DTYPES = by_name(torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES = {"fine": (33, 7), "large": (3, 70_000)}
FIRST, SECOND = 140_003, 140_500
"""In the second of the two spans; the later one must not be named."""


def spoil(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    for index in (FIRST, SECOND):
        tensors["large"].view(-1)[index] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def recipe_of(folder: Path, name: str, family: Family, weights: list[float] | None = None) -> Path:
    """A recipe that gives the method what it needs."""
    method = METHODS[name]
    required = [parameter for parameter in method.parameters if parameter.default is None]
    return write_recipe(
        folder / "recipe.yaml",
        name,
        family,
        per_model={
            parameter.name: weights or [0.3, 0.7][: len(family.tuned)] for parameter in required if parameter.per_model
        },
        parameters={parameter.name: 0.3 for parameter in required if not parameter.per_model},
        stockflow={"accept": ["unmerged"]},
    )


def assert_named(recipe: Path, spoiled: Path, output: Path) -> None:
    with pytest.raises(NumericsError) as failure:
        runs.merge_here(recipe, output)

    assert failure.value.exit_code == 2
    assert f"tensor 'large' of {spoiled} has NaN or infinity at flat index {FIRST:,};" in str(failure.value)
    assert not list(output.glob("*.safetensors")) + runs.leftovers(output)
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize(("name", "dtype"), diagonal(by_name(*MERGING), DTYPES))
def test_every_method_finds_them_in_every_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a tuned model, where an elementwise method may drop the element before it counts."""
    family = make_family(tmp_path, METHODS[name].max_tuned or 2, SHAPES, dtype, buffers=False)
    spoil(family.tuned[-1], NAN)

    assert_named(recipe_of(tmp_path, name, family), family.tuned[-1], tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), diagonal(by_name(*MERGING), by_name(NAN, INFINITY, -INFINITY)))
def test_every_method_finds_each_of_them_in_the_anchor_and_in_a_tuned_model(
    name: str, value: float, tmp_path: Path
) -> None:
    folders = []
    for where in ("base", "tuned-1"):
        family = make_family(tmp_path / where, METHODS[name].max_tuned or 2, SHAPES, buffers=False)
        anchored = METHODS[name].base == "required" or where == "tuned-1"
        spoiled = tmp_path / where / (where if anchored else "tuned-1")
        spoil(spoiled, value)
        folders.append((recipe_of(tmp_path / where, name, family), spoiled))

    for recipe, spoiled in folders:
        assert_named(recipe, spoiled, recipe.parent / "out")


@pytest.mark.parametrize("name", [name for name in MERGING if any(p.per_model for p in METHODS[name].parameters)])
def test_a_model_without_weight_is_looked_at_too(name: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, SHAPES, buffers=False)
    spoil(family.tuned[1], NAN)

    assert_named(recipe_of(tmp_path, name, family, weights=[1.0, 0.0]), family.tuned[1], tmp_path / "out")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
def test_an_element_that_ties_would_trim_or_outvote_is_named_all_the_same(value: float, tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, SHAPES, torch.float32, buffers=False, cosine=0.99)
    spoil(family.tuned[1], value)
    weights = {"weight": [1.0, 0.001, 1.0], "density": [1.0, 0.001, 1.0]}
    recipe = write_recipe(tmp_path / "recipe.yaml", "ties", family, per_model=weights)

    assert_named(recipe, family.tuned[1], tmp_path / "out")
