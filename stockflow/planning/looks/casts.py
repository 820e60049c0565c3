"""Casts: whether of two samples one holds the numbers of the other, rounded to its dtype."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.samples import Sample
from stockflow.kernels.arrays import Floats

_DIGITS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149), "F64": (53, -1074)}
"""Binary digits of a number, and the exponent of the smallest one."""
LEAST_LOSS = 0.1
"""Of the distance between two numbers of a dtype; rounding takes 0.25 on average, small changes far less."""


def cast_to(pairs: Sequence[tuple[Sample, Sample]]) -> str:
    """Return the dtype that the finer of each pair was rounded to; "" where some differ, or none was rounded.

    Changes so small that rounding undoes them are of another model, not of the precision: they lie close to the coarser
    numbers, and what rounding takes is spread over all of the distance between two.
    """
    losses, dtype = [], ""
    for pair in pairs:
        finer, coarser = sorted(pair, key=lambda each: _DIGITS[each.dtype], reverse=True)
        steps = _steps(finer.values, coarser.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = np.ldexp(np.rint(np.ldexp(finer.values, -steps)), steps)
            if not np.array_equal(rounded, coarser.values, equal_nan=True):
                return ""
            lost = np.abs(np.ldexp(finer.values - rounded, -steps))
        if finer.dtype != coarser.dtype:
            losses.append(lost[(rounded != 0) & np.isfinite(lost)])
            dtype = coarser.dtype
    taken = np.concatenate(losses) if losses else np.zeros(0)
    return dtype if taken.size and float(taken.mean()) >= LEAST_LOSS else ""


def _steps(values: Floats, dtype: str) -> npt.NDArray[np.int32]:
    """Return the exponent of the distance between numbers of a dtype, around each value."""
    digits, smallest = _DIGITS[dtype]
    steps: npt.NDArray[np.int32] = np.maximum(np.frexp(values)[1] - digits, smallest)
    return steps
