"""Losses: what is counted of a result as it is written: range, distinct values, variances below zero, ends of zeros."""

from collections.abc import Callable

import numpy as np

from stockflow.checkpoints.files.header import DTYPES
from stockflow.checkpoints.values import as_numbers
from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Fill, Write
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import count_losses
from stockflow.output.receipts import ENDS_OF_ZEROS
from stockflow.planning.job import Result, TensorJob
from stockflow.planning.precision import has_smaller_range

VARIANCES = (".running_var", ".moving_variance")
MAX_COMPARED_ELEMS = 1024
"""Of tensors whose distinct values are counted: biases of routers, decays, sinks."""

MIN_ELEMS_WITH_END, END_BYTES = 4096, 1024
"""Of tensors whose last bytes are looked at, once: those of a file that was cut are zeros, and all behind them."""

Count = Callable[[LoadedPiece, Bytes, str], dict[str, int]]


def counting(fill: Fill, job: TensorJob, result: Result, ledger: Ledger) -> Write:
    """Return what fills, and counts what is lost by it."""
    dtype = result.outputs[0].dtype
    counts = _counts_of(job, result)
    if not counts:
        return fill.write

    def filling(span: LoadedPiece, target: Bytes) -> None:
        fill.write(span, target)
        for count in counts:
            ledger.count(count(span, target, dtype))

    return filling


def _counts_of(job: TensorJob, result: Result) -> list[Count]:
    output, counts = result.outputs[0], list[Count]()
    if job.is_copy:
        return counts
    if job.reading.is_plain and not result.rule and job.reading.num_elems >= MIN_ELEMS_WITH_END:
        counts.append(_ends_of_zeros)
    if has_smaller_range(output.dtype, job.reading.dtypes):
        counts.append(_beyond_range)
    if not result.rule and output.name.endswith(VARIANCES):
        counts.append(_below_zero)
    is_coarser = job.reading.operands[0].decode.is_plain and _bits(output.dtype) < _bits(job.reading.dtypes[0])
    if not result.rule and is_coarser and output.num_elems <= MAX_COMPARED_ELEMS:
        counts.append(_collapsed)
    return counts


def _bits(dtype: str) -> int:
    return DTYPES[dtype].bits


def _beyond_range(span: LoadedPiece, target: Bytes, dtype: str) -> dict[str, int]:
    lost = np.zeros(2, np.int64)
    count_losses(span.slab, span.firsts_M, span.formats_M, target, dtype, lost)
    return {"zeroed": int(lost[0]), "subnormal": int(lost[1])}


def _ends_of_zeros(span: LoadedPiece, target: Bytes, dtype: str) -> dict[str, int]:
    """Return of which models the tensor ends in zeros where another has numbers: a bit each, by their numbers."""
    operands = span.reading.operands if span.stop == span.reading.num_elems else ()
    ends = [bool(span.operand(number)[-END_BYTES:].any()) for number in range(len(operands))]
    if all(ends) or not any(ends):
        return {}
    empty = {operand.checkpoint for operand, has_numbers in zip(operands, ends, strict=True) if not has_numbers}
    return {ENDS_OF_ZEROS: sum(1 << number for number in empty)}


def _below_zero(span: LoadedPiece, target: Bytes, dtype: str) -> dict[str, int]:
    return {"below_zero": int(np.count_nonzero(_numbers(target, dtype) < 0))}


def _collapsed(span: LoadedPiece, target: Bytes, dtype: str) -> dict[str, int]:
    """How many fewer distinct values are written than the first source has."""
    source = _numbers(span.operand(0), span.dtypes[0])
    return {"collapsed": max(len(np.unique(source)) - len(np.unique(_numbers(target, dtype))), 0)}


def _numbers(payload: Bytes, dtype: str) -> Floats:
    numbers = as_numbers(payload.tobytes(), dtype)
    assert numbers is not None
    return numbers
