"""Vectors that are known by their products alone: norms, cosines, angles, and the lengths of weighted sums.

Everything is added in the order of the models, group by group, and sines are the C library's, so that no result
depends on how many groups are looked at together.

Shape suffixes: G groups, N vectors, P pairs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stockflow.kernels.arrays import Flags, Floats
from stockflow.methods.gram import Gram, mean_in_order
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients

ANGLE_TOLERANCE = math.degrees(math.sqrt(2.0 * COSINE_TOLERANCE))
"""The error in degrees of an angle near 0 whose cosine is off by ``COSINE_TOLERANCE``."""
NEARLY_ONE = 2.0**-50


@dataclass(frozen=True)
class Vectors:
    """What a method adds up: task vectors where there is a base, whole models where there is none."""

    products_GNN: Floats
    from_base: bool

    @classmethod
    def of(cls, gram: Gram, parameters: Parameters) -> "Vectors":
        """Take the task vectors of a Gram, or its sources."""
        first = int(parameters.from_base)
        return cls(gram.products_GMM[:, first:, first:], parameters.from_base)

    @property
    def num(self) -> int:
        """N, the number of vectors."""
        return int(self.products_GNN.shape[1])

    @cached_property
    def norms_GN(self) -> Floats:
        """Euclidean norms."""
        return np.sqrt(np.diagonal(self.products_GNN, axis1=1, axis2=2))

    @cached_property
    def cosines_GNN(self) -> Floats:
        """Cosines of all pairs, in [-1, 1]; 0 where a vector is zero, exactly 1 and -1 of exact copies."""
        squares_GN = np.diagonal(self.products_GNN, axis1=1, axis2=2)
        some_GN = np.where(squares_GN == 0.0, 1.0, squares_GN)  # their products are 0
        left_GNN, right_GNN = self.products_GNN / some_GN[:, :, None], self.products_GNN / some_GN[:, None, :]
        return np.copysign(np.sqrt(np.minimum(left_GNN * right_GNN, 1.0)), self.products_GNN)

    @property
    def cosines_GP(self) -> Floats:
        """Cosines of the pairs i < j."""
        left_P, right_P = np.triu_indices(self.num, 1)
        return self.cosines_GNN[:, left_P, right_P]

    def length(self, shares_GN: Floats) -> Floats:
        """Return the length of the sum of the unit vectors times ``shares``, shape (G,)."""
        return np.sqrt(np.maximum(dot(shares_GN, times(self.cosines_GNN, shares_GN)), 0.0))

    def per_norm(self, shares_GN: Floats) -> Floats:
        """Return what the vectors themselves are multiplied by where the unit vectors are by ``shares``."""
        return np.where(self.norms_GN == 0.0, 0.0, shares_GN / np.where(self.norms_GN == 0.0, 1.0, self.norms_GN))

    def facts(self) -> dict[str, Floats]:
        """Return the cosines of the pairs and the mean of their angles in degrees; nothing of a single vector."""
        if self.num < 2:
            return {}
        return {
            "mean_cosine": mean_in_order(self.cosines_GP),
            "min_cosine": self.cosines_GP.min(axis=1),
            "max_cosine": self.cosines_GP.max(axis=1),
            "angle": np.degrees(mean_in_order(mapped(math.acos, self.cosines_GP))),
        }

    def added(
        self, weights_GN: Floats, facts: Mapping[str, Floats], flags: Mapping[str, Flags] | None = None
    ) -> Coefficients:
        """Return the decision to add the vectors up, to the base where they are task vectors."""
        weights_GM = weights_GN if self.from_base else closed(weights_GN)
        return Coefficients(weights_GM, self.from_base, {**self.facts(), **facts}, flags or {})

    def only(self) -> Coefficients:
        """Return the decision to take the only model as it is."""
        weights_M = [0.0, 1.0] if self.from_base else [1.0]
        return Coefficients(np.tile(weights_M, (len(self.products_GNN), 1)), anchored=False)


def times(matrices_GNN: Floats, columns_GN: Floats) -> Floats:
    """Return the products of matrices and columns, shape (G, N)."""
    total_GN = np.zeros(columns_GN.shape)
    for n in range(columns_GN.shape[1]):
        total_GN += matrices_GNN[:, :, n] * columns_GN[:, n, None]
    return total_GN


def dot(left_GN: Floats, right_GN: Floats) -> Floats:
    """Return the sums of products, shape (G,)."""
    total_G: Floats = np.zeros(len(left_GN))
    for n in range(left_GN.shape[1]):
        total_G += left_GN[:, n] * right_GN[:, n]
    return total_G


def mapped(function: Callable[[float], float], values: Floats) -> Floats:
    """Apply a function of the C library to every element; numpy's differ from one processor to another."""
    return np.array(list(map(function, values.ravel().tolist()))).reshape(values.shape)


def closed(weights_GN: Floats) -> Floats:
    """Return weights of which those that sum to 1 but for rounding do so exactly: copies come back bit for bit."""
    rest_GN = (weights_GN[:, 1:] + 1.0) - 1.0  # multiples of 2**-52, whose sums are exact
    first_G = 1.0 - dot(rest_GN, np.ones(rest_GN.shape))
    total_G = dot(weights_GN, np.ones(weights_GN.shape))
    is_whole_G = (np.abs(total_G - 1.0) <= NEARLY_ONE) & (np.abs(weights_GN) <= 1.0).all(axis=1)
    return np.where(is_whole_G[:, None], np.column_stack([first_G, rest_GN]), weights_GN)
