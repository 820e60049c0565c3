"""Spherical interpolation between two models, or between their task vectors."""

import math

import numpy as np

from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method
from stockflow.methods.vectors import ANGLE_TOLERANCE, Vectors, mapped

NO_SUM = 1e-6
PARALLEL, ANTIPODAL = 1e-16, 1e-14
"""Squared sines. Of antipodes the line differs from the arc, and float64 products do not tell smaller ones from 0."""


@linear_method(
    "nuslerp",
    source="Shoemake 1985; weights, rows and fallbacks as in mergekit 0.1.5",
    base="optional",
    min_tuned=2,
    max_tuned=2,
    parameters=(
        Parameter("weight", "number", per_model=True, role="share"),
        Parameter("nuslerp_flatten", "flag", default=True),
        Parameter("nuslerp_row_wise", "flag", default=False),
    ),
    scopes=("tensor", "row", "leading", "layer"),
    products="vectors",
    facts=("mean_cosine", "min_cosine", "max_cosine", "angle"),
    tolerance=Tolerance(
        fact=lambda name, *_: ANGLE_TOLERANCE if name == "angle" else COSINE_TOLERANCE,
        coefficient=lambda coefficient, _: 20.0 * COSINE_TOLERANCE * max(1.0, abs(coefficient)) ** 3,
    ),
    rows_if=("nuslerp_flatten", False),
    columns_if="nuslerp_row_wise",
)
def nuslerp(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return ``sin((1-t) a)/sin(a) x_1 + sin(t a)/sin(a) x_2``, ``t = a_2 / (a_1 + a_2)``, plus w_0 if there is a base.

    ``x_i`` are the task vectors where there is a base, else the models; ``a`` is the angle between them. Kept from
    mergekit: t is 0.5 where the weights' sum is below 1e-6 in size; a straight line where ``1 - cos^2 <= 1e-16``
    (1e-14 of antipodes); a right angle where a vector is zero; lengths are interpolated like directions. Dropped:
    norms count as 1e-7 at least, which bends the arc of vectors shorter than that.
    """
    vectors = Vectors.of(gram, parameters)
    first, second = parameters.each("weight")
    t = second / (first + second) if abs(first + second) >= NO_SUM else 0.5
    cosine_G = vectors.cosines_GNN[:, 0, 1]
    is_straight_G = 1.0 - cosine_G**2 <= np.where(cosine_G < 0.0, ANTIPODAL, PARALLEL)
    angle_G = mapped(math.acos, np.where(is_straight_G, 0.0, cosine_G))
    sines_G3 = [mapped(math.sin, factor * angle_G) for factor in (1.0 - t, t, 1.0)]
    weights_G2 = np.column_stack(
        [np.where(is_straight_G, line, sines_G3[n] / sines_G3[2]) for n, line in enumerate((1.0 - t, t))]
    )
    return vectors.added(weights_G2, {})
