"""Sums over elements in float64, in an order that neither processor nor cut changes: sixteen partial sums, in turn."""

import numpy as np

from stockflow.kernels.arrays import Floats, Values
from stockflow.kernels.jit import jit

LANES = 16
"""Partial sums; part of the numerics."""


@jit
def add_magnitudes(rows_RE: Values, sums_R: Floats) -> None:
    """Add the sum of the magnitudes of each row: element k belongs to partial sum ``k % 16``."""
    for r in range(len(rows_RE)):
        row = rows_RE[r]
        lanes = np.zeros(LANES)
        num_elems = len(row)
        whole = num_elems // LANES * LANES
        for start in range(np.uint64(0), np.uint64(whole), np.uint64(LANES)):
            for n in range(np.uint64(LANES)):
                lanes[n] += np.float64(abs(row[start + n]))
        for k in range(whole, num_elems):
            lanes[k - whole] += np.float64(abs(row[k]))
        total = 0.0
        for n in range(LANES):
            total += lanes[n]
        sums_R[r] += total
