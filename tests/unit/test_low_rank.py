"""Kernels of products of low rank: the promised order of additions, whatever the run, and products in float64."""

from typing import Any

import numpy as np
import pytest

from stockflow.kernels.low_rank import add_product, scale_rows

SIZES = [(1, 33, 5), (3, 32, 4), (5, 7, 9), (7, 100, 13), (64, 300, 8), (2, 1, 3)]


def in_order(left: Any, right: Any, scale: Any, values: Any) -> Any:
    sums = np.zeros((len(left), right.shape[1]), left.dtype)
    for k in range(len(right)):
        sums = sums + left[:, k : k + 1] * right[k]
    return values + (scale * sums).reshape(-1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rank", "columns", "rows"), SIZES)
def test_sums_are_taken_in_the_order_of_the_rank_wherever_a_run_begins(
    rank: int, columns: int, rows: int, dtype: str
) -> None:
    random = np.random.default_rng(rank)
    left, right = (random.standard_normal(shape).astype(dtype) for shape in ((rows, rank), (rank, columns)))
    values, scale = random.standard_normal(rows * columns).astype(dtype), np.dtype(dtype).type(0.37)
    expected = in_order(left, right, scale, values)

    for step in (1, 3, columns, columns + columns // 2, 2 * columns + 1, rows * columns):
        found = values.copy()
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            touched = left[start // columns : -(-stop // columns)]
            add_product(touched, right, scale, start % columns, found[start:stop])
        assert np.array_equal(found, expected), step


def test_rows_get_their_lengths_and_none_has_a_row_of_zeros() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 33)).astype(np.float32)
    rows[3] = 0
    found, lengths = rows.copy().reshape(-1), np.arange(5, dtype=np.float32)

    scale_rows(lengths, np.uint64(33), found)

    norms = np.linalg.norm(found.reshape(5, 33).astype(np.float64), axis=1)
    assert norms[[0, 1, 2, 4]] == pytest.approx([0.0, 1.0, 2.0, 4.0], rel=1e-6)
    assert np.isnan(norms[3])
