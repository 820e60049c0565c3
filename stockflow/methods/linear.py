"""Weighted average of all listed models."""

import math

import numpy as np

from stockflow.methods.gram import Gram
from stockflow.methods.parameters import FACTORS, Parameter, Parameters
from stockflow.methods.protocol import Coefficients, linear_method
from stockflow.methods.weights import normalized, zero_sum


@linear_method(
    "linear",
    source="Wortsman et al. 2022, arXiv:2203.05482",
    base="ignored",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True, usual=FACTORS),
        Parameter("normalize", "flag", default=True, role="sum"),
    ),
    products=None,
    refuses=zero_sum("normalize"),
)
def linear(_: Gram, parameters: Parameters) -> Coefficients:
    """Return ``sum_i a_i w_i / sum_i a_i``, without the division if ``normalize`` is false.

    Where the coefficients sum to 1 they are applied to the differences from the first model, so that
    merging copies returns them bit for bit. Weights that sum to zero are refused, where mergekit returns infinity
    or NaN.
    """
    weights = parameters.each("weight")
    total = math.fsum(weights)
    if parameters.flag("normalize"):
        weights = normalized(weights)
    if parameters.flag("normalize") or total == 1.0:
        return Coefficients(np.array([weights[1:]], dtype=np.float64), anchored=True)
    return Coefficients(np.array([weights], dtype=np.float64), anchored=False)
