"""The arithmetic of linear methods on the processor: spans of loaded pieces handed to compiled kernels."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stockflow.engine.buffers import allocate
from stockflow.engine.units import LoadedPiece
from stockflow.kernels import linear
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import FORMATS, TILE, results_in, slab_of
from stockflow.planning.plan import TensorJob, is_linear


def working_dtype(job: TensorJob) -> npt.DTypeLike:
    """Return float32, or float64 where a source or the output is F64."""
    return np.float64 if job.float_bits == 64 else np.float32


def formats_of(job: TensorJob) -> npt.NDArray[np.uint64]:
    """Return the formats of the sources as kernels know them."""
    return np.array([FORMATS[source.spec.dtype] for source in job.sources], np.uint64)


class HostArithmetic:
    """Kernels on the calling thread; safe to use from several."""

    kind: Literal["cpu"] = "cpu"
    numerics_class = "cpu"
    """equal plans give equal bytes on every processor: no sum depends on its vectors, no product is fused"""

    def allocate(self, num_bytes: int) -> Bytes:
        """Return memory to read into or to compute into."""
        return allocate(num_bytes)

    def prepare(self, jobs: Iterable[TensorJob]) -> None:
        """Compile the kernels of these tensors, or load what was compiled earlier on this machine."""
        distinct = {(job.float_bits, job.output.dtype): job for job in jobs if is_linear(job)}
        for job in distinct.values():
            memory = np.zeros(8 * len(job.sources), np.uint8)
            element = LoadedPiece(job, 0, 1, slab_of(memory), memory, (0,) * len(job.sources))
            self.gram(element, 1)
            self.combine(element, np.zeros((1, len(job.sources) - 1)), memory[: job.output_width], anchored=True)

    def gram(self, span: LoadedPiece, group_elems: int, *, with_anchor: bool = True) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] per group of a span, shape (G, M, M).

        Those of w_0 with the task vectors are 0 unless ``with_anchor``.
        """
        num_elems, num_sources = span.stop - span.start, len(span.job.sources)
        products_GMM = np.empty((num_elems // group_elems, num_sources, num_sources))
        tile_T: npt.NDArray[Any] = np.empty(TILE, working_dtype(span.job))
        linear.gram(
            span.slab,
            span.firsts_M,
            formats_of(span.job),
            tile_T,
            np.uint64(group_elems),
            with_anchor,
            products_GMM,
        )
        return products_GMM

    def combine(self, span: LoadedPiece, weights_GM: Floats, out: Bytes, *, anchored: bool) -> bool:
        """Write the weighted sum of a span into ``out``; return whether every result is finite.

        Args:
            span: whole groups, or a run within one.
            weights_GM: per group of the span and non-anchor source if ``anchored``, else per source.
            out: the bytes of the results.
            anchored: whether the sum is ``w_0 + sum_i c_i (w_i - w_0)``.
        """
        job = span.job
        combine = linear.combine_anchored if anchored else linear.combine_plain
        return combine(
            span.slab,
            span.firsts_M,
            formats_of(job),
            np.uint64((span.stop - span.start) // len(weights_GM)),
            np.ascontiguousarray(weights_GM, working_dtype(job)),
            results_in(out, job.output.dtype),
            FORMATS[job.output.dtype],
        )
