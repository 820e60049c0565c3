"""Karcher means of directions of which only the cosines between each other are known.

A point of the sphere is the shares by which it is a sum of the directions. Shape suffixes: G groups, N directions.
"""

import math

import numpy as np

from stockflow.kernels.arrays import Flags, Floats
from stockflow.kernels.jit import jit
from stockflow.kernels.small import dot, form

ANTIPODAL = 1e-14
"""Squared sine of the angle to what has no shortest arc, or none worth a step."""


@jit
def karcher_means(
    cosines_GNN: Floats,
    is_there_GN: Flags,
    max_iter: int,
    tol: float,
    means_GN: Floats,
    spreads_G: Floats,
    iterations_G: Floats,
) -> None:
    """Fill ``means_GN`` with the Karcher means of equal weights.

    Args:
        cosines_GNN: of the directions.
        is_there_GN: which of them are directions; the others are of zero vectors.
        max_iter: most steps.
        tol: radians: the step that ends it, and the arc that counts as none.
        means_GN: receives the means; zeros where there is no direction.
        spreads_G: receives the mean angles from the means to the directions, in radians.
        iterations_G: receives the number of steps.
    """
    for g in range(len(cosines_GNN)):
        cosines, is_there, mean = cosines_GNN[g], is_there_GN[g], means_GN[g]
        num_there = np.count_nonzero(is_there)
        shares_N = is_there / max(num_there, 1)
        _begin(cosines, is_there, shares_N, tol, mean)
        steps_N = np.empty_like(mean)
        iterations_G[g] = 0.0
        for _ in range(max_iter if num_there else 0):
            _step(cosines, shares_N, tol, mean, steps_N)
            size = math.sqrt(max(form(cosines, steps_N), 0.0))
            if not size >= tol or size == 0.0:
                break
            for n in range(len(mean)):
                mean[n] = math.cos(size) * mean[n] + math.sin(size) / size * steps_N[n]
            length = math.sqrt(max(form(cosines, mean), 0.0))
            if length > tol:
                mean /= length
            iterations_G[g] += 1.0
        spreads_G[g] = 0.0
        for n in range(len(mean)):
            spreads_G[g] += shares_N[n] * math.acos(_cosine(cosines[n], mean))


@jit
def _begin(cosines_NN: Floats, is_there_N: Flags, shares_N: Floats, tol: float, mean_N: Floats) -> None:
    """Begin with the direction of the mean of all directions, or with the first direction where they cancel."""
    length = math.sqrt(max(form(cosines_NN, shares_N), 0.0))
    if length < tol or length == 0.0:
        mean_N[:] = 0.0
        for n in range(len(mean_N)):
            if is_there_N[n]:
                mean_N[n] = 1.0
                break
    else:
        for n in range(len(mean_N)):
            mean_N[n] = shares_N[n] / length


@jit
def _step(cosines_NN: Floats, shares_N: Floats, tol: float, mean_N: Floats, steps_N: Floats) -> None:
    """Write the mean of the arcs from the mean to each direction."""
    along = 0.0
    for n in range(len(mean_N)):
        cosine = _cosine(cosines_NN[n], mean_N)
        angle = math.acos(cosine)
        steps_N[n] = 0.0
        if angle >= tol and 1.0 - cosine * cosine > ANTIPODAL:
            steps_N[n] = shares_N[n] * angle / math.sin(angle)
        along += steps_N[n] * cosine
    steps_N -= along * mean_N


@jit
def _cosine(cosines_N: Floats, mean_N: Floats) -> float:
    return min(max(dot(cosines_N, mean_N), -1.0), 1.0)
