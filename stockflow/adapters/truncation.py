"""Truncation of products of low rank: their best approximation of a smaller rank, found in the space of their factors.

``B A = Q_B (R_B R_A') Q_A'``: the singular values are those of the small core. Source: Eckart and Young 1936.

Shape suffixes: R rows and C columns of the product, K its rank, L the smaller one.
"""

import numpy as np

from stockflow.adapters.sketch import Approximation, with_signs
from stockflow.kernels.arrays import Floats


def decomposed(left_RK: Floats, right_KC: Floats) -> Approximation:
    """Return the best approximations of a product, of every rank up to its own."""
    basis_RK, left_KK = np.linalg.qr(left_RK)
    basis_CK, right_KK = np.linalg.qr(right_KC.T)
    inner_KL, values_L, outer_LK = np.linalg.svd(left_KK @ right_KK.T, full_matrices=False)
    squares = float((values_L**2).sum())
    return with_signs(basis_RK @ inner_KL, values_L, basis_CK @ outer_LK.T, squares)
