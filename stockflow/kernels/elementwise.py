"""What elementwise methods need: task vectors of a span at full length, digits of magnitudes, votes, the update.

Shape suffixes: M sources (anchor first), N = M - 1, E elements of a span, D digits.
"""

import numpy as np

from stockflow.kernels.arrays import Counts, Patterns, Unsigned, Values
from stockflow.kernels.floats import TILE, Index, Slab, narrow, widen
from stockflow.kernels.jit import jit


@jit
def load_task_vectors(slab: Slab, firsts_M: Unsigned, formats_M: Unsigned, base_E: Values, deltas_NE: Values) -> None:
    """Fill ``base_E`` with w_0 and ``deltas_NE`` with ``w_i - w_0``, in working precision."""
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
    """Return the bits of working precision as integers; without its sign bit a pattern sorts like the magnitude."""
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
def elect_and_average(
    deltas_NE: Values,
    patterns_NE: Patterns,
    weights_N: Values,
    thresholds_N: Unsigned,
    factor: Values,
    normalize: bool,
    update_E: Values,
) -> None:
    """Fill ``update_E`` with the sum of what agrees with the elected sign, divided by the weights that do.

    Args:
        deltas_NE: the task vectors.
        patterns_NE: their bits.
        weights_N: in working precision.
        thresholds_N: bits of the least magnitude that is kept, per model.
        factor: one number, which multiplies the result.
        normalize: whether to divide.
        update_E: receives the result.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    num_elems = np.uint64(len(update_E))
    weighted_NT = np.empty((len(deltas_NE), TILE), deltas_NE.dtype)
    votes, divisors = np.empty(TILE, deltas_NE.dtype), np.empty(TILE, deltas_NE.dtype)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        votes[:] = zero
        for n in range(len(deltas_NE)):
            _weigh_kept(
                deltas_NE[n], patterns_NE[n], start, count, weights_N[n], thresholds_N[n], weighted_NT[n], votes
            )
        totals = update_E[start : start + count]
        totals[:] = zero
        divisors[:] = zero
        for n in range(len(deltas_NE)):
            weighted, weight = weighted_NT[n], weights_N[n]
            for k in range(count):
                is_positive = votes[k] >= zero
                agrees = weighted[k] > zero if is_positive else weighted[k] < zero
                totals[k] += weighted[k] * (one if agrees else zero)  # NaN times zero is NaN: it must not get lost
                divisors[k] += weight if agrees else zero
        if normalize:
            for k in range(count):
                totals[k] /= one if divisors[k] == zero else divisors[k]
        for k in range(count):
            totals[k] *= factor[0]
        start += count


@jit
def _weigh_kept(
    delta: Values,
    pattern: Patterns,
    start: Index,
    count: Index,
    weight: float,
    threshold: Index,
    weighted: Values,
    votes: Values,
) -> None:
    """Fill ``weighted`` with ``weight * delta`` where the magnitude is kept, else 0, and add it to ``votes``."""
    zero, one = delta.dtype.type(0.0), delta.dtype.type(1.0)
    magnitude_mask = pattern.dtype.type((np.uint64(1) << np.uint64(8 * pattern.itemsize - 1)) - np.uint64(1))
    is_any_kept = threshold <= magnitude_mask
    least = pattern.dtype.type(threshold)
    for k in range(count):
        magnitude = pattern.dtype.type(pattern[start + k] & magnitude_mask)
        weighted[k] = delta[start + k] * weight * (one if magnitude >= least and is_any_kept else zero)
    for k in range(count):
        votes[k] += weighted[k]


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
