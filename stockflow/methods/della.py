"""DELLA: keep elements of each task vector at random, larger ones rather than smaller; with an election or without."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from stockflow.kernels.arrays import Counts, Unsigned
from stockflow.methods import sparse
from stockflow.methods.dare import RESCALES, SEED, keys_of
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, Statistic, UnitContext, elementwise_method

SOURCE = "Deep, Bhardwaj, Poria 2024, arXiv:2406.11617"
EPSILON = Parameter("epsilon", "number", per_model=True, default=0.15, minimum=0.0, maximum=0.5)


def _too_wide(given: Parameters) -> str | None:
    """Return what is wrong with densities and epsilons together."""
    for density, epsilon in zip(given.each("density"), given.each("epsilon"), strict=True):
        if 0.0 < density < 1.0 and not epsilon < density < 1.0 - epsilon:
            return (
                f"the `density` {density:g} with `epsilon` {epsilon:g}: expected both density - epsilon and density + "
                f"epsilon between 0 and 1, found {density - epsilon:g} and {density + epsilon:g}; lower epsilon"
            )
    return None


@dataclass(frozen=True, slots=True)
class Ranked:
    """Each element by itself, with a probability that grows with its rank in its row."""

    densities: Sequence[float]
    epsilons: Sequence[float]
    keys_N2: Unsigned
    inflated: bool
    """whether what is kept is divided by its probability"""
    bits: Literal[32, 64]

    @property
    def shares(self) -> Sequence[float]:
        """Only the draws tell."""
        return ()

    @property
    def factors(self) -> Sequence[float]:
        """Each element has its own."""
        return [1.0] * len(self.densities)

    @property
    def is_whole(self) -> Sequence[bool]:
        """Those that nothing is drawn for."""
        return [density >= 1.0 for density in self.densities]

    def drop(self, block: Block) -> Counts:
        """Rank and draw."""
        from stockflow.kernels import ranking

        kept_N = np.zeros(len(self.densities), np.int64)
        factors_E = np.empty(len(block.base_E), block.base_E.dtype)
        for n, (density, epsilon) in enumerate(zip(self.densities, self.epsilons, strict=True)):
            if density >= 1.0:
                kept_N[n] = len(factors_E)
                continue
            if density <= 0.0:
                factors_E[:] = 0.0
            else:
                order_E = ranking.ascending(
                    block.deltas_NE[n].astype(f"f{self.bits // 8}", copy=False), block.row_elems
                )
                kept_N[n] = ranking.draw_ranked(
                    order_E, np.uint64(block.row_elems), np.uint64(block.start), self.keys_N2[n],
                    density - epsilon, 2.0 * epsilon, self.inflated, factors_E,
                )  # fmt: skip
            if block.lows_NE is None:
                ranking.multiply(block.deltas_NE[n], factors_E)
            else:
                ranking.multiply_exactly(block.deltas_NE[n], block.lows_NE[n], factors_E)
        return kept_N


def ranked(context: UnitContext, given: Parameters) -> Generator[Statistic, None, Ranked]:
    """Keep each element with a probability from ``density - epsilon`` to ``density + epsilon``, by its rank."""
    yield from ()
    inflated = sparse.rescaling(given) == "expected"
    keys_N2 = keys_of(context, given.integer("seed"))
    return Ranked(given.each("density"), given.each("epsilon"), keys_N2, inflated, context.float_bits)


_parameters = partial(sparse.parameters, EPSILON, SEED, rescale=True, rescales=RESCALES)
_della = partial(
    elementwise_method,
    source=SOURCE,
    min_tuned=1,
    scopes=("tensor", "leading", "layer"),
    num_rounds=sparse.num_rounds(),
    kept_bytes=sparse.kept_bytes(),
    temporaries=4,
    whole_rows=True,
    facts=("kept_share", "rescale"),
    refuses=_too_wide,
)


@_della("della", parameters=_parameters(elect=True, normalize=True))
def della(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + lambda * sum_i(m_i a_i f_i S_i(d_i)) / sum_i(m_i a_i)``; ``S_i`` keeps larger elements rather.

    An element is kept with the probability ``density - epsilon + 2 epsilon r / (L - 1)``, r its rank among the L
    magnitudes of its row, 0 for the smallest; of equal ones the lower index counts as larger (mergekit: whichever). A
    row is one of the last dimension (mergekit: of dimension 1, which is another where there are three or more), at most
    2**18 elements of it together; where L is 1, the probability is ``density`` (mergekit stops). The election is that
    of ``ties``, draws are those of ``dare_ties``, and so is ``rescale``, where ``expected`` divides what is kept by
    its probability. Kept from mergekit: density 1 draws nothing, density 0 keeps nothing.
    """
    return sparse.merged(context, parameters, ranked, elect=True)


@_della("della_linear", parameters=_parameters(elect=False, normalize=False))
def della_linear(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return what ``della`` keeps and rescales, added up without an election.

    ``w_0 + lambda * sum_i a_i f_i S_i(d_i) / Z``, Z being 1 unless ``normalize`` is true.
    """
    return sparse.merged(context, parameters, ranked, elect=False)
