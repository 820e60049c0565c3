"""Arrays of float64 rounded once to a floating-point format."""

import numpy as np

from stockflow.kernels.arrays import Bytes, Floats, Values
from stockflow.kernels.floats import FORMATS, TILE, WIDTHS, narrow, results_in
from stockflow.kernels.jit import jit


def rounded(values: Floats, dtype: str) -> tuple[Bytes, bool]:
    """Return the bytes of an array in a format, each element rounded once, and whether all are finite."""
    values_E = np.ascontiguousarray(values, np.float64).reshape(-1)
    out = np.empty(values_E.size * WIDTHS[dtype], np.uint8)
    return out, bool(_round(values_E, FORMATS[dtype], results_in(out, dtype)))


@jit
def _round(values_E: Floats, format_: int, out: Values) -> bool:
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    are_finite = True
    for start in range(0, len(values_E), TILE):
        count = min(TILE, len(values_E) - start)
        tile_T = values_E[start : start + count]
        are_finite &= narrow(tile_T, np.uint64(count), format_, bits, floats, out, np.uint64(start))
    return are_finite
