"""Every reading of Model Stock's ratio, against its definition written out for single numbers."""

import math

import numpy as np
import pytest

from stockflow.methods.gram import Gram
from stockflow.methods.ratios import RATIOS, Geometry, cosine_matrix, packed, pairs, unpacked


def gram_of(deltas_GNE: np.ndarray, base_norm: float = 1.0) -> Gram:
    """The Gram of given task vectors, in whatever base."""
    num_groups, num_tuned, _ = deltas_GNE.shape
    products = np.zeros((num_groups, num_tuned + 1, num_tuned + 1))
    products[:, 0, 0] = base_norm**2
    products[:, 1:, 1:] = deltas_GNE @ deltas_GNE.transpose(0, 2, 1)
    return Gram(products)


def drawn(num_groups: int, num_tuned: int, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng([num_groups, num_tuned])
    common = random.standard_normal((num_groups, 1, 50))
    return scale * (common + random.standard_normal((num_groups, num_tuned, 50)))


def cosine(left: np.ndarray, right: np.ndarray, floor: float = 0.0) -> float:
    norms = math.sqrt(float(left @ left)) * math.sqrt(float(right @ right))
    return min(1.0, max(-1.0, float(left @ right) / max(norms, floor)))


def expected_ratio(name: str, deltas: np.ndarray) -> float:
    num_tuned = len(deltas)
    couples = [(i, j) for i in range(num_tuned) for j in range(i + 1, num_tuned)]
    floor = 1e-6 if name == "floored" else 0.0
    cosines = {couple: cosine(deltas[couple[0]], deltas[couple[1]], floor) for couple in couples}
    if name == "adjacent":
        c = sum(cosines[i, i + 1] for i in range(num_tuned - 1)) / (num_tuned - 1)
    elif name == "mean_angle":
        c = math.cos(sum(math.acos(value) for value in cosines.values()) / len(couples))
    else:
        c = sum(cosines.values()) / len(couples)
    if name == "two_model":
        return 2 * c / (1 + c)
    t = num_tuned * c / (1 + (num_tuned - 1) * c)
    return max(t, 0.0) if name == "exact" else t


@pytest.mark.parametrize("num_tuned", [2, 3, 5])
@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_ratios_are_what_their_tools_define(name: str, num_tuned: int, scale: float) -> None:
    deltas = drawn(4, num_tuned, scale)

    found = Geometry(gram_of(deltas)).ratio(name)

    assert found == pytest.approx([expected_ratio(name, group) for group in deltas], rel=1e-9)


def test_with_two_models_that_agree_all_readings_are_one() -> None:
    geometry = Geometry(gram_of(drawn(6, 2)))

    ratios = np.array([geometry.ratio(name) for name in RATIOS])

    assert (geometry.mean_cosine_G > 0).all()
    assert ratios == pytest.approx(np.broadcast_to(ratios[:1], ratios.shape), rel=1e-12)


def test_with_more_models_the_readings_differ() -> None:
    geometry = Geometry(gram_of(drawn(1, 4)))

    exact, two_model, mean_angle, adjacent = (
        float(geometry.ratio(name)[0]) for name in ("exact", "two_model", "mean_angle", "adjacent")
    )

    assert two_model < exact - 0.05
    assert len({round(value, 6) for value in (exact, mean_angle, adjacent)}) == 3


def test_the_floor_of_mergekit_shows_with_small_norms_only() -> None:
    large, small = (Geometry(gram_of(drawn(1, 3, scale))) for scale in (1.0, 1e-5))

    assert large.ratio("floored") == pytest.approx(large.ratio("exact"))
    assert small.ratio("floored")[0] < 0.1 < small.ratio("exact")[0]


def test_opposing_task_vectors_are_kept_at_the_base_or_extrapolated() -> None:
    deltas = np.array([[[1.0, 0.0], [-0.5, 1.0]]])
    geometry = Geometry(gram_of(deltas))

    assert geometry.ratio("exact")[0] == 0.0
    assert geometry.ratio("extrapolated")[0] == pytest.approx(expected_ratio("extrapolated", deltas[0]))
    assert geometry.ratio("extrapolated")[0] < -1.0
    assert [name for name, flags in geometry.flags().items() if flags[0]] == ["would_clamp"]


def test_flags_tell_unchanged_models_and_task_vectors_that_cancel() -> None:
    deltas = np.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [-1.0, -2.0]]])

    flags = Geometry(gram_of(deltas)).flags()

    assert {name: found.tolist() for name, found in flags.items()} == {
        "zero_delta": [True, True, False],
        "unchanged": [False, True, False],
        "would_clamp": [False, False, True],
        "degenerate": [False, False, True],
    }


def test_a_single_model_has_norms_and_no_ratio() -> None:
    geometry = Geometry(gram_of(drawn(2, 1)))

    assert geometry.cosines_GP.shape == (2, 0)
    assert np.isnan([geometry.mean_cosine_G, *(geometry.ratio(name) for name in RATIOS)]).all()
    assert set(geometry.flags()) == {"zero_delta", "unchanged"}


def test_a_packed_gram_comes_back_whole() -> None:
    gram = gram_of(drawn(3, 4), base_norm=7.0)

    assert np.array_equal(unpacked(packed(gram), 4).products_GMM, gram.products_GMM)
    assert packed(gram).shape == (3, 1 + 10)


def test_a_matrix_of_cosines_has_each_pair_in_its_place() -> None:
    assert pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert cosine_matrix([0.1, 0.2, 0.3], 3) == [[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]]
