"""Changes that follow from the task vectors of an element alone: means over the models that moved it, limited steps.

Shape suffixes: N task vectors, E elements of a block, T of a tile.
"""

import numpy as np

from stockflow.kernels.arrays import Counts, Floats, Values
from stockflow.kernels.doubled import pair_added, pair_quotient, pair_scaled
from stockflow.kernels.floats import TILE
from stockflow.kernels.jit import jit


@jit
def count_active(deltas_NE: Values, epsilon: Values, shared_N: Counts, unique_N: Counts) -> None:
    """Count the elements that each model moves beside others, and those that it alone moves.

    Args:
        deltas_NE: the task vectors.
        epsilon: one number; what is larger in size moves an element.
        shared_N: the counts so far; grows.
        unique_N: the counts so far; grows.
    """
    num_elems = np.uint64(deltas_NE.shape[1])
    active_T = np.empty(TILE, np.uint32)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        active_T[:] = 0
        for n in range(len(deltas_NE)):
            delta = deltas_NE[n, start : start + count]
            for k in range(count):
                active_T[k] += np.uint32(abs(delta[k]) > epsilon[0])
        for n in range(len(deltas_NE)):
            delta = deltas_NE[n, start : start + count]
            num_shared, num_unique = np.uint32(0), np.uint32(0)
            for k in range(count):
                is_active = abs(delta[k]) > epsilon[0]
                num_shared += np.uint32(is_active and active_T[k] > 1)
                num_unique += np.uint32(is_active and active_T[k] == 1)
            shared_N[n] += num_shared
            unique_N[n] += num_unique
        start += count


@jit
def average_active(deltas_NE: Values, epsilon: Values, unique_N: Values, update_E: Values) -> None:
    """Fill ``update_E`` with the mean of the task vectors that move an element, times a factor where it is one only.

    Args:
        deltas_NE: the task vectors.
        epsilon: one number; what is larger in size moves an element.
        unique_N: the factor of each model.
        update_E: receives the result.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    num_elems = np.uint64(len(update_E))
    counts_T, factors_T = np.empty(TILE, deltas_NE.dtype), np.empty(TILE, deltas_NE.dtype)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        totals = update_E[start : start + count]
        totals[:] = zero
        counts_T[:] = zero
        factors_T[:] = zero
        for n in range(len(deltas_NE)):
            delta, factor = deltas_NE[n, start : start + count], unique_N[n]
            for k in range(count):
                active = one if abs(delta[k]) > epsilon[0] else zero
                totals[k] += delta[k] * active  # NaN times zero is NaN: it must not get lost
                counts_T[k] += active
                factors_T[k] += active * factor
        for k in range(count):
            totals[k] *= factors_T[k] if counts_T[k] == one else one
            totals[k] /= max(counts_T[k], one)
        start += count


@jit
def average_active_exactly(
    deltas_NE: Floats, lows_NE: Floats, epsilon: Floats, unique_N: Floats, update_2E: Floats
) -> None:
    """Fill ``update_2E`` with the high and low parts of what ``average_active`` computes."""
    average_active(deltas_NE, epsilon, unique_N, update_2E[0])
    update_2E[1] = 0.0
    for k in range(np.uint64(deltas_NE.shape[1])):
        total, total_low, count, factor = 0.0, 0.0, 0.0, 1.0
        for n in range(len(deltas_NE)):
            if abs(deltas_NE[n, k]) > epsilon[0]:
                total, total_low = pair_added(total, total_low, deltas_NE[n, k], lows_NE[n, k])
                count, factor = count + 1.0, unique_N[n]
        if count == 1.0:
            total, total_low = pair_scaled(total, total_low, factor)
        elif count > 1.0:
            total, total_low = pair_quotient(total, total_low, count, 0.0)
        if np.isfinite(total + total_low) and np.isfinite(update_2E[0, k]):
            update_2E[0, k], update_2E[1, k] = total, total_low


@jit
def step(delta_E: Values, most: Values, least_size: Values, update_E: Values) -> None:
    """Fill ``update_E`` with ``d min(t / max(|d|, s), 1)``, t and s one number each, t not negative."""
    slope = min(most[0] / least_size[0], least_size.dtype.type(1.0))
    for k in range(np.uint64(len(update_E))):
        delta = delta_E[k]
        size = abs(delta)
        limited = most[0] if delta > 0 else -most[0]
        near = (delta if size <= most[0] else limited) if size > least_size[0] else delta * slope
        update_E[k] = near if np.isfinite(delta) else delta


@jit
def step_exactly(delta_E: Floats, low_E: Floats, most: Floats, least_size: Floats, update_2E: Floats) -> None:
    """Fill ``update_2E`` with the high and low parts of what ``step`` computes."""
    step(delta_E, most, least_size, update_2E[0])
    update_2E[1] = 0.0
    for k in range(np.uint64(len(delta_E))):
        size, high, low = abs(delta_E[k]), delta_E[k], low_E[k]
        if size > max(most[0], least_size[0]):
            continue
        if size <= least_size[0] and most[0] < least_size[0]:
            high, low = pair_scaled(high, low, most[0])
            high, low = pair_quotient(high, low, least_size[0], 0.0)
        if np.isfinite(high + low):
            update_2E[0, k], update_2E[1, k] = high, low
