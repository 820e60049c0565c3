"""What elementwise methods need: task vectors of a span at full length, digits of magnitudes, votes, the update.

Shape suffixes: M sources (anchor first), N = M - 1, E elements of a span, D digits.
"""

import numpy as np

from stockflow.kernels.arrays import Counts, Patterns, Unsigned, Values
from stockflow.kernels.floats import TILE, Index, Slab, narrow, widen
from stockflow.kernels.jit import jit


@jit
def load_task_vectors(slab: Slab, firsts_M: Unsigned, formats_M: Unsigned, base_E: Values, deltas_NE: Values) -> None:
    """Fill ``base_E`` with w_0 and ``deltas_NE`` with ``w_i - w_0``, in the precision of these."""
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    num_elems = np.uint64(len(base_E))
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        base = base_E[start : start + count]
        widen(slab, firsts_M[0] + start, count, formats_M[0], bits, floats, base)
        for n in range(len(deltas_NE)):
            delta = deltas_NE[n, start : start + count]
            widen(slab, firsts_M[n + 1] + start, count, formats_M[n + 1], bits, floats, delta)
            for k in range(count):
                delta[k] -= base[k]
        start += count


def patterns(values: Values) -> Patterns:
    """Return the bits of floats as integers; without its sign bit a pattern sorts like the magnitude."""
    return values.view(np.uint32 if values.itemsize == 4 else np.uint64)


@jit
def count_digits(
    patterns_NE: Patterns, prefixes_N: Unsigned, shift: Index, digit_bits: Index, counts_ND: Counts
) -> None:
    """Count how often each digit occurs among the magnitudes that begin with a prefix.

    Args:
        patterns_NE: the bits of the task vectors.
        prefixes_N: per model, the digits above the one counted.
        shift: position of the digit, in bits.
        digit_bits: its width.
        counts_ND: the counts so far; grows.
    """
    sign = np.uint64(8 * patterns_NE.itemsize - 1)
    magnitude_mask = (np.uint64(1) << sign) - np.uint64(1)
    digit_mask = (np.uint64(1) << digit_bits) - np.uint64(1)
    for n in range(len(patterns_NE)):
        counts, prefix = counts_ND[n], prefixes_N[n]
        for k in range(np.uint64(patterns_NE.shape[1])):
            digits = (np.uint64(patterns_NE[n, k]) & magnitude_mask) >> shift
            if digits >> digit_bits == prefix:
                counts[digits & digit_mask] += 1


@jit
def keep_at_least(deltas_NE: Values, thresholds_N: Values) -> None:
    """Multiply what is smaller than the least magnitude that is kept by zero, so that NaN stays NaN.

    Args:
        deltas_NE: the task vectors; changed.
        thresholds_N: per model the least magnitude that is kept, NaN to keep none; magnitudes are rounded to the
            precision that they were ranked in, which is that of the thresholds.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    for n in range(len(deltas_NE)):
        delta, least = deltas_NE[n], thresholds_N[n]
        if least == 0:
            continue
        for k in range(np.uint64(len(delta))):
            delta[k] *= one if abs(thresholds_N.dtype.type(delta[k])) >= least else zero


@jit
def rescale(deltas_NE: Values, factors_N: Values) -> None:
    """Multiply each task vector by a factor of its own."""
    for n in range(len(deltas_NE)):
        delta, factor = deltas_NE[n], factors_N[n]
        for k in range(np.uint64(len(delta))):
            delta[k] *= factor


@jit
def consensus(
    deltas_NE: Values, weights_N: Values, elect: bool, divisor: Values, factor: Values, update_E: Values
) -> None:
    """Fill ``update_E`` with ``factor * sum_i m_i a_i d_i / Z``.

    Args:
        deltas_NE: the task vectors, what is dropped of them being zero.
        weights_N: in working precision.
        elect: whether only elements count (``m_i``) that have the elected sign, that of ``sum_i a_i d_i``: a sum of
            zero elects positive, zeros never agree.
        divisor: one number, Z; 0 for ``sum_i m_i a_i``, element by element, and 1 where that is 0.
        factor: one number.
        update_E: receives the result.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    num_elems = np.uint64(len(update_E))
    weighted_NT = np.empty((len(deltas_NE), TILE), deltas_NE.dtype)
    votes, agreed = np.empty(TILE, deltas_NE.dtype), np.empty(TILE, deltas_NE.dtype)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        votes[:] = zero
        for n in range(len(deltas_NE)):
            weighted, weight = weighted_NT[n], weights_N[n]
            for k in range(count):
                weighted[k] = deltas_NE[n, start + k] * weight
                votes[k] += weighted[k]
        totals = update_E[start : start + count]
        if elect:
            totals[:] = zero
            agreed[:] = zero
            for n in range(len(deltas_NE)):
                weighted, weight = weighted_NT[n], weights_N[n]
                for k in range(count):
                    is_positive = votes[k] >= zero
                    agrees = weighted[k] > zero if is_positive else weighted[k] < zero
                    totals[k] += weighted[k] * (one if agrees else zero)  # NaN times zero is NaN: it must not get lost
                    agreed[k] += weight if agrees else zero
        else:
            for k in range(count):
                totals[k] = votes[k]
        if divisor[0] == zero:
            for k in range(count):
                totals[k] /= one if agreed[k] == zero else agreed[k]
        else:
            for k in range(count):
                totals[k] /= divisor[0]
        for k in range(count):
            totals[k] *= factor[0]
        start += count


@jit
def add_update(base_E: Values, update_E: Values, out: Values, out_format: int) -> bool:
    """Write ``w_0 + update``, with the base's own bits where the update is zero; return whether all is finite."""
    values = np.empty(TILE, base_E.dtype)
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    num_elems = np.uint64(len(base_E))
    start = np.uint64(0)
    is_finite = True
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        for k in range(count):
            base, update = base_E[start + k], update_E[start + k]
            values[k] = base if update == 0 else base + update
        is_finite &= narrow(values, count, out_format, bits, floats, out, start)
        start += count
    return is_finite
