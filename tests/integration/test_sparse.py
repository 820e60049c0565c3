"""Methods that keep some elements of each task vector: which ones they keep, and what they make of them."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.methods.parameters import Parameters
from stockflow.recipe import parse_recipe
from stockflow.storage import StorageConfig
from stockflow.verification.sample import SampleOptions
from stockflow.verification.verify import verify
from tests import oracle, runs
from tests.checkpoints import Family, Shape, make_family, write_checkpoint, write_recipe
from tests.selection import diagonal, mostly_slow

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WEIGHTS = [0.5153, 0.7121, -0.2333]
SPANNING: dict[str, Shape] = {
    "layers.0.mlp.experts.gate_up_proj": (3, 40, 3500),
    "layers.0.matrix": (293, 1021),
    "layers.0.norm": (1021,),
    "layers.0.scale": (1,),
    "layers.0.vector": (300_007,),
    "odd.empty": (0, 7),
    "odd.scalar": (),
}
"""Tensors of several spans, of groups of several blocks, and small ones."""


def write(folder: Path, tensors: Sequence[torch.Tensor], name: str = "w") -> Family:
    """Write a base and the models tuned from it, of one tensor."""
    folders = [write_checkpoint(folder / str(number), {name: tensor}) for number, tensor in enumerate(tensors)]
    return Family(folders[0], tuple(folders[1:]))


@pytest.fixture(scope="module")
def spanning(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, torch.dtype], Family]:
    """Families of the tensors of ``SPANNING``, each made once."""

    @cache
    def make(num_tuned: int, dtype: torch.dtype) -> Family:
        return make_family(tmp_path_factory.mktemp("spanning"), num_tuned, SPANNING, dtype, num_shards=2)

    return make


Spanning = Callable[[int, torch.dtype], Family]


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
    "breadcrumbs": (
        "breadcrumbs",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 1.0, 0.7], "gamma": [0.1, 0.2, 0.05]}},
        {"weights": WEIGHTS, "densities": [0.3, 1.0, 0.7], "gammas": [0.1, 0.2, 0.05]},
    ),
    "breadcrumbs, more than there is": (
        "breadcrumbs",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 0.9, 0.0], "gamma": [0.8, 0.2, 0.5]},
         "parameters": {"normalize": True, "rescale": True}},
        {"weights": WEIGHTS, "densities": [0.3, 0.9, 0.0], "gammas": [0.8, 0.2, 0.5],
         "normalize": True, "rescale": True},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        {"per_model": {"weight": WEIGHTS}, "parameters": {"density": 0.6}},
        {"weights": WEIGHTS, "densities": [0.6] * 3, "gammas": [0.01] * 3},
    ),
    "dare_linear": (
        "dare_linear",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 1.0, 0.7]}},
        {"weights": WEIGHTS, "densities": [0.3, 1.0, 0.7]},
    ),
    "dare_linear, as the paper": (
        "dare_linear",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 0.0, 0.7]},
         "parameters": {"rescale": "expected", "normalize": True, "lambda": 0.8117}, "stockflow": {"seed": 17}},
        {"weights": WEIGHTS, "densities": [0.3, 0.0, 0.7], "rescale": "expected", "normalize": True, "lam": 0.8117,
         "seed": 17},
    ),
    "dare_ties": (
        "dare_ties",
        {"per_model": {"weight": WEIGHTS}, "parameters": {"density": 0.45}},
        {"weights": WEIGHTS, "densities": [0.45] * 3},
    ),
    "dare_ties, not rescaled": (
        "dare_ties",
        {"per_model": {"weight": WEIGHTS}, "parameters": {"density": 0.45, "rescale": False, "normalize": True},
         "stockflow": {"scope": "tensor"}},
        {"weights": WEIGHTS, "densities": [0.45] * 3, "rescale": False, "normalize": True, "scope": "tensor"},
    ),
    "della": (
        "della",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 1.0, 0.7], "epsilon": [0.1, 0.15, 0.2]}},
        {"weights": WEIGHTS, "densities": [0.3, 1.0, 0.7], "epsilons": [0.1, 0.15, 0.2]},
    ),
    "della_linear, as the paper": (
        "della_linear",
        {"per_model": {"weight": WEIGHTS, "density": [0.3, 0.0, 0.7]},
         "parameters": {"rescale": "expected", "lambda": 0.8117}, "stockflow": {"seed": 5}},
        {"weights": WEIGHTS, "densities": [0.3, 0.0, 0.7], "epsilons": [0.15] * 3, "rescale": "expected",
         "lam": 0.8117, "seed": 5},
    ),
    "sce": ("sce", {}, {}),
    "sce of some": ("sce", {"parameters": {"select_topk": 0.3}}, {"topk": 0.3}),
    "sce of nothing": (
        "sce",
        {"parameters": {"select_topk": 0.0}, "stockflow": {"accept": ["unmerged"]}},
        {"topk": 0.0},
    ),
    "arcee_fusion": ("arcee_fusion", {"num_tuned": 1}, {}),
    "ram": ("ram", {"parameters": {"epsilon": 9e-4}}, {"epsilon": 9e-4}),
    "ramplus_tl": (
        "ramplus_tl", {"parameters": {"epsilon": 1.3e-3, "r": 0.31, "alpha": 0.9}},
        {"epsilon": 1.3e-3, "boost": (0.31, 0.9)},
    ),
    "nearswap": ("nearswap", {"num_tuned": 1, "parameters": {"t": 5.3e-4}}, {"t": 5.3e-4}),
}  # fmt: skip
"""Method, what the recipe says, what the oracle is told."""

LEAST_SHARE = {"BF16": 0.9999, "F16": 0.999, "F32": 0.9999}
"""Of a tensor, outputs that are the correctly rounded ones. F16 models differ by few distinct numbers: where one of
these, weighted, lies within float32's error of a middle, all elements that have it are rounded the other way."""


DTYPES = {"BF16": (BF16, "BF16"), "F16": (F16, "F16"), "F32": (F32, "F32"), "narrowed": (F32, "BF16")}
"""What is read and what is written."""


@pytest.mark.parametrize(("case", "dtypes"), diagonal(CASES, DTYPES))
def test_a_merge_is_what_the_oracle_says(
    case: tuple[str, dict[str, Any], dict[str, Any]],
    dtypes: tuple[torch.dtype, str],
    spanning: Spanning,
    tmp_path: Path,
) -> None:
    method, asked, told = case
    dtype, out = dtypes
    family = spanning(asked.get("num_tuned", 3), dtype)
    out_dtype = {"out_dtype": "bfloat16"} if out == "BF16" and dtype == F32 else {}
    words = {key: value for key, value in asked.items() if key != "num_tuned"}

    found = merged(tmp_path, method, family, **words, **out_dtype)

    expected = oracle.merge_folder(method, family.base, family.tuned, out_dtype=out, **told)
    shares = {}
    for name in SPANNING:
        wrong = np.count_nonzero(oracle.ulp_distance(out, oracle.round_to(out, found[name].array), expected[name].bits))
        shares[name] = 1 - wrong / max(expected[name].out.size, 1)
    worst = min(shares, key=shares.__getitem__)
    print(f"FIGURES {method} {out}: worst {worst} {shares[worst]:.6%}")
    assert shares[worst] >= LEAST_SHARE[out]


@pytest.mark.parametrize("case", CASES)
def test_results_of_float64_are_exact_but_for_the_last_bit(case: str, tmp_path: Path) -> None:
    method, asked, told = CASES[case]
    family = make_family(tmp_path / "family", asked.get("num_tuned", 3), {"w": (40, 52), "v": (1031,)}, F64)

    found = merged(tmp_path, method, family, **{key: value for key, value in asked.items() if key != "num_tuned"})

    sources = [oracle.load_checkpoint(folder) for folder in (family.base, *family.tuned)]
    for name, want in oracle.merge_folder(method, family.base, family.tuned, **told).items():
        if want.dtype == "F64":
            error = np.abs(found[name].array - want.out)
            size = sum(np.abs(source[name].array) for source in sources) + np.abs(want.out)
            assert (error <= 2.0**-51 * size).all()


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_found_to_be_what_its_inputs_give(case: str, tmp_path: Path) -> None:
    """By ``verify --sample``, which decides it again."""
    method, asked, _ = CASES[case]
    shapes: dict[str, Shape] = {"w": (40, 52), "layers.0.experts": (3, 5, 70), "norm": (31,)}
    family = make_family(tmp_path / "family", asked.get("num_tuned", 3), shapes)
    merged(tmp_path, method, family, **{key: value for key, value in asked.items() if key != "num_tuned"})

    options = SampleOptions(1.0, 1, 1024 * runs.MIB + runs.grown_bytes(), num_threads=2)
    found = verify(str(tmp_path / "out"), StorageConfig(), sample=options)

    assert found.findings == ()
    assert found.sampled is not None
    assert found.sampled.num_decided == len(shapes)


# --- equal magnitudes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.25, 0.5, 0.999999, 1.0])
def test_of_equal_magnitudes_the_first_are_kept_exactly_k(density: float, dtype: torch.dtype, tmp_path: Path) -> None:
    n = 700_001
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(n // 3 + 1)[:n].to(dtype)
    family = write(tmp_path / "family", [torch.zeros(n, dtype=dtype), signs])

    asked = {"parameters": {"weight": 1.0, "density": density}, "stockflow": {"accept": ["unmerged"]}}
    found = merged(tmp_path, "ties", family, **asked)["w"].array

    k = 0 if density == 0 else n if density == 1 else max(1, int(density * n))
    assert np.array_equal(found[:k], signs[:k].double().numpy())
    assert not found[k:].any()
    assert runs.tensor_facts(tmp_path / "out")["w"]["facts"]["kept_share_1"] == k / n


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


@pytest.mark.parametrize("case", mostly_slow(CASES, ["ties", "breadcrumbs", "dare_ties", "della", "sce of some"]))
def test_memory_and_threads_change_no_byte(case: str, spanning: Spanning, tmp_path: Path) -> None:
    """BF16 task vectors have thousands of equal magnitudes at every threshold."""
    method, asked, _ = CASES[case]
    family = spanning(asked.get("num_tuned", 3), BF16)
    words = {key: value for key, value in asked.items() if key != "num_tuned"}
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, **words)

    digests = [
        runs.expected_digests([runs.merge_here(recipe, tmp_path / name, memory_bytes=memory * runs.MIB, **more)])[0]
        for name, memory, more in (
            ("one thread", 400, {"num_threads": 1}), ("three", 500, {"num_threads": 3}), ("much", 3000, {})
        )
    ]  # fmt: skip

    assert digests[0] == digests[1] == digests[2]


# --- what is drawn ----------------------------------------------------------------------------------------------


def chi_square(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return by how many standard deviations chi-square is above what is to be expected."""
    expected = np.array(shares) * sum(counts)
    freedom = len(counts) - 1
    return float((((np.array(counts) - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.93])
def test_elements_are_kept_as_often_as_is_asked_and_independently(density: float, tmp_path: Path) -> None:
    """Of two models and neighbouring elements: sixteen cases, each as often as the density says, in every stretch."""
    n = 400_000
    family = write(tmp_path / "family", [torch.zeros(n), torch.ones(n), torch.full((n,), 2.0)])
    asked = {"parameters": {"weight": 1.0, "density": density, "rescale": False}, "stockflow": {"seed": 3}}

    found = merged(tmp_path, "dare_linear", family, **asked)["w"].array.astype(int)

    shares = [(1 - density) ** (2 - case.bit_count()) * density ** case.bit_count() for case in range(4)]
    stretches = [np.bincount(part, minlength=4) for part in np.split(found, 100)]
    assert max(chi_square(counts, shares) for counts in stretches) < 8
    assert chi_square(sum(stretches), shares) < 4
    neighbours = np.bincount(4 * found[:-1] + found[1:], minlength=16)
    assert chi_square(neighbours, np.outer(shares, shares).ravel()) < 4


def test_where_models_lie_and_how_they_are_cut_decides_no_draw(tmp_path: Path) -> None:
    asked = {"parameters": {"weight": 1.0, "density": 0.4}}
    shapes: dict[str, Shape] = {"a": (50, 40), "b": (300_001,), "layers.0.experts": (3, 40, 70)}
    outputs = [
        merged(folder, "dare_ties", make_family(folder / "family", 3, shapes, num_shards=num_shards), **asked)
        for folder, num_shards in ((tmp_path / "here", 1), (tmp_path / "elsewhere", 3))
    ]

    for name in shapes:
        assert np.array_equal(outputs[0][name].array, outputs[1][name].array)


def test_another_seed_is_another_plan_and_another_merge(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 2, {"w": (30, 40)})
    asked = {"parameters": {"weight": 1.0, "density": 0.5}}
    found = [
        merged(tmp_path / str(seed), "dare_linear", family, stockflow={"seed": seed}, **asked)["w"].array
        for seed in (0, 1)
    ]

    plans = [next((tmp_path / str(seed) / "out" / "_stockflow").glob("*/plan.json")).parent.name for seed in (0, 1)]
    assert not np.array_equal(found[0], found[1])
    assert plans[0] != plans[1]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "ties", "ram"])
def test_a_model_that_did_not_move_and_one_element_are_merged(method: str, tmp_path: Path) -> None:
    """Norms of zero are not divided by; a tensor of one element is kept or not."""
    family = write(tmp_path / "family", [torch.ones(1), torch.ones(1), torch.full((1,), 3.0)])
    asked = {} if method == "ram" else {"parameters": {"weight": 1.0, "density": 0.5, "rescale": True}}

    found = merged(tmp_path, method, family, **asked)["w"].array

    assert found.tolist() in ([1.0], [3.0])
    assert method != "breadcrumbs" or found.tolist() == [1.0], "int(0.5 * 1) elements are kept"
    assert method not in ("ties", "ram") or found.tolist() == [3.0], "at least one is kept"


def test_of_equal_magnitudes_the_first_count_as_outliers(tmp_path: Path) -> None:
    family = write(tmp_path / "family", [torch.zeros(300_000), torch.ones(300_000)])
    asked = {"parameters": {"weight": 1.0, "density": 0.5, "gamma": 0.1}}

    found = merged(tmp_path, "breadcrumbs", family, **asked)["w"].array

    assert np.array_equal(found, [0.0] * 30_000 + [1.0] * 150_000 + [0.0] * 120_000)


def test_weights_that_sum_to_zero_are_not_divided_by(tmp_path: Path) -> None:
    family = write(tmp_path / "family", [torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])])
    asked = {"per_model": {"weight": [0.5, -0.5]}, "parameters": {"normalize": True}}

    linear = merged(tmp_path / "linear", "dare_linear", family, **asked)["w"].array
    elected = merged(tmp_path / "elected", "dare_ties", family, **asked)["w"].array

    assert linear.tolist() == [-1.0, 0.5]
    assert elected.tolist() == [3.0, 2.0], "-1.5 of a weight of -0.5 has the elected sign in one, 1 of 0.5 in the other"


# --- what is declared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "num_passes"),
    [
        ("ram", {}, 0),
        ("nearswap", {}, 0),
        ("dare_linear", {"rescale": False}, 0),
        ("dare_linear", {"rescale": "expected"}, 0),
        ("dare_ties", {"rescale": True}, 1),
        ("ramplus_tl", {}, 1),
        ("ties", {"rescale": False}, 3),
        ("della", {"rescale": False}, 0),
        ("sce", {"select_topk": 1.0}, 1),
        ("sce", {"select_topk": 0.5}, 4),
        ("breadcrumbs", {"rescale": "l1"}, 4),
    ],
)
def test_only_what_needs_to_know_the_elements_goes_over_them_first(
    method: str, given: dict[str, Any], num_passes: int
) -> None:
    assert METHODS[method].rule.num_statistic_passes(32, Parameters(given)) == num_passes


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("dare_ties", "{weight: 1, density: 1.1}", "recipe:5:25: parameters.density: expected at most 1, found 1.1"),
        ("breadcrumbs", "{weight: 1, gamma: -0.1}", "parameters.gamma: expected at least 0, found -0.1"),
        ("ties", "{weight: 1, rescale: expected}", "expected true or false or l1, found 'expected'"),
        ("dare_linear", "{weight: 1, rescale: l2}", "expected true or false or l1 or expected, found 'l2'"),
        ("dare_linear", "{density: 0.5}", "`dare_linear` needs the parameter `weight`"),
        (
            "della",
            "{weight: 1, density: 0.1}",
            "parameters.density: the `density` 0.1 with `epsilon` 0.15: expected",
        ),
        ("della_linear", "{weight: 1, density: 0.9, epsilon: 0.1}", "between 0 and 1, found 0.8 and 1; lower epsilon"),
        ("sce", "{select_topk: 1.5}", "parameters.select_topk: expected at most 1, found 1.5"),
        ("nearswap", "{}", "`nearswap` needs the parameter `t`"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(method: str, parameters: str, said: str) -> None:
    recipe = f"merge_method: {method}\nbase_model: /base\nmodels:\n  - model: /one\nparameters: {parameters}\n"

    with pytest.raises(RecipeError, match=re.escape(said)):
        parse_recipe(recipe, "recipe")
