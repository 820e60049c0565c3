"""RAM: what several models moved is averaged over these, what one alone moved is taken from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stockflow.kernels.arrays import Counts
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, UnitContext, Update, elementwise_method

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

SOURCE = "arXiv:2601.13572"
EPSILON = Parameter("epsilon", "number", default=1e-5, minimum=0.0, role="least change")


@elementwise_method("ram", source=SOURCE, min_tuned=1, parameters=(EPSILON,), scopes=("tensor", "leading", "layer"))
def ram(context: UnitContext, parameters: Parameters) -> Update:
    """Return ``w_0`` plus the mean of those ``d_i`` that are larger than ``epsilon`` in size, element by element.

    Kept from mergekit: ``epsilon`` is absolute, so what moves less than it is not merged at all.
    """
    return _averaged(parameters.number("epsilon"), [1.0] * context.num_tuned)


@elementwise_method(
    "ramplus_tl",
    source=SOURCE,
    min_tuned=1,
    parameters=(
        Parameter("r", "number", default=0.1),
        Parameter("alpha", "number", default=0.2, minimum=0.0),
        EPSILON,
    ),
    scopes=("tensor", "leading", "layer"),
    num_rounds=lambda float_bits, given: 1,
    facts=("unique_factor", "shared_share", "unique_share"),
)
def ramplus_tl(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return what ``ram`` does, with ``L_i d_i`` where model i alone moves an element.

    ``L_i = 1 + r * min(rho_i, alpha)``, ``rho_i`` how many elements model i moves beside others, over how many it moves
    alone, in the unit. Kept from mergekit: at least ``epsilon`` for that divisor.
    """
    epsilon = parameters.number("epsilon")
    shared_N, unique_N = yield ActiveCounts(epsilon, context.num_tuned, context.working_bits)
    pairs = zip(shared_N.tolist(), unique_N.tolist(), strict=True)
    rhos = [_ratio(shared, max(unique, epsilon)) for shared, unique in pairs]
    factors = [1.0 + parameters.number("r") * min(rho, parameters.number("alpha")) for rho in rhos]
    shares_2N = np.stack([shared_N, unique_N]) / context.num_elems
    named = zip(("unique_factor", "shared_share", "unique_share"), [factors, *shares_2N.tolist()], strict=True)
    facts = {f"{name}_{number}": each for name, numbers in named for number, each in enumerate(numbers, 1)}
    return _averaged(epsilon, factors, facts)


def _averaged(epsilon: float, factors: Sequence[float], facts: Mapping[str, float] | None = None) -> Update:
    def change(block: Block) -> "Values":
        from stockflow.kernels import pointwise

        deltas_NE = block.deltas_NE
        limit, factors_N = _at_most(epsilon, deltas_NE.dtype), np.array(factors, deltas_NE.dtype)
        if block.lows_NE is None:
            change_E = np.empty_like(block.base_E)
            pointwise.average_active(deltas_NE, limit, factors_N, change_E)
            return change_E
        change_2E = np.empty((2, len(block.base_E)))
        pointwise.average_active_exactly(deltas_NE, block.lows_NE, limit, factors_N, change_2E)
        return change_2E

    return Update(change, facts or {})


def _at_most(epsilon: float, dtype: "np.dtype[Any]") -> "Values":
    """The largest number of a precision that is not above ``epsilon``: what is larger than one is than the other."""
    rounded = np.array([epsilon], dtype)
    return np.nextafter(rounded, dtype.type(-np.inf)) if rounded[0] > epsilon else rounded


def _ratio(shared: int, unique: float) -> float:
    return shared / unique if unique > 0.0 else math.inf if shared else 0.0


@dataclass(frozen=True)
class ActiveCounts:
    """How many elements each model moves beside others, and how many it alone moves. Shape (2, N)."""

    epsilon: float
    num_tuned: int
    float_bits: Literal[32, 64]

    def zero(self) -> Counts:
        """Return no counts."""
        return np.zeros((2, self.num_tuned), np.int64)

    def update(self, state: Counts, block: Block) -> Counts:
        """Count a block."""
        from stockflow.kernels.pointwise import count_active

        count_active(block.deltas_NE, _at_most(self.epsilon, block.deltas_NE.dtype), state[0], state[1])
        return state

    def combine(self, left: Counts, right: Counts) -> Counts:
        """Add counts."""
        return left + right

    def finish(self, state: Counts) -> Counts:
        """Return the counts."""
        return state
