"""Geometric medians of points of which only the squared distances from each other are known.

Shape suffixes: G groups, N points.
"""

import math

import numpy as np

from stockflow.kernels.arrays import Floats
from stockflow.kernels.jit import jit
from stockflow.kernels.small import dot, form, total

NOTHING = 1e-15
"""A squared distance of this share of the points' own is rounding."""
AT_A_POINT = 1.0 - 1e-9
"""What the pull of a point is multiplied by before it must outweigh that of the others to hold the median."""


@jit
def geometric_medians(
    squares_GNN: Floats, weights_N: Floats, max_iter: int, tol: float, shares_GN: Floats, iterations_G: Floats
) -> None:
    """Fill ``shares_GN`` with the shares of the points, which sum to 1, in the point of least weighted distance.

    Where the other points do not outweigh one it is that point. Else Weiszfeld's steps begin at the weighted mean and
    end when the way that is left, by the last two of them, is shorter than ``tol`` times the points' root mean square
    distance from each other.

    Args:
        squares_GNN: squared distances of the points from each other.
        weights_N: of the points; they sum to 1.
        max_iter: most steps.
        tol: as it says.
        shares_GN: receives the shares.
        iterations_G: receives the number of steps, ``max_iter + 1`` if the last was not short enough.
    """
    for g in range(len(squares_GNN)):
        squares, shares = squares_GNN[g], shares_GN[g]
        mean_square = _mean(squares)
        iterations_G[g] = 0.0
        if _take_a_point(squares, weights_N, NOTHING * mean_square, shares):
            continue
        for n in range(len(shares)):
            shares[n] = weights_N[n]
        near, before = tol * math.sqrt(mean_square), math.inf
        iterations_G[g] = max_iter + 1.0
        for number in range(max_iter):
            step = _step(squares, weights_N, NOTHING * mean_square, shares)
            if not step > near * max(1.0 - step / before, 0.0):
                iterations_G[g] = number + 1.0
                break
            before = step


@jit
def _mean(squares_NN: Floats) -> float:
    return total(squares_NN.ravel()) / squares_NN.size


@jit
def _take_a_point(squares_NN: Floats, weights_N: Floats, nothing: float, shares_N: Floats) -> bool:
    """Give all to the first point that holds the median; return whether one does."""
    pulls_N = np.empty_like(weights_N)
    for n in range(len(weights_N)):
        held = _pull(squares_NN[n], weights_N, nothing, pulls_N)
        pulls_N[n] -= total(pulls_N)
        if _length(squares_NN, pulls_N) < AT_A_POINT * held:
            shares_N[:] = 0.0
            shares_N[n] = 1.0
            return True
    return False


@jit
def _step(squares_NN: Floats, weights_N: Floats, nothing: float, shares_N: Floats) -> float:
    """Move the point that the shares are to the mean by its pulls, as Vardi and Zhang do; return the way's length."""
    num_points = len(weights_N)
    from_point_N, pulls_N, moves_N = np.empty(num_points), np.empty(num_points), np.empty(num_points)
    half = 0.0
    for n in range(num_points):
        from_point_N[n] = dot(squares_NN[n], shares_N)
        half += 0.5 * shares_N[n] * from_point_N[n]
    for n in range(num_points):
        from_point_N[n] = max(from_point_N[n] - half, 0.0)
    held = _pull(from_point_N, weights_N, nothing, pulls_N)
    all_pulls = total(pulls_N)
    for n in range(num_points):
        moves_N[n] = pulls_N[n] - all_pulls * shares_N[n]
    others = _length(squares_NN, moves_N)
    goes = 1.0 - (min(1.0, held / others) if held > 0.0 else 0.0)
    for n in range(num_points):
        moves_N[n] = goes * (pulls_N[n] / all_pulls - shares_N[n])
        shares_N[n] += moves_N[n]
    return _length(squares_NN, moves_N)


@jit
def _pull(from_point_N: Floats, weights_N: Floats, nothing: float, pulls_N: Floats) -> float:
    """Write ``a_i / |w_i - y|``, 0 where y, known by its distances, is the point; return the weight of these."""
    held = 0.0
    for n in range(len(weights_N)):
        is_there = from_point_N[n] <= nothing
        held += weights_N[n] if is_there else 0.0
        pulls_N[n] = 0.0 if is_there else weights_N[n] / math.sqrt(from_point_N[n])
    return held


@jit
def _length(squares_NN: Floats, shares_N: Floats) -> float:
    """Of a sum of points by shares that sum to zero."""
    return math.sqrt(max(-0.5 * form(squares_NN, shares_N), 0.0))
