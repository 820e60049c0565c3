"""Floating-point formats: runs of elements widened to working precision, and results rounded once.

A *tile* is a run of at most ``TILE`` elements, small enough for the first-level cache. Working precision is float32,
or float64 where a source or the output is F64. Indices are unsigned, so that the compiler need not care for negative
ones.
"""

from typing import Any, NamedTuple

import numpy as np

from stockflow.kernels.arrays import Bits, Bytes, Counts, Floats, Halves, Patterns, Singles, Unsigned, Values
from stockflow.kernels.jit import jit

TILE = 512
"""Elements computed at a time."""

Index = Any
"""np.uint64"""

BF16, F16, F32, F64 = range(4)
FORMATS = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}
"""The dtypes that are merged, as kernels know them."""
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes per element."""
_OUT_TYPES = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}
EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""The bits that are all set in infinities and NaN, and only there."""


class Slab(NamedTuple):
    """One run of bytes in memory, seen as elements of each width."""

    halves: Halves
    singles: Singles
    doubles: Floats


def slab_of(raw: Bytes) -> Slab:
    """Return bytes as a slab; they begin on an 8-byte boundary."""
    whole = raw[: raw.nbytes // 8 * 8]
    return Slab(
        raw[: raw.nbytes // 2 * 2].view(np.uint16), raw[: raw.nbytes // 4 * 4].view(np.float32), whole.view(np.float64)
    )


def results_in(out: Bytes, dtype: str) -> Values:
    """Return the bytes ``out`` as ``narrow`` fills them: 16-bit formats as patterns, the others as numbers."""
    return out.view(_OUT_TYPES[dtype])


@jit
def widen(slab: Slab, first: Index, count: Index, format_: int, bits: Bits, floats: Singles, out: Values) -> None:
    """Fill ``out`` with ``count`` elements from ``first`` on, exactly; ``bits`` and ``floats`` are one scratch tile."""
    if format_ == BF16:
        for k in range(count):
            bits[k] = np.uint32(slab.halves[first + k]) << np.uint32(16)
        for k in range(count):
            out[k] = floats[k]
    elif format_ == F16:
        widen_f16(slab.halves, first, count, bits, floats)
        for k in range(count):
            out[k] = floats[k]
    elif format_ == F32:
        for k in range(count):
            out[k] = slab.singles[first + k]
    else:
        for k in range(count):
            out[k] = slab.doubles[first + k]


@jit
def widen_f16(halves: Halves, first: Index, count: Index, bits: Bits, floats: Singles) -> None:
    """Move exponent and fraction into a float32 and mend the exponent's bias by a multiplication, which is exact."""
    for k in range(count):
        bits[k] = np.uint32(halves[first + k] & np.uint16(0x7FFF)) << np.uint32(13)
    for k in range(count):
        floats[k] *= np.float32(2.0**112)
    for k in range(count):
        half = halves[first + k]
        is_special = (half & np.uint16(0x7C00)) == np.uint16(0x7C00)
        special = np.uint32(0x7F80_0000) if is_special else np.uint32(0)
        bits[k] |= special | (np.uint32(half & np.uint16(0x8000)) << np.uint32(16))


@jit
def narrow(values: Values, count: Index, format_: int, bits: Bits, floats: Singles, out: Values, first: Index) -> bool:
    """Round ``count`` values once, to nearest even, into ``out`` from ``first`` on; return whether all are finite."""
    num_bad = 0
    if out.itemsize == 2:
        _to_single(values, count, bits, floats)
        if format_ == BF16:
            _round_to_bf16(bits, count, out, first)
        else:
            _round_to_f16(bits, floats, count, out, first)
        exponent = np.uint16(0x7F80) if format_ == BF16 else np.uint16(0x7C00)
        for k in range(count):
            num_bad += (np.uint16(out[first + k]) & exponent) == exponent
    else:
        for k in range(count):
            out[first + k] = values[k]
        for k in range(count):
            num_bad += not np.isfinite(out[first + k])
    return num_bad == 0


@jit
def _to_single(values: Values, count: Index, bits: Bits, floats: Singles) -> None:
    """Turn ``values`` into float32; float64 is rounded to odd, so that a second rounding does no harm.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd".
    """
    for k in range(count):
        floats[k] = values[k]
    if values.itemsize == 8:
        for k in range(count):
            back = np.float64(floats[k])
            if back != values[k] and np.isfinite(values[k]):
                if abs(back) > abs(values[k]):
                    bits[k] -= np.uint32(1)
                bits[k] |= np.uint32(1)


@jit
def _round_to_bf16(bits: Bits, count: Index, out: Values, first: Index) -> None:
    for k in range(count):
        is_nan = (bits[k] & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000)
        odd = (bits[k] >> np.uint32(16)) & np.uint32(1)
        rounded = (bits[k] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        out[first + k] = np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@jit
def _round_to_f16(bits: Bits, floats: Singles, count: Index, out: Values, first: Index) -> None:
    """Round normal numbers in integers, subnormal ones by adding 0.5, whose last place is theirs."""
    for k in range(count):
        sign = bits[k] & np.uint32(0x8000_0000)
        bits[k] ^= sign
        magnitude = bits[k]
        if magnitude >= np.uint32(0x4780_0000):  # 65,536 and more
            rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F80_0000) else np.uint32(0x7C00)
        elif magnitude < np.uint32(0x3880_0000):  # below 2**-14
            floats[k] += np.float32(0.5)
            rounded = bits[k] - np.uint32(0x3F00_0000)
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            rounded = (magnitude - np.uint32(0x3800_0000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        out[first + k] = np.uint16(rounded | (sign >> np.uint32(16)))


def count_losses(slab: Slab, firsts_M: Unsigned, formats_M: Unsigned, out: Bytes, dtype: str, counts: Counts) -> None:
    """Count what results lost to the range of their dtype, from the bits alone; added to what is there.

    Args:
        slab: holds the sources.
        firsts_M: where each source's part of the span begins, in its elements.
        formats_M: format of each source.
        out: the results.
        dtype: of the results.
        counts: zeros of which a source is not zero, and subnormal numbers.
    """
    width, exponents = WIDTHS[dtype], EXPONENTS[dtype]
    magnitudes, normal = np.uint64((1 << (8 * width - 1)) - 1), np.uint64(exponents & -exponents)
    _count_losses(slab, firsts_M, formats_M, out.view(f"u{width}"), magnitudes, normal, counts)


@jit
def _count_losses(
    slab: Slab,
    firsts_M: Unsigned,
    formats_M: Unsigned,
    out: Patterns,
    magnitudes: Index,
    smallest_normal: Index,
    counts: Counts,
) -> None:
    for k in range(np.uint64(len(out))):
        magnitude = np.uint64(out[k]) & magnitudes
        if magnitude == np.uint64(0):
            is_lost = False
            for m in range(len(firsts_M)):
                place = firsts_M[m] + k
                if formats_M[m] == F32:
                    is_lost |= slab.singles[place] != np.float32(0.0)
                elif formats_M[m] == F64:
                    is_lost |= slab.doubles[place] != 0.0
                else:
                    is_lost |= (slab.halves[place] & np.uint16(0x7FFF)) != np.uint16(0)
            counts[0] += is_lost
        elif magnitude < smallest_normal:
            counts[1] += 1


def first_nonfinite(raw: Bytes, dtype: str) -> int | None:
    """Return the index of the first NaN or infinity among the elements in ``raw``, None if there is none."""
    patterns = np.frombuffer(raw.tobytes(), dtype=f"<u{WIDTHS[dtype]}")
    bad = (patterns & EXPONENTS[dtype]) == EXPONENTS[dtype]
    return int(bad.argmax()) if bad.any() else None
