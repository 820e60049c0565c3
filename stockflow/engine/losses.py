"""Losses: what is counted of a result as it is written: range, distinct values, changes, ends of zeros."""

from collections.abc import Callable
from functools import partial

import numpy as np

from stockflow.checkpoints.files.header import DTYPES
from stockflow.checkpoints.values import as_numbers
from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Fill, Write
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import count_losses
from stockflow.kernels.once import rounded
from stockflow.methods.protocol import Linear
from stockflow.output.receipts import ENDS_OF_ZEROS
from stockflow.planning.job import Result, TensorJob
from stockflow.planning.looks.values import only_source
from stockflow.planning.precision import has_smaller_range

VARIANCES = (".running_var", ".moving_variance")
MAX_COMPARED_ELEMS = 1024
"""Of tensors whose distinct values are counted: biases of routers, decays, sinks."""

MIN_ELEMS_WITH_END, END_BYTES = 4096, 1024
"""Of tensors whose last bytes are looked at, once: those of a file that was cut are zeros, and all behind them."""

MAX_HELD_ELEMS = 1024
"""In the middle of a tensor, which are held against the base's to see what rounding leaves of a change."""

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
    if job.reading.is_plain and not result.rule and _may_round_away(job, result):
        counts.append(partial(_rounded_away, result))
    return counts


def _may_round_away(job: TensorJob, result: Result) -> bool:
    """Return whether a base is changed by what is stored finer than it is written."""
    is_coarser = any(_bits(result.outputs[0].dtype) < _bits(dtype) for dtype in job.reading.dtypes[1:])
    is_anchored = result.declared.has_anchor(result.parameters)
    return is_coarser and is_anchored and only_source(result.declared, result.parameters) is None


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


def _rounded_away(result: Result, span: LoadedPiece, target: Bytes, dtype: str) -> dict[str, int]:
    """How many elements that a model changes are looked at, and how many come out as the base's, rounded.

    Methods that leave changes out do so with some: there all that a span has must be lost to be counted.
    """
    first = (span.reading.num_elems - MAX_HELD_ELEMS) // 2
    start, stop = max(first, span.start, 0), min(max(first, 0) + MAX_HELD_ELEMS, span.stop)
    if start >= stop:
        return {}
    held = span.narrow(start, stop)
    base, *tuned = [_numbers(held.operand(number), each) for number, each in enumerate(held.dtypes)]
    width = len(target) // (span.stop - span.start)
    written = _numbers(target[width * (start - span.start) : width * (stop - span.start)], dtype)
    is_changed = np.any([each != base for each in tuned], axis=0)
    num_changed = int(np.count_nonzero(is_changed))
    num_lost = int(np.count_nonzero(is_changed & (written == _numbers(rounded(base, dtype)[0], dtype))))
    is_lost = isinstance(result.declared.rule, Linear) or num_lost == num_changed
    return {"changed": num_changed, "rounded_away": num_lost * is_lost}


def _numbers(payload: Bytes, dtype: str) -> Floats:
    numbers = as_numbers(payload.tobytes(), dtype)
    assert numbers is not None
    return numbers
