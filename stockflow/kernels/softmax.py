"""How far two rows of numbers are apart, taken as distributions: divergences of softmax, in float64, alike everywhere.

Exponentials and logarithms are polynomials, written out, because those of the system's library differ between systems.

Shape suffixes: E elements of a block of whole rows, L elements of a row, R rows.
"""

import numpy as np

from stockflow.kernels.arrays import Floats, Values
from stockflow.kernels.floats import Index
from stockflow.kernels.jit import jit

LANES = 16
"""Partial sums; part of the numerics."""
TERMS = 14
"""Of the series of the exponential up to half of log 2: what is left out is below 1e-17."""
_LOG2_HIGH, _LOG2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_INVERSE_LOG2 = 1.4426950408889634
_SHIFT = 6755399441055744.0
"""1.5 * 2**52: a number below 2**51 that is added to it is rounded to an integer, whose bits are the last ones."""
_ROOT_HALF = 0.7071067811865476


@jit
def exponentials(values: Floats, out: Floats) -> None:
    """Fill ``out`` with the exponentials of numbers that are not positive; below -700 they are 0."""
    shifted = np.empty(len(values))
    bits = shifted.view(np.uint64)
    for k in range(np.uint64(len(values))):
        shifted[k] = values[k] * _INVERSE_LOG2 + _SHIFT
    for k in range(np.uint64(len(values))):
        times = shifted[k] - _SHIFT
        rest = (values[k] - times * _LOG2_HIGH) - times * _LOG2_LOW
        total = 1.0 / 6227020800.0
        total = total * rest + 1.0 / 479001600.0
        total = total * rest + 1.0 / 39916800.0
        total = total * rest + 1.0 / 3628800.0
        total = total * rest + 1.0 / 362880.0
        total = total * rest + 1.0 / 40320.0
        total = total * rest + 1.0 / 5040.0
        total = total * rest + 1.0 / 720.0
        total = total * rest + 1.0 / 120.0
        total = total * rest + 1.0 / 24.0
        total = total * rest + 1.0 / 6.0
        total = total * rest + 0.5
        total = total * rest + 1.0
        out[k] = total * rest + 1.0
    for k in range(np.uint64(len(values))):
        bits[k] = (bits[k] + np.uint64(1023)) << np.uint64(52)  # two to the power
    for k in range(np.uint64(len(values))):
        out[k] = out[k] * shifted[k] if values[k] >= -700.0 else values[k] * 0.0  # NaN stays NaN


@jit
def logarithms(values: Floats, out: Floats) -> None:
    """Fill ``out`` with the logarithms of positive numbers that are neither subnormal nor infinite."""
    fractions = values.copy()
    bits = fractions.view(np.uint64)
    for k in range(np.uint64(len(values))):
        out[k] = np.float64(np.int64(bits[k] >> np.uint64(52)) - 1023)
        bits[k] = (bits[k] & np.uint64(0xF_FFFF_FFFF_FFFF)) | np.uint64(0x3FF0_0000_0000_0000)
    for k in range(np.uint64(len(values))):
        is_large = fractions[k] > 2.0 * _ROOT_HALF
        power = out[k] + 1.0 if is_large else out[k]
        fraction = fractions[k] * 0.5 if is_large else fractions[k]
        s = (fraction - 1.0) / (fraction + 1.0)
        z = s * s
        total = 1.0 / 23.0
        total = total * z + 1.0 / 21.0
        total = total * z + 1.0 / 19.0
        total = total * z + 1.0 / 17.0
        total = total * z + 1.0 / 15.0
        total = total * z + 1.0 / 13.0
        total = total * z + 1.0 / 11.0
        total = total * z + 1.0 / 9.0
        total = total * z + 1.0 / 7.0
        total = total * z + 1.0 / 5.0
        total = total * z + 1.0 / 3.0
        near = 2.0 * s + 2.0 * s * (z * total)
        out[k] = power * _LOG2_HIGH + (near + power * _LOG2_LOW)


@jit
def _summed(values: Floats) -> float:
    """Return a sum in which element k belongs to partial sum ``k % 16``."""
    lanes = np.zeros(LANES)
    whole = len(values) // LANES * LANES
    for start in range(np.uint64(0), np.uint64(whole), np.uint64(LANES)):
        for n in range(np.uint64(LANES)):
            lanes[n] += values[start + n]
    for k in range(whole, len(values)):
        lanes[k - whole] += values[k]
    total = 0.0
    for n in range(LANES):
        total += lanes[n]
    return total


@jit
def _softmax(values_L: Floats, shifted_L: Floats, out_L: Floats) -> None:
    most = values_L[0]
    for k in range(np.uint64(len(values_L))):
        most = max(most, values_L[k])
    for k in range(np.uint64(len(values_L))):
        shifted_L[k] = values_L[k] - most
    exponentials(shifted_L, out_L)
    total = _summed(out_L)
    for k in range(np.uint64(len(values_L))):
        out_L[k] = out_L[k] / total


@jit
def divergences(base_E: Floats, delta_E: Floats, row_elems: Index, floor: float, out_R: Floats) -> None:
    """Fill ``out_R`` with ``sum p log(p / q)`` per row: p and q the softmax of the model and of the base, plus a floor.

    Args:
        base_E: the base.
        delta_E: the model less the base.
        row_elems: L; the last row may be shorter.
        floor: what is added to each probability.
        out_R: receives the divergences.
    """
    for r in range(np.uint64(len(out_R))):
        first = r * row_elems
        stop = min(first + row_elems, np.uint64(len(base_E)))
        base_L, model_L = base_E[first:stop], base_E[first:stop] + delta_E[first:stop]
        p_L, q_L, ratios_L, logs_L = (
            np.empty_like(base_L),
            np.empty_like(base_L),
            np.empty_like(base_L),
            np.empty_like(base_L),
        )
        _softmax(model_L, ratios_L, p_L)
        _softmax(base_L, ratios_L, q_L)
        for k in range(np.uint64(len(base_L))):
            p_L[k] += floor
            ratios_L[k] = p_L[k] / (q_L[k] + floor)
        logarithms(ratios_L, logs_L)
        for k in range(np.uint64(len(base_L))):
            logs_L[k] *= p_L[k]
        out_R[r] = _summed(logs_L)


@jit
def scores(delta_E: Floats, divergences_R: Floats, row_elems: Index, out_E: Floats) -> None:
    """Fill ``out_E`` with the size of each element times the divergence of its row."""
    for r in range(np.uint64(len(divergences_R))):
        first = r * row_elems
        divergence = divergences_R[r]
        for k in range(first, min(first + row_elems, np.uint64(len(delta_E)))):
            out_E[k] = abs(delta_E[k]) * divergence


@jit
def keep_above(delta_E: Values, scores_E: Floats, threshold: float) -> int:
    """Multiply by zero what scores less than the threshold, so that NaN stays NaN; return how many are kept."""
    zero, one = delta_E.dtype.type(0.0), delta_E.dtype.type(1.0)
    num_kept = 0
    for k in range(np.uint64(len(delta_E))):
        is_kept = scores_E[k] >= threshold
        delta_E[k] *= one if is_kept else zero
        num_kept += int(is_kept)
    return num_kept
