"""One model as it is, or multiplied by a number."""

import numpy as np

from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Coefficients, linear_method


def _is_whole(parameters: Parameters) -> bool:
    return parameters.each("scale") == (1.0,)


@linear_method(
    "passthrough",
    source="mergekit 0.1.5",
    base="ignored",
    min_tuned=1,
    max_tuned=1,
    parameters=(Parameter("scale", "number", per_model=True, default=1.0, role="scale"),),
    products=None,
    copies=_is_whole,
)
def passthrough(_: Gram, parameters: Parameters) -> Coefficients:
    """Return ``scale * w``; with a scale of 1 and the same dtype the bytes are carried over. 0 gives zeros."""
    return Coefficients(np.array([parameters.each("scale")]), anchored=False)
