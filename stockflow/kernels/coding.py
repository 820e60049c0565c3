"""Numbers turned into codes of eight and of four bits, each block with a scale that is stored beside it.

A *block* is what shares a scale: some rows and columns of a matrix, or a group of columns of one row. Blocks in which
nothing is other than in a source keep the scale of that source, and so all its codes.

Shape suffixes: E elements of a run, S scales of a run, row by row of the grid, K sources that are stored alike.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from stockflow.kernels.arrays import Bits, Bytes, Floats, Singles
from stockflow.kernels.floats import TILE, Index
from stockflow.kernels.jit import jit

AMAX, POWER, SEVEN, SEVEN_AND_HALF, FLOOR, EVEN, CEIL = range(7)
"""In the order of ``checkpoints.scale_rules``: how a scale follows from the largest magnitude of its block."""
E4M3, E5M2, I4, F4 = range(4)
CODES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "I4": I4, "F4": F4}
AS_F32, AS_BF16, AS_F16, AS_POWER = range(4)
SCALES = {"F32": AS_F32, "BF16": AS_BF16, "F16": AS_F16, "F8_E8M0": AS_POWER}
"""What a scale is rounded to before anything is divided by it."""


class BlockGrid(NamedTuple):
    """Where blocks lie in a tensor."""

    rows: Index
    """of each matrix"""
    columns: Index
    block_rows: Index
    block_columns: Index


class Coded(NamedTuple):
    """What a run is turned into."""

    codes: Bytes
    first_byte: Index
    """where in them the run begins"""
    row_bytes: Index
    scales_S: Singles
    first_scale: Index
    """number, in the tensor, of the first of ``scales_S``"""


@jit
def _scale_row(row: Index, grid: BlockGrid) -> Any:
    bands = (grid.rows + grid.block_rows - np.uint64(1)) // grid.block_rows
    return row // grid.rows * bands + row % grid.rows // grid.block_rows


@jit
def _block_of(element: Index, grid: BlockGrid) -> Any:
    """Return the number of the scale of an element, and how many elements of its row, from it on, share it."""
    row, column = element // grid.columns, element % grid.columns
    per_row = (grid.columns + grid.block_columns - np.uint64(1)) // grid.block_columns
    place = column // grid.block_columns
    end = min((place + np.uint64(1)) * grid.block_columns, grid.columns)
    return _scale_row(row, grid) * per_row + place, end - column


@jit
def spread(scales_S: Singles, first_scale: Index, start: Index, grid: BlockGrid, out_E: Floats) -> None:
    """Fill ``out_E`` with the scales of elements from ``start`` on; the first given is number ``first_scale``."""
    num_elems, done = np.uint64(len(out_E)), np.uint64(0)
    while done < num_elems:
        scale, count = _block_of(start + done, grid)
        out_E[done : done + count] = scales_S[scale - first_scale]
        done += count


@jit
def mark_changed(
    numbers_E: Singles, source_E: Singles, start: Index, grid: BlockGrid, first_scale: Index, changed_S: Bytes
) -> None:
    """Set the flags of the blocks in which a run of results, from element ``start`` on, is other than a source."""
    num_elems, done = np.uint64(len(numbers_E)), np.uint64(0)
    while done < num_elems:
        scale, count = _block_of(start + done, grid)
        if changed_S[scale - first_scale] == 0:
            for k in range(done, min(done + count, num_elems)):
                if numbers_E[k] != source_E[k]:
                    changed_S[scale - first_scale] = 1
                    break
        done += count


@jit
def encode(
    numbers_E: Singles,
    start: Index,
    grid: BlockGrid,
    changed_KS: Bytes,
    kept_KS: Singles,
    rule: int,
    scale_format: int,
    code_format: int,
    target: Coded,
) -> int:
    """Turn a run of whole rows of blocks into scales and codes; return how many numbers have no code.

    Args:
        numbers_E: the results.
        start: flat index in the tensor of the first.
        grid: where blocks lie.
        changed_KS: which blocks are other than in a source.
        kept_KS: scales of the sources.
        rule: how scales are chosen where something changed.
        scale_format: what they are rounded to.
        code_format: what numbers become.
        target: receives codes and scales.
    """
    columns = grid.columns
    per_row = (columns + grid.block_columns - np.uint64(1)) // grid.block_columns
    used = min(per_row, (np.uint64(len(numbers_E)) + grid.block_columns - np.uint64(1)) // grid.block_columns)
    bits_E, largest_B, tile = numbers_E.view(np.uint32), np.empty(used, np.uint32), np.empty(TILE, np.float32)
    amax_B = largest_B.view(np.float32)
    lost = 0
    first_row, num_rows = start // columns, (np.uint64(len(numbers_E)) + columns - np.uint64(1)) // columns
    row = np.uint64(0)
    while row < num_rows:
        scale_row = _scale_row(first_row + row, grid)
        last = row + np.uint64(1)
        while last < num_rows and _scale_row(first_row + last, grid) == scale_row:
            last += np.uint64(1)
        base = scale_row * per_row - target.first_scale
        largest_B[:] = np.uint32(0)
        for r in range(row, last):
            _note_largest(bits_E, r * columns, grid, largest_B)
        for place in range(used):
            scale = _scale_of(amax_B[place], rule, scale_format, code_format)
            for source in range(len(changed_KS)):
                kept = kept_KS[source, base + place]
                if changed_KS[source, base + place] == 0 and kept > np.float32(0) and np.isfinite(kept):
                    scale = kept
                    break
            target.scales_S[base + place] = scale
        for r in range(row, last):
            byte = target.first_byte + r * target.row_bytes
            scales_B = target.scales_S[base : base + used]
            lost += _write_row(numbers_E, r * columns, grid, scales_B, code_format, tile, target.codes, byte)
        row = last
    return lost


@jit
def _note_largest(bits_E: Bits, first: Index, grid: BlockGrid, largest_B: Bits) -> None:
    """Raise the largest magnitudes of blocks by those of a row, all as bits, in which magnitudes keep their order.

    NaN and infinity are none.
    """
    for place in range(np.uint64(len(largest_B))):
        lo = place * grid.block_columns
        hi = min(min(lo + grid.block_columns, grid.columns), np.uint64(len(bits_E)) - first)
        largest = largest_B[place]
        for k in range(lo, hi):
            size = bits_E[first + k] & np.uint32(0x7FFF_FFFF)
            largest = max(largest, size if size < np.uint32(0x7F80_0000) else np.uint32(0))
        largest_B[place] = largest


@jit
def _write_row(
    numbers_E: Singles,
    first: Index,
    grid: BlockGrid,
    scales_B: Singles,
    code_format: int,
    tile: Singles,
    codes: Bytes,
    byte: Index,
) -> int:
    """Write the codes of a row; return how many numbers have none."""
    num_columns = min(grid.columns, np.uint64(len(numbers_E)) - first)
    bits, nibbles = tile.view(np.uint32), np.zeros(TILE, np.uint8)
    lost = 0
    for column in range(np.uint64(0), num_columns, np.uint64(TILE)):
        count = min(num_columns - column, np.uint64(TILE))
        _divide(numbers_E, first, column, count, grid.block_columns, scales_B, tile)
        if code_format == E4M3:
            lost += _to_e4m3(tile, bits, count, codes, byte + column)
        elif code_format == E5M2:
            _to_e5m2(tile, bits, count, codes, byte + column)
        else:
            if code_format == I4:
                lost += _to_i4(tile, count, nibbles)
            else:
                lost += _to_f4(tile, count, nibbles)
            _pack(nibbles, count, codes, byte + column // np.uint64(2))
    return lost


@jit
def _divide(
    numbers_E: Singles, first: Index, column: Index, count: Index, width: Index, scales_B: Singles, tile: Singles
) -> None:
    """Fill a tile with numbers of a row over the scales of their blocks."""
    done = np.uint64(0)
    while done < count:
        place = (column + done) // width
        end = min((place + np.uint64(1)) * width - column, count)
        scale = scales_B[place]
        for k in range(done, end):
            tile[k] = numbers_E[first + column + k] / scale
        done = end


@jit
def _scale_of(amax: Any, rule: int, scale_format: int, code_format: int) -> Any:
    """Return the scale of a block, as it is stored. Blocks of zeros have the scale one."""
    if not amax > np.float32(0) or not np.isfinite(amax):
        return np.float32(1)
    most = np.float32(57344) if code_format == E5M2 else np.float32(448)
    if rule == AMAX:
        scale = amax / most
    elif rule == POWER:
        scale = _power_up(amax / most)
    elif rule == SEVEN:
        scale = amax / np.float32(7)
    elif rule == SEVEN_AND_HALF:
        scale = amax / np.float32(7.5)
    elif rule == CEIL:
        scale = _power_up(amax / np.float32(6))
    else:
        fraction, exponent = math.frexp(amax)
        up = 1 if rule == EVEN and fraction >= np.float32(0.875) else 0
        scale = np.float32(math.ldexp(1.0, exponent - 3 + up))
    return _stored(max(scale, np.float32(2.0**-120)), scale_format)


@jit
def _power_up(value: Any) -> Any:
    """Return the least power of two that is not below a value: by its exponent, as logarithms are not exact."""
    fraction, exponent = math.frexp(value)
    return np.float32(math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))


@jit
def _stored(scale: Any, scale_format: int) -> Any:
    """Round a scale to what it is stored in."""
    one = np.empty(1, np.float32)
    one[0] = scale
    bits = one.view(np.uint32)
    if scale_format == AS_BF16:
        bits[0] = (bits[0] + np.uint32(0x7FFF) + ((bits[0] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF_0000)
    elif scale_format == AS_F16:
        magnitude = max(one[0], np.float32(2.0**-14))
        one[0] = min(magnitude, np.float32(65504))
        bits[0] = (bits[0] + np.uint32(0xFFF) + ((bits[0] >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFF_E000)
    return one[0]


@jit
def _to_e4m3(tile: Singles, bits: Bits, count: Index, codes: Bytes, first: Index) -> int:
    """Round to E4M3, to nearest even; beyond 448 is 448, and infinity has no code. Subnormal codes end at 2**-9."""
    lost = 0
    for k in range(count):
        lost += abs(tile[k]) == np.float32(np.inf)
    for k in range(count):
        tile[k] = min(max(tile[k], np.float32(-448)), np.float32(448)) if tile[k] == tile[k] else tile[k]
    for k in range(count):
        sign = (bits[k] >> np.uint32(24)) & np.uint32(0x80)
        magnitude = bits[k] & np.uint32(0x7FFF_FFFF)
        odd = (magnitude >> np.uint32(20)) & np.uint32(1)
        normal = ((magnitude + np.uint32(0x7_FFFF) + odd) >> np.uint32(20)) - np.uint32(960)
        small = (
            np.uint32(np.rint(abs(tile[k]) * np.float32(512))) if magnitude < np.uint32(0x3C80_0000) else np.uint32(0)
        )
        code = small if magnitude < np.uint32(0x3C80_0000) else normal
        code = np.uint32(0x7F) if magnitude > np.uint32(0x7F80_0000) else code
        codes[first + np.uint64(k)] = np.uint8(sign | code)
    return lost


@jit
def _to_e5m2(tile: Singles, bits: Bits, count: Index, codes: Bytes, first: Index) -> None:
    """Round to E5M2, to nearest even; beyond 57,344 is 57,344, but for infinity."""
    for k in range(count):
        sign = (bits[k] >> np.uint32(24)) & np.uint32(0x80)
        magnitude = bits[k] & np.uint32(0x7FFF_FFFF)
        if magnitude > np.uint32(0x7F80_0000):
            code = np.uint32(0x7F)
        elif magnitude == np.uint32(0x7F80_0000):
            code = np.uint32(0x7C)
        elif magnitude >= np.uint32(0x4760_0000):
            code = np.uint32(0x7B)
        elif magnitude < np.uint32(0x3880_0000):
            code = np.uint32(np.rint(abs(tile[k]) * np.float32(65536)))
        else:
            odd = (magnitude >> np.uint32(21)) & np.uint32(1)
            code = min(((magnitude + np.uint32(0xF_FFFF) + odd) >> np.uint32(21)) - np.uint32(448), np.uint32(0x7B))
        codes[first + np.uint64(k)] = np.uint8(sign | code)


@jit
def _to_i4(tile: Singles, count: Index, nibbles: Bytes) -> int:
    """Round to integers from -8 to 7, stored with 8 added; NaN and infinity have no code. Scales decide of -8."""
    lost = 0
    for k in range(count):
        value = tile[k]
        lost += not abs(value) < np.float32(np.inf)
        kept = min(max(np.rint(value), np.float32(-8)), np.float32(7)) if value == value else np.float32(0)
        nibbles[k] = np.uint8(np.int32(kept) + np.int32(8))
    return lost


@jit
def _to_f4(tile: Singles, count: Index, nibbles: Bytes) -> int:
    """Round to E2M1, ties to the even code; beyond 6 is 6; NaN and infinity have no code."""
    lost = 0
    for k in range(count):
        value = tile[k]
        lost += not abs(value) < np.float32(np.inf)
        size = abs(value)
        code = np.int32(size > np.float32(0.25)) + np.int32(size >= np.float32(0.75))
        code += np.int32(size > np.float32(1.25)) + np.int32(size >= np.float32(1.75))
        code += np.int32(size > np.float32(2.5)) + np.int32(size >= np.float32(3.5)) + np.int32(size > np.float32(5))
        nibbles[k] = np.uint8(code + (np.int32(8) if np.signbit(value) else np.int32(0)))
    return lost


@jit
def _pack(nibbles: Bytes, count: Index, codes: Bytes, first: Index) -> None:
    """Store codes of four bits two to a byte, the first in the lower half; of an odd number the last is alone."""
    for k in range(count // np.uint64(2)):
        codes[first + k] = nibbles[k + k] | np.uint8(nibbles[k + k + np.uint64(1)] << np.uint8(4))
    if count & np.uint64(1):
        codes[first + count // np.uint64(2)] = nibbles[count - np.uint64(1)]
