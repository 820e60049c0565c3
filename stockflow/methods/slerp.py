"""Spherical interpolation from the base to one model."""

import math

import numpy as np

from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method

NEARLY_PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


@linear_method(
    "slerp",
    source="Shoemake 1985; fallbacks as in mergekit 0.1.5",
    base="required",
    products="crossed",
    min_tuned=1,
    max_tuned=1,
    parameters=(Parameter("t", "number", usual=(0.0, 1.0), role="place"),),
    tolerance=Tolerance(coefficient=lambda coefficient, num_sources: 20.0 * COSINE_TOLERANCE),
)
def slerp(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return ``sin((1-t) a)/sin(a) w_0 + sin(t a)/sin(a) w_1``, with ``a`` the angle between the two.

    Kept from mergekit: ``|dot| > 0.9995`` interpolates linearly, a norm of at most 1e-8 is not divided
    out of the dot product, the dot is clamped to [-1, 1], t is not limited to [0, 1].
    """
    t = parameters.number("t")
    base_squared = float(gram.products_GMM[0, 0, 0])
    base_with_delta = float(gram.products_GMM[0, 0, 1])
    tuned_squared = max(base_squared + 2.0 * base_with_delta + float(gram.products_GMM[0, 1, 1]), 0.0)
    dot = base_squared + base_with_delta
    for norm in (math.sqrt(base_squared), math.sqrt(tuned_squared)):
        dot = dot / norm if norm > SMALLEST_NORM else dot
    dot = min(max(dot, -1.0), 1.0)
    if abs(dot) > NEARLY_PARALLEL:
        return Coefficients(np.array([[t]]), anchored=True)
    angle = math.acos(dot)
    weights = [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return Coefficients(np.array([weights]), anchored=False)
