"""Decoders of adapters: what is within is decoded first, then changed in place.

Shape suffixes: E elements of a run, R its rows, K the rank, C columns, X experts.
"""

from functools import partial
from typing import Any

import numpy as np

from stockflow.checkpoints.decodes.low_rank import Added, Anchored, Lengths, LowRank, ReplacedRows
from stockflow.checkpoints.decodes.stored import row_elems
from stockflow.engine.decoding import DecodeRun, StoredRun, numbers
from stockflow.kernels import low_rank
from stockflow.kernels.arrays import Values


def adapter_decoders(within: DecodeRun) -> dict[type, DecodeRun]:
    """Return the decoders of adapters, given what decodes that which they change."""
    kinds: dict[type, Any] = {
        Anchored: _copy_anchor,
        LowRank: _add_product,
        Lengths: _set_lengths,
        Added: _add,
        ReplacedRows: _replace_rows,
    }
    return {kind: partial(decoder, within) for kind, decoder in kinds.items()}


def _copy_anchor(within: DecodeRun, decode: Anchored, run: StoredRun, out_E: Values) -> None:
    del within, decode
    assert run.memory.anchor_E is not None
    out_E[:] = run.memory.anchor_E


def _add_product(within: DecodeRun, decode: LowRank, run: StoredRun, out_E: Values) -> None:
    within(decode.inner, run.without(2), out_E)
    shape, start, stop, memory, (*_, place_a, place_b) = run
    if start == stop:
        return
    _, rows, columns = decode.matrices(shape)
    first, last = decode.experts_within(shape, start, stop)
    top, bottom = decode.rows_of_b(shape, start, stop)
    (dtype_a, dtype_b), working = decode.dtypes, out_E.dtype
    num_a, num_b = (last - first) * (rows if decode.is_transposed else columns), (bottom - top) * decode.num_experts
    a_XKC = numbers(dtype_a, memory, place_a, decode.rank * num_a, working).reshape(last - first, decode.rank, -1)
    b_RKX = numbers(dtype_b, memory, place_b, decode.rank * num_b, working).reshape(bottom - top, decode.rank, -1)
    for expert in range(first, last):
        base = 0 if decode.expert is not None else expert * rows * columns
        begin, end = max(start, base), min(stop, base + rows * columns)
        touched = slice((begin - base) // columns, -(-(end - base) // columns))
        left_RK, right_KC = _factors(decode, a_XKC[expert - first], b_RKX[..., expert], touched)
        column, changed_E = (begin - base) % columns, out_E[begin - start : end - start]
        low_rank.add_product(left_RK, right_KC, working.type(decode.scale), column, changed_E)


def _factors(decode: LowRank, a_KC: Values, b_RK: Values, rows: slice) -> tuple[Values, Values]:
    """Return the left factor of some rows of the matrix, and the right one."""
    if decode.is_transposed:
        return np.ascontiguousarray(a_KC.T[rows]), np.ascontiguousarray(b_RK.T)
    is_whole = decode.num_experts > 1 and decode.expert is None
    return np.ascontiguousarray(b_RK[rows] if is_whole else b_RK), a_KC


def _set_lengths(within: DecodeRun, decode: Lengths, run: StoredRun, out_E: Values) -> None:
    within(decode.inner, run.without(1), out_E)
    columns = row_elems(run.shape)
    num_rows = (run.stop - run.start) // columns if columns else 0
    lengths_R = numbers(decode.length_dtype, run.memory, run.places[-1], num_rows, out_E.dtype)
    low_rank.scale_rows(lengths_R, np.uint64(columns), out_E)


def _add(within: DecodeRun, decode: Added, run: StoredRun, out_E: Values) -> None:
    within(decode.inner, run.without(1), out_E)
    added_E = numbers(decode.added_dtype, run.memory, run.places[-1], len(out_E), out_E.dtype)
    out_E += out_E.dtype.type(decode.scale) * added_E


def _replace_rows(within: DecodeRun, decode: ReplacedRows, run: StoredRun, out_E: Values) -> None:
    within(decode.inner, run.without(1), out_E)
    columns, width = row_elems(run.shape), decode.widths[-1]
    for number, index in enumerate(decode.indices):
        begin, end = max(index * columns, run.start), min((index + 1) * columns, run.stop)
        if begin < end:
            at = run.places[-1] + (number * columns + begin - index * columns) * width
            own_E = numbers(decode.row_dtype, run.memory, at, end - begin, out_E.dtype)
            out_E[begin - run.start : end - run.start] = own_E
