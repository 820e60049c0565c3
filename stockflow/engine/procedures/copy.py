"""Bytes carried over, after all sources proved to hold the same ones where the rule asks for it."""

import numpy as np

from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Fill, Tools
from stockflow.engine.units import Unit
from stockflow.kernels.arrays import Bytes
from stockflow.methods.protocol import Copy
from stockflow.planning.job import Result

COMPARED_BYTES = 2**20
"""How much of two tensors is compared at a time."""


def decide(unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Fill:
    """Return what copies; there is nothing to decide.

    Raises:
        NumericsError: sources that must agree do not; by what is returned.
    """
    del unit, ledger
    rule = result.declared.rule
    must_agree = isinstance(rule, Copy) and rule.must_agree

    def fill(span: LoadedPiece, target: Bytes) -> None:
        donated = span.operand(0)
        for index in range(1, len(span.reading.operands) if must_agree else 1):
            if not _same_bytes(donated, span.operand(index)):
                tools.alarm.refuse_unequal(span.reading, index, result.outputs[0].dtype)
        np.copyto(target, donated)

    return Fill(fill)


def _same_bytes(left: Bytes, right: Bytes) -> bool:
    parts = range(0, left.nbytes, COMPARED_BYTES)
    return all(np.array_equal(left[at : at + COMPARED_BYTES], right[at : at + COMPARED_BYTES]) for at in parts)
