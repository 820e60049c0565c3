"""Model Stock: interpolate between the base and the average of the tuned models, by their geometry."""

import numpy as np

from stockflow.errors import NumericsError
from stockflow.methods.gram import Gram, legacy_ratio, mean_in_order, stock_ratio
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import COSINE_TOLERANCE, Coefficients, Tolerance, linear_method


def _fact_tolerance(name: str, mean_cosine: float | None, num_tuned: int) -> float:
    if name not in ("ratio", "legacy_ratio"):
        return COSINE_TOLERANCE
    return COSINE_TOLERANCE * _slope(mean_cosine or 0.0, 2 if name == "legacy_ratio" else num_tuned)


def _slope(cosine: float, num_tuned: int) -> float:
    """How much a ratio ``N c / (1 + (N - 1) c)`` moves with its cosine; at least 1."""
    denominator = 1.0 + (num_tuned - 1) * cosine
    return max(num_tuned / max(denominator, 1e-6) ** 2, 1.0)


def _coefficient_tolerance(coefficient: float, num_tuned: int) -> float:
    """By the slope at the cosine that gives the ratio ``N * coefficient``."""
    slope = (num_tuned - (num_tuned - 1) * num_tuned * coefficient) ** 2 / num_tuned
    return 10.0 * COSINE_TOLERANCE * max(slope, 1.0)


@linear_method(
    "model_stock",
    source="arXiv:2403.19522, eq. 2 and appendix D",
    base="required",
    min_tuned=2,
    parameters=(
        Parameter("filter_wise", "flag", default=False),
        Parameter("on_negative", "word", default="clamp", choices=("clamp", "extrapolate", "error")),
    ),
    scopes=("tensor", "row", "leading", "layer"),
    rows_if=("filter_wise", True),
    facts=("mean_cosine", "min_cosine", "max_cosine", "ratio", "legacy_ratio"),
    tolerance=Tolerance(_fact_tolerance, _coefficient_tolerance),
)
def model_stock(gram: Gram, parameters: Parameters) -> Coefficients:
    """Return one ratio per group, shared equally by the tuned models: ``out = w_0 + sum_i (t / N) d_i``.

    ``t = N cos / (1 + (N - 1) cos)`` with cos the mean of all pairwise cosines. Kept from mergekit: a zero
    task vector beside others counts as cosine 0. Dropped: its clamp of the norm product at 1e-6, which makes
    the result depend on the scale of the task vectors, and its unbounded extrapolation for cos < 0, which
    ``on_negative: extrapolate`` brings back.

    Raises:
        NumericsError: cos < 0 with ``on_negative: error``; the task vectors cancel with ``extrapolate``.
    """
    cosines_GP = gram.pairwise_cosines_GP()
    cosine_G = mean_in_order(cosines_GP)
    ratio_G = stock_ratio(cosine_G, gram.num_tuned)
    negative_G = ratio_G < 0.0
    policy = parameters.word("on_negative")
    if policy == "clamp":
        ratio_G = np.where(negative_G, 0.0, ratio_G)
    elif negative_G.any() and policy == "error":
        raise NumericsError(
            f"the task vectors oppose each other (mean cosine {cosine_G[negative_G].min():.6f}), which gives the "
            f"negative ratio t = {ratio_G[negative_G].min():.6g}; "
            "set `stockflow: {on_negative: clamp}` to keep the base there"
        )
    elif np.isneginf(ratio_G).any():
        raise NumericsError(
            f"the {gram.num_tuned} task vectors cancel (mean cosine {cosine_G.min():.6f}), so no ratio exists; "
            "set `stockflow: {on_negative: clamp}` to keep the base there"
        )
    return Coefficients(
        np.repeat((ratio_G / gram.num_tuned)[:, None], gram.num_tuned, axis=1),
        anchored=True,
        facts={
            "mean_cosine": cosine_G,
            "min_cosine": cosines_GP.min(axis=1),
            "max_cosine": cosines_GP.max(axis=1),
            "ratio": ratio_G,
            "legacy_ratio": legacy_ratio(cosine_G),
        },
        flags={"clamped": negative_G & (policy == "clamp")},
    )
