"""Ranks within rows, and draws with a probability that follows from them.

Shape suffixes: E elements of a block of whole rows, L elements of a row.
"""

import numpy as np

from stockflow.kernels.arrays import Bits, Unsigned, Values
from stockflow.kernels.doubled import pair_scaled
from stockflow.kernels.draws import fill_words
from stockflow.kernels.floats import TILE, Index
from stockflow.kernels.jit import jit
from stockflow.kernels.selection import patterns

_LOW = np.uint64(0xFFFF_FFFF)


def ascending(values_E: Values, row_elems: int) -> Unsigned:
    """Return the elements of each row by their magnitudes, the smallest first; the lower index counts as larger.

    An element is told by how far it is from the end of its row, in the low 32 bits: 0 for the last. The last row may
    be shorter.
    """
    order_E = np.empty(len(values_E), np.uint64)
    whole = len(values_E) // row_elems * row_elems
    for start, stop, length in ((0, whole, row_elems), (whole, len(values_E), len(values_E) - whole)):
        if start < stop:
            _sort_rows(values_E[start:stop], order_E[start:stop], length)
    return order_E


def _sort_rows(values_E: Values, order_E: Unsigned, row_elems: int) -> None:
    if values_E.itemsize == 4:  # magnitude and place fit one number, and no two are equal
        _pack(patterns(values_E), np.uint64(row_elems), order_E)
        order_E.reshape(-1, row_elems).sort(axis=1)
        return
    backwards = np.abs(values_E).view(np.uint64).reshape(-1, row_elems)[:, ::-1]
    order_E.reshape(-1, row_elems)[:] = np.argsort(backwards, axis=1, kind="stable")


@jit
def _pack(patterns_E: Unsigned, row_elems: Index, keys_E: Unsigned) -> None:
    """Put magnitude and distance from the end of the row into one number each."""
    for first in range(np.uint64(0), np.uint64(len(keys_E)), row_elems):
        for k in range(row_elems):
            magnitude = np.uint64(patterns_E[first + k]) & np.uint64(0x7FFF_FFFF)
            keys_E[first + k] = magnitude << np.uint64(32) | (row_elems - np.uint64(1) - k)


@jit
def draw_ranked(
    order_E: Unsigned,
    row_elems: Index,
    start: Index,
    key: Unsigned,
    least: float,
    width: float,
    inflated: bool,
    factors_E: Values,
) -> int:
    """Fill ``factors_E`` with 0 for what is not kept, and 1, or one over its probability, for what is.

    Args:
        order_E: what ``ascending`` returns.
        row_elems: L; the last row may be shorter.
        start: number of the first element, by which it is drawn for.
        key: what is drawn by.
        least: probability of the smallest element of a row.
        width: how much greater that of the largest is; a row of one element has the middle.
        inflated: whether factors are one over the probability.
        factors_E: receives the factors.

    Returns:
        How many elements are kept.
    """
    num_elems = np.uint64(len(factors_E))
    limits_E = np.empty(num_elems, np.uint32)
    table_limits, table_factors = np.empty(row_elems, np.uint32), np.empty(row_elems, factors_E.dtype)
    first, known = np.uint64(0), np.uint64(0)
    while first < num_elems:
        length = min(row_elems, num_elems - first)
        if length != known:
            _tabulate(length, least, width, inflated, table_limits, table_factors)
            known = length
        last = first + length - np.uint64(1)
        for rank in range(length):
            place = last - (order_E[first + rank] & _LOW)
            limits_E[place], factors_E[place] = table_limits[rank], table_factors[rank]
        first += length
    return _draw(limits_E, start, key, factors_E)


@jit
def _draw(limits_E: Bits, start: Index, key: Unsigned, factors_E: Values) -> int:
    """Put 0 for the factors of elements whose words are above their limits; return how many are not."""
    num_elems, skipped = np.uint64(len(factors_E)), start % np.uint64(4)
    words_T = np.empty(TILE, np.uint32)
    num_kept, done = np.uint32(0), np.uint64(0)
    while done < num_elems:
        fill_words(words_T, (start + done) // np.uint64(4), key)
        shift = skipped if done == 0 else np.uint64(0)
        count = min(np.uint64(TILE) - shift, num_elems - done)
        for k in range(count):
            is_kept = words_T[k + shift] <= limits_E[done + k]
            num_kept += np.uint32(is_kept)
            factors_E[done + k] = factors_E[done + k] if is_kept else factors_E.dtype.type(0.0)
        done += count
    return int(num_kept)


@jit
def _tabulate(length: Index, least: float, width: float, inflated: bool, limits_L: Bits, factors_L: Values) -> None:
    """Fill in, per rank in a row, the greatest word for which an element is kept, and its factor."""
    slope = width / (np.float64(length) - 1.0) if length > 1 else 0.0
    lowest = least if length > 1 else least + width / 2.0
    for rank in range(length):
        probability = lowest + slope * np.float64(rank)
        limits_L[rank] = np.uint32(np.ceil(probability * 4294967296.0) - 1.0)
        factors_L[rank] = 1.0 / probability if inflated else 1.0


@jit
def multiply(values_E: Values, factors_E: Values) -> None:
    """Multiply elements by a factor each; times zero, NaN stays NaN."""
    for k in range(np.uint64(len(values_E))):
        values_E[k] *= factors_E[k]


@jit
def multiply_exactly(highs_E: Values, lows_E: Values, factors_E: Values) -> None:
    """Multiply pairs by a factor each; times zero, NaN stays NaN."""
    for k in range(np.uint64(len(highs_E))):
        if factors_E[k] == 0.0 or factors_E[k] == 1.0:
            highs_E[k] *= factors_E[k]
        else:
            highs_E[k], lows_E[k] = pair_scaled(highs_E[k], lows_E[k], factors_E[k])
