"""Weighted average of all listed models."""

import math

import numpy as np

from stockflow.errors import NumericsError
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import Coefficients, Parameter, Parameters, linear_method


@linear_method(
    "linear",
    source="Wortsman et al. 2022, arXiv:2203.05482",
    base="optional",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True),
        Parameter("normalize", "flag", default=True),
    ),
    needs_gram=False,
)
def linear(_: Gram, parameters: Parameters) -> Coefficients:
    """Return ``sum_i a_i w_i / sum_i a_i``, without the division if ``normalize`` is false.

    Where the coefficients sum to 1 they are applied to the differences from the first model, so that
    merging copies returns them bit for bit. A base counts only if it is listed among the models.

    Raises:
        NumericsError: the weights sum to zero (mergekit returns infinity or NaN there).
    """
    weights = parameters.each("weight")
    total = math.fsum(weights)
    if parameters.flag("normalize"):
        if total == 0.0:
            raise NumericsError(
                f"the weights {list(weights)} of `linear` sum to zero, so they cannot be normalized; "
                "change them or set `normalize: false`"
            )
        weights = tuple(weight / total for weight in weights)
    if parameters.flag("normalize") or total == 1.0:
        return Coefficients(np.array([weights[1:]], dtype=np.float64), anchored=True)
    return Coefficients(np.array([weights], dtype=np.float64), anchored=False)
