"""The arithmetic of linear methods on the processor: spans of loaded pieces handed to compiled kernels."""

from typing import Literal

import numpy as np

from stockflow.engine.arithmetic import Weighted
from stockflow.engine.buffers import allocate
from stockflow.engine.pieces import LoadedPiece
from stockflow.kernels import doubled, linear
from stockflow.kernels.arrays import Bytes, Floats, Values
from stockflow.kernels.floats import FORMATS, TILE, results_in
from stockflow.methods.gram import Products
from stockflow.planning.working_precision import FloatBits


class HostArithmetic:
    """Kernels on the calling thread; safe to use from several."""

    kind: Literal["cpu"] = "cpu"
    numerics_class = "cpu"
    """equal plans give equal bytes on every processor: no sum depends on its vectors, no product is fused"""

    def allocate(self, num_bytes: int) -> Bytes:
        """Return memory to read into or to compute into."""
        return allocate(num_bytes)

    def gram(
        self, span: LoadedPiece, group_elems: int, *, products: Products = "changes", float_bits: FloatBits = 64
    ) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] or of the sources per group of a span, shape (G, M, M).

        Task vectors are rounded to ``float_bits``.
        """
        num_elems, num_sources = span.stop - span.start, len(span.dtypes)
        products_GMM = np.empty((num_elems // group_elems, num_sources, num_sources))
        tile_T: Values = np.empty(TILE, np.float64 if "F64" in span.dtypes else np.float32)
        linear.gram(
            span.slab,
            span.firsts_M,
            span.formats_M,
            tile_T,
            np.uint64(group_elems),
            products != "changes",
            float_bits == 32,
            products != "sources",
            products_GMM,
        )
        return products_GMM

    def combine(self, span: LoadedPiece, weighted: Weighted, out: Bytes) -> bool:
        """Write the weighted sum of a span, whole groups or a run within one, into ``out``.

        Returns:
            Whether every result is finite.
        """
        group_elems = np.uint64((span.stop - span.start) // len(weighted.weights_GM))
        results = results_in(out, weighted.dtype)
        if weighted.dtype == "F64":
            weights_GM = np.ascontiguousarray(weighted.weights_GM)
            return doubled.combine(
                span.slab, span.firsts_M, span.formats_M, group_elems, weights_GM, weighted.anchored, results
            )
        combine = linear.combine_anchored if weighted.anchored else linear.combine_plain
        return combine(
            span.slab,
            span.firsts_M,
            span.formats_M,
            group_elems,
            np.ascontiguousarray(weighted.weights_GM, f"f{weighted.float_bits // 8}"),
            results,
            FORMATS[weighted.dtype],
        )
