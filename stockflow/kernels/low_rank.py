"""Products of low rank added to rows, in an order of additions that depends on neither chunks nor threads.

Shape suffixes: E elements of a run, R rows, K the rank, C columns, L lanes.
"""

import numpy as np

from stockflow.kernels.arrays import Values
from stockflow.kernels.floats import Index
from stockflow.kernels.jit import jit

_LANES, _BLOCK = 64, 4
"""Columns whose sums stay in the first-level cache, and rows and ranks that are taken at once: 1.7 ns per element at
rank 64, and 2.8 rank by rank."""


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
    (num_rows, rank), num_columns = left_RK.shape, right_KC.shape[1]
    filled_RK = np.zeros((-(-num_rows // _BLOCK) * _BLOCK, -(-rank // _BLOCK) * _BLOCK), out_E.dtype)
    for row in range(num_rows):
        for k in range(rank):
            filled_RK[row, k] = left_RK[row, k]
    # Columns side by side: rows of a power of two would share cache lines. Zeros beyond the rank change no sum.
    panel_KL, sums_RL = np.zeros((filled_RK.shape[1], _LANES), out_E.dtype), np.empty((_BLOCK, _LANES), out_E.dtype)
    for start in range(0, num_columns, _LANES):
        count = min(_LANES, num_columns - start)
        for k in range(rank):
            for j in range(count):
                panel_KL[k, j] = right_KC[k, start + j]
        for row in range(0, num_rows, _BLOCK):
            sums_RL[:] = 0
            a_K, b_K, c_K, d_K = filled_RK[row], filled_RK[row + 1], filled_RK[row + 2], filled_RK[row + 3]
            a_L, b_L, c_L, d_L = sums_RL[0], sums_RL[1], sums_RL[2], sums_RL[3]
            for k in range(0, len(panel_KL), _BLOCK):
                a0, a1, a2, a3 = a_K[k], a_K[k + 1], a_K[k + 2], a_K[k + 3]
                b0, b1, b2, b3 = b_K[k], b_K[k + 1], b_K[k + 2], b_K[k + 3]
                c0, c1, c2, c3 = c_K[k], c_K[k + 1], c_K[k + 2], c_K[k + 3]
                d0, d1, d2, d3 = d_K[k], d_K[k + 1], d_K[k + 2], d_K[k + 3]
                w_L, x_L, y_L, z_L = panel_KL[k], panel_KL[k + 1], panel_KL[k + 2], panel_KL[k + 3]
                for j in range(_LANES):
                    w, x, y, z = w_L[j], x_L[j], y_L[j], z_L[j]
                    a_L[j] = (((a_L[j] + a0 * w) + a1 * x) + a2 * y) + a3 * z
                    b_L[j] = (((b_L[j] + b0 * w) + b1 * x) + b2 * y) + b3 * z
                    c_L[j] = (((c_L[j] + c0 * w) + c1 * x) + c2 * y) + c3 * z
                    d_L[j] = (((d_L[j] + d0 * w) + d1 * x) + d2 * y) + d3 * z
            for i in range(min(_BLOCK, num_rows - row)):
                first = (row + i) * num_columns + start - column
                begin, end = max(first, 0), min(max(first + count, 0), len(out_E))
                out_L, sums_L = out_E[begin:end], sums_RL[i, begin - first :]
                for j in range(len(out_L)):
                    out_L[j] += scale * sums_L[j]


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
def sum_of_products(left_KL: Values, right_KL: Values) -> float:
    """Return the sum over all elements of the products of two matrices, in float64, row by row."""
    total = 0.0
    for k in range(left_KL.shape[0]):
        for m in range(left_KL.shape[1]):
            total += left_KL[k, m] * right_KL[k, m]
    return total
