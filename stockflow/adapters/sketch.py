"""Sketches: low-rank approximations of matrices that are seen twice, a block of rows at a time.

The first time ``Y = D S`` and ``Z = D' Y`` are taken, ``S`` of random signs, the second time ``B = D Q`` and
``C = D' B``, ``Q`` a basis of ``Z``. The products of
``[Y, B]`` with ``D`` are known then, so that two passes give a block Krylov space of two powers.

Sources: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", arXiv:0909.4061; Musco, Musco 2015,
"Randomized block Krylov methods", arXiv:1504.05477.

Shape suffixes: R rows and C columns of the matrix, K columns of a sketch, L rank of what is known.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stockflow.kernels.arrays import Floats

OVERSAMPLED, OVERSAMPLED_SHARE = 8, 4
"""A sketch has 8 columns more than the rank, and a fourth of the rank: the error is within 1.5 % of the least one then,
for spectra that are flat, fall slowly, or have a step at the rank."""
NEGLIGIBLE = 1e-6
"""Share of the largest singular value of a sketch below which its directions are rounding."""
NUM_COPIES = 10
"""Matrices of the size of a sketch and its image that are held at once, at most: 9.7 measured at a rank of 128."""
_WORD_BITS = 64


class Factors(NamedTuple):
    """A matrix of low rank: ``left_RL @ right_LC``, each with the square roots of the singular values."""

    left_RL: Floats
    right_LC: Floats


@dataclass(frozen=True, slots=True)
class Approximation:
    """The best approximations of a matrix that are known, of every rank up to a largest one."""

    left_RL: Floats
    """orthonormal columns"""
    values_L: Floats
    """singular values, the largest first"""
    right_CL: Floats
    """orthonormal columns"""
    squares: float
    """squared Frobenius norm of the matrix"""

    def kept(self, rank: int) -> float:
        """Return the share of the squared norm that so many directions keep, 1 at most."""
        return min(float((self.values_L[:rank] ** 2).sum()) / self.squares, 1.0) if self.squares else 1.0

    def num_needed(self, energy: float | None, most: int) -> int:
        """Return the least rank that keeps a share of the squared norm; ``most`` if none does, or none is given."""
        limit = min(most, len(self.values_L))
        if energy is None:
            return limit
        return next((rank for rank in range(1, limit) if self.kept(rank) >= energy), limit)

    def factors(self, rank: int) -> Factors:
        """Return the approximation of a rank: what is scaled is shared equally by both factors."""
        roots_L = np.sqrt(self.values_L[:rank])
        return Factors(self.left_RL[:, :rank] * roots_L, (self.right_CL[:, :rank] * roots_L).T)


def num_columns(rank: int, shape: tuple[int, int]) -> int:
    """Return how many columns a sketch has that is to tell so many directions of a matrix."""
    return min(rank + -(-rank // OVERSAMPLED_SHARE) + OVERSAMPLED, *shape)


def held_bytes(rank: int, shape: tuple[int, int]) -> int:
    """Return what sketches of a matrix take, and what is made of them."""
    return NUM_COPIES * 8 * num_columns(rank, shape) * sum(shape)


def signs(name: str, num_rows: int, num_sketched: int) -> Floats:
    """Return random signs, the same for a name wherever it is sketched."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=seed).random_raw(-(-num_rows * num_sketched // _WORD_BITS))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=num_rows * num_sketched)
    return bits.reshape(num_rows, num_sketched) * np.float64(2.0) - 1.0


def basis(columns_CK: Floats) -> Floats:
    """Return orthonormal columns that span those given."""
    found: Floats = np.linalg.qr(columns_CK)[0]
    return found


def approximation(images_RK: Floats, products_CK: Floats, squares: float, most: int) -> Approximation:
    """Return what is known of a matrix ``D`` from columns of its image and ``D'`` times these.

    Args:
        images_RK: columns that ``D`` has made.
        products_CK: their products with the rows of ``D``.
        squares: the squared norm of ``D``.
        most: directions that are wanted.
    """
    basis_RK, mixed_KK = np.linalg.qr(images_RK)
    turned_KL, values_L, mixing_LK = np.linalg.svd(mixed_KK, full_matrices=False)
    is_known = values_L > NEGLIGIBLE * values_L.max(initial=0.0)
    rows_CL = products_CK @ (mixing_LK[is_known].T / values_L[is_known])
    right_CL, core_LL = np.linalg.qr(rows_CL)
    inner_LL, found_L, outer_LL = np.linalg.svd(core_LL.T, full_matrices=False)
    left_RL = basis_RK @ (turned_KL[:, is_known] @ inner_LL[:, :most])
    return with_signs(left_RL, found_L[:most], right_CL @ outer_LL[:most].T, squares)


def with_signs(left_RL: Floats, values_L: Floats, right_CL: Floats, squares: float) -> Approximation:
    """Return an approximation in which the largest element of each left direction is positive."""
    largest_L = left_RL[np.abs(left_RL).argmax(axis=0), np.arange(left_RL.shape[1])]
    signs_L = np.where(largest_L < 0.0, -1.0, 1.0)
    return Approximation(left_RL * signs_L, values_L, right_CL * signs_L, squares)
