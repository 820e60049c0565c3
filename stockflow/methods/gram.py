"""From Gram matrices to similarities and ratios: formulas in float64, each with its source.

A Gram holds, for each of G groups, all products of [w_0, d_1 .. d_N], where ``d_i = w_i - w_0``.
No absolute epsilon appears here: scaling all task vectors changes no cosine and no ratio.

Shape suffixes: G groups, N task vectors, M = N + 1 sources.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from stockflow.kernels.arrays import Flags, Floats, Indices

Products = Literal["changes", "crossed", "sources"]
"""``changes``: |w_0|^2 and <d_i, d_j>; ``crossed``: <w_0, d_i> as well; ``sources``: <w_i, w_j>, of task vectors none.

A model far smaller than w_0 is lost in ``w_i - w_0``, and how two models differ is lost in their own products.
"""


@dataclass(frozen=True)
class Gram:
    """Products of the anchor and the task vectors, or of the sources themselves, per group."""

    products_GMM: Floats
    """row and column 0 belong to the anchor w_0, the others to the task vectors; <w_0, d_i> may be left out as 0"""

    @property
    def num_tuned(self) -> int:
        """N, the number of task vectors."""
        return int(self.products_GMM.shape[1]) - 1

    @property
    def base_norm_G(self) -> Floats:
        """|w_0|."""
        return np.sqrt(self.products_GMM[:, 0, 0])

    @property
    def delta_norms_GN(self) -> Floats:
        """|d_i|."""
        return np.sqrt(np.diagonal(self.products_GMM, axis1=1, axis2=2)[:, 1:])

    @property
    def zero_deltas_GN(self) -> Flags:
        """Which task vectors are zero."""
        zero_GN: Flags = self.delta_norms_GN == 0.0
        return zero_GN

    def pairwise_cosines_GP(self) -> Floats:
        """Return ``<d_i, d_j> / (|d_i| |d_j|)`` of all pairs i < j, in [-1, 1]; 0 where a task vector is zero."""
        norms_GN = self.delta_norms_GN
        left_P, right_P = _pairs(self.num_tuned)
        left_GP, right_GP = norms_GN[:, left_P], norms_GN[:, right_P]
        # Dividing twice keeps |d_i| |d_j| from under- or overflowing.
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine_GP = self.products_GMM[:, left_P + 1, right_P + 1] / left_GP / right_GP
        limited_GP = np.minimum(np.maximum(cosine_GP, -1.0), 1.0)
        return np.where((left_GP == 0.0) | (right_GP == 0.0), 0.0, limited_GP)


@cache
def _pairs(num_tuned: int) -> tuple[Indices, Indices]:
    """All i < j, as two columns; made anew for each of many small tensors they took a fifth of its time."""
    left_P, right_P = np.triu_indices(num_tuned, 1)
    return left_P, right_P


def mean_in_order(columns_GP: Floats) -> Floats:
    """Return the mean over the last axis, added from left to right, so that it does not depend on G."""
    total_G: Floats = np.zeros(columns_GP.shape[0])
    for column_G in columns_GP.T:
        total_G += column_G
    total_G /= columns_GP.shape[1]
    return total_G


def stock_ratio(cosine_G: Floats, num_tuned: int) -> Floats:
    """Return the share of the tuned average in the merged tensor: ``t = N cos / (1 + (N - 1) cos)``.

    The denominator is ``|sum of the unit task vectors|**2 / N``: never negative, and zero only when
    they cancel; where it is, the ratio is minus infinity. ``t`` is 1 for parallel task vectors, 0 for
    orthogonal ones and negative when they oppose each other on average.

    Args:
        cosine_G: mean over pairs of tuned checkpoints, in [-1 / (N - 1), 1].
        num_tuned: N, at least 2.

    Source:
        Jang, Yun, Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024,
        arXiv:2403.19522, eq. 2 and appendix D. For N > 2 the cosine is the mean over all pairs,
        the reading the author confirms (naver-ai/model-stock issue 2).
    """
    return _ratio(num_tuned * cosine_G, 1.0 + (num_tuned - 1) * cosine_G)


def legacy_ratio(cosine_G: Floats) -> Floats:
    """Return ``2 cos / (1 + cos)``, the two-model formula that mergekit first used for every N.

    NaN (null in the tensor table) for cos <= 0, where that formula was never meant to apply.

    Source:
        mergekit pull requests 227 (2024-03-29, introduced) and 246 (2024-04-04, corrected).
    """
    return np.where(cosine_G > 0.0, _ratio(2.0 * cosine_G, 1.0 + cosine_G), np.nan)


def _ratio(numerator_G: Floats, denominator_G: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator_G <= 0.0, -np.inf, numerator_G / denominator_G)
