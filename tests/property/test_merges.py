"""Promises about whole merges that hold for any checkpoints: bits, not tolerances, wherever bits are promised."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.errors import BudgetError
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from tests import oracle, runs
from tests.checkpoints import Family, Shape, make_family, write_checkpoint, write_recipe
from tests.runs import MIB
from tests.selection import by_name, diagonal

FEW = settings(max_examples=8, derandomize=True)
"""Every example is a whole merge of small files."""

SPANNING: dict[str, Shape] = {
    "model.layers.0.experts": (3, 40, 3500),
    "model.layers.0.long_rows": (2, 200_001),
    "model.layers.0.matrix": (523, 1021),
    "model.layers.0.norm": (1021,),
    "model.layers.0.scale": (1,),
    "model.layers.0.vector": (300_007,),
}
"""Tensors of several spans of 2**17 elements, of several rows per span, of rows of several spans, and small ones."""

METHODS: dict[str, dict[str, Any]] = {
    "model_stock by tensor": {"method": "model_stock"},
    "model_stock by row": {"method": "model_stock", "stockflow": {"scope": "row"}},
    "model_stock by leading index": {"method": "model_stock", "stockflow": {"scope": "leading"}},
    "linear": {"method": "linear", "per_model": {"weight": [0.31, 0.72, -0.44]}},
    "task_arithmetic": {"method": "task_arithmetic", "per_model": {"weight": [0.31, 0.72, -0.44]}},
    "slerp": {"method": "slerp", "parameters": {"t": 0.37}},
    "nuslerp by row": {
        "method": "nuslerp", "per_model": {"weight": [0.31, 0.72]}, "parameters": {"nuslerp_flatten": False},
    },
    "multislerp by leading index": {
        "method": "multislerp", "per_model": {"weight": [0.31, 0.72, 0.44]}, "stockflow": {"scope": "leading"},
    },
    "karcher by row": {"method": "karcher", "stockflow": {"scope": "row"}},
    "geometric_median": {"method": "geometric_median"},
}  # fmt: skip
NUM_TUNED = {"slerp": 1, "nuslerp": 2}
"""Of methods that take a certain number."""
ANY_METHOD = pytest.mark.parametrize("asked", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def spanning(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("spanning"), 3, SPANNING, num_shards=2, heavy_tailed=True)


def recipe_of(path: Path, family: Family, asked: dict[str, Any]) -> Path:
    tuned = family.tuned[: NUM_TUNED.get(asked["method"])]
    rest = {key: value for key, value in asked.items() if key != "method"}
    if "per_model" in rest:
        rest["per_model"] = {key: values[: len(tuned)] for key, values in rest["per_model"].items()}
    return write_recipe(path, asked["method"], Family(family.base, tuned), **rest)


# --- the same plan, other circumstances -----------------------------------------------------------------------


@ANY_METHOD
def test_memory_and_threads_never_change_a_byte(asked: dict[str, Any], spanning: Family, tmp_path: Path) -> None:
    """From the smallest budget that is accepted, where nothing fits and all is read twice, to one that holds all."""
    recipe = recipe_of(tmp_path / "recipe.yaml", spanning, asked)
    smallest = smallest_budget(recipe)

    results = [
        runs.merge_here(recipe, tmp_path / f"{memory_bytes}-{num_threads}", memory_bytes=memory_bytes, **threads)
        for memory_bytes, num_threads in ((smallest, 1), (smallest + 40 * MIB, 3), (2048 * MIB, 2))
        for threads in ({"num_threads": num_threads},)
    ]

    first, *others = runs.expected_digests(results)
    assert all(first == other for other in others)
    rows = [runs.tensor_facts(Path(result.output_url)) for result in results]
    assert rows[0] == rows[1] == rows[2]


def smallest_budget(recipe: Path) -> int:
    """Return the least --memory, in steps of a MiB, that is accepted for one thread."""
    inputs = Inputs.open(load_recipe(str(recipe)))
    for memory_bytes in itertools.count(300 * MIB, MIB):
        try:
            plan_merge(inputs, str(recipe.parent / "nowhere"), MergeOptions(memory_bytes, 1, "cpu"))
        except BudgetError:
            continue
        return memory_bytes
    raise AssertionError


@pytest.mark.parametrize("shard_size", [1, 500_000])
def test_the_layout_of_files_never_changes_a_tensor(shard_size: int, spanning: Family, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "recipe.yaml", spanning, {"method": "model_stock"})
    resharded = tuple(
        write_checkpoint(tmp_path / f"resharded-{number}", read_tensors(folder), num_shards=3, seed=7 * number)
        for number, folder in enumerate((spanning.base, *spanning.tuned))
    )
    other_recipe = recipe_of(tmp_path / "other.yaml", Family(resharded[0], resharded[1:]), {"method": "model_stock"})

    runs.merge_here(recipe, tmp_path / "out")
    runs.merge_here(other_recipe, tmp_path / "other", shard_size=shard_size)

    one, other = oracle.load_checkpoint(tmp_path / "out"), oracle.load_checkpoint(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name].array, other[name].array) for name in one)
    assert coefficients_by_tensor(tmp_path / "out") == coefficients_by_tensor(tmp_path / "other")


# --- similarities -----------------------------------------------------------------------------------------------


@FEW
@given(
    num_tuned=st.integers(2, 6),
    num_rows=st.integers(1, 30),
    num_columns=st.sampled_from([1, 3, 255, 256, 257, 1000, 1024, 1500]),
    cosine=st.sampled_from([-0.15, 0.03, 0.5, 0.97]),
    scope=st.sampled_from(["tensor", "row"]),
    seed=st.integers(0, 9),
)
def test_scaling_all_task_vectors_changes_no_coefficient(
    num_tuned: int, num_rows: int, num_columns: int, cosine: float, scope: str, seed: int
) -> None:
    """No epsilon hides in the formulas: a model that barely moved is merged like one that moved a lot."""
    with folder() as top:
        shapes = {"w": (num_rows, num_columns)}
        family = make_family(top / "a", num_tuned, shapes, cosine=cosine, base_scale=0.0, seed=seed)
        for exponent in (-40, 40):
            models = [read_tensors(path) for path in (family.base, *family.tuned)]
            scaled = tuple(
                write_checkpoint(top / f"{exponent}-{i}", {"w": torch.ldexp(model["w"], torch.tensor(exponent))})
                for i, model in enumerate(models)
            )
            for name, members in (("as is", family), ("scaled", Family(scaled[0], scaled[1:]))):
                recipe = write_recipe(top / "recipe.yaml", "model_stock", members, stockflow={"scope": scope})
                runs.merge_here(recipe, top / f"{name} {exponent}")

            as_is, other = (runs.tensor_facts(top / f"{name} {exponent}")["w"] for name in ("as is", "scaled"))
            assert as_is["coefficients"] == other["coefficients"]
            assert as_is["mean_cosine"] == other["mean_cosine"]
            assert [norm * 2.0**exponent for norm in as_is["delta_norms"]] == other["delta_norms"]


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_ratio_does_not_depend_on_the_size_of_the_task_vectors(scale: float, tmp_path: Path) -> None:
    """mergekit's clamp of the norm product gives 0.00995 instead of 0.667 for norms of 1e-4."""
    families = [
        make_family(tmp_path / str(norm), 2, {"w": (100, 100)}, torch.float32, base_scale=0.0, delta_scale=norm / 100)
        for norm in (1.0, scale)
    ]
    for number, family in enumerate(families):
        recipe = write_recipe(tmp_path / f"{number}.yaml", "model_stock", family)
        runs.merge_here(recipe, tmp_path / f"out-{number}")

    usual, extreme = (runs.tensor_facts(tmp_path / f"out-{number}")["w"] for number in (0, 1))
    assert extreme["delta_norms"] == pytest.approx([norm * scale for norm in usual["delta_norms"]], rel=1e-6)
    assert extreme["ratio"] == pytest.approx(usual["ratio"], abs=2e-7)
    assert 0.6 < usual["ratio"] < 0.7


@pytest.mark.parametrize(("num_tuned", "scope"), diagonal(by_name(2, 3, 4, 5, 6), by_name("tensor", "row")))
def test_the_order_of_the_models_does_not_matter(scope: str, num_tuned: int, tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"a": (40, 1023), "b": (100, 999), "c": (140_001,)}
    family = make_family(tmp_path / "family", num_tuned, shapes, cosine=0.1, heavy_tailed=True)
    orders = [tuple(range(num_tuned)), tuple(reversed(range(num_tuned))), (*range(1, num_tuned), 0)]
    found = []
    for number, order in enumerate(orders):
        permuted = Family(family.base, tuple(family.tuned[index] for index in order))
        recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", permuted, stockflow={"scope": scope})
        runs.merge_here(recipe, tmp_path / str(number))
        found.append(coefficients_by_tensor(tmp_path / str(number)))

    for name, expected in found[0].items():
        assert np.max(expected) > 0
        for permuted_coefficients in found[1:]:
            np.testing.assert_allclose(permuted_coefficients[name], expected, rtol=1e-15, atol=0.0)


@FEW
@given(num_columns=st.integers(1, 2000), cosine=st.floats(-0.9, 1.0), seed=st.integers(0, 99))
def test_with_two_models_the_legacy_ratio_is_the_ratio(num_columns: int, cosine: float, seed: int) -> None:
    with folder() as top:
        shapes = {f"{index}": (3, num_columns) for index in range(5)}
        family = make_family(top, 2, shapes, torch.float32, cosine=cosine, seed=seed)
        runs.merge_here(write_recipe(top / "recipe.yaml", "model_stock", family), top / "out")

        for row in runs.tensor_facts(top / "out").values():
            if row["method"] == "model_stock":
                assert row["legacy_ratio"] == (row["ratio"] if row["mean_cosine"] > 0 else None)
                assert row["flags"] == ([] if row["mean_cosine"] >= 0 else ["clamped"])


# --- what must come back bit for bit ----------------------------------------------------------------------------


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of both signs, subnormals, the extremes and ordinary numbers of a dtype, in two rows."""
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, limits.smallest_normal, -limits.smallest_normal, limits.smallest_normal / 4, 1.0, -1.0]
    ordinary = torch.randn(293, generator=torch.Generator().manual_seed(3)).to(dtype)
    extremes = torch.tensor([limits.max, limits.min, limits.tiny], dtype=dtype) / 2
    ordinary[:3] = extremes if dtype != torch.float64 else extremes * 2.0**-600
    return torch.cat([torch.tensor(special, dtype=dtype), ordinary]).reshape(2, 150)


@pytest.mark.parametrize(
    ("asked", "dtype"),
    diagonal(METHODS, by_name(torch.bfloat16, torch.float16, torch.float32, torch.float64)),
)
def test_merging_copies_returns_them_bit_for_bit(asked: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"w": special_values(dtype), "zeros": -torch.zeros(5, 5, dtype=dtype)}
    folders = [write_checkpoint(tmp_path / f"copy-{number}", tensors) for number in range(4)]
    recipe = recipe_of(tmp_path / "recipe.yaml", Family(folders[0], tuple(folders[1:])), asked)

    runs.merge_here(recipe, tmp_path / "out")

    assert bits_of(tmp_path / "out") == bits_of(folders[0])


@pytest.mark.parametrize("num_models", [1, 2, 5])
def test_averaging_copies_without_a_base_returns_them_bit_for_bit(num_models: int, tmp_path: Path) -> None:
    tensors = {"w": special_values(torch.bfloat16)}
    folders = [write_checkpoint(tmp_path / f"copy-{number}", tensors) for number in range(num_models)]
    weights = {"weight": [0.3 + number for number in range(num_models)]}
    family = Family(folders[0], tuple(folders))
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", family, per_model=weights, with_base=False)

    runs.merge_here(recipe, tmp_path / "out")

    assert bits_of(tmp_path / "out") == bits_of(folders[0])


@pytest.mark.parametrize("on_negative", ["clamp", "extrapolate", "error"])
def test_a_model_that_did_not_move_counts_as_orthogonal(on_negative: str, tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 2, {"w": (30, 100)}, torch.float32)
    copies = [write_checkpoint(tmp_path / f"copy-{number}", read_tensors(family.base)) for number in range(2)]
    with_copy = Family(family.base, (*family.tuned, copies[0]))
    only_copies = Family(family.base, tuple(copies))
    rows = []
    for number, members in enumerate((family, with_copy, only_copies)):
        recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", members, stockflow={"on_negative": on_negative})
        runs.merge_here(recipe, tmp_path / f"out-{number}")
        rows.append(runs.tensor_facts(tmp_path / f"out-{number}")["w"])

    two, with_zero, zeros = rows
    assert with_zero["mean_cosine"] == pytest.approx(two["mean_cosine"] / 3, rel=1e-15)
    assert [row["flags"] for row in rows] == [[], ["zero_delta"], ["zero_delta"]]
    assert zeros["ratio"] == 0.0
    assert bits_of(tmp_path / "out-2") == bits_of(family.base)


def test_a_clamped_row_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = special_values(torch.float32)
    drift = torch.randn(2, 150, generator=torch.Generator().manual_seed(5)) * base.abs().clamp(1e-3, 1e3)
    opposite = torch.cat([-drift[:1], drift[1:]])
    folders = [
        write_checkpoint(tmp_path / str(number), {"w": model})
        for number, model in enumerate((base, base + drift, base + opposite))
    ]
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "model_stock", Family(folders[0], tuple(folders[1:])), stockflow={"scope": "row"}
    )

    runs.merge_here(recipe, tmp_path / "out")

    merged = read_tensors(tmp_path / "out")["w"]
    assert torch.equal(base[0].view(torch.int32), merged[0].view(torch.int32))
    assert not torch.equal(base[1], merged[1])
    assert runs.tensor_facts(tmp_path / "out")["w"]["facts"] == {"groups": 2.0, "clamped_groups": 1.0}


# --- support ------------------------------------------------------------------------------------------------------


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder for one example; hypothesis shares pytest's among all of them."""
    with tempfile.TemporaryDirectory() as top:
        yield Path(top)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bits_of(checkpoint: Path) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in sorted(read_tensors(checkpoint).items())
    }


def coefficients_by_tensor(output: Path) -> dict[str, list[list[float]]]:
    rows: Sequence[dict[str, Any]] = list(runs.tensor_facts(output).values())
    return {row["name"]: runs.coefficients(row) for row in rows if row["coefficients"] is not None}
