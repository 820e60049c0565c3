"""NearSwap: a step from the base towards one model, of limited size, so that near elements become the model's."""

from typing import TYPE_CHECKING

import numpy as np

from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, UnitContext, Update, elementwise_method

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

SMALLEST_SIZE = 1e-6


@elementwise_method(
    "nearswap",
    source="alchemonaut 2024, QuartetAnemoi-70B; as in mergekit 0.1.5",
    min_tuned=1,
    max_tuned=1,
    parameters=(Parameter("t", "number", role="step"),),
)
def nearswap(context: UnitContext, parameters: Parameters) -> Update:
    """Return ``w_0 + a (w_1 - w_0)`` with ``a = min(max(t / max(|w_1 - w_0|, 1e-6), 0), 1)``, element by element.

    So what is nearer than t becomes the model's, and all else moves by t. Kept from mergekit: the least divisor of
    1e-6, which is absolute; a negative t is the base.
    """
    del context
    most = max(parameters.number("t"), 0.0)

    def change(block: Block) -> "Values":
        from stockflow.kernels import pointwise

        delta_E = block.deltas_NE[0]
        limit, least = (np.array([number], delta_E.dtype) for number in (most, SMALLEST_SIZE))
        if block.lows_NE is None:
            change_E = np.empty_like(block.base_E)
            pointwise.step(delta_E, limit, least, change_E)
            return change_E
        change_2E = np.empty((2, len(block.base_E)))
        pointwise.step_exactly(delta_E, block.lows_NE[0], limit, least, change_2E)
        return change_2E

    return Update(change)
