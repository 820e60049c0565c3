"""Steps between representable numbers around the elements of an operand, and its elements as they are stored."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from stockflow.checkpoints.files.header import DTYPES
from stockflow.engine.arithmetic import Weighted
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Tools
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.roundings import fraction_bits, patterns_in, sum_of_steps


@dataclass(frozen=True, eq=False)
class StepsSweep:
    """Squared distances of representable numbers around the elements of one operand, added up."""

    operand: int
    dtype: str
    steps_X: Floats
    tools: Tools

    @property
    def key(self) -> Hashable:
        """Its own: nobody else asks for it."""
        return id(self)

    def begin(self) -> float:
        """Return zero."""
        return 0.0

    def look(self, span: LoadedPiece) -> float:
        """Return the sum over a span."""
        patterns_E = patterns_in(as_stored(span, self.operand, self.dtype, self.tools), self.dtype)
        return float(sum_of_steps(patterns_E, fraction_bits(self.dtype), self.steps_X))

    def add(self, state: float, start: int, said: float) -> float:
        """Add it."""
        del start
        return state + said


def as_stored(span: LoadedPiece, operand: int, dtype: str, tools: Tools) -> Bytes:
    """Return an operand in a dtype: as it lies there, or, of one that was decoded, rounded to it."""
    if span.dtypes[operand] == dtype:
        return span.operand(operand)
    found: Bytes = np.empty((span.stop - span.start) * DTYPES[dtype].bits // 8, np.uint8)
    tools.arithmetic.combine(span.only(operand), Weighted(np.ones((1, 1)), False, dtype, 64), found)
    return found
