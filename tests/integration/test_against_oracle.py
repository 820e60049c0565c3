"""Whole merges of real files against the float64 oracle: similarities, ratios, norms and every output element."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle, runs
from tests.checkpoints import ZOO, Family, Shape, make_family, write_recipe

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LARGE: dict[str, Shape] = {"large.matrix": (300, 1000), "large.vector": (270_001,), "large.experts": (2, 1, 140_000)}
"""Tensors, rows of experts and vectors of several spans each."""

FLOAT32_EPSILON = 2.0**-24
"""Largest relative error of one rounding to float32."""


@dataclass(frozen=True)
class Drawn:
    """What a family of checkpoints looks like; families are made once and shared."""

    num_tuned: int
    dtype: torch.dtype = BF16
    base_dtype: torch.dtype | None = None
    num_shards: int = 1
    large: bool = False
    delta_scale: float = 1e-3
    base_scale: float = 0.02
    cosine: float = 0.5
    heavy_tailed: bool = False


@dataclass(frozen=True)
class Case:
    """One merge, in the words of the recipe and in those of the oracle."""

    name: str
    method: str
    drawn: Drawn
    asked: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of ``write_recipe``"""
    expected: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the oracle's method"""
    out_dtype: str | None = None
    with_base: bool = True
    """whether the base is ``base_model``"""
    base_listed: bool = False
    """whether the base is also the first of ``models``"""
    max_cosine_error: float = 1e-7
    min_share: float = 0.9999
    """of outputs that are the correctly rounded ones; of F64 see ``test_correct_rounding``"""
    may_cancel: bool = False
    """whether terms cancel to far below their size, so that a rounding of a term is many units of the sum"""


def stock(name: str, drawn: Drawn, scope: str = "tensor", **more: Any) -> Case:
    asked = {"stockflow": {"scope": scope}}
    return Case(f"model_stock {name}", "model_stock", drawn, asked, {"scope": scope}, **more)


def weighted(method: str, name: str, drawn: Drawn, weights: tuple[float, ...], **more: Any) -> Case:
    shared = more.pop("shared", {})
    words = {"lambda": "lam"}
    asked = {"per_model": {"weight": list(weights)}, **({"parameters": shared} if shared else {})}
    expected = {"weights": list(weights), **{words.get(key, key): value for key, value in shared.items()}}
    return Case(f"{method} {name}", method, drawn, asked, expected, **more)


def slerp(name: str, drawn: Drawn, t: float, **more: Any) -> Case:
    return Case(f"slerp {name}", "slerp", drawn, {"parameters": {"t": t}}, {"t": t}, **more)


def vectors(method: str, name: str, drawn: Drawn, scope: str = "tensor", **more: Any) -> Case:
    """Of a method that sees a Gram of task vectors or of models; weights with many digits, if it takes any.

    Of half a million sums one or two nearly cancel.
    """
    more = {"may_cancel": True} | more
    shared, with_base = more.pop("shared", {}), more.setdefault("with_base", method != "karcher")
    weights = [] if method == "karcher" else [0.5153, 0.7121, 0.2333, 0.9137, 0.4391, 0.6217, 0.8011, 0.3571, 0.1931]
    weights = more.pop("weights", weights)[: drawn.num_tuned]
    asked = {"stockflow": {"scope": scope}} | ({"per_model": {"weight": weights}} if weights else {})
    asked |= {"parameters": shared} if shared else {}
    expected = {"scope": scope, **shared} | ({"weights": weights} if weights else {})
    if method in ("nuslerp", "multislerp"):
        expected["from_base"] = with_base
    return Case(f"{method} {name}", method, drawn, asked, expected, **more)


OPPOSED = Drawn(5, cosine=-0.15)
THREE = Drawn(3, num_shards=2)
FOUR = Drawn(4, num_shards=3)
TURNED = Drawn(1, delta_scale=0.03)
TAILED = Drawn(3, large=True, base_scale=0.0, heavy_tailed=True)
TWO, APART = Drawn(2, num_shards=2), Drawn(2, num_shards=2, delta_scale=0.02)
SHORT = {number: ("tensor", "row", "leading")[number % 3] for number in range(10)}
HEAVY = {"max_cosine_error": 1e-6}

# Weights with many digits, but for one case: with few, such as 0.7 and 0.3, a sum of BF16 numbers is so often
# halfway between two others (1 in 500) or zero that the 53rd bit of the weights decides what is correct.
CASES = [
    stock("N=2 in one file", Drawn(2)),
    *(stock(f"N=3 by {scope}", THREE, scope) for scope in ("tensor", "row", "leading")),
    *(stock(f"N=4 by {scope}", FOUR, scope) for scope in ("row", "leading")),
    stock("N=5 opposed, clamped", OPPOSED),
    Case(
        "model_stock N=5 opposed, extrapolated", "model_stock", OPPOSED,
        {"stockflow": {"on_negative": "extrapolate"}}, {"on_negative": "extrapolate"},
    ),
    stock("N=6 in F16", Drawn(6, F16, num_shards=2)),
    stock("N=3 in F32, heavy-tailed, by row", Drawn(3, F32, heavy_tailed=True), "row", **HEAVY),
    stock("N=2 in F64", Drawn(2, F64)),
    stock("N=2 in F64 to BF16", Drawn(2, F64), out_dtype="bfloat16"),
    stock("N=2 in F64 to F16", Drawn(2, F64), "row", out_dtype="float16"),
    stock("N=3 of BF16 on an F32 base", Drawn(3, base_dtype=F32, num_shards=2)),
    stock("N=3 of BF16 on an F32 base to BF16", Drawn(3, base_dtype=F32, num_shards=2), out_dtype="bfloat16"),
    stock("N=2 of F64 on a BF16 base", Drawn(2, F64, base_dtype=BF16)),
    stock("N=4, large, nearly orthogonal, heavy-tailed", Drawn(4, large=True, cosine=0.02, heavy_tailed=True), **HEAVY),
    stock("N=3, large, by leading index", Drawn(3, large=True), "leading"),
    stock("N=3, large, zero base, norms of 1e-10", Drawn(3, large=True, base_scale=0.0, delta_scale=1e-13)),
    stock("N=3, large, zero base, norms of 1e10", Drawn(3, large=True, base_scale=0.0, delta_scale=1e7), "row"),
    stock("N=3, large, zero base, norms of 1e-30, heavy-tailed", replace(TAILED, delta_scale=1e-33), **HEAVY),
    stock("N=3, large, zero base, norms of 1e30, heavy-tailed", replace(TAILED, delta_scale=1e27), **HEAVY),
    weighted("linear", "normalized", FOUR, (0.1371, 0.2113, 0.3097, 0.4391), with_base=False),
    weighted("linear", "not normalized", FOUR, (0.7121, -0.2333, 0.3517, 0.4019), with_base=False,
             shared={"normalize": False}),
    weighted("linear", "with weights of one digit", FOUR, (0.7, -0.2, 0.3, 0.4), with_base=False,
             shared={"normalize": False}, min_share=0.99, may_cancel=True),
    weighted("linear", "with the base listed", FOUR, (0.5153, 0.2113, 0.3097, 0.4391, 1.0), base_listed=True),
    weighted("linear", "with a base that is not listed", THREE, (0.5153, 0.2113, 0.3097)),
    weighted("linear", "of F64", Drawn(2, F64), (0.3, 0.7)),
    weighted("task_arithmetic", "with lambda", THREE, (0.5153, 0.7121, -0.2333), shared={"lambda": 0.8117}),
    weighted("task_arithmetic", "normalized", THREE, (0.5153, 0.7121, -0.2333), shared={"normalize": True}),
    weighted("task_arithmetic", "of one model to F32", TURNED, (1.2719,), out_dtype="float32"),
    slerp("of parallel models: a straight line", Drawn(1), 0.3119),
    slerp("inwards", TURNED, 0.3119),
    slerp("outwards", TURNED, 1.2119),
    slerp("of F64", Drawn(1, F64, delta_scale=0.03), 0.3119),
    *(
        vectors("nuslerp", f"{what} by {scope}", drawn, scope, with_base=with_base)
        for scope in ("tensor", "row", "leading")
        for what, drawn, with_base in (
            ("of task vectors", TWO, True), ("of models far apart", APART, False), ("of models nearby", TWO, False),
        )
    ),
    vectors("nuslerp", "outwards", TWO, weights=[-0.3119, 1.3531]),
    vectors("nuslerp", "of task vectors of 1e-12", replace(TWO, base_scale=0.0, delta_scale=1e-14)),
    vectors("nuslerp", "of F32", replace(TWO, dtype=F32)),
    vectors("nuslerp", "of F64 models", replace(APART, dtype=F64), with_base=False),
    *(vectors("multislerp", f"N={num} of task vectors", Drawn(num), SHORT[num]) for num in range(2, 10)),
    vectors("multislerp", "of models far apart", replace(APART, num_tuned=3), with_base=False),
    vectors("multislerp", "with an eps that acts", THREE, shared={"eps": 1e-5}),
    vectors("multislerp", "not normalized", THREE, shared={"normalize_weights": False}),
    vectors("multislerp", "of one model", Drawn(1)),
    vectors("multislerp", "of F16", replace(FOUR, dtype=F16)),
    *(vectors("karcher", f"N={num} far apart", replace(APART, num_tuned=num), SHORT[num]) for num in range(1, 10)),
    vectors("karcher", "of models near each other", FOUR),
    vectors("karcher", "of F32 with 2 steps", replace(APART, num_tuned=3, dtype=F32), shared={"max_iter": 2}),
    *(vectors("geometric_median", f"N={num}", Drawn(num), SHORT[num]) for num in range(2, 10)),
    vectors("geometric_median", "without a base", FOUR, with_base=False),
    vectors("geometric_median", "with a model that outweighs the others", THREE, weights=[0.5153, 3.7121, 0.2333]),
    vectors("geometric_median", "of F32", replace(FOUR, dtype=F32, cosine=0.1)),
    Case("passthrough scaled", "passthrough", Drawn(1), {"per_model": {"scale": [0.7121]}}, {"weights": [0.7121]},
         with_base=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Drawn], Family]:
    @cache
    def make(drawn: Drawn) -> Family:
        return make_family(
            tmp_path_factory.mktemp("family"),
            drawn.num_tuned,
            LARGE if drawn.large else ZOO,
            drawn.dtype,
            base_dtype=drawn.base_dtype,
            num_shards=drawn.num_shards,
            delta_scale=drawn.delta_scale,
            base_scale=drawn.base_scale,
            cosine=drawn.cosine,
            heavy_tailed=drawn.heavy_tailed,
        )

    return make


REPEATED = {
    *(f"multislerp N={num} of task vectors" for num in (3, 4, 6, 7, 8)),
    *(f"karcher N={num} far apart" for num in (3, 4, 5, 6, 7, 8)),
    *(f"geometric_median N={num}" for num in (3, 4, 6, 7, 8)),
    *(f"nuslerp {what} by {scope}" for what, scope in (
        ("of task vectors", "row"), ("of task vectors", "leading"), ("of models far apart", "tensor"),
        ("of models far apart", "leading"), ("of models nearby", "tensor"), ("of models nearby", "row"),
    )),
    "model_stock N=4 by leading", "multislerp of F16", "karcher of models near each other", "slerp inwards",
    "geometric_median of F32", "linear with the base listed", "model_stock N=3 by tensor",
}  # fmt: skip
"""Rungs of ladders, and properties that others have, too."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in REPEATED else ()) for case in CASES],
)
def test_a_merge_is_what_the_oracle_says(case: Case, family_of: Callable[[Drawn], Family], tmp_path: Path) -> None:
    family = family_of(case.drawn)
    models = (family.base, *family.tuned) if case.base_listed else family.tuned
    merged = Family(family.base, models)
    out_dtype = {"out_dtype": case.out_dtype} if case.out_dtype else {}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", case.method, merged, with_base=case.with_base, **case.asked, **out_dtype
    )

    runs.merge_here(recipe, tmp_path / "out")

    expected = oracle.merge_folder(
        case.method,
        family.base if case.with_base else None,
        models,
        out_dtype={"bfloat16": "BF16", "float16": "F16", "float32": "F32", None: None}[case.out_dtype],
        **case.expected,
    )
    found = oracle.load_checkpoint(tmp_path / "out")
    facts = runs.tensor_facts(tmp_path / "out")
    inputs = [oracle.load_checkpoint(folder) for folder in dict.fromkeys((family.base, *family.tuned))]
    assert expected.keys() == found.keys() == facts.keys()
    tally = Tally()
    for name, want in expected.items():
        assert want.dtype == found[name].dtype
        if want.dtype in oracle.FORMATS:
            tally.count(name, want, found[name], [tensors[name].array for tensors in inputs])
            tally.compare_facts(want, facts[name])
        else:
            assert np.array_equal(want.out, found[name].array)
            assert facts[name]["flags"] == ["copied"]
    print(f"FIGURES {case.name}: {tally}")  # pytest -rP shows them
    assert tally.cosine_error <= case.max_cosine_error
    assert tally.ratio_error <= 5 * case.max_cosine_error  # |dt/dcos| is at most 4.4 in these cases (N=5, cos=-0.15)
    assert tally.norm_error <= case.max_cosine_error
    if "F64" not in tally.dtypes:
        assert tally.num_correct >= case.min_share * tally.num_elems
        assert case.may_cancel or tally.num_beyond_1_ulp == 0


@dataclass
class Tally:
    """How far a merge is from the oracle."""

    cosine_error: float = 0.0
    ratio_error: float = 0.0
    norm_error: float = 0.0
    num_elems: int = 0
    num_correct: int = 0
    """outputs that are the correctly rounded ones"""
    num_beyond_1_ulp: int = 0
    dtypes: set[str] = field(default_factory=set)

    def count(self, name: str, want: oracle.OracleResult, got: oracle.Stored, sources: list[oracle.Array]) -> None:
        """Count correct outputs; no output is further from the exact value than rounding explains.

        Half a unit in the last place of the output is the final rounding. The rest is working precision,
        relative to the terms of the sum: each of at most 7 terms is rounded in subtraction, coefficient,
        product and sum, and the ratio behind the coefficients may be off by 5e-7.
        """
        bits = oracle.round_to(want.dtype, got.array)
        distance = oracle.ulp_distance(want.dtype, bits, want.bits)
        self.num_elems += distance.size
        self.num_correct += int((distance == 0).sum())
        self.num_beyond_1_ulp += int((distance > 1).sum())
        self.dtypes.add(want.dtype)
        wide = want.dtype in ("F32", "F64") or any((source != source.astype(np.float32)).any() for source in sources)
        slack = 1e-12 if wide else 24 * FLOAT32_EPSILON + 5e-7 * (len(want.facts) > 0)
        terms = sum(np.abs(source) for source in sources)
        allowed = 0.5 * spacing(want.dtype, want.out) + slack * terms * _largest_coefficient(want)
        error = np.abs(got.array - want.out)
        assert (error <= allowed).all(), (
            f"{name}: {(error - allowed).max()} beyond, element {np.argmax(error - allowed)}"
        )

    def compare_facts(self, want: oracle.OracleResult, row: dict[str, Any]) -> None:
        """Hold cosines, ratio, norms and coefficients against the oracle's."""
        if not want.out.size:
            return
        if row["coefficients"] is not None and "coefficients" in want.facts and row["method"] == "model_stock":
            difference = np.abs(np.array(runs.coefficients(row)) - want.facts["coefficients"]).max()
            self.ratio_error = max(self.ratio_error, float(difference) * len(want.facts["coefficients"][0]))
        if "mean_cosine" in want.facts:
            for key, expected in (
                ("mean_cosine", want.facts["mean_cosine"].mean()),
                ("min_cosine", _pairs(want).min()),
                ("max_cosine", _pairs(want).max()),
            ):
                self.cosine_error = max(self.cosine_error, abs(row[key] - expected))
            self.ratio_error = max(self.ratio_error, abs(row["ratio"] - want.facts["ratio"].mean()))
            norms = [want.facts["base_norm"][:, None], want.facts["delta_norms"]]
            squares_M = (np.concatenate(norms, axis=1) ** 2).sum(axis=0)
            for expected, found in zip(np.sqrt(squares_M), (row["base_norm"], *row["delta_norms"]), strict=True):
                self.norm_error = max(self.norm_error, abs(found - expected) / (expected or 1.0))


def spacing(dtype: str, values: oracle.Array) -> oracle.Array:
    """Return the distance of neighbouring numbers of a format around ``values``."""
    exponent_bits, mantissa_bits, _ = oracle.FORMATS[dtype]
    _, exponent = np.frexp(values)
    smallest = 2 - (1 << (exponent_bits - 1))
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - mantissa_bits)


def _largest_coefficient(want: oracle.OracleResult) -> float:
    return max(1.0, float(np.abs(want.facts["coefficients"]).max())) if want.facts["coefficients"].size else 1.0


def _pairs(want: oracle.OracleResult) -> oracle.Array:
    cosines_GNN = want.facts["cosines"]
    left, right = np.triu_indices(cosines_GNN.shape[1], 1)
    return cosines_GNN[:, left, right]


def test_a_base_that_is_not_listed_is_averaged_in_by_the_weight_of_the_recipe(tmp_path: Path) -> None:
    """The usual tool appends the base to the models. The dtype is one that holds all three, and config.json says so."""
    family = make_family(tmp_path / "family", 2, ZOO, BF16, base_dtype=F16, config={"torch_dtype": "float16"})
    own = {"weight": [0.2113, 0.3097]}
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", family, per_model=own, parameters={"weight": 0.4391})

    runs.merge_here(recipe, tmp_path / "out")

    models = (*family.tuned, family.base)
    expected = oracle.merge_folder("linear", None, models, weights=[*own["weight"], 0.4391])
    found = oracle.load_checkpoint(tmp_path / "out")
    merged = [name for name, want in expected.items() if want.dtype in oracle.FORMATS]
    assert {found[name].dtype for name in merged} == {"F32"}
    wrong = sum(np.count_nonzero(oracle.round_to("F32", found[name].array) != expected[name].bits) for name in merged)
    assert wrong <= 1e-4 * sum(found[name].array.size for name in merged)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
