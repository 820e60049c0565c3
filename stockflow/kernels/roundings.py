"""How far apart two results are, counted in representable numbers, and how large the steps between those are.

Shape suffixes: E elements, K candidates, X exponents.
"""

import numpy as np

from stockflow.kernels.arrays import Bytes, Counts, Floats, Patterns
from stockflow.kernels.jit import jit

_SHAPES = {"BF16": (8, 7, np.uint16), "F16": (5, 10, np.uint16), "F32": (8, 23, np.uint32), "F64": (11, 52, np.uint64)}
"""bits of exponent and fraction, and what holds them"""


def patterns_in(raw: Bytes, dtype: str) -> Patterns:
    """Return the bits of the elements in ``raw``."""
    return raw.view(_SHAPES[dtype][2])


def fraction_bits(dtype: str) -> int:
    """Return the width of the fraction, which is where the exponent begins."""
    return _SHAPES[dtype][1]


def squared_steps(dtype: str, out_dtype: str) -> Floats:
    """Return the squared distance between neighbours in ``out_dtype``, by exponent field of an element of ``dtype``.

    Infinities and NaN count as 0.
    """
    exponent_bits, *_ = _SHAPES[dtype]
    out_exponent_bits, out_fraction, _ = _SHAPES[out_dtype]
    fields_X = np.arange(2**exponent_bits)
    exponents_X = np.maximum(fields_X, 1) - (2 ** (exponent_bits - 1) - 1)
    least = 2 - 2 ** (out_exponent_bits - 1)
    with np.errstate(over="ignore", under="ignore"):
        steps_X: Floats = 4.0 ** (np.maximum(exponents_X, least) - out_fraction).astype(np.float64)
    steps_X[-1] = 0.0
    return steps_X


@jit
def sum_of_steps(patterns_E: Patterns, shift: int, steps_X: Floats) -> float:
    """Return the sum of ``steps_X`` over the exponent fields, which begin at bit ``shift``."""
    mask = np.uint64(len(steps_X) - 1)
    total = 0.0
    for k in range(len(patterns_E)):
        total += steps_X[(np.uint64(patterns_E[k]) >> np.uint64(shift)) & mask]
    return total


@jit
def count_roundings(
    merged_E: Patterns,
    candidates_KE: Patterns,
    equal_K: Counts,
    roundings_K: Floats,
    most_K: Floats,
    nearer_KK: Counts,
) -> None:
    """Compare one result with several candidates, element by element; everything is added to what is there.

    Args:
        merged_E: the bits of the result.
        candidates_KE: those of the candidates.
        equal_K: elements that are the same number; +0 and -0 are.
        roundings_K: representable numbers between result and candidate, summed up.
        most_K: the largest of these.
        nearer_KK: elements where the result is nearer to the candidate of the row than to that of the column.
    """
    num_candidates = len(candidates_KE)
    sign = np.uint64(1) << np.uint64(8 * merged_E.itemsize - 1)
    distances_K = np.empty(num_candidates)
    for e in range(len(merged_E)):
        bits = np.uint64(merged_E[e])
        magnitude, is_negative = np.int64(bits & (sign - np.uint64(1))), bits >= sign
        for k in range(num_candidates):
            other_bits = np.uint64(candidates_KE[k, e])
            other, other_negative = np.int64(other_bits & (sign - np.uint64(1))), other_bits >= sign
            if is_negative == other_negative:
                distance = float(abs(magnitude - other))
            else:
                distance = float(magnitude) + float(other)
            distances_K[k] = distance
            equal_K[k] += distance == 0.0
            roundings_K[k] += distance
            most_K[k] = max(most_K[k], distance)
        for i in range(num_candidates):
            for j in range(i):
                nearer_KK[i, j] += distances_K[i] < distances_K[j]
                nearer_KK[j, i] += distances_K[j] < distances_K[i]
