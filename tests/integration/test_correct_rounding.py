"""Every output is the exact result rounded once: whole merges against fractions, which never round."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle, runs
from tests.checkpoints import Shape, make_family, write_recipe
from tests.selection import diagonal

F16, F32, F64 = torch.float16, torch.float32, torch.float64
SHAPES: dict[str, Shape] = {"matrix": (40, 52), "vector": (1031,)}
WEIGHTS = [0.5153, 0.7121, -0.2333]
CANCELLING = [1.0, -0.610357221, -0.389642903]
"""With few digits, such as 0.61, so many sums are almost halfway that the 53rd bit of the weights decides some."""
DENSITIES = [0.3, 1.0, 0.7]

Exact = list[Fraction]


@dataclass(frozen=True)
class Case:
    """One merge, in the words of the recipe."""

    method: str
    asked: dict[str, Any] = field(default_factory=dict)
    num_tuned: int = 3
    delta_scale: float = 1e-3


CASES = {
    "model_stock": Case("model_stock"),
    "model_stock, far apart": Case("model_stock", delta_scale=0.02),
    "model_stock by row": Case("model_stock", {"stockflow": {"scope": "row"}}),
    "linear": Case("linear", {"per_model": {"weight": WEIGHTS}, "with_base": False}),
    "linear, cancelling": Case(
        "linear", {"per_model": {"weight": CANCELLING}, "parameters": {"normalize": False}, "with_base": False}
    ),
    "task_arithmetic": Case("task_arithmetic", {"per_model": {"weight": WEIGHTS}, "parameters": {"lambda": 0.8117}}),
    "slerp": Case("slerp", {"parameters": {"t": 0.3119}}, num_tuned=1, delta_scale=0.03),
    "ties": Case("ties", {"per_model": {"weight": WEIGHTS, "density": DENSITIES}, "parameters": {"lambda": 0.8117}}),
}


DTYPES = {"F32": (F32, "F32"), "F64": (F64, "F64"), "F32 to F16": (F32, "F16")}
"""What is read and what is written."""


@pytest.mark.parametrize(("case", "dtypes"), diagonal(CASES, DTYPES))
def test_every_element_is_the_exact_result_rounded_once(
    case: Case, dtypes: tuple[torch.dtype, str], tmp_path: Path
) -> None:
    """Of linear methods with the coefficients on record; those of Model Stock are held against the oracle's below."""
    dtype, out = dtypes
    family = make_family(tmp_path / "family", case.num_tuned, SHAPES, dtype, delta_scale=case.delta_scale)
    out_dtype = {"out_dtype": "float16"} if out == "F16" else {}
    recipe = write_recipe(tmp_path / "recipe.yaml", case.method, family, **case.asked, **out_dtype)

    runs.merge_here(recipe, tmp_path / "out")

    found = oracle.load_checkpoint(tmp_path / "out")
    rows = runs.tensor_facts(tmp_path / "out")
    for name in SHAPES:
        folders = family.tuned if case.method == "linear" else (family.base, *family.tuned)
        sources = [oracle.load_checkpoint(folder)[name].array.ravel() for folder in folders]
        exact = exact_ties(sources) if case.method == "ties" else exact_sum(sources, runs.coefficients(rows[name]))
        got = oracle.round_to(out, found[name].array.ravel())
        assert found[name].dtype == out
        assert np.count_nonzero(got != nearest(out, exact)) == 0


def exact_sum(sources: Sequence[oracle.Array], groups: Sequence[Sequence[float]]) -> Exact:
    """``w_0 + sum_i c_i (w_i - w_0)`` where there is a coefficient less than sources, else ``sum_i c_i w_i``."""
    elems = len(sources[0]) // len(groups)
    results = []
    for e, values in enumerate(zip(*(map(Fraction, source.tolist()) for source in sources), strict=True)):
        weights = list(map(Fraction, groups[e // elems]))
        if len(weights) < len(values):
            weights = [1 - sum(weights), *weights]
        results.append(sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0)))
    return results


def exact_ties(sources: Sequence[oracle.Array]) -> Exact:
    base, *tuned = sources
    ranked = [np.sort(np.abs(model - base)) for model in tuned]
    ranks = [max(1, int(density * len(base))) for density in DENSITIES]
    least = [Fraction(magnitudes[-rank]) for magnitudes, rank in zip(ranked, ranks, strict=True)]
    weights, scale = list(map(Fraction, WEIGHTS)), Fraction(0.8117)
    results = []
    for anchor, *values in zip(*(map(Fraction, source.tolist()) for source in sources), strict=True):
        weighted = [
            weight * (value - anchor) if abs(value - anchor) >= threshold else Fraction(0)
            for weight, value, threshold in zip(weights, values, least, strict=True)
        ]
        sign = 1 if sum(weighted) >= 0 else -1
        agreeing = [n for n, each in enumerate(weighted) if sign * each > 0]
        divisor = sum(weights[n] for n in agreeing) or 1
        results.append(anchor + scale * sum((weighted[n] for n in agreeing), Fraction(0)) / divisor)
    return results


def nearest(dtype: str, exact: Exact) -> oracle.Array:
    """Return bit patterns; Python divides integers to the nearest float64, ties to even."""
    return oracle.round_to(dtype, [float(each) for each in exact])


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("delta_scale", [1e-6, 1e-3, 0.02])
def test_ratios_of_float32_models_are_those_of_float64(delta_scale: float, scope: str, tmp_path: Path) -> None:
    """An error of 2e-9, as of task vectors in float32, turned one rounding in twenty where they are large."""
    family = make_family(tmp_path / "family", 3, {"w": (40, 52)}, F32, delta_scale=delta_scale, cosine=0.4)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, stockflow={"scope": scope})

    runs.merge_here(recipe, tmp_path / "out")

    expected = oracle.merge_folder("model_stock", family.base, family.tuned, scope=scope)["w"]
    row = runs.tensor_facts(tmp_path / "out")["w"]
    assert np.abs(np.array(runs.coefficients(row)) - expected.facts["coefficients"]).max() <= 1e-14
    assert np.array_equal(oracle.round_to("F32", oracle.load_checkpoint(tmp_path / "out")["w"].array), expected.bits)


def test_a_float64_sum_of_numbers_near_the_end_of_the_range_is_finite(tmp_path: Path) -> None:
    """The halves that exact products are made of overflow there; results are then those of plain float64."""
    family = make_family(tmp_path / "family", 2, {"w": (1000,)}, F64, base_scale=1e305, delta_scale=1e303)
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", family, per_model={"weight": [0.4, 0.6]}, with_base=False)

    runs.merge_here(recipe, tmp_path / "out")

    one, two = (oracle.load_checkpoint(folder)["w"].array for folder in family.tuned)
    assert np.allclose(oracle.load_checkpoint(tmp_path / "out")["w"].array, one + 0.6 * (two - one), rtol=1e-15)
