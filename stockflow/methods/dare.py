"""DARE: keep elements of each task vector at random, rescale what is kept, add up, with an election or without."""

import hashlib
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from stockflow.kernels.arrays import Counts, Unsigned
from stockflow.methods import sparse
from stockflow.methods.parameters import Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, Statistic, UnitContext, elementwise_method

SEED = Parameter("seed", "integer", default=0)
SOURCE = "Yu et al. 2023, arXiv:2311.03099"
RESCALES = ("l1", "expected")


def keys_of(context: UnitContext, seed: int) -> Unsigned:
    """Return the keys that models are drawn by, shape (N, 2): of seed, name of the tensor, place of the model."""
    said = [json.dumps([seed, context.name, place]).encode() for place in range(context.num_tuned)]
    digests = b"".join(hashlib.sha256(each).digest()[:8] for each in said)
    return np.frombuffer(digests, "<u4").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Each element by itself, with the probability ``density``."""

    densities: Sequence[float]
    keys_N2: Unsigned
    factors: Sequence[float]

    @property
    def shares(self) -> Sequence[float]:
        """Only the draws tell."""
        return ()

    @property
    def is_whole(self) -> Sequence[bool]:
        """Those that nothing is drawn for."""
        return [density >= 1.0 for density in self.densities]

    def drop(self, block: Block) -> Counts:
        """Draw."""
        from stockflow.kernels.draws import keep_drawn

        kept_N = np.zeros(len(self.densities), np.int64)
        limits = [2**32 if density >= 1.0 else math.ceil(density * 2**32) - 1 for density in self.densities]
        keep_drawn(block.deltas_NE, np.uint64(block.start), self.keys_N2, np.array(limits, np.int64), kept_N)
        return kept_N


def drawn(context: UnitContext, given: Parameters) -> Generator[Statistic, None, Drawn]:
    """Keep each element with the probability ``density``."""
    yield from ()
    densities = given.each("density")
    inflated = sparse.rescaling(given) == "expected"
    factors = [1.0 / density if inflated and density > 0.0 else 1.0 for density in densities]
    return Drawn(densities, keys_of(context, given.integer("seed")), factors)


_dare = partial(
    elementwise_method,
    source=SOURCE,
    min_tuned=1,
    scopes=("tensor", "leading", "layer"),
    num_rounds=sparse.num_rounds(),
    kept_bytes=sparse.kept_bytes(),
    facts=("kept_share", "rescale"),
)


@_dare("dare_linear", parameters=sparse.parameters(SEED, elect=False, normalize=False, rescale=True, rescales=RESCALES))
def dare_linear(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return ``w_0 + lambda * sum_i a_i f_i S_i(d_i) / Z``, ``S_i`` keeping each element with probability ``density``.

    ``rescale`` is true by default: as in mergekit, what is kept gets the L1 norm of what was there; ``expected``
    divides it by the density, as the paper does, and takes no pass over the elements. Draws depend on the seed, the
    name of the tensor, the place of the model among the models and the flat index of the element alone. Kept from
    mergekit: density 1 draws nothing, and a sum of the weights below 1e-8 in size counts as 1 when normalizing.
    """
    return sparse.merged(context, parameters, drawn, elect=False)


@_dare("dare_ties", parameters=sparse.parameters(SEED, elect=True, normalize=False, rescale=True, rescales=RESCALES))
def dare_ties(context: UnitContext, parameters: Parameters) -> Rounds:
    """Return what ``dare_linear`` does of the elements that have the elected sign, as ``ties`` elects it.

    ``w_0 + lambda * sum_i m_i a_i f_i S_i(d_i) / Z``, Z being 1 unless ``normalize`` is true.
    """
    return sparse.merged(context, parameters, drawn, elect=True)
