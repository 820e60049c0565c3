"""Add weighted task vectors to the base."""

import math

import numpy as np

from stockflow.methods.gram import Gram
from stockflow.methods.parameters import FACTORS, Parameter, Parameters
from stockflow.methods.protocol import Coefficients, linear_method


@linear_method(
    "task_arithmetic",
    source="Ilharco et al. 2023, arXiv:2212.04089",
    base="required",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True, usual=FACTORS, role="amount"),
        Parameter("lambda", "number", default=1.0, usual=FACTORS, role="amount"),
        Parameter("normalize", "flag", default=False, role="sum"),
    ),
    products=None,
)
def task_arithmetic(_: Gram, parameters: Parameters) -> Coefficients:
    """Return ``w_0 + lambda * sum_i a_i d_i``, divided by ``sum_i a_i`` if ``normalize`` is true.

    Kept from mergekit: a weight sum below 1e-8 in size counts as 1 when normalizing.
    """
    weights = parameters.each("weight")
    total = math.fsum(weights)
    divisor = total if parameters.flag("normalize") and abs(total) >= 1e-8 else 1.0
    scale = parameters.number("lambda") / divisor
    return Coefficients(np.array([[scale * weight for weight in weights]], dtype=np.float64), anchored=True)
