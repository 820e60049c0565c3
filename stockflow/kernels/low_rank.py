"""Products of low rank added to rows, in an order of additions that depends on neither chunks nor threads.

Shape suffixes: E elements of a run, R rows, K the rank, C columns, L lanes.
"""

import numpy as np

from stockflow.kernels.arrays import Values
from stockflow.kernels.floats import Index
from stockflow.kernels.jit import jit

_LANES, _ROWS = 64, 4
"""Columns and rows whose sums stay in registers: 2.6 ns per element at rank 64, and 5.7 row by row."""

_LEFT, _RIGHT, _PARTS = 4, 2, 8
"""Rows of either factor, and partial sums of each product, that stay in registers."""
FILLED = 8
"""What the sizes of factors are multiples of whose products are taken."""


@jit
def add_product(left_RK: Values, right_KC: Values, scale: float, column: int, out_E: Values) -> None:
    """Add ``scale`` times the product to a run of elements: each sum in the order of k, then scaled, then added.

    Args:
        left_RK: the rows that the run touches.
        right_KC: all columns.
        scale: in the precision of the run.
        column: in which the run begins, in its first row.
        out_E: the run.
    """
    num_columns, num_elems = right_KC.shape[1], len(out_E)
    first = min((num_columns - column) % num_columns, num_elems)
    whole = (num_elems - first) // num_columns
    if first:
        _add_row(left_RK[0], right_KC, scale, column, out_E[:first])
    row = 1 if first else 0
    _add_rows(left_RK[row:], right_KC, scale, whole, out_E[first:])
    done = first + whole * num_columns
    if done < num_elems:
        _add_row(left_RK[row + whole], right_KC, scale, 0, out_E[done:])


@jit
def _add_rows(left_RK: Values, right_KC: Values, scale: float, num_rows: int, out_E: Values) -> None:
    rank, num_columns = right_KC.shape
    fast_rows, fast_columns = num_rows // _ROWS * _ROWS, num_columns // _LANES * _LANES
    sums_RL, panel_KL = np.empty((_ROWS, _LANES), out_E.dtype), np.empty((rank, _LANES), out_E.dtype)
    for column in range(0, fast_columns, _LANES):
        panel_KL[:] = right_KC[:, column : column + _LANES]  # side by side: rows of a power of two share cache lines
        for row in range(0, fast_rows, _ROWS):
            sums_RL[:] = 0
            for k in range(rank):
                right_L = panel_KL[k]
                a, b, c, d = left_RK[row, k], left_RK[row + 1, k], left_RK[row + 2, k], left_RK[row + 3, k]
                for j in range(_LANES):
                    x = right_L[j]
                    sums_RL[0, j] += a * x
                    sums_RL[1, j] += b * x
                    sums_RL[2, j] += c * x
                    sums_RL[3, j] += d * x
            for i in range(_ROWS):
                start = (row + i) * num_columns + column
                for j in range(_LANES):
                    out_E[start + j] += scale * sums_RL[i, j]
    for row in range(num_rows):
        begin = fast_columns if row < fast_rows else 0
        if begin < num_columns:
            out_C = out_E[row * num_columns + begin : (row + 1) * num_columns]
            _add_row(left_RK[row], right_KC, scale, begin, out_C)


@jit
def _add_row(left_K: Values, right_KC: Values, scale: float, column: int, out_C: Values) -> None:
    """Add the product to a part of a row, which begins in a column."""
    sums_L = np.empty(_LANES, out_C.dtype)
    for start in range(0, len(out_C), _LANES):
        count = min(_LANES, len(out_C) - start)
        sums_L[:] = 0
        for k in range(len(left_K)):
            a, right_L = left_K[k], right_KC[k, column + start : column + start + count]
            for j in range(count):
                sums_L[j] += a * right_L[j]
        for j in range(count):
            out_C[start + j] += scale * sums_L[j]


@jit
def scale_rows(lengths_R: Values, num_columns: Index, out_E: Values) -> None:
    """Scale whole rows to lengths of their own; a row of zeros becomes NaN, as it has no direction."""
    for row in range(len(lengths_R)):
        row_C = out_E[np.uint64(row) * num_columns : np.uint64(row + 1) * num_columns]
        squares = 0.0
        for value in row_C:
            squares += np.float64(value) * np.float64(value)
        factor = np.float64(lengths_R[row]) / np.sqrt(squares)
        for j in range(len(row_C)):
            row_C[j] *= factor


@jit
def cross_products(left_KC: Values, right_LC: Values, products_KL: Values) -> None:
    """Fill ``products_KL`` with the products of rows, in float64: column c belongs to partial sum ``c % 8``.

    The number of columns is a multiple of 8 and the numbers of rows are of 4 and 2: rows of zeros fill them up.
    """
    sums_L = np.empty((_LEFT, _RIGHT, _PARTS))
    for k in range(0, left_KC.shape[0], _LEFT):
        for m in range(0, right_LC.shape[0], _RIGHT):
            sums_L[:] = 0.0
            for column in range(0, left_KC.shape[1], _PARTS):
                for j in range(_PARTS):
                    x, y = right_LC[m, column + j], right_LC[m + 1, column + j]
                    a, b = left_KC[k, column + j], left_KC[k + 1, column + j]
                    c, d = left_KC[k + 2, column + j], left_KC[k + 3, column + j]
                    sums_L[0, 0, j] += a * x
                    sums_L[0, 1, j] += a * y
                    sums_L[1, 0, j] += b * x
                    sums_L[1, 1, j] += b * y
                    sums_L[2, 0, j] += c * x
                    sums_L[2, 1, j] += c * y
                    sums_L[3, 0, j] += d * x
                    sums_L[3, 1, j] += d * y
            for i in range(_LEFT):
                for n in range(_RIGHT):
                    total = 0.0
                    for j in range(_PARTS):
                        total += sums_L[i, n, j]
                    products_KL[k + i, m + n] = total


@jit
def sum_of_products(left_KL: Values, right_KL: Values) -> float:
    """Return the sum over all elements of the products of two matrices, in float64, row by row."""
    total = 0.0
    for k in range(left_KL.shape[0]):
        for m in range(left_KL.shape[1]):
            total += left_KL[k, m] * right_KL[k, m]
    return total
