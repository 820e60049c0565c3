"""Decoders of adapters: what is within is decoded first, then changed in place.

Shape suffixes: E elements of a run, R its rows, K the rank, C columns, X experts.
"""

from functools import partial
from typing import Any

import numpy as np

from stockflow.checkpoints.adapter_decodes import Added, Anchored, Lengths, LowRank, ReplacedRows
from stockflow.checkpoints.decodes import row_elems
from stockflow.engine.decoding import DecodeRun, Memory, Shape, numbers
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


def _copy_anchor(
    within: DecodeRun,
    decode: Anchored,
    shape: Shape,
    start: int,
    stop: int,
    memory: Memory,
    places: list[int],
    out_E: Values,
) -> None:
    del within, decode, shape, start, stop, places
    assert memory.anchor_E is not None
    out_E[:] = memory.anchor_E


def _add_product(
    within: DecodeRun,
    decode: LowRank,
    shape: Shape,
    start: int,
    stop: int,
    memory: Memory,
    places: list[int],
    out_E: Values,
) -> None:
    *inner, place_a, place_b = places
    within(decode.inner, shape, start, stop, memory, inner, out_E)
    if start == stop:
        return
    _, rows, columns = decode.matrices(shape)
    first, last = decode.experts_within(shape, start, stop)
    top, bottom = decode.rows_of_b(shape, start, stop)
    dtype_a, dtype_b = decode.dtypes
    a_XKC = numbers(
        dtype_a, memory, place_a, (last - first) * decode.rank * _a_columns(decode, rows, columns), out_E.dtype
    )
    b_RKX = numbers(dtype_b, memory, place_b, (bottom - top) * decode.rank * decode.num_experts, out_E.dtype)
    a_XKC = a_XKC.reshape(last - first, decode.rank, -1)
    b_RKX = b_RKX.reshape(bottom - top, decode.rank, decode.num_experts)
    scale = out_E.dtype.type(decode.scale)
    for expert in range(first, last):
        base = 0 if decode.expert is not None else expert * rows * columns
        begin, end = max(start, base), min(stop, base + rows * columns)
        touched = slice((begin - base) // columns, -(-(end - base) // columns))
        left_RK, right_KC = _factors(decode, a_XKC[expert - first], b_RKX[..., expert], touched)
        column = (begin - base) % columns
        low_rank.add_product(left_RK, right_KC, scale, column, out_E[begin - start : end - start])


def _a_columns(decode: LowRank, rows: int, columns: int) -> int:
    return rows if decode.is_transposed else columns


def _factors(decode: LowRank, a_KC: Values, b_RK: Values, rows: slice) -> tuple[Values, Values]:
    """Return the left factor of some rows of the matrix, and the right one."""
    if decode.is_transposed:
        return np.ascontiguousarray(a_KC.T[rows]), np.ascontiguousarray(b_RK.T)
    is_whole = decode.num_experts > 1 and decode.expert is None
    return np.ascontiguousarray(b_RK[rows] if is_whole else b_RK), a_KC


def _set_lengths(
    within: DecodeRun,
    decode: Lengths,
    shape: Shape,
    start: int,
    stop: int,
    memory: Memory,
    places: list[int],
    out_E: Values,
) -> None:
    *inner, place = places
    within(decode.inner, shape, start, stop, memory, inner, out_E)
    columns = row_elems(shape)
    lengths_R = numbers(decode.length_dtype, memory, place, (stop - start) // columns if columns else 0, out_E.dtype)
    low_rank.scale_rows(lengths_R, np.uint64(columns), out_E)


def _add(
    within: DecodeRun,
    decode: Added,
    shape: Shape,
    start: int,
    stop: int,
    memory: Memory,
    places: list[int],
    out_E: Values,
) -> None:
    *inner, place = places
    within(decode.inner, shape, start, stop, memory, inner, out_E)
    out_E += out_E.dtype.type(decode.scale) * numbers(decode.added_dtype, memory, place, stop - start, out_E.dtype)


def _replace_rows(
    within: DecodeRun,
    decode: ReplacedRows,
    shape: Shape,
    start: int,
    stop: int,
    memory: Memory,
    places: list[int],
    out_E: Values,
) -> None:
    *inner, place = places
    within(decode.inner, shape, start, stop, memory, inner, out_E)
    columns, width = row_elems(shape), decode.widths[-1]
    for number, index in enumerate(decode.indices):
        begin, end = max(index * columns, start), min((index + 1) * columns, stop)
        if begin < end:
            at = place + (number * columns + begin - index * columns) * width
            out_E[begin - start : end - start] = numbers(decode.row_dtype, memory, at, end - begin, out_E.dtype)
