"""What every device computes: Gram matrices and weighted sums of spans."""

from dataclasses import dataclass
from typing import Protocol

from stockflow.engine.pieces import LoadedPiece
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.methods.gram import Products
from stockflow.planning.working_precision import FloatBits


@dataclass(frozen=True, slots=True)
class Weighted:
    """A weighted sum of sources, and how its results are written."""

    weights_GM: Floats
    """per group of the span and non-anchor source if ``anchored``, else per source"""
    anchored: bool
    """whether the sum is ``w_0 + sum_i c_i (w_i - w_0)``"""
    dtype: str
    """of the results; those of F64 are computed in pairs of float64"""
    float_bits: FloatBits
    """width of the working precision of the others"""


class Arithmetic(Protocol):
    """Where linear methods are computed; every method may be called from several threads."""

    def gram(
        self, span: LoadedPiece, group_elems: int, *, products: Products = "changes", float_bits: FloatBits = 64
    ) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] or of the sources per group of a span, shape (G, M, M).

        Task vectors are rounded to ``float_bits``.
        """

    def combine(self, span: LoadedPiece, weighted: Weighted, out: Bytes) -> bool:
        """Write the weighted sum of a span into ``out``; return whether every result is finite."""
