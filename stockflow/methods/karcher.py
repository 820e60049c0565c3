"""Karcher mean of the models' directions: the point of the sphere from which all of them lie around evenly."""

import numpy as np

from stockflow.methods.gram import Gram, mean_in_order
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method
from stockflow.methods.vectors import ANGLE_TOLERANCE, Vectors


def _fact_tolerance(name: str, mean_cosine: float | None, num_tuned: int) -> float:
    del mean_cosine, num_tuned
    return {"iterations": 1.0, "angle": ANGLE_TOLERANCE, "spread": ANGLE_TOLERANCE}.get(name, COSINE_TOLERANCE)


@linear_method(
    "karcher",
    source="Karcher 1977; fixed-point iteration, arXiv:2603.04972, as in mergekit 0.1.5",
    base="ignored",
    min_tuned=1,
    parameters=(
        Parameter("max_iter", "integer", default=10, minimum=0),
        Parameter("tol", "number", default=1e-5, minimum=0.0),
    ),
    scopes=("tensor", "row", "leading", "layer"),
    products="vectors",
    facts=("mean_cosine", "min_cosine", "max_cosine", "angle", "spread", "iterations"),
    tolerance=Tolerance(
        fact=_fact_tolerance,
        coefficient=lambda coefficient, _: 100.0 * COSINE_TOLERANCE * max(1.0, abs(coefficient)) ** 3,
    ),
)
def karcher(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return the mean of all ``|w_i|`` times m, the Karcher mean of the directions ``u_i = w_i / |w_i|``.

    m begins as the direction of the mean of all u_i, and moves along the mean of the arcs to them until the step is
    below ``tol`` (radians), ``max_iter`` times at most. Kept from mergekit: the first u_i where the mean of all is
    shorter than ``tol``; arcs below ``tol`` count as zero; tensors of zero have no direction, but their norms count.
    Dropped: tensors with a norm up to ``tol`` have no direction either, which is a matter of scale; an antipode of
    m, from which no arc is the shortest, is left out of a step.
    """
    from stockflow.kernels.directions import karcher_means

    vectors = Vectors.of(gram, parameters)
    means_GN, (spreads_G, iterations_G) = np.empty(vectors.norms_GN.shape), np.empty((2, len(vectors.norms_GN)))
    karcher_means(
        vectors.cosines_GNN,
        vectors.norms_GN > 0.0,
        parameters.integer("max_iter"),
        parameters.number("tol"),
        means_GN,
        spreads_G,
        iterations_G,
    )
    weights_GN = mean_in_order(vectors.norms_GN)[:, None] * vectors.per_norm(means_GN)
    return vectors.added(weights_GN, {"spread": np.degrees(spreads_G), "iterations": iterations_G})
