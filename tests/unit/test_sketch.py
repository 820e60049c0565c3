"""Sketches of matrices against their singular values in float64."""

import numpy as np
import pytest

from stockflow.adapters import sketch
from stockflow.kernels.arrays import Floats

WORST = 1.02
"""Error in Frobenius norm, of the least possible one."""
ROWS, COLUMNS = 500, 400


def spectra(rank: int) -> dict[str, Floats]:
    places = np.arange(1, COLUMNS + 1)
    return {
        "flat": np.linspace(1.5, 0.5, COLUMNS),
        "slow": places**-0.5,
        "fast": 1.0 / places,
        "step": np.where(places <= rank, 3.0, 1.0),
        "small step": np.where(places <= rank, (COLUMNS / rank) ** 0.25, 1.0),
        "steep": 0.8**places,
    }


def sketched(matrix: Floats, rank: int, name: str = "w") -> sketch.Approximation:
    signs = sketch.signs(name, matrix.shape[1], sketch.num_columns(rank, matrix.shape))
    images = matrix @ signs
    products = matrix.T @ images
    basis = sketch.basis(products)
    more = matrix @ basis
    both = np.concatenate([images / np.linalg.norm(images), more / np.linalg.norm(more)], axis=1)
    return sketch.approximation(both, matrix.T @ both, float(np.sum(matrix**2)), rank)


@pytest.mark.parametrize("rank", [1, 8, 48])
def test_two_passes_come_near_the_least_error_whatever_the_spectrum(rank: int) -> None:
    random = np.random.default_rng(3)
    left = np.linalg.qr(random.standard_normal((ROWS, COLUMNS)))[0]
    right = np.linalg.qr(random.standard_normal((COLUMNS, COLUMNS)))[0]
    for name, values in spectra(rank).items():
        matrix = (left * values) @ right

        found = sketched(matrix, rank)

        factors = found.factors(rank)
        error = np.linalg.norm(matrix - factors.left_RL @ factors.right_LC)
        assert error <= WORST * np.linalg.norm(values[rank:]), name
        assert found.kept(rank) == pytest.approx(1.0 - error**2 / np.sum(values**2), abs=1e-9), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 90), (90, 3), (12, 12)])
def test_matrices_smaller_than_a_sketch_are_kept_whole(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(4).standard_normal(shape)

    found = sketched(matrix, 16)

    factors = found.factors(found.num_needed(None, 16))
    np.testing.assert_allclose(factors.left_RL @ factors.right_LC, matrix, atol=1e-9)
    assert found.kept(min(shape)) == pytest.approx(1.0)


def test_the_least_rank_that_keeps_the_energy_is_taken() -> None:
    values = np.array([4.0, 2.0, 1.0, 0.5])
    matrix = np.diag(values)

    found = sketched(matrix, 4)

    kept = np.cumsum(values**2) / np.sum(values**2)
    assert [found.num_needed(share, 4) for share in (*(kept - 1e-6), *(kept[:3] + 1e-6))] == [1, 2, 3, 4, 2, 3, 4]
    assert found.num_needed(0.999, 2) == 2


def test_a_name_has_its_own_signs_and_always_the_same() -> None:
    first, again, other = (sketch.signs(name, 33, 5) for name in ("a", "a", "b"))

    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert set(np.unique(first)) == {-1.0, 1.0}
    assert first[:3].tolist() == [[1, -1, 1, 1, -1], [1, -1, 1, 1, -1], [1, 1, -1, -1, 1]]
