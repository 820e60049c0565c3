"""How an audit decides: the noise of rounding as derived, bits compared as counted, and labels from evidence."""

import math

import numpy as np
import pytest

from stockflow.insight.formulas import FORMULAS, TensorEvidence, decide, ratios_of
from stockflow.kernels.roundings import count_roundings, fraction_bits, squared_steps, sum_of_steps
from stockflow.methods.gram import Gram
from stockflow.methods.ratios import Geometry
from tests import oracle

EXACT, TWO_MODEL, AVERAGE, BASE = (FORMULAS.index(name) for name in ("exact", "two_model", "average", "base"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("delta_scale", [1e-3, 1e-2])
def test_the_noise_of_rounding_is_what_rounding_does(dtype: str, delta_scale: float) -> None:
    """``sum(step**2) / 12`` against the squared error of merges rounded here; F32 from float64 values."""
    random = np.random.default_rng(7)
    values = 0.02 * random.standard_normal(300_000) + delta_scale * random.standard_normal(300_000)
    bits = oracle.round_to(dtype, values)
    error = float(np.sum((oracle.widen(dtype, bits) - values) ** 2))

    steps = sum_of_steps(bits, fraction_bits(dtype), squared_steps(dtype, dtype))

    assert steps / 12.0 == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_roundings_between_results_are_those_of_the_oracle(dtype: str) -> None:
    random = np.random.default_rng(3)
    merged = oracle.round_to(dtype, random.standard_normal(2000) * 10.0 ** random.integers(-6, 3, 2000))
    steps = [random.integers(-3, 4, 2000), np.zeros(2000, np.int64)]
    candidates = np.stack([(merged.astype(np.uint64) + step.astype(np.uint64)).astype(merged.dtype) for step in steps])
    candidates[0, :5] = oracle.round_to(dtype, [-1e-3, 0.0, -0.0, 1e-3, 1.0])
    merged[:5] = candidates[1, :5] = oracle.round_to(dtype, [1e-3, -0.0, 0.0, -1e-3, -1.0])
    equal, roundings, most = np.zeros(2, np.int64), np.zeros(2), np.zeros(2)
    nearer = np.zeros((2, 2), np.int64)

    count_roundings(merged, candidates, equal, roundings, most, nearer)

    apart = [oracle.ulp_distance(dtype, merged, candidate) for candidate in candidates]
    assert equal.tolist() == [int(np.sum(each == 0)) for each in apart]
    assert roundings == pytest.approx([float(np.sum(each.astype(float))) for each in apart])
    assert most == pytest.approx([float(np.max(each)) for each in apart])
    assert nearer[0, 1] == np.sum(apart[0] < apart[1]) == 0
    assert nearer[1, 0] == np.sum(apart[1] < apart[0]) > 1000


def evidence(
    contenders: tuple[int, ...], *, equal: dict[int, int], nearer: dict[tuple[int, int], int], same: bool = False
) -> TensorEvidence:
    ratios = ratios_of(Geometry(Gram(np.array([[[1.0, 0, 0, 0], [0, 2, 1, 1], [0, 1, 2, 1], [0, 1, 1, 2]]]))))[:, 0]
    size = len(FORMULAS)
    wins = np.zeros((size, size), np.int64)
    for (row, column), count in nearer.items():
        wins[row, column] = count
    return TensorEvidence(
        num_elems=1000,
        num_tuned=3,
        is_contender=[k in contenders for k in range(size)],
        ratios=ratios.tolist(),
        is_same=np.ones((size, size), np.bool_) if same else np.eye(size, dtype=np.bool_),
        num_equal=[equal.get(k, 0) for k in range(size)],
        roundings=[1000.0 - equal.get(k, 0) for k in range(size)],
        nearer=wins,
    )


def test_nothing_near_is_none_and_one_near_is_that_one() -> None:
    assert decide(evidence((), equal={}, nearer={}), "BF16") == ("none", ())
    assert decide(evidence((AVERAGE,), equal={}, nearer={}), "BF16") == ("average", ("average",))


def test_elements_decide_between_contenders() -> None:
    clear = evidence((EXACT, TWO_MODEL), equal={EXACT: 1000, TWO_MODEL: 900}, nearer={(EXACT, TWO_MODEL): 100})
    few = evidence((EXACT, TWO_MODEL), equal={EXACT: 1000, TWO_MODEL: 980}, nearer={(EXACT, TWO_MODEL): 20})

    assert decide(clear, "BF16") == ("exact", ("exact",))
    assert decide(few, "BF16") == ("indistinguishable", ("exact", "two_model"))


def test_a_tool_that_rounds_more_than_once_is_allowed_an_error_of_its_own_ratio() -> None:
    """t = 0.75 against 0.6667 is beyond what BF16 can do to it; against 1 - 2**-8 of itself it would not be."""
    far = evidence((EXACT, TWO_MODEL), equal={EXACT: 600, TWO_MODEL: 400}, nearer={(EXACT, TWO_MODEL): 200})
    near = TensorEvidence(**{**vars(far), "ratios": [0.75, 0.7476, *far.ratios[2:]]})

    assert decide(far, "BF16") == ("exact", ("exact",))
    assert decide(near, "BF16") == ("indistinguishable", ("exact", "two_model"))
    assert decide(near, "F32") == ("exact", ("exact",))


def test_formulas_of_one_ratio_are_one_and_the_first_gives_the_name() -> None:
    found = evidence((EXACT, TWO_MODEL), equal={EXACT: 1000, TWO_MODEL: 1000}, nearer={}, same=True)

    assert decide(found, "F32") == ("exact", ("exact", "two_model"))


def test_readings_of_other_tools_are_asked_about_last() -> None:
    mean_angle = FORMULAS.index("mean_angle")
    better = {EXACT: 600, mean_angle: 1000}

    assert decide(evidence((EXACT, mean_angle), equal=better, nearer={}), "BF16")[0] == "exact"
    assert decide(evidence((mean_angle,), equal=better, nearer={}), "BF16")[0] == "mean_angle"


def test_steps_follow_the_output_where_it_has_another_dtype() -> None:
    values = np.array([1.0, 1.5, 3.0, 2.0**-20])
    bits = oracle.round_to("F32", values)

    bf16, f16 = (sum_of_steps(bits, fraction_bits("F32"), squared_steps("F32", out)) for out in ("BF16", "F16"))

    assert bf16 == pytest.approx(2 * 2.0**-14 + 2.0**-12 + 2.0**-54)
    assert f16 == pytest.approx(2 * 2.0**-20 + 2.0**-18 + 2.0**-48)  # the last is below F16's least exponent
    assert math.isfinite(squared_steps("F64", "F64")[1000])
