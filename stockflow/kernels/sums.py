"""Sums over elements in float64, in an order that neither processor nor cut changes: sixteen partial sums, in turn."""

import numpy as np

from stockflow.kernels.arrays import Floats, Values
from stockflow.kernels.floats import TILE
from stockflow.kernels.jit import jit

LANES = 16
"""Partial sums; part of the numerics."""
RUN = 256
"""Elements that are added up pairwise before they join the partial sums; part of the numerics."""


@jit
def add_magnitudes(rows_RE: Values, sums_R: Floats) -> None:
    """Add the sum of the magnitudes of each row; element k of a row belongs to partial sum ``k % 16``."""
    _add_rows(rows_RE, False, sums_R)


@jit
def add_squares(rows_RE: Values, sums_R: Floats) -> None:
    """Add the sum of the squares of each row, in the same order."""
    _add_rows(rows_RE, True, sums_R)


@jit
def _add_rows(rows_RE: Values, is_squared: bool, sums_R: Floats) -> None:
    run, lanes = np.empty(RUN), np.empty(LANES)
    for r in range(len(rows_RE)):
        row = rows_RE[r]
        lanes[:] = 0.0
        num_elems = np.uint64(len(row))
        for start in range(np.uint64(0), num_elems, np.uint64(RUN)):
            count = min(np.uint64(RUN), num_elems - start)
            if is_squared:
                for k in range(count):
                    run[k] = np.float64(row[start + k]) * np.float64(row[start + k])
            else:
                for k in range(count):
                    run[k] = abs(np.float64(row[start + k]))
            run[count:] = 0.0
            add_run(run, lanes)
        sums_R[r] += total_of(lanes)


@jit
def add_run(run: Floats, lanes: Floats) -> None:
    """Add ``RUN`` elements to the partial sums: sixteen of them to each, added up pairwise."""
    for n in range(np.uint64(LANES)):
        first = run[n] + run[n + np.uint64(16)]
        first += run[n + np.uint64(32)] + run[n + np.uint64(48)]
        second = run[n + np.uint64(64)] + run[n + np.uint64(80)]
        second += run[n + np.uint64(96)] + run[n + np.uint64(112)]
        third = run[n + np.uint64(128)] + run[n + np.uint64(144)]
        third += run[n + np.uint64(160)] + run[n + np.uint64(176)]
        fourth = run[n + np.uint64(192)] + run[n + np.uint64(208)]
        fourth += run[n + np.uint64(224)] + run[n + np.uint64(240)]
        lanes[n] += (first + second) + (third + fourth)


@jit
def total_of(lanes: Floats) -> float:
    """Return the sum of the partial sums, in their order."""
    total = 0.0
    for n in range(LANES):
        total += lanes[n]
    return total


@jit
def deviate(rows_NE: Values, deviation_E: Values) -> None:
    """Fill ``deviation_E`` with the population's standard deviation over the rows of each element.

    In float64, from differences to the first row, so that it is 0 exactly where all rows are equal.
    """
    num_rows, num_elems = len(rows_NE), np.uint64(rows_NE.shape[1])
    first = rows_NE[0]
    means, squares = np.empty(TILE), np.empty(TILE)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        means[:] = 0.0
        squares[:] = 0.0
        for n in range(num_rows):
            row = rows_NE[n]
            for k in range(count):
                means[k] += np.float64(row[start + k]) - np.float64(first[start + k])
        for k in range(count):
            means[k] /= num_rows
        for n in range(num_rows):
            row = rows_NE[n]
            for k in range(count):
                apart = (np.float64(row[start + k]) - np.float64(first[start + k])) - means[k]
                squares[k] += apart * apart
        for k in range(count):
            deviation_E[start + k] = np.sqrt(squares[k] / num_rows)
        start += count


@jit
def multiply_where(rows_NE: Values, marks_E: Values) -> None:
    """Multiply by zero where a mark is zero, so that NaN stays NaN, and by one elsewhere."""
    zero, one = rows_NE.dtype.type(0.0), rows_NE.dtype.type(1.0)
    for n in range(len(rows_NE)):
        row = rows_NE[n]
        for k in range(np.uint64(len(row))):
            row[k] *= one if marks_E[k] != 0 else zero
