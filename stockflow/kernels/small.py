"""Sums over the few numbers that belong to models, added in their order."""

from stockflow.kernels.arrays import Floats
from stockflow.kernels.jit import jit


@jit
def dot(left_N: Floats, right_N: Floats) -> float:
    """Return the sum of products."""
    total = 0.0
    for n in range(len(left_N)):
        total += left_N[n] * right_N[n]
    return total


@jit
def form(matrix_NN: Floats, column_N: Floats) -> float:
    """Return the quadratic form of a matrix at a column."""
    total = 0.0
    for n in range(len(column_N)):
        total += column_N[n] * dot(matrix_NN[n], column_N)
    return total


@jit
def total(values_N: Floats) -> float:
    """Return the sum."""
    found = 0.0
    for value in values_N:
        found += value
    return found
