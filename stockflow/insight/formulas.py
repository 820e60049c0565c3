"""Which formula made a merged tensor: the candidates, and how the evidence decides between them. Pure.

A merged tensor m lies at ``w_0 + t d``, d the mean task vector, plus what rounding did to it; the formulas differ in
t. Two kinds of evidence decide:

1. *Distance.* ``|m - w_0 - t d|`` follows from the Gram of base, models and m. A formula is a contender if it is
   within ``ROUNDINGS_OF_A_TOOL`` times the noise of one rounding, plus what an error of ``RATIO_PRECISION`` in a
   tool's own t makes.
2. *Elements.* What the contenders give, each rounded once to the dtype of m, is held against m. Where two give
   different numbers, m is nearer to one of them: a formula is told apart from the best one if elements speak for the
   best one by more than ``SIGNIFICANCE`` standard deviations of tossing a coin. Means over many elements would not do:
   updates of about one rounding are rounded with a bias (most of them to nothing).

The noise of a rounding is the root of ``sum(step_k**2) / 12`` over the elements, step_k the distance between the
representable numbers around m_k: an error uniform in half a step to either side has that variance. The sum is within
5 % of the true squared error where results fall anywhere between representable numbers
(``tests/unit/test_formulas.py``). Where models and merge are on one grid they do not: with N = 3 and t = 0.75, which
leaves quarters of a step, the true squared error was 1.06 to 1.14 times the sum for task vectors of 1e-3 and more,
and 0.72 times for BF16 task vectors of 1e-4, below a step.

Shape suffixes: G groups, K formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stockflow.kernels.arrays import Floats
from stockflow.methods.ratios import RATIOS, Geometry

FORMULAS = ("exact", "two_model", "extrapolated", "floored", "average", "base", "mean_angle", "adjacent")
"""In order of preference where several are equal: those of ``geometry.RATIOS``, t = 1 and t = 0."""
SECONDARY = ("mean_angle", "adjacent")
"""Asked about only where no other formula fits: their ratios are so near to the exact one that a tool which computes
in BF16 would often be taken for one of them."""
WORDS = {
    "exact": "Model Stock's formula",
    "two_model": "the old formula for two models",
    "extrapolated": "Model Stock's formula, extrapolated where the cosine is negative",
    "floored": "mergekit's formula with its floor of 1e-6 under small norms",
    "average": "the plain average of the models",
    "base": "the base, unchanged",
    "mean_angle": "Model Stock's formula with the mean angle for the mean cosine",
    "adjacent": "Model Stock's formula with the cosines of neighbours only",
    "indistinguishable": "several formulas that give the same numbers",
    "none": "none of these",
    "not_finite": "NaN or infinity in a model or in the merge",
}
"""Every label a tensor can get."""

ROUNDINGS_OF_A_TOOL = 4.0
"""One rounding is within 1.74 times its own noise at worst. mergekit 0.1.5, which rounds the average, two products and
their sum, was at 1.6 to 2.3 in BF16 and in float32 (tests/integration/test_audit_mergekit.py prints it)."""
RATIO_PRECISION = {"BF16": 2.0**-7, "F16": 2.0**-9, "F32": 2.0**-12, "F64": 2.0**-40}
"""Relative error of the t of a tool that computes in the dtype it writes: mergekit 0.1.5 in BF16 gave 0.7461 for
0.7497; in float32 it was off by 2e-5 of t for 256,000 elements, and sums of more lose more."""
GRAM_PRECISION = 1e-13
"""Relative error of a squared distance, from differences of sums in float64."""
SIGNIFICANCE = 5.0
SAME_RATIO = 1e-12
ROUNDED_ONCE = 0.98
"""Share of equal elements from which on a tensor was rounded once from the formula; below, the tool's own t has an
error and formulas within it are not told apart."""


@dataclass(frozen=True)
class TensorEvidence:
    """What elements say of a tensor, per formula; sums over all of it."""

    num_elems: int
    num_tuned: int
    is_contender: Sequence[bool]
    ratios: Sequence[float]
    """t per formula; NaN where there is none"""
    is_same: npt.NDArray[np.bool_]
    """whether two formulas have the same t in every group, shape (K, K)"""
    num_equal: Sequence[int]
    roundings: Sequence[float]
    nearer: npt.NDArray[np.int64]
    """elements that are nearer to what the row's formula gives than to the column's, shape (K, K)"""


def ratios_of(geometry: Geometry) -> Floats:
    """Return t of every formula, shape (K, G)."""
    constant = {"average": 1.0, "base": 0.0}
    num_groups = len(geometry.gram.products_GMM)
    rows = [geometry.ratio(name) if name in RATIOS else np.full(num_groups, constant[name]) for name in FORMULAS]
    return np.stack(rows)


def ratio_errors(ratios: Floats, num_tuned: int, dtype: str) -> Floats:
    """Return the error that a tool's own t may have which computes in ``dtype``.

    A relative error of the cosine is one of t times ``1 / (1 + (N - 1) cos)``, that is ``1 - t (N - 1) / N``: more
    than itself only for negative cosines.
    """
    amplified = np.maximum(1.0 - ratios * (num_tuned - 1) / num_tuned, 1.0)
    return np.abs(ratios) * amplified * RATIO_PRECISION[dtype]


def decide(evidence: TensorEvidence, dtype: str) -> tuple[str, tuple[str, ...]]:
    """Return the label of a tensor, and every formula it may have been made by, those of equal t included."""
    contenders = [k for k in range(len(FORMULAS)) if evidence.is_contender[k] and FORMULAS[k] not in SECONDARY]
    contenders = contenders or [k for k in range(len(FORMULAS)) if evidence.is_contender[k]]
    if not contenders:
        return "none", ()
    best = min(contenders, key=lambda k: (evidence.roundings[k], k))
    alike = [k for k in contenders if evidence.is_same[best, k]]
    rivals = [k for k in contenders if k not in alike and not _told_apart(evidence, best, k, dtype)]
    found = tuple(FORMULAS[k] for k in sorted({*alike, *rivals}))
    return ("indistinguishable" if rivals else FORMULAS[min(alike)]), found


def _told_apart(evidence: TensorEvidence, best: int, other: int, dtype: str) -> bool:
    for_best, for_other = int(evidence.nearer[best, other]), int(evidence.nearer[other, best])
    if for_best - for_other <= SIGNIFICANCE * math.sqrt(for_best + for_other):
        return False
    if evidence.num_equal[best] >= ROUNDED_ONCE * evidence.num_elems:
        return True
    difference = abs(evidence.ratios[other] - evidence.ratios[best])
    allowed = ratio_errors(np.array([evidence.ratios[best]]), evidence.num_tuned, dtype)
    return not difference <= float(allowed[0])
