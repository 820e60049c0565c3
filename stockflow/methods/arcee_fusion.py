"""Arcee Fusion: take from one model the changes that matter most, by their size and by how far their row moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stockflow.kernels.arrays import Counts, Floats
from stockflow.methods import selection
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Block, Rounds, UnitContext, Update, elementwise_method
from stockflow.methods.selection import first_digits, order_statistics

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

FLOOR = 1e-8
"""Added to every probability."""
CLOSE = 2.0**-50
"""A score that is so near below the threshold equals it: where all elements share a row, many do, but for rounding."""


@elementwise_method(
    "arcee_fusion",
    source="Arcee, MergeKit 0.1; as in mergekit 0.1.5",
    min_tuned=1,
    max_tuned=1,
    scopes=("tensor", "leading", "layer"),
    num_rounds=lambda float_bits, given: 64 // selection.DIGIT_BITS,
    state_bytes=2 * selection.STATE_BYTES,
    temporaries=8,
    whole_rows=True,
    kept_bytes=lambda given, num_numbers, num_rows: selection.kept_bytes(3 * num_numbers, 64) + 16 * num_rows,
    facts=("threshold",),
)
def arcee_fusion(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + d`` where the score ``|d| K`` reaches the threshold, else ``w_0``, with ``d = w_1 - w_0``.

    ``K = sum p log(p / q)`` per row of the last dimension, p and q the softmax of ``w_1`` and ``w_0`` plus 1e-8; the
    threshold is ``q2 + 1.5 (q3 - q1)`` of the quartiles of all scores, the elements ``(n - 1) / 4``, ``(n - 1) / 2``
    and ``3 (n - 1) / 4``, rounded down, in ascending order. In float64 throughout, and quartiles are exact (mergekit
    takes those of a random sample where n is above a million). Rows of more than 2**18 elements are taken in parts
    of that length. Kept from mergekit: a score equal to the threshold counts, so where all scores are zero, ``w_1``.
    """
    del parameters
    starts, divergences, first_PD = yield Divergences()
    scores = Scores(starts, divergences)
    n = context.num_elems
    ranks = [n - quarters * (n - 1) // 4 for quarters in (1, 2, 3)]
    found = yield from order_statistics([0, 0, 0], ranks, 64, 64, scores, first_PD)
    first, second, third = (float(each) for each in found.least_P)
    threshold = (second + 1.5 * (third - first)) * (1.0 - CLOSE)

    def change(block: Block) -> "Values":
        from stockflow.kernels.softmax import keep_above

        change_E: Values = block.deltas_NE[0]
        keep_above(change_E, scores(block)[0], threshold)
        if block.lows_NE is None:
            return change_E
        return np.stack([change_E, np.where(change_E != 0.0, block.lows_NE[0], 0.0)])

    return Update(change, {"threshold": threshold}, float_bits=64)


@dataclass(frozen=True, slots=True)
class Scores:
    """What each element of a block scores."""

    starts: Sequence[int]
    """first element of every block"""
    divergences: Sequence[Floats]
    """of the rows of every block"""

    def __call__(self, block: Block) -> "Values":
        """Return the scores, shape (1, E)."""
        return _scores(block, self.divergences[int(np.searchsorted(self.starts, block.start))])


def _scores(block: Block, divergences_R: Floats) -> "Values":
    from stockflow.kernels.softmax import scores

    scores_1E = np.empty((1, len(block.base_E)))
    scores(block.deltas_NE[0], divergences_R, np.uint64(block.row_elems), scores_1E[0])
    return scores_1E


@dataclass(frozen=True)
class Divergences:
    """How far each row moved: first elements of blocks, the divergences of their rows, first digits of the scores."""

    float_bits: Literal[32, 64] = 64

    def zero(self) -> Any:
        """Return no blocks."""
        return [], first_digits(64).zero()

    def update(self, state: Any, block: Block) -> Any:
        """Compute those of a block."""
        from stockflow.kernels.softmax import divergences

        divergences_R = np.empty(-(-len(block.base_E) // block.row_elems))
        divergences(block.base_E, block.deltas_NE[0], np.uint64(block.row_elems), FLOOR, divergences_R)
        blocks, counts_PD = state
        counts_PD = first_digits(64, lambda _: _scores(block, divergences_R)).update(counts_PD, block)
        return [*blocks, (block.start, divergences_R)], counts_PD

    def combine(self, left: Any, right: Any) -> Any:
        """Put the blocks of two runs one after the other, and add counts."""
        (blocks, counts_PD), (further, more_PD) = left, right
        blocks.extend(further)
        return blocks, first_digits(64).combine(counts_PD, more_PD)

    def finish(self, state: Any) -> tuple[Counts, Sequence[Floats], Counts]:
        """Return starts, divergences and counts."""
        blocks, counts_PD = state
        starts, found = zip(*blocks, strict=True)
        return np.array(starts, np.int64), found, counts_PD
