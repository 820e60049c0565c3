"""Barycentric mean of directions: the weighted mean of the models' directions, as long as the models are on average."""

import math

import numpy as np

from stockflow.errors import NumericsError
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import FACTORS, Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method
from stockflow.methods.vectors import ANGLE_TOLERANCE, Vectors, dot
from stockflow.methods.weights import normalized, zero_sum

CANCELLED = 1e-8


@linear_method(
    "multislerp",
    source="mergekit 0.1.5, whose step in the tangent space is zero for any weights",
    base="optional",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True, usual=FACTORS),
        Parameter("normalize_weights", "flag", default=True, role="sum"),
        Parameter("eps", "number", default=0.0, minimum=0.0),
    ),
    scopes=("tensor", "row", "leading", "layer"),
    products="vectors",
    facts=("mean_cosine", "min_cosine", "max_cosine", "angle", "direction_length"),
    tolerance=Tolerance(
        fact=lambda name, *_: ANGLE_TOLERANCE if name in ("angle", "direction_length") else COSINE_TOLERANCE,
        coefficient=lambda coefficient, _: 20.0 * COSINE_TOLERANCE * max(1.0, abs(coefficient)) ** 3,
    ),
    refuses=zero_sum("normalize_weights"),
)
def multislerp(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return ``sum_i a_i |x_i|`` times the direction of ``M = sum_i a_i x_i / |x_i|``, plus w_0 if there is a base.

    ``x_i`` are the task vectors where there is a base, else the models; ``a_i`` the weights, divided by their sum
    unless ``normalize_weights`` is false. Kept from mergekit: one model comes back unchanged; where directions
    cancel, ``|M| < 1e-8`` or ``eps`` if that is larger, two are added up as they are and more are an error. Its
    ``eps`` is added to each norm, and its cosine is a factor of the result; its default of 1e-8 acts on vectors of
    that size only, and here it is 0. Dropped: the error where all vectors are zero, whose sum is zero.

    Raises:
        NumericsError: the directions of three or more vectors cancel.
    """
    vectors = Vectors.of(gram, parameters)
    if vectors.num == 1:
        return vectors.only()
    eps = parameters.number("eps")
    given = parameters.each("weight")
    weights_N = np.array(normalized(given) if parameters.flag("normalize_weights") else given)
    norms_GN = vectors.norms_GN
    lengths_GN = norms_GN + np.where(norms_GN == 0.0, 1.0, eps)
    shares_GN = weights_N * (norms_GN / lengths_GN)
    length_G = vectors.length(shares_GN)
    cancels_G = length_G < max(eps, CANCELLED)
    if vectors.num > 2 and (cancels_G & norms_GN.any(axis=1)).any():
        raise NumericsError(
            f"the directions of {vectors.num} models cancel, so they have no mean; change the weights, or name the "
            "tensor in a rule with another method"
        )
    weights_GN = np.broadcast_to(weights_N, norms_GN.shape)
    factor_G = dot(norms_GN, weights_GN) * math.cos(eps) / np.where(cancels_G, 1.0, length_G)
    arc_GN = factor_G[:, None] * (weights_GN / lengths_GN)
    return vectors.added(np.where(cancels_G[:, None], weights_GN, arc_GN), {"direction_length": length_G})
