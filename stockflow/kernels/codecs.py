"""Codes of eight bits and less turned into plain numbers, for operands that are not stored as such.

Shape suffixes: E elements of a run, C codes, R rows and S columns of a grid of scales.
"""

from functools import cache
from typing import Any

import numpy as np

from stockflow.kernels.arrays import Bits, Bytes, Singles, Values
from stockflow.kernels.floats import TILE, Index, Slab, widen
from stockflow.kernels.jit import jit


@cache
def numbers_of_codes(dtype: str, working: str) -> Values:
    """Return what each of the 256 codes of a dtype stands for, exactly, in a working precision.

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433: E4M3 has no infinities, and
    one pattern per sign for NaN.
    """
    bits, bias = _FLOAT_CODES[dtype]
    codes_C = np.arange(256)
    exponents_C, fractions_C = (codes_C & 127) >> bits, codes_C & (2**bits - 1)
    normal_C = np.ldexp(1.0 + fractions_C / 2.0**bits, exponents_C - bias)
    magnitudes_C = np.where(exponents_C == 0, np.ldexp(fractions_C / 2.0**bits, 1 - bias), normal_C)
    if dtype == "F8_E5M2":
        magnitudes_C[(codes_C & 124) == 124] = np.nan
        magnitudes_C[(codes_C & 127) == 124] = np.inf
    else:
        magnitudes_C[(codes_C & 127) == 127] = np.nan
    numbers_C: Values = np.where(codes_C < 128, magnitudes_C, -magnitudes_C).astype(working)
    return numbers_C


_FLOAT_CODES = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}
"""Bits of the fraction, and the bias of the exponent."""
_HALVES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@cache
def numbers_of_nibbles(codes: str, working: str) -> Values:
    """Return what each of the 16 codes of four bits stands for.

    Sources: OCP Microscaling Formats v1.0 for E2M1; compressed-tensors for integers, which are stored with 8 added.
    """
    numbers_C = np.concatenate([_HALVES, -_HALVES]) if codes == "F4" else np.arange(-8.0, 8.0)
    return numbers_C.astype(working)


def powers_of_two(exponents_S: Bytes, working: str) -> Values:
    """Return the scales that exponents of eight bits (E8M0) stand for; 255 is no number. Source: OCP, as above."""
    powers_S = np.ldexp(np.ones(len(exponents_S), working), np.minimum(exponents_S, 254).astype(np.int32) - 127)
    powers_S[exponents_S == 255] = np.nan
    return powers_S.astype(working)


@jit
def widen_run(slab: Slab, first: Index, format_: int, out_E: Values) -> None:
    """Fill ``out_E`` with the elements from ``first`` on, in working precision."""
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    num_elems = np.uint64(len(out_E))
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        widen(slab, first + start, count, format_, bits, floats, out_E[start : start + count])
        start += count


@jit
def scale_blocks(
    codes: Bytes,
    first: Index,
    numbers_C: Values,
    scales_RS: Values,
    start: Index,
    matrix: tuple[Index, Index],
    block: tuple[Index, Index],
    out_E: Values,
) -> None:
    """Fill ``out_E`` with code times scale, rounded once to its precision.

    Args:
        codes: memory that holds the codes of the run.
        first: where in it they begin.
        numbers_C: what each code stands for.
        scales_RS: the rows of scales that the run touches.
        start: flat index of the first element.
        matrix: rows and columns of each matrix.
        block: rows and columns of a block.
        out_E: receives the numbers.
    """
    num_elems, one = np.uint64(len(out_E)), np.uint64(1)
    is_e4m3 = numbers_C[0x7F] != numbers_C[0x7F] and numbers_C[0x7E] == 448.0
    bits = np.empty(TILE, np.uint32)
    floats, mend = bits.view(np.float32), np.float32(2.0**120 if is_e4m3 else 1.0)
    num_rows, num_columns = matrix
    bands = (num_rows + block[0] - one) // block[0]
    first_row = start // num_columns
    first_band = first_row // num_rows * bands + first_row % num_rows // block[0]
    done = np.uint64(0)
    while done < num_elems:
        row, column = (start + done) // num_columns, (start + done) % num_columns
        band = row // num_rows * bands + row % num_rows // block[0]
        count = min(min(num_columns - column, num_elems - done), np.uint64(TILE))
        if is_e4m3:
            _move_e4m3(codes, first + done, count, bits)
        else:
            for k in range(count):
                floats[k] = numbers_C[codes[first + done + k]]
        place, left = column // block[1], block[1] - column % block[1]
        scales_S, out = scales_RS[band - first_band], out_E[done : done + count]
        _scale(floats, mend, count, scales_S, place, left, block[1], out)
        done += count


@jit
def _move_e4m3(codes: Bytes, first: Index, count: Index, bits: Bits) -> None:
    """Move exponent and fraction into a float32; a multiplication by 2**120, which is exact, mends its exponent."""
    for k in range(count):
        code = np.uint32(codes[first + k])
        magnitude = (code & np.uint32(0x7F)) << np.uint32(20)
        magnitude = np.uint32(0x7FC0_0000) if magnitude == np.uint32(0x7F0_0000) else magnitude
        bits[k] = magnitude | ((code & np.uint32(0x80)) << np.uint32(24))


@jit
def _scale(
    floats: Singles, mend: Any, count: Index, scales_S: Values, place: Index, left: Index, group: Index, out: Values
) -> None:
    """Fill ``out`` with mended numbers of a row times their scales: that at ``place`` for ``left`` of them, and so on.

    Each further scale is for ``group`` numbers.
    """
    done, end = np.uint64(0), left
    while done < count:
        scale = scales_S[place]
        for k in range(done, min(end, count)):
            out[k] = floats[k] * mend * scale
        done, end, place = end, end + group, place + np.uint64(1)


@jit
def scale_groups(
    codes: Bytes,
    first: Index,
    numbers_C: Values,
    scales_S: Values,
    start: Index,
    num_columns: Index,
    row_bytes: Index,
    group: Index,
    out_E: Values,
) -> None:
    """Fill ``out_E`` with code times scale, for codes of four bits, the lower half of a byte first.

    Args:
        codes: memory that holds the codes of the run.
        first: where in it the byte with the first one is.
        numbers_C: what each code stands for.
        scales_S: the scales that the run touches.
        start: flat index of the first element.
        num_columns: of a row.
        row_bytes: bytes of the codes of a row.
        group: columns that share a scale.
        out_E: receives the numbers.
    """
    num_elems, one, two = np.uint64(len(out_E)), np.uint64(1), np.uint64(2)
    per_row = (num_columns + group - one) // group
    first_byte = start // num_columns * row_bytes + start % num_columns // two
    first_scale = start // num_columns * per_row + start % num_columns // group
    bits, is_i4 = np.empty(TILE + 2, np.uint32), numbers_C[0] == -8.0
    floats, mend = bits.view(np.float32), np.float32(1.0 if is_i4 else 2.0**126)
    done = np.uint64(0)
    while done < num_elems:
        row, column = (start + done) // num_columns, (start + done) % num_columns
        count = min(min(num_columns - column, num_elems - done), np.uint64(TILE))
        skipped = column & one
        byte, num_bytes = first + row * row_bytes - first_byte + column // two, (skipped + count + one) // two
        if is_i4:
            _move_i4(codes, byte, num_bytes, floats)
        else:
            _move_f4(codes, byte, num_bytes, bits)
        place, left = row * per_row + column // group - first_scale, group - column % group
        _scale(floats[skipped:], mend, count, scales_S, place, left, group, out_E[done : done + count])
        done += count


@jit
def _move_i4(codes: Bytes, first: Index, num_bytes: Index, floats: Singles) -> None:
    for k in range(num_bytes):
        both = np.int32(codes[first + k])
        floats[k + k] = np.float32((both & np.int32(15)) - np.int32(8))
        floats[k + k + np.uint64(1)] = np.float32((both >> np.int32(4)) - np.int32(8))


@jit
def _move_f4(codes: Bytes, first: Index, num_bytes: Index, bits: Bits) -> None:
    """Move exponent and fraction into a float32; a multiplication by 2**126, which is exact, mends its exponent."""
    for k in range(num_bytes):
        both = np.uint32(codes[first + k])
        bits[k + k] = (both & np.uint32(7)) << np.uint32(22) | (both & np.uint32(8)) << np.uint32(28)
        bits[k + k + np.uint64(1)] = (both & np.uint32(0x70)) << np.uint32(18) | (both >> np.uint32(7)) << np.uint32(31)
