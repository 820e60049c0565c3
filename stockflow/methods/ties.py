"""TIES: keep the largest changes of each model, elect a sign per element, average what agrees with it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from stockflow.methods import selection, sparse
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Block, Rounds, Statistic, UnitContext, elementwise_method
from stockflow.methods.selection import KeptByRank, Pick, Threshold, largest, multiply_largest


@dataclass(frozen=True, slots=True)
class Largest(KeptByRank):
    """The largest elements of each task vector."""

    thresholds: Sequence[Threshold]

    def drop(self, block: Block) -> None:
        """Keep the largest."""
        multiply_largest(block.deltas_NE, self.thresholds, block.start, self.bits, by=1)


def largest_kept(context: UnitContext, given: Parameters) -> Generator[Statistic, Any, Largest]:
    """Keep ``k = max(1, int(density * n))`` elements of each task vector: none at density 0, all at 1."""
    n, densities = context.num_elems, given.each("density")
    ranks = [0 if density <= 0 else n if density >= 1 else max(1, int(density * n)) for density in densities]
    thresholds = yield from largest(context, [Pick(row, rank) for row, rank in enumerate(ranks)])
    return Largest([rank / n for rank in ranks], context.float_bits, thresholds)


@elementwise_method(
    "ties",
    source="Yadav et al. 2023, arXiv:2306.01708",
    min_tuned=1,
    parameters=sparse.parameters(elect=True, normalize=True, rescale=False),
    scopes=("tensor", "leading", "layer"),
    num_rounds=sparse.num_rounds(selection.num_rounds),
    kept_bytes=sparse.kept_bytes(1),
    state_bytes=selection.STATE_BYTES,
    facts=("kept_share", "rescale"),
)
def ties(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + lambda * sum_i(m_i a_i s_i) / sum_i(m_i a_i)``, elementwise.

    ``s_i`` is d_i where it is among the k largest magnitudes, ``k = max(1, int(density * n))``, else 0; exactly k are
    kept, of equal ones the lower flat index first (mergekit: in the order its sort happens to give).
    ``m_i`` says whether ``a_i s_i`` has the elected sign, that of ``sum_i a_i s_i``. Kept from mergekit: an
    elected sum of zero counts as positive, zeros never agree, a divisor of zero counts as one, density 0 keeps
    nothing and density 1 everything; ``rescale`` gives what is kept the L1 norm of what was there. Without
    ``normalize`` there is no division.
    """
    return sparse.merged(context, parameters, largest_kept, elect=True)
