"""Methods that keep some elements of each task vector: which ones they keep, and what they make of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle, runs
from tests.checkpoints import Family, Shape, make_family, write_checkpoint, write_recipe

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WEIGHTS = [0.5153, 0.7121, -0.2333]
SPANNING: dict[str, Shape] = {
    "layers.0.mlp.experts.gate_up_proj": (3, 40, 3500),
    "layers.0.matrix": (523, 1021),
    "layers.0.norm": (1021,),
    "layers.0.scale": (1,),
    "layers.0.vector": (600_007,),
    "odd.empty": (0, 7),
    "odd.scalar": (),
}
"""Tensors of several spans, of groups of several blocks, and small ones."""


def write(folder: Path, tensors: Sequence[torch.Tensor], name: str = "w") -> Family:
    """Write a base and the models tuned from it, of one tensor."""
    folders = [write_checkpoint(folder / str(number), {name: tensor}) for number, tensor in enumerate(tensors)]
    return Family(folders[0], tuple(folders[1:]))


def merged(folder: Path, method: str, family: Family, **asked: Any) -> dict[str, oracle.Stored]:
    """Merge and return the output."""
    folder.mkdir(exist_ok=True)
    runs.merge_here(write_recipe(folder / "recipe.yaml", method, family, **asked), folder / "out")
    return oracle.load_checkpoint(folder / "out")


# --- against the oracle -----------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ties": (
        "ties",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 1.0, 0.7]}, "parameters": {"lambda": 0.8117}},
        {"weights": WEIGHTS, "densities": [0.3, 1.0, 0.7], "lam": 0.8117},
    ),
    "ties, rescaled, not normalized": (
        "ties",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 1.0, 0.7]},
         "parameters": {"rescale": "l1", "normalize": False}},
        {"weights": WEIGHTS, "densities": [0.3, 1.0, 0.7], "rescale": True, "normalize": False},
    ),
    "ties of whole tensors": (
        "ties",
        {"per_model": {"weight": WEIGHTS, "density": [0.0, 0.5, 0.01]}, "stockflow": {"scope": "tensor"}},
        {"weights": WEIGHTS, "densities": [0.0, 0.5, 0.01], "scope": "tensor"},
    ),
}  # fmt: skip
"""Method, what the recipe says, what the oracle is told."""

LEAST_SHARE = 0.9999
"""Outputs that are the correctly rounded ones."""


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(BF16, "BF16"), (F16, "F16"), (F32, "F32"), (F32, "BF16")], ids=["BF16", "F16", "F32", "narrowed"],
)  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_what_the_oracle_says(case: str, dtype: torch.dtype, out: str, tmp_path: Path) -> None:
    method, asked, told = CASES[case]
    num_tuned = asked.get("num_tuned", 3)
    family = make_family(tmp_path / "family", num_tuned, SPANNING, dtype, num_shards=2)
    out_dtype = {"out_dtype": "bfloat16"} if out == "BF16" and dtype == F32 else {}
    words = {key: value for key, value in asked.items() if key != "num_tuned"}

    found = merged(tmp_path, method, family, **words, **out_dtype)

    expected = oracle.merge_folder(method, family.base, family.tuned, out_dtype=out, **told)
    shares = {}
    num_wrong = num_elems = 0
    for name in SPANNING:
        wrong = np.count_nonzero(oracle.ulp_distance(out, oracle.round_to(out, found[name].array), expected[name].bits))
        shares[name] = 1 - wrong / max(expected[name].out.size, 1)
        num_wrong, num_elems = num_wrong + wrong, num_elems + expected[name].out.size
    worst = min(shares, key=shares.__getitem__)
    print(f"FIGURES {case} {out}: {1 - num_wrong / num_elems:.6%}, worst {worst} {shares[worst]:.6%}")
    assert num_wrong <= (1 - LEAST_SHARE) * num_elems


@pytest.mark.parametrize("case", CASES)
def test_results_of_float64_are_exact_but_for_the_last_bit(case: str, tmp_path: Path) -> None:
    method, asked, told = CASES[case]
    family = make_family(tmp_path / "family", asked.get("num_tuned", 3), {"w": (40, 52), "v": (1031,)}, F64)

    found = merged(tmp_path, method, family, **{key: value for key, value in asked.items() if key != "num_tuned"})

    sources = oracle.load_checkpoint(family.base)
    for name, want in oracle.merge_folder(method, family.base, family.tuned, **told).items():
        if want.dtype == "F64":
            error = np.abs(found[name].array - want.out)
            assert (error <= 2.0**-51 * (np.abs(sources[name].array) + np.abs(want.out))).all()


# --- equal magnitudes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.25, 0.5, 0.999999, 1.0])
def test_of_equal_magnitudes_the_first_are_kept_exactly_k(density: float, dtype: torch.dtype, tmp_path: Path) -> None:
    n = 700_001
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(n // 3 + 1)[:n].to(dtype)
    family = write(tmp_path / "family", [torch.zeros(n, dtype=dtype), signs])

    found = merged(tmp_path, "ties", family, parameters={"weight": 1.0, "density": density})["w"].array

    k = 0 if density == 0 else n if density == 1 else max(1, int(density * n))
    assert np.array_equal(found[:k], signs[:k].double().numpy())
    assert not found[k:].any()
    assert runs.tensor_facts(tmp_path / "out")["w"]["facts"] == {"kept_share_1": k / n}


def test_fused_experts_are_trimmed_one_by_one(tmp_path: Path) -> None:
    name, shape = "layers.0.mlp.experts.down_proj", (3, 100, 900)
    signs = torch.ones(shape)
    family = write(tmp_path / "family", [torch.zeros(shape), signs], name)
    asked = {"parameters": {"weight": 1.0, "density": 0.4}}

    one_by_one = merged(tmp_path / "a", "ties", family, **asked)[name].array.reshape(3, -1)
    together = merged(tmp_path / "b", "ties", family, stockflow={"scope": "tensor"}, **asked)[name].array.ravel()

    assert np.array_equal(one_by_one, np.repeat([[1.0] * 36_000 + [0.0] * 54_000], 3, axis=0))
    assert np.array_equal(together, [1.0] * 108_000 + [0.0] * 162_000)
    assert runs.tensor_facts(tmp_path / "a" / "out")[name]["scope"] == "leading"


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
        ([-0.0, 2.0, -2.0, 2.0], [0.0, 2.0, -2.0, 0.0]),
        ([1e-45, -1e-45, 0.0, 1e-45], [1e-45, -1e-45, 0.0, 0.0]),
        ([3e38, -3e38, 3e38, 1.0], [3e38, -3e38, 0.0, 0.0]),
    ],
)
def test_zeros_subnormals_and_extremes_are_ranked(values: list[float], kept: list[float], tmp_path: Path) -> None:
    family = write(tmp_path / "family", [torch.zeros(4), torch.tensor(values)])

    found = merged(tmp_path, "ties", family, parameters={"weight": 1.0, "density": 0.5})["w"].array

    assert found.tolist() == torch.tensor(kept).double().tolist()


@pytest.mark.parametrize("case", CASES)
def test_memory_threads_and_resuming_change_no_byte(case: str, tmp_path: Path) -> None:
    """BF16 task vectors have thousands of equal magnitudes at every threshold."""
    method, asked, _ = CASES[case]
    family = make_family(tmp_path / "family", asked.get("num_tuned", 3), SPANNING, num_shards=2)
    words = {key: value for key, value in asked.items() if key != "num_tuned"}
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, **words)

    digests = [
        runs.expected_digests([runs.merge_here(recipe, tmp_path / name, memory_bytes=memory * runs.MIB, **more)])[0]
        for name, memory, more in (
            ("one thread", 400, {"num_threads": 1}), ("three", 500, {"num_threads": 3}), ("much", 3000, {})
        )
    ]  # fmt: skip

    assert digests[0] == digests[1] == digests[2]
