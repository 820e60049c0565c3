"""Breadcrumbs: of each task vector neither the largest elements nor the smallest; with an election or without."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stockflow.methods import selection, sparse
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, Statistic, UnitContext, elementwise_method
from stockflow.methods.selection import KeptByRank, Pick, Threshold, largest, multiply_largest

SOURCE = "Davari and Belilovsky 2023, arXiv:2312.06795"
GAMMA = Parameter("gamma", "number", per_model=True, default=0.01, minimum=0.0, maximum=1.0)


@dataclass(frozen=True, slots=True)
class Middle(KeptByRank):
    """The largest elements of each task vector without the very largest."""

    outer: Sequence[Threshold]
    inner: Sequence[Threshold]

    def drop(self, block: Block) -> None:
        """Drop the smallest, then the largest."""
        multiply_largest(block.deltas_NE, self.outer, block.start, self.bits, by=1)
        multiply_largest(block.deltas_NE, self.inner, block.start, self.bits, by=0)


def middle(context: UnitContext, given: Parameters) -> Generator[Statistic, Any, Middle]:
    """Keep ``k = int(density * n)`` elements below the ``g = int(gamma * n)`` largest: fewer of these if n < k + g."""
    n, picks, shares = context.num_elems, [], []
    for row, (density, gamma) in enumerate(zip(given.each("density"), given.each("gamma"), strict=True)):
        k = n if density >= 1.0 else int(density * n)
        dropped = min(int(gamma * n), n - k)
        picks += [Pick(row, dropped + k if k else 0), Pick(row, dropped if k else 0)]
        shares.append(k / n)
    thresholds = yield from largest(context, picks)
    return Middle(shares, context.float_bits, thresholds[::2], thresholds[1::2])


_breadcrumbs = partial(
    elementwise_method,
    source=SOURCE,
    min_tuned=1,
    scopes=("tensor", "leading", "layer"),
    num_rounds=sparse.num_rounds(selection.num_rounds),
    kept_bytes=sparse.kept_bytes(2),
    state_bytes=2 * selection.STATE_BYTES,
    facts=("kept_share", "rescale"),
)


@_breadcrumbs("breadcrumbs", parameters=sparse.parameters(GAMMA, elect=False, normalize=False, rescale=False))
def breadcrumbs(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + lambda * sum_i a_i S_i(d_i) / Z``; of each ``d_i`` k elements are kept, and the g largest are not.

    ``k = int(density * n)``, ``g = int(gamma * n)``, or what k leaves of n; exactly k are kept, of equal ones the
    lower flat index counts as larger (mergekit: in the order its sort happens to give). Kept from mergekit: density 1
    keeps everything, outliers too; k may be 0; a sum of the weights below 1e-8 in size counts as 1 when normalizing.
    """
    return sparse.merged(context, parameters, middle, elect=False)


@_breadcrumbs("breadcrumbs_ties", parameters=sparse.parameters(GAMMA, elect=True, normalize=False, rescale=False))
def breadcrumbs_ties(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return what ``breadcrumbs`` does of the elements that have the elected sign, as ``ties`` elects it.

    ``w_0 + lambda * sum_i m_i a_i S_i(d_i) / Z``, Z being 1 unless ``normalize`` is true.
    """
    return sparse.merged(context, parameters, middle, elect=True)
