"""Geometric median of the models: the point with the least sum of distances to them; outliers hardly move it."""

import math

import numpy as np

from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method
from stockflow.methods.vectors import ANGLE_TOLERANCE, Vectors, closed
from stockflow.methods.weights import normalized


def _fact_tolerance(name: str, mean_cosine: float | None, num_tuned: int) -> float:
    del mean_cosine, num_tuned
    return {"iterations": 5.0, "angle": ANGLE_TOLERANCE}.get(name, 10.0 * COSINE_TOLERANCE)


def _no_weight(parameters: Parameters) -> str | None:
    return None if any(parameters.each("weight")) else "every `weight` of `geometric_median` is 0; change one"


def _outweighs(parameters: Parameters) -> bool:
    """Return whether the pull of all others is no match for one model; two of equal weight match each other."""
    weights = parameters.each("weight")
    most = max(weights)
    matched = math.fsum(weights) - most
    return most > matched or (most == matched and sum(map(bool, weights)) > 2)


@linear_method(
    "geometric_median",
    source="Weiszfeld 1937; Vardi and Zhang 2000, doi:10.1073/pnas.97.4.1423",
    base="optional",
    min_tuned=1,
    parameters=(
        Parameter("weight", "number", per_model=True, default=1.0, minimum=0.0, role="share"),
        Parameter("max_iter", "integer", default=10_000, minimum=0),
        Parameter("tol", "number", default=1e-12, minimum=0.0),
    ),
    scopes=("tensor", "row", "leading", "layer"),
    facts=("mean_cosine", "min_cosine", "max_cosine", "angle", "share", "iterations"),
    tolerance=Tolerance(fact=_fact_tolerance),
    refuses=_no_weight,
    outweighs=_outweighs,
)
def geometric_median(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return the y that makes ``sum_i a_i |w_i - y|`` least, ``y = sum_i p_i w_i`` with shares that sum to 1.

    A model that the others do not outweigh is the median itself. Else y begins as the weighted mean and becomes,
    again and again, the mean by ``a_i / |w_i - y|``, until the way left is below ``tol`` times the models' distance
    from each other, ``max_iter`` times at most, which flags the tensor ``unconverged``. Of two equal weights it is the
    mean. A base changes nothing but what differences are taken from. There is no epsilon: where y is a model, its
    pull is held against that of the others (Vardi and Zhang). mergekit has no such method.
    """
    from stockflow.kernels.medians import geometric_medians

    weights_N, max_iter = np.array(normalized(parameters.each("weight"))), parameters.integer("max_iter")
    squares_GNN = _squared_distances(gram, parameters)
    shares_GN, iterations_G = np.empty(squares_GNN.shape[:2]), np.empty(len(squares_GNN))
    geometric_medians(squares_GNN, weights_N, max_iter, parameters.number("tol"), shares_GN, iterations_G)
    shares = {f"share_{number}": share_G for number, share_G in enumerate(shares_GN.T, 1)}
    changes = Vectors.of(gram, parameters).facts() if parameters.from_base else {}
    return Coefficients(
        shares_GN if parameters.from_base else closed(shares_GN),
        anchored=parameters.from_base,
        facts={**changes, **shares, "iterations": np.minimum(iterations_G, max_iter)},
        flags={"unconverged": iterations_G > max_iter},
    )


def _squared_distances(gram: Gram, parameters: Parameters) -> Floats:
    """Of all models from each other; without a base the first of them is what task vectors are measured from."""
    products_GNN = gram.products_GMM[:, 1:, 1:] if parameters.from_base else gram.products_GMM.copy()
    if not parameters.from_base:
        products_GNN[:, 0, :] = products_GNN[:, :, 0] = 0.0
    norms_GN = np.diagonal(products_GNN, axis1=1, axis2=2)
    return np.maximum(norms_GN[:, :, None] + norms_GN[:, None, :] - 2.0 * products_GNN, 0.0)
