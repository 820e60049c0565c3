"""Codes of eight bits and less turned into plain numbers, for operands that are not stored as such.

Shape suffixes: E elements of a run, C codes, R rows and S columns of a grid of scales.
"""

from functools import cache

import numpy as np

from stockflow.kernels.arrays import Bytes, Values
from stockflow.kernels.floats import TILE, Index, Slab, widen
from stockflow.kernels.jit import jit


@cache
def numbers_of_codes(dtype: str, working: str) -> Values:
    """Return what each of the 256 codes of a dtype stands for, exactly, in a working precision.

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433: E4M3 has no infinities, and
    one pattern per sign for NaN.
    """
    if dtype != "F8_E4M3":
        raise ValueError(f"no codes of {dtype} are known")
    codes_C = np.arange(256)
    exponents_C, fractions_C = (codes_C >> 3) & 15, codes_C & 7
    normal_C = np.ldexp(1.0 + fractions_C / 8.0, exponents_C - 7)
    magnitudes_C = np.where(exponents_C == 0, np.ldexp(fractions_C / 8.0, -6), normal_C)
    magnitudes_C[(codes_C & 127) == 127] = np.nan
    return np.where(codes_C < 128, magnitudes_C, -magnitudes_C).astype(working)


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
    num_columns: Index,
    block_rows: Index,
    block_columns: Index,
    out_E: Values,
) -> None:
    """Fill ``out_E`` with code times scale, rounded once to its precision.

    Args:
        codes: memory that holds the codes of the run.
        first: where in it they begin.
        numbers_C: what each code stands for.
        scales_RS: the rows of scales that the run touches.
        start: flat index in the matrix of the first element.
        num_columns: of the matrix.
        block_rows: rows of a block.
        block_columns: columns of a block.
        out_E: receives the numbers.
    """
    num_elems = np.uint64(len(out_E))
    first_row = start // num_columns // block_rows
    done = np.uint64(0)
    while done < num_elems:
        row, column = (start + done) // num_columns, (start + done) % num_columns
        block = column // block_columns
        end = min((block + np.uint64(1)) * block_columns, num_columns)
        count = min(end - column, num_elems - done)
        scale = scales_RS[row // block_rows - first_row, block]
        for k in range(count):
            out_E[done + k] = numbers_C[codes[first + done + k]] * scale
        done += count
