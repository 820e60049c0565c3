"""What elementwise methods need: task vectors of a block at full length, votes, the update.

Shape suffixes: M sources (anchor first), N = M - 1, E elements of a block.
"""

import numpy as np

from stockflow.kernels.arrays import Unsigned, Values
from stockflow.kernels.floats import TILE, Slab, narrow, widen
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


@jit
def consensus(
    deltas_NE: Values,
    ballots_N: Values,
    weights_N: Values,
    counted_N: Values,
    elect: bool,
    divisor: Values,
    factor: Values,
    update_E: Values,
) -> None:
    """Fill ``update_E`` with ``factor * sum_i m_i b_i d_i / Z``.

    Args:
        deltas_NE: the task vectors, what is dropped of them being zero.
        ballots_N: ``v_i``, in working precision like all numbers here.
        weights_N: ``b_i``.
        counted_N: ``a_i``, what a task vector adds to Z where it counts.
        elect: whether only elements count (``m_i``) for which ``v_i d_i`` has the elected sign, that of
            ``sum_i v_i d_i``: a sum of zero elects positive, zeros never agree.
        divisor: two numbers. Z is the first; where that is 0, it is ``sum_i m_i a_i``, element by element: at
            least the second, or 1 for 0 where that is 0.
        factor: one number.
        update_E: receives the result.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    num_elems = np.uint64(len(update_E))
    votes, agreed = np.empty(TILE, deltas_NE.dtype), np.empty(TILE, deltas_NE.dtype)
    start = np.uint64(0)
    while start < num_elems:
        count = min(np.uint64(TILE), num_elems - start)
        totals = update_E[start : start + count]
        totals[:] = zero
        if elect:
            votes[:] = zero
            agreed[:] = zero
            for n in range(len(deltas_NE)):
                delta, ballot = deltas_NE[n, start : start + count], ballots_N[n]
                for k in range(count):
                    votes[k] += delta[k] * ballot
            for k in range(count):
                votes[k] = one if votes[k] >= zero else -one
            for n in range(len(deltas_NE)):
                delta = deltas_NE[n, start : start + count]
                ballot, weight, counted = ballots_N[n], weights_N[n], counted_N[n]
                for k in range(count):
                    agrees = one if votes[k] * (delta[k] * ballot) > zero else zero
                    totals[k] += delta[k] * weight * agrees  # NaN times zero is NaN: it must not get lost
                    agreed[k] += counted * agrees
        else:
            for n in range(len(deltas_NE)):
                delta, weight = deltas_NE[n, start : start + count], weights_N[n]
                for k in range(count):
                    totals[k] += delta[k] * weight
        if divisor[0] != zero:
            for k in range(count):
                totals[k] /= divisor[0]
        elif divisor[1] != zero:
            for k in range(count):
                totals[k] /= max(agreed[k], divisor[1])
        else:
            for k in range(count):
                totals[k] /= one if agreed[k] == zero else agreed[k]
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
