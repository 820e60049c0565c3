"""The geometry of tuned models around their base, and every reading of Model Stock's ratio that is in use.

All of it follows from Gram matrices; a *group* is whatever has one Gram: a tensor, a row of it, a whole model.
The ratios differ in what stands for the cosine where there are more than two models, and in what happens to
negative ones. For two models with a positive cosine all of them are equal.

Shape suffixes: G groups, N tuned models, P pairs of them, K ratios.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stockflow.kernels.arrays import Flags, Floats
from stockflow.methods.gram import Gram, mean_in_order, stock_ratio

FLOOR = 1e-6
"""Below this mergekit replaces the product of two norms (mergekit 0.1.5, ``model_stock.py``)."""
DEGENERATE = 1e-12
"""Least ``1 + (N - 1) cos``, which is ``|sum of unit task vectors|**2 / N``; where they cancel no ratio exists."""

RATIOS = ("exact", "two_model", "extrapolated", "floored", "mean_angle", "adjacent")
"""``Geometry.ratio`` knows these:

- ``exact``: ``N c / (1 + (N - 1) c)``, c the mean of all pairwise cosines; 0 where that is negative.
- ``extrapolated``: the same without the limit at 0: negative ratios lead away from the tuned models. mergekit since
  pull request 246 (2024-04-04).
- ``two_model``: ``2 c / (1 + c)`` for every N. mergekit from pull request 227 (2024-03-29) to 246.
- ``floored``: ``extrapolated`` with ``<d_i, d_j> / max(|d_i| |d_j|, 1e-6)`` for the cosines, which is what mergekit
  computes to this day; it differs where the norms of two task vectors multiply to less than 1e-6.
- ``mean_angle``: c is the cosine of the mean of all pairwise angles. fusion_bench (``method/model_stock``).
- ``adjacent``: c is the mean cosine of the pairs (1, 2), (2, 3) .. (N - 1, N) in recipe order. sd-mecha
  (``model_stock``; it takes one per row of the last dimension, here it is one per group).
"""


@dataclass(frozen=True)
class Geometry:
    """What the Grams of some groups say."""

    gram: Gram

    @property
    def num_tuned(self) -> int:
        """N, the number of tuned models."""
        return self.gram.num_tuned

    @cached_property
    def cosines_GP(self) -> Floats:
        """Cosines of all pairs i < j, in the order of ``pairs``; 0 where a task vector is zero."""
        return self.gram.pairwise_cosines_GP()

    @property
    def angles_GP(self) -> Floats:
        """Angles of all pairs in degrees."""
        return np.degrees(np.arccos(self.cosines_GP))

    @cached_property
    def mean_cosine_G(self) -> Floats:
        """Mean over all pairs; NaN for a single model, which has none."""
        return _mean(self.cosines_GP)

    @property
    def is_finite_G(self) -> Flags:
        """Whether no element was NaN or infinite, and nothing overflowed."""
        return np.asarray(np.isfinite(self.gram.products_GMM).all(axis=(1, 2)))

    def ratio(self, name: str) -> Floats:
        """Return one of ``RATIOS`` per group; NaN for a single model, minus infinity where task vectors cancel."""
        if self.num_tuned < 2:
            return np.full(len(self.gram.products_GMM), np.nan)
        if name == "exact":
            unlimited_G = stock_ratio(self.mean_cosine_G, self.num_tuned)
            return np.where(unlimited_G < 0.0, 0.0, unlimited_G)
        if name == "two_model":
            return stock_ratio(self.mean_cosine_G, 2)
        return stock_ratio(self._cosine_for(name), self.num_tuned)

    def flags(self) -> dict[str, Flags]:
        """Return what is remarkable, by name, per group.

        ``zero_delta``: a model is unchanged; ``unchanged``: every model is; ``would_clamp``: the mean cosine is
        negative; ``degenerate``: the task vectors cancel, so that no ratio exists without the limit at 0.
        """
        zero_GN = self.gram.zero_deltas_GN
        flags = {"zero_delta": zero_GN.any(axis=1), "unchanged": zero_GN.all(axis=1)}
        if self.num_tuned >= 2:
            flags["would_clamp"] = self.mean_cosine_G < 0.0
            flags["degenerate"] = 1.0 + (self.num_tuned - 1) * self.mean_cosine_G < DEGENERATE
        return {name: np.asarray(flags_G) for name, flags_G in flags.items()}

    def _cosine_for(self, name: str) -> Floats:
        """What stands for the cosine in the formula for N models."""
        if name == "extrapolated":
            return self.mean_cosine_G
        if name == "floored":
            return _mean(self._floored_cosines_GP())
        if name == "mean_angle":
            return np.cos(_mean(np.arccos(self.cosines_GP)))
        if name == "adjacent":
            return _mean(self.cosines_GP[:, self._adjacent_pairs()])
        raise KeyError(name)

    def _floored_cosines_GP(self) -> Floats:
        norms_GN = self.gram.delta_norms_GN
        left_P, right_P = np.triu_indices(self.num_tuned, 1)
        floored_GP = np.maximum(norms_GN[:, left_P] * norms_GN[:, right_P], FLOOR)
        return np.clip(self.gram.products_GMM[:, left_P + 1, right_P + 1] / floored_GP, -1.0, 1.0)

    def _adjacent_pairs(self) -> list[int]:
        return [number for number, (left, right) in enumerate(pairs(self.num_tuned)) if right == left + 1]


def pairs(num_tuned: int) -> Sequence[tuple[int, int]]:
    """Return all pairs of models, counted from 0, in the order of ``cosines_GP``."""
    left_P, right_P = np.triu_indices(num_tuned, 1)
    return list(zip(left_P.tolist(), right_P.tolist(), strict=True))


def cosine_matrix(cosines_P: Sequence[float], num_tuned: int) -> list[list[float]]:
    """Return the symmetric matrix of pairwise cosines, 1 on its diagonal."""
    matrix = np.eye(num_tuned)
    for (left, right), cosine in zip(pairs(num_tuned), cosines_P, strict=True):
        matrix[left, right] = matrix[right, left] = cosine
    rows: list[list[float]] = matrix.tolist()
    return rows


def packed(gram: Gram) -> Floats:
    """Return the products of each group as one row: |w_0|^2 and the upper triangle of the task vectors' products."""
    upper = np.triu_indices(gram.num_tuned)
    deltas_GNN = gram.products_GMM[:, 1:, 1:]
    return np.concatenate([gram.products_GMM[:, :1, 0], deltas_GNN[:, upper[0], upper[1]]], axis=1)


def unpacked(packed_GQ: Floats, num_tuned: int) -> Gram:
    """Return what ``packed`` was given; products of w_0 with the task vectors are 0."""
    products_GMM = np.zeros((len(packed_GQ), num_tuned + 1, num_tuned + 1))
    upper = np.triu_indices(num_tuned)
    products_GMM[:, 0, 0] = packed_GQ[:, 0]
    products_GMM[:, upper[0] + 1, upper[1] + 1] = packed_GQ[:, 1:]
    products_GMM[:, upper[1] + 1, upper[0] + 1] = packed_GQ[:, 1:]
    return Gram(products_GMM)


def _mean(columns_GP: Floats) -> Floats:
    return mean_in_order(columns_GP) if columns_GP.shape[1] else np.full(len(columns_GP), np.nan)


def finite(value: float) -> float | None:
    """Return a number as JSON and tables hold it: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None
