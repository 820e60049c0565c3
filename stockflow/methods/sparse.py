"""What sparse methods are made of: keep, rescale, consensus. Each step takes the block that the one before has left.

Kernels are imported when they are called, so that planning needs no compiler.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stockflow.methods.protocol import Block

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values


def keep_at_least(block: Block, thresholds_N: "Values") -> None:
    """Drop what is smaller than the least magnitude that is kept of each model, NaN to keep none.

    Magnitudes are rounded to the precision of the thresholds, in which they were ranked.
    """
    from stockflow.kernels.elementwise import keep_at_least

    keep_at_least(block.deltas_NE, thresholds_N)


def rescale(block: Block, factors: Sequence[float]) -> None:
    """Multiply what is left of each model."""
    from stockflow.kernels.elementwise import rescale

    factors_N = np.array(factors, block.deltas_NE.dtype)
    rescale(block.deltas_NE, factors_N)
    if block.lows_NE is not None:
        rescale(block.lows_NE, factors_N)


def consensus(block: Block, weights: Sequence[float], *, elect: bool, divisor: float, factor: float) -> "Values":
    """Return ``factor * sum_i m_i a_i d_i / Z``, what is to be added to the base.

    Args:
        block: what is left of the task vectors.
        weights: ``a_i``.
        elect: whether only what has the elected sign counts (``m_i``), that of ``sum_i a_i d_i``; else all does.
        divisor: Z, or 0 for the sum of the weights that count, element by element, and 1 where that is 0.
        factor: as it says.
    """
    from stockflow.kernels import doubled, elementwise

    deltas_NE = block.deltas_NE
    weights_N, divisor_1, factor_1 = (np.array(each, deltas_NE.dtype) for each in (weights, [divisor], [factor]))
    if block.lows_NE is None:
        change_E = np.empty_like(block.base_E)
        elementwise.consensus(deltas_NE, weights_N, elect, divisor_1, factor_1, change_E)
        return change_E
    change_2E = np.empty((2, len(block.base_E)))
    doubled.consensus_exactly(deltas_NE, block.lows_NE, weights_N, elect, divisor_1, factor_1, change_2E)
    return change_2E
