"""The arithmetic of linear methods on the processor: spans of loaded pieces handed to compiled kernels."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stockflow.engine.buffers import allocate
from stockflow.engine.pieces import LoadedPiece
from stockflow.kernels import linear
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import FORMATS, TILE, results_in
from stockflow.planning.job import Reading


def working_dtype(reading: Reading) -> npt.DTypeLike:
    """Return float32 or float64, the precision in which a reading is computed."""
    return np.float64 if reading.float_bits == 64 else np.float32


class HostArithmetic:
    """Kernels on the calling thread; safe to use from several."""

    kind: Literal["cpu"] = "cpu"
    numerics_class = "cpu"
    """equal plans give equal bytes on every processor: no sum depends on its vectors, no product is fused"""

    def allocate(self, num_bytes: int) -> Bytes:
        """Return memory to read into or to compute into."""
        return allocate(num_bytes)

    def gram(self, span: LoadedPiece, group_elems: int, *, with_anchor: bool = True) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] per group of a span, shape (G, M, M).

        Those of w_0 with the task vectors are 0 unless ``with_anchor``.
        """
        num_elems, num_sources = span.stop - span.start, len(span.reading.operands)
        products_GMM = np.empty((num_elems // group_elems, num_sources, num_sources))
        tile_T: npt.NDArray[Any] = np.empty(TILE, working_dtype(span.reading))
        linear.gram(
            span.slab,
            span.firsts_M,
            span.formats_M,
            tile_T,
            np.uint64(group_elems),
            with_anchor,
            products_GMM,
        )
        return products_GMM

    def combine(self, span: LoadedPiece, weights_GM: Floats, out: Bytes, dtype: str, *, anchored: bool) -> bool:
        """Write the weighted sum of a span into ``out``; return whether every result is finite.

        Args:
            span: whole groups, or a run within one.
            weights_GM: per group of the span and non-anchor source if ``anchored``, else per source.
            out: the bytes of the results.
            dtype: their element type.
            anchored: whether the sum is ``w_0 + sum_i c_i (w_i - w_0)``.
        """
        combine = linear.combine_anchored if anchored else linear.combine_plain
        return combine(
            span.slab,
            span.firsts_M,
            span.formats_M,
            np.uint64((span.stop - span.start) // len(weights_GM)),
            np.ascontiguousarray(weights_GM, working_dtype(span.reading)),
            results_in(out, dtype),
            FORMATS[dtype],
        )
