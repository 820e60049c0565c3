"""TIES: keep the largest changes of each model, elect a sign per element, average what agrees with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stockflow.kernels.arrays import Counts
from stockflow.methods import sparse
from stockflow.methods.protocol import (
    Block,
    Parameter,
    Parameters,
    Rounds,
    UnitContext,
    Update,
    elementwise_method,
)

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

DIGIT_BITS = 16
"""A magnitude is selected digit by digit: 2 rounds for the 32 bits of a float32, 4 for a float64."""


@dataclass(frozen=True)
class DigitCounts:
    """How often each value of one 16-bit digit occurs among the magnitudes that begin with a prefix.

    Magnitudes are taken as the integers of their bits, which sort alike. Shape (N, 2**16).
    """

    prefixes: Sequence[int]
    """per model, the digits above this one"""
    shift: int
    """position of the digit, in bits"""

    def zero(self) -> Counts:
        """Return no counts."""
        return np.zeros((len(self.prefixes), 1 << DIGIT_BITS), dtype=np.int64)

    def update(self, state: Counts, block: Block) -> Counts:
        """Count the digits of a block."""
        from stockflow.kernels.elementwise import count_digits, patterns

        prefixes_N = np.array(self.prefixes, np.uint64)
        count_digits(patterns(block.deltas_NE), prefixes_N, np.uint64(self.shift), np.uint64(DIGIT_BITS), state)
        return state

    def combine(self, left: Counts, right: Counts) -> Counts:
        """Add counts."""
        return left + right

    def finish(self, state: Counts) -> Counts:
        """Return the counts."""
        return state


@elementwise_method(
    "ties",
    source="Yadav et al. 2023, arXiv:2306.01708",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True),
        Parameter("density", "number", per_model=True, default=1.0, minimum=0.0),
        Parameter("lambda", "number", default=1.0),
        Parameter("normalize", "flag", default=True),
    ),
    scopes=("tensor", "leading"),
    num_rounds=lambda float_bits: float_bits // DIGIT_BITS,
    state_bytes=8 << DIGIT_BITS,
    facts=("kept_share",),
)
def ties(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + lambda * sum_i(m_i a_i s_i) / sum_i(m_i a_i)``, elementwise.

    ``s_i`` is d_i where its magnitude is at least the k-th largest, ``k = max(1, int(density * n))``, else 0;
    all elements of that magnitude are kept, so no order decides (mergekit keeps exactly k, in sort order).
    ``m_i`` says whether ``a_i s_i`` has the elected sign, that of ``sum_i a_i s_i``. Kept from mergekit: an
    elected sum of zero counts as positive, zeros never agree, a divisor of zero counts as one, density 0 keeps
    nothing and density of 1 or more everything. Without ``normalize`` there is no division.
    """
    densities = parameters.each("density")
    prefixes = [0] * context.num_tuned
    ranks = [max(1, int(density * context.num_elems)) for density in densities]
    kept = [0] * context.num_tuned
    for shift in reversed(range(0, context.float_bits, DIGIT_BITS)):
        counts = yield DigitCounts(tuple(prefixes), shift)
        for model, digits in enumerate(counts):
            at_least = np.cumsum(digits[::-1])[::-1]
            digit = int(np.nonzero(at_least >= min(ranks[model], at_least[0]))[0][-1])
            above = int(at_least[digit] - digits[digit])
            prefixes[model] = prefixes[model] << DIGIT_BITS | digit
            ranks[model] -= above
            kept[model] += above if shift else int(at_least[digit])
    selections = [_Selection(*chosen, context.num_elems) for chosen in zip(densities, prefixes, kept, strict=True)]
    weights, scale, normalize = parameters.each("weight"), parameters.number("lambda"), parameters.flag("normalize")
    ranked_in = np.float32 if context.float_bits == 32 else np.float64
    thresholds_N = np.array([selection.least(ranked_in) for selection in selections], ranked_in)

    def change(block: Block) -> "Values":
        sparse.keep_at_least(block, thresholds_N)
        return sparse.consensus(block, weights, elect=True, divisor=0.0 if normalize else 1.0, factor=scale)

    return Update(change, facts={f"kept_share_{i}": chosen.share for i, chosen in enumerate(selections, 1)})


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which elements of one task vector are kept."""

    density: float
    threshold_bits: int
    num_at_least: int
    num_elems: int

    @property
    def share(self) -> float:
        """Kept elements as a share of all."""
        if self.density <= 0.0:
            return 0.0
        return 1.0 if self.density >= 1.0 else self.num_at_least / self.num_elems

    def least(self, ranked_in: type[np.float32] | type[np.float64]) -> float:
        """Return the least magnitude that is kept, NaN if none is."""
        if self.density <= 0.0:
            return math.nan
        bits = np.array([self.threshold_bits], np.uint32 if ranked_in is np.float32 else np.uint64)
        return 0.0 if self.density >= 1.0 else float(bits.view(ranked_in)[0])
