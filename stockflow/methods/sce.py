"""SCE: select what varies most between the models, calculate weights from what is left, erase the minority's signs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stockflow.kernels.arrays import Floats
from stockflow.methods import selection
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, UnitContext, Update, elementwise_method
from stockflow.methods.selection import ALL, NOTHING, Pick, Threshold, first_digits, largest, multiply_largest
from stockflow.methods.sparse import Election

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

SMALLEST_TOTAL = 1e-6


def _num_rounds(float_bits: int, given: Parameters) -> int:
    selects = given.number("select_topk") < 1.0
    return 1 + selects * selection.num_rounds(float_bits)


@elementwise_method(
    "sce",
    source="Wan et al. 2024, arXiv:2408.07990",
    min_tuned=1,
    parameters=(Parameter("select_topk", "number", default=1.0, minimum=0.0, maximum=1.0, role="amount"),),
    scopes=("tensor", "leading", "layer"),
    num_rounds=_num_rounds,
    kept_bytes=lambda given, num_numbers, num_rows: selection.kept_bytes(num_numbers),
    state_bytes=selection.STATE_BYTES,
    temporaries=3,
    facts=("coefficient", "kept_share"),
)
def sce(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + sum_i(c_i m_i s(d_i)) / max(sum_i(c_i m_i), 1e-6)``, ``c_i`` the share of model i in the squares.

    With ``select_topk`` below 1, ``s`` keeps the k elements that vary most over the models, ``k = int(select_topk *``
    the number that vary at all ``)``, exactly k, of equal ones the lower flat index (mergekit: whichever); it ranks
    standard deviations, as float32 (those of F64 models as float64). ``c_i = mean(s(d_i)**2)``, divided by their sum,
    or 1 / N where that is below 1e-6, which is absolute; ``m_i`` says whether ``s(d_i)`` has the sign of the plain sum
    over the models, zero being positive. All of that is mergekit's.
    """
    threshold, share = ALL, 1.0
    if parameters.number("select_topk") < 1.0:
        num_changed, first_PD = yield Variation(context.float_bits)
        k = int(parameters.number("select_topk") * num_changed)
        threshold, share = NOTHING, k / context.num_elems
        if k:
            (threshold,) = yield from largest(context, [Pick(0, k)], deviations, first_PD)
    kept = Varying(threshold, context.float_bits)
    squares_N = yield SquareSums(kept, context.num_tuned, context.working_bits)
    coefficients = _shares(squares_N / context.num_elems)
    election = Election([1.0] * context.num_tuned, coefficients, coefficients, True, 0.0, SMALLEST_TOTAL, 1.0)

    def change(block: Block) -> "Values":
        kept.drop(block)
        return election.change(block)

    facts = {f"coefficient_{number}": each for number, each in enumerate(coefficients, 1)}
    return Update(change, facts | {"kept_share": share})


def _shares(means_N: Floats) -> list[float]:
    total = float(sum(means_N.tolist()))
    if abs(total) < SMALLEST_TOTAL:
        return [1.0 / len(means_N)] * len(means_N)
    return [mean / total for mean in means_N.tolist()]


def deviations(block: Block, bits: int | None = None) -> "Values":
    """Return the standard deviation of each element over the models, shape (1, E): 0 where these agree.

    Of task vectors rounded to ``bits``, as they are ranked.
    """
    from stockflow.kernels.sums import deviate

    deltas_NE = block.deltas_NE.astype(f"f{bits // 8}", copy=False) if bits else block.deltas_NE
    deviation_1E: Values = np.empty_like(deltas_NE[:1])
    deviate(deltas_NE, deviation_1E[0])
    return deviation_1E


@dataclass(frozen=True, slots=True)
class Varying:
    """The elements that vary most over the models."""

    threshold: Threshold
    bits: Literal[32, 64]

    def drop(self, block: Block) -> None:
        """Keep them in every model; times zero, NaN stays NaN."""
        if self.threshold is ALL:
            return
        from stockflow.kernels.sums import multiply_where

        deviations_1E = deviations(block, self.bits)
        multiply_largest(deviations_1E, [self.threshold], block.start, self.bits, by=1)
        multiply_where(block.deltas_NE, deviations_1E[0])


@dataclass(frozen=True)
class Variation:
    """How many elements vary over the models at all, and how often each first digit of their deviations occurs."""

    float_bits: Literal[32, 64]

    def zero(self) -> Any:
        """Return none."""
        return 0, first_digits(self.float_bits).zero()

    def update(self, state: Any, block: Block) -> Any:
        """Count a block."""
        num_changed, counts_PD = state
        deviations_1E = deviations(block)
        counts_PD = first_digits(self.float_bits, lambda _: deviations_1E).update(counts_PD, block)
        return num_changed + int(np.count_nonzero(deviations_1E)), counts_PD

    def combine(self, left: Any, right: Any) -> Any:
        """Add counts."""
        return left[0] + right[0], first_digits(self.float_bits).combine(left[1], right[1])

    def finish(self, state: Any) -> Any:
        """Return the number and the counts."""
        return state


@dataclass(frozen=True)
class SquareSums:
    """The sum of the squares of what is kept of each task vector. Shape (N,)."""

    kept: Varying
    num_tuned: int
    float_bits: Literal[32, 64]

    def zero(self) -> Floats:
        """Return nothing."""
        return np.zeros(self.num_tuned)

    def update(self, state: Floats, block: Block) -> Floats:
        """Add up a block."""
        from stockflow.kernels.sums import add_squares

        self.kept.drop(block)
        add_squares(block.deltas_NE, state)
        return state

    def combine(self, left: Floats, right: Floats) -> Floats:
        """Add sums."""
        return left + right

    def finish(self, state: Floats) -> Floats:
        """Return the sums."""
        return state
