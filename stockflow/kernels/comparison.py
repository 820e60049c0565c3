"""What tells two tensors apart: bits, distances, roundings; one pass over both, tile by tile, in the first-level cache.

Numbers are as far apart, in roundings, as there are numbers of their format between them, plus one. Numbers that differ
count as zero roundings apart only where they are 0.0 and -0.0.

Shape suffixes: T elements of a tile, L lanes, C counts.
"""

import numpy as np

from stockflow.kernels.arrays import Bits, Floats, Halves, Patterns, Singles, Unsigned, Values
from stockflow.kernels.floats import BF16, TILE, Index, Slab, widen, widen_f16
from stockflow.kernels.jit import jit

LANES = 16
"""Partial sums, as in the Gram."""
RUN = 128
"""Elements whose squares are added up pairwise before they join the partial sums."""

DIFFERING, FIRST, LARGEST_AT, MOST_ROUNDINGS, SAME, ONE, TWO, MORE, NONFINITE = range(9)
"""What is counted, by its place: elements that differ, the first of them, where the largest change is, the most
roundings apart, how many elements are 0, 1, 2 and more roundings apart, how many are NaN or infinite on a side."""
NUM_COUNTS = 9
SQUARES_A, SQUARES_B, SQUARES_CHANGE, LARGEST = range(4)
"""What is summed, by its place; the last is a maximum."""
NUM_SUMS = 4


@jit
def compare(
    slab: Slab,
    firsts_2: Unsigned,
    formats_2: Unsigned,
    num_elems: Index,
    is_half: bool,
    exponent: Index,
    wide_2T: Values,
    patterns_2T: Patterns,
    sums: Floats,
    counts: Unsigned,
) -> None:
    """Compare a run of elements of two sources; ``sums`` and ``counts`` are overwritten.

    Pairs with NaN or infinity on a side are left out of sums and roundings; they are counted, and differ where their
    bits do. Indices are those within the run; where there is none it is ``num_elems``.

    Args:
        slab: holds both sources.
        firsts_2: where each begins, in its elements.
        formats_2: their formats.
        num_elems: how many.
        is_half: whether both have the same format of 16 bits; else they are compared in working precision.
        exponent: the bits that are all set in infinities and NaN of the format compared in.
        wide_2T: two tiles of working precision; overwritten.
        patterns_2T: the same memory as integers.
        sums: see ``SQUARES_A`` and its neighbours.
        counts: see ``DIFFERING`` and its neighbours.
    """
    zero, tile = np.uint64(0), np.uint64(TILE)
    a_T, b_T = wide_2T[0], wide_2T[1]
    bits_T = np.empty(TILE, np.uint32)
    floats_T = bits_T.view(np.float32)
    padded_2T, apart_halves_T = np.zeros((2, TILE), np.uint16), np.empty(TILE, np.uint16)
    apart_T = np.empty(TILE, patterns_2T.dtype)
    change_T = np.empty(TILE, np.float64)
    lanes_3L = np.zeros((3, LANES))
    _begin(sums, counts, num_elems)
    start = largest = zero
    while start < num_elems:
        count = min(tile, num_elems - start)
        first_a, first_b = firsts_2[0] + start, firsts_2[1] + start
        nonfinite_before = counts[NONFINITE]
        if count < tile:
            padded_2T[:] = np.uint16(0)
            wide_2T[:] = 0.0
        if is_half:
            left_T, right_T = padded_2T[0], padded_2T[1]
            if count == tile:
                left_T, right_T = slab.halves[first_a : first_a + tile], slab.halves[first_b : first_b + tile]
            else:
                for k in range(count):
                    left_T[k], right_T[k] = slab.halves[first_a + k], slab.halves[first_b + k]
            is_same = _tally(left_T, right_T, start, count, exponent, apart_halves_T, counts)
            _widen_halves(left_T, formats_2[0], patterns_2T[0], bits_T, floats_T)
            if not is_same:
                _widen_halves(right_T, formats_2[1], patterns_2T[1], bits_T, floats_T)
        else:
            widen(slab, first_a, count, formats_2[0], bits_T, floats_T, a_T)
            widen(slab, first_b, count, formats_2[1], bits_T, floats_T, b_T)
            is_same = _tally(patterns_2T[0], patterns_2T[1], start, count, exponent, apart_T, counts)
        if counts[NONFINITE] > nonfinite_before:
            _drop_nonfinite(a_T, a_T if is_same else b_T)
        _add_squares(a_T, lanes_3L[SQUARES_A])
        if is_same:
            _add_squares(a_T, lanes_3L[SQUARES_B])
        else:
            _add_squares(b_T, lanes_3L[SQUARES_B])
            _subtract(a_T, b_T, change_T)
            _add_squares(change_T, lanes_3L[SQUARES_CHANGE])
            largest = _find_largest(change_T, start, largest, counts)
        start += count
    _add_lanes(lanes_3L, sums)
    sums.view(np.uint64)[LARGEST] = largest


@jit
def _begin(sums: Floats, counts: Unsigned, num_elems: Index) -> None:
    sums[:] = 0.0
    counts[:] = np.uint64(0)
    counts[FIRST] = counts[LARGEST_AT] = num_elems


@jit
def _add_lanes(lanes_3L: Floats, sums: Floats) -> None:
    for i in range(3):
        for n in range(LANES):
            sums[i] += lanes_3L[i, n]


@jit
def _widen_halves(halves_T: Halves, format_: int, patterns_T: Patterns, bits_T: Bits, floats_T: Singles) -> None:
    """Fill a tile of float32, seen as ``patterns_T``, with numbers of 16 bits."""
    if format_ == BF16:
        for k in range(np.uint64(TILE)):
            patterns_T[k] = np.uint32(halves_T[k]) << np.uint32(16)
    else:
        widen_f16(halves_T, np.uint64(0), np.uint64(TILE), bits_T, floats_T)
        for k in range(np.uint64(TILE)):
            patterns_T[k] = bits_T[k]


@jit
def _tally(
    left_T: Patterns,
    right_T: Patterns,
    start: Index,
    count: Index,
    exponent: Index,
    apart_T: Patterns,
    counts: Unsigned,
) -> bool:
    """Count what differs in a tile, padded with zeros beyond ``count``; return whether its bits are the same."""
    tile, of = np.uint64(TILE), left_T.dtype.type
    difference = of(0)
    for k in range(tile):
        difference |= left_T[k] ^ right_T[k]
    if difference == 0 and _largest(left_T) < exponent:
        counts[SAME] += count
        return True
    largest, has_zeros = _measure(left_T, right_T, apart_T)
    if largest >= exponent:
        _tally_slowly(left_T, right_T, start, count, exponent, apart_T, counts)
        return bool(difference == 0)
    most = at_least_1 = at_least_2 = more = of(0)
    for k in range(tile):
        most = max(most, apart_T[k])
    for k in range(tile):
        at_least_1 = of(at_least_1 + of(apart_T[k] >= of(1)))
    if most > of(1):
        for k in range(tile):
            at_least_2 = of(at_least_2 + of(apart_T[k] >= of(2)))
        for k in range(tile):
            more = of(more + of(apart_T[k] >= of(3)))
    if counts[DIFFERING] == 0:
        _note_first(left_T, right_T, start, counts)
    counts[DIFFERING] += _count_differing(left_T, right_T) if has_zeros else np.uint64(at_least_1)
    counts[MOST_ROUNDINGS] = max(counts[MOST_ROUNDINGS], np.uint64(most))
    counts[SAME] += count - np.uint64(at_least_1)
    counts[ONE] += np.uint64(at_least_1) - np.uint64(at_least_2)
    counts[TWO] += np.uint64(at_least_2) - np.uint64(more)
    counts[MORE] += np.uint64(more)
    return False


@jit
def _count_differing(left_T: Patterns, right_T: Patterns) -> Index:
    differing = np.uint64(0)
    for k in range(np.uint64(TILE)):
        differing += np.uint64(left_T[k] != right_T[k])
    return differing


@jit
def _largest(patterns_T: Patterns) -> Index:
    """Return the largest magnitude, as a pattern."""
    of = patterns_T.dtype.type
    magnitude = of((of(1) << of(8 * patterns_T.itemsize - 1)) - of(1))
    largest = of(0)
    for k in range(np.uint64(TILE)):
        largest = max(largest, of(patterns_T[k] & magnitude))
    return np.uint64(largest)


@jit
def _measure(left_T: Patterns, right_T: Patterns, apart_T: Patterns) -> tuple[Index, bool]:
    """Fill ``apart_T`` with how many roundings two numbers are apart.

    Patterns of one sign are ordered like their numbers; 0.0 and -0.0 are the same number. No sum overflows.

    Returns:
        The largest magnitude, as a pattern, and whether 0.0 meets -0.0 somewhere.
    """
    of = left_T.dtype.type
    sign = of(of(1) << of(8 * left_T.itemsize - 1))
    magnitude = of(sign - of(1))
    largest = zeros = of(0)
    for k in range(np.uint64(TILE)):
        a, b = of(left_T[k] & magnitude), of(right_T[k] & magnitude)
        high, low = max(a, b), min(a, b)
        has_same_sign = of(left_T[k] ^ right_T[k]) < sign
        zeros |= of(0) if has_same_sign or high > of(0) else of(1)
        apart_T[k] = of(high - low) if has_same_sign else of(high + low)
        largest = max(largest, high)
    return np.uint64(largest), zeros != of(0)


@jit
def _tally_slowly(
    left_T: Patterns,
    right_T: Patterns,
    start: Index,
    count: Index,
    exponent: Index,
    apart_T: Patterns,
    counts: Unsigned,
) -> None:
    """Count what differs where some numbers are NaN or infinite."""
    magnitude = (np.uint64(1) << np.uint64(8 * left_T.itemsize - 1)) - np.uint64(1)
    for k in range(count):
        differs = left_T[k] != right_T[k]
        if differs and counts[DIFFERING] == 0:
            counts[FIRST] = start + k
        counts[DIFFERING] += np.uint64(differs)
        if np.uint64(left_T[k]) & magnitude >= exponent or np.uint64(right_T[k]) & magnitude >= exponent:
            counts[NONFINITE] += np.uint64(1)
            continue
        apart = np.uint64(apart_T[k])
        counts[MOST_ROUNDINGS] = max(counts[MOST_ROUNDINGS], apart)
        counts[np.uint64(SAME) + min(apart, np.uint64(3))] += np.uint64(1)


@jit
def _note_first(left_T: Patterns, right_T: Patterns, start: Index, counts: Unsigned) -> None:
    for k in range(np.uint64(TILE)):
        if left_T[k] != right_T[k]:
            counts[FIRST] = start + k
            break


@jit
def _drop_nonfinite(a_T: Values, b_T: Values) -> None:
    """Set pairs with NaN or infinity on a side to zero."""
    for k in range(np.uint64(TILE)):
        if not (np.isfinite(a_T[k]) and np.isfinite(b_T[k])):
            a_T[k] = b_T[k] = 0.0


@jit
def _subtract(a_T: Values, b_T: Values, change_T: Floats) -> None:
    for k in range(np.uint64(TILE)):
        change_T[k] = np.float64(b_T[k]) - np.float64(a_T[k])


@jit
def _add_squares(values_T: Values, sums_L: Floats) -> None:
    """Add the squares of a tile, in float64: eight per lane and run, added up pairwise."""
    for r in range(np.uint64(TILE // RUN)):
        first = r * np.uint64(RUN)
        x = values_T[first : first + np.uint64(RUN)]
        for n in range(LANES):
            a, b = np.float64(x[n]), np.float64(x[n + 16])
            c, d = np.float64(x[n + 32]), np.float64(x[n + 48])
            e, f = np.float64(x[n + 64]), np.float64(x[n + 80])
            g, h = np.float64(x[n + 96]), np.float64(x[n + 112])
            sums_L[n] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (g * g + h * h))


@jit
def _find_largest(change_T: Floats, start: Index, largest: Index, counts: Unsigned) -> Index:
    """Return the larger one of ``largest`` and the largest magnitude, as patterns, which sort alike; note its place."""
    patterns = change_T.view(np.uint64)
    magnitude = (np.uint64(1) << np.uint64(63)) - np.uint64(1)
    found = np.uint64(0)
    for k in range(np.uint64(TILE)):
        found = max(found, patterns[k] & magnitude)
    if found <= largest:
        return largest
    for k in range(np.uint64(TILE)):
        if patterns[k] & magnitude == found:
            counts[LARGEST_AT] = start + k
            break
    return found
