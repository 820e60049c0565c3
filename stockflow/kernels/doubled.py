"""Results of F64: sums of products in pairs of float64, high part and low part, together some 105 bits; rounded once.

Operations are written out one by one and in this order, so that other devices can repeat them bit for bit. Where a
pair overflows (numbers beyond 1e300, infinities, NaN) the result is that of plain float64.

Shape suffixes: M sources (anchor first), N = M - 1, G groups, E elements of a span, T of a tile.

Source: Dekker 1971, "A floating-point technique for extending the available precision"; Hida, Li, Bailey 2001,
"Algorithms for quad-double precision floating point arithmetic".
"""

import numpy as np

from stockflow.kernels.arrays import Floats, Unsigned
from stockflow.kernels.elementwise import consensus
from stockflow.kernels.floats import TILE, Index, Slab, widen
from stockflow.kernels.jit import jit

Pair = tuple[float, float]

SPLITTER = 2.0**27 + 1.0
"""Cuts a float64 into two halves whose products are exact."""


@jit
def two_sum(a: float, b: float) -> Pair:
    """Return ``a + b`` exactly."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@jit
def two_product(a: float, b: float) -> Pair:
    """Return ``a * b`` exactly."""
    product = a * b
    cut_a, cut_b = SPLITTER * a, SPLITTER * b
    high_a, high_b = cut_a - (cut_a - a), cut_b - (cut_b - b)
    low_a, low_b = a - high_a, b - high_b
    return product, ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


@jit
def pair_scaled(high: float, low: float, factor: float) -> Pair:
    """Return a pair times a number."""
    product, error = two_product(high, factor)
    return product, error + low * factor


@jit
def pair_added(high: float, low: float, more: float, more_low: float) -> Pair:
    """Return the sum of two pairs."""
    total, error = two_sum(high, more)
    error += low + more_low
    high = total + error
    return high, error - (high - total)


@jit
def pair_quotient(high: float, low: float, divisor: float, divisor_low: float) -> Pair:
    """Return a pair over another."""
    first = high / divisor
    product, error = two_product(first, divisor)
    error += first * divisor_low
    rest, rest_low = pair_added(high, low, -product, -error)
    second = (rest + rest_low) / divisor
    quotient = first + second
    return quotient, second - (quotient - first)


@jit
def _rounded(high: float, low: float, plain: float) -> float:
    """Return a pair as one number; ``plain`` where it overflowed, and for its sign where both are zero."""
    exact = high + low
    return plain if not np.isfinite(exact) or (exact == 0.0 and plain == 0.0) else exact


@jit
def combine(
    slab: Slab,
    firsts_M: Unsigned,
    formats_M: Unsigned,
    group_elems: Index,
    weights_GM: Floats,
    anchored: bool,
    out: Floats,
) -> bool:
    """Write ``w_0 + sum_i c_i (w_i - w_0)`` or ``sum_i c_i w_i``, rounded once; return whether all are finite.

    Arguments are those of ``linear.combine_anchored`` and ``combine_plain``; the signs of zeros are theirs.
    """
    num_groups = len(weights_GM)
    anchor, wide = np.empty(TILE), np.empty(TILE)
    highs, lows, plains = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    first_weighted = 1 if anchored else 0
    num_bad = 0
    for g in range(np.uint64(num_groups)):
        start, stop = g * group_elems, (g + np.uint64(1)) * group_elems
        while start < stop:
            count = min(np.uint64(TILE), stop - start)
            anchor[:] = highs[:] = lows[:] = 0.0
            plains[:] = -0.0  # adding to it keeps the sign of a zero
            if anchored:
                widen(slab, firsts_M[0] + start, count, formats_M[0], bits, floats, anchor)
            for m in range(first_weighted, len(firsts_M)):
                widen(slab, firsts_M[m] + start, count, formats_M[m], bits, floats, wide)
                weight = weights_GM[g, m - first_weighted]
                for k in range(count):
                    term, term_low = wide[k], 0.0
                    if anchored:
                        term, term_low = two_sum(anchor[k], -wide[k])
                    plains[k] += term * weight
                    term, term_low = pair_scaled(term, term_low, weight)
                    highs[k], lows[k] = pair_added(highs[k], lows[k], term, term_low)
            for k in range(count):
                high, low, plain = highs[k], lows[k], plains[k]
                if anchored:
                    high, error = two_sum(anchor[k], -high)
                    low, plain = error - low, anchor[k] - (plain + 0.0)
                out[start + k] = _rounded(high, low, plain)
                num_bad += not np.isfinite(out[start + k])
            start += count
    return num_bad == 0


@jit
def load_task_vectors(
    slab: Slab, firsts_M: Unsigned, formats_M: Unsigned, base_E: Floats, deltas_NE: Floats, lows_NE: Floats
) -> None:
    """Fill ``base_E`` with w_0, and ``deltas_NE`` and ``lows_NE`` with the high and low parts of ``w_i - w_0``."""
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    wide = np.empty(TILE)
    num_elems = np.uint64(len(base_E))
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        base = base_E[start : start + count]
        widen(slab, firsts_M[0] + start, count, formats_M[0], bits, floats, base)
        for n in range(len(deltas_NE)):
            widen(slab, firsts_M[n + 1] + start, count, formats_M[n + 1], bits, floats, wide)
            for k in range(count):
                high, low = two_sum(wide[k], -base[k])
                deltas_NE[n, start + k], lows_NE[n, start + k] = high, low
        start += count


@jit
def consensus_exactly(
    deltas_NE: Floats,
    lows_NE: Floats,
    ballots_N: Floats,
    weights_N: Floats,
    counted_N: Floats,
    elect: bool,
    divisor: Floats,
    factor: Floats,
    update_2E: Floats,
) -> None:
    """Fill ``update_2E`` with the high and low parts of what ``consensus`` computes."""
    consensus(deltas_NE, ballots_N, weights_N, counted_N, elect, divisor, factor, update_2E[0])
    update_2E[1] = 0.0
    for k in range(np.uint64(deltas_NE.shape[1])):
        sign = 0.0
        if elect:
            vote, vote_low = 0.0, 0.0
            for n in range(len(deltas_NE)):
                if deltas_NE[n, k] != 0.0:
                    weighted, low = pair_scaled(deltas_NE[n, k], lows_NE[n, k], ballots_N[n])
                    vote, vote_low = pair_added(vote, vote_low, weighted, low)
            sign = 1.0 if vote >= 0.0 else -1.0
        total, total_low, agreed, agreed_low = 0.0, 0.0, 0.0, 0.0
        for n in range(len(deltas_NE)):
            if deltas_NE[n, k] != 0.0 and (not elect or sign * (deltas_NE[n, k] * ballots_N[n]) > 0.0):
                weighted, low = pair_scaled(deltas_NE[n, k], lows_NE[n, k], weights_N[n])
                total, total_low = pair_added(total, total_low, weighted, low)
                agreed, agreed_low = pair_added(agreed, agreed_low, counted_N[n], 0.0)
        if divisor[0] != 0.0:
            agreed, agreed_low = divisor[0], 0.0
        elif divisor[1] != 0.0 and agreed < divisor[1]:
            agreed, agreed_low = divisor[1], 0.0
        if agreed not in (0.0, 1.0) or agreed_low != 0.0:
            total, total_low = pair_quotient(total, total_low, agreed, agreed_low)
        total, total_low = pair_scaled(total, total_low, factor[0])
        if np.isfinite(total + total_low) and np.isfinite(update_2E[0, k]):
            update_2E[0, k], update_2E[1, k] = total, total_low


@jit
def add_update(base_E: Floats, update_2E: Floats, out: Floats) -> bool:
    """Write ``w_0 + update``, with the base's own bits where the update is zero; return whether all is finite."""
    num_bad = 0
    for k in range(np.uint64(len(base_E))):
        base, update = base_E[k], update_2E[0, k]
        if update == 0.0:
            out[k] = base
        else:
            high, error = two_sum(base, update)
            out[k] = _rounded(high, error + update_2E[1, k], base + update)
        num_bad += not np.isfinite(out[k])
    return num_bad == 0
