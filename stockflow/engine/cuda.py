"""The arithmetic of linear methods on a CUDA device, in torch. Written and reviewed, not yet run on one.

Each calling thread has a stream of its own, so that copies of one span overlap the computation of another. Given the
same coefficients results have the same bytes as the processor's: operations are the same, one by one, each rounded
on its own. Grams differ in the order of additions, in float64.

Shape suffixes: M sources (anchor first), E elements of a span, G groups, K elements of a group in the span.
"""

import threading
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stockflow.engine.arithmetic import Weighted
from stockflow.engine.pieces import LoadedPiece
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.methods.gram import Products
from stockflow.planning.working_precision import FloatBits

SPLITTER = 2.0**27 + 1.0
"""As in the kernels; cuts a float64 into two halves whose products are exact."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def is_available() -> bool:
    """Return whether torch sees a CUDA device."""
    return torch.cuda.is_available()


class CudaArithmetic:
    """Spans computed on the current CUDA device; safe to use from several threads."""

    kind: Literal["cuda"] = "cuda"

    def __init__(self) -> None:
        """Take the current device."""
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._streams = threading.local()

    @property
    def numerics_class(self) -> str:
        """The architecture: sums may be ordered otherwise on another."""
        major, minor = torch.cuda.get_device_capability(self._device)
        return f"cuda-sm{major}{minor}"

    def allocate(self, num_bytes: int) -> Bytes:
        """Return page-locked memory, from which copies run beside the computation."""
        memory: Bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def gram(
        self, span: LoadedPiece, group_elems: int, *, products: Products = "changes", float_bits: FloatBits = 64
    ) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] or of the sources per group of a span, shape (G, M, M).

        Those of w_0 with the task vectors are always there, at no cost.
        """
        with torch.cuda.stream(self._stream()):
            rows_ME = self._load(span, 64 if "F64" in span.dtypes else float_bits)
            if products != "sources":
                torch.sub(rows_ME[1:], rows_ME[:1], out=rows_ME[1:])
            groups_GMK = rows_ME.double().view(len(rows_ME), -1, group_elems).transpose(0, 1)
            products_GMM: Floats = torch.bmm(groups_GMK, groups_GMK.transpose(1, 2)).cpu().numpy()
        return products_GMM

    def combine(self, span: LoadedPiece, weighted: Weighted, out: Bytes) -> bool:
        """Write the weighted sum of a span, whole groups or a run within one, into ``out``.

        Returns:
            Whether every result is finite.
        """
        with torch.cuda.stream(self._stream()):
            rows_ME = self._load(span, 64 if weighted.dtype == "F64" else weighted.float_bits)
            rounded_E = rounded(_sum_of(rows_ME, weighted), DTYPES[weighted.dtype])
            is_finite = torch.isfinite(rounded_E).all()
            torch.from_numpy(out).copy_(rounded_E.view(torch.uint8))
            return bool(is_finite)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._streams, "stream"):
            self._streams.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._streams.stream
        return stream

    def _load(self, span: LoadedPiece, float_bits: FloatBits) -> Tensor:
        """The operands of a span in a precision, shape (M, E)."""
        num_operands, num_elems = len(span.dtypes), span.stop - span.start
        working = torch.float64 if float_bits == 64 else torch.float32
        rows_ME = torch.empty(num_operands, num_elems, dtype=working, device=self._device)
        for number, dtype in enumerate(span.dtypes):
            raw = torch.from_numpy(span.operand(number)).to(self._device, non_blocking=True)
            rows_ME[number].copy_(raw.view(DTYPES[dtype]))
        return rows_ME


def _sum_of(rows_ME: Tensor, weighted: Weighted) -> Tensor:
    if weighted.dtype == "F64":
        return doubled_sum(rows_ME, weighted.weights_GM, anchored=weighted.anchored)
    return (anchored_sum if weighted.anchored else weighted_sum)(rows_ME, weighted.weights_GM)


def anchored_sum(rows_ME: Tensor, weights_GN: Floats) -> Tensor:
    """Return ``w_0 + sum_i c_i d_i``, shape (E,), as ``combine_anchored`` of the kernels; the rows are overwritten."""
    if len(rows_ME) == 1:
        return rows_ME[0]
    torch.sub(rows_ME[:1], rows_ME[1:], out=rows_ME[1:])
    if np.all(weights_GN == weights_GN[:, :1]):
        total_E = _scaled(_sum(rows_ME[1:]), weights_GN[:, 0])
    else:
        total_E = weighted_sum(rows_ME[1:], weights_GN)
    return rows_ME[0].sub_(total_E.add_(0.0))  # -0.0 + 0.0 is 0.0


def weighted_sum(rows_ME: Tensor, weights_GM: Floats) -> Tensor:
    """Return ``sum_i c_i w_i``, shape (E,); the rows are overwritten."""
    for row_E, weight_G in zip(rows_ME, weights_GM.T, strict=True):
        _scaled(row_E, weight_G)
    return _sum(rows_ME)


def _sum(rows_ME: Tensor) -> Tensor:
    total_E = rows_ME[0]
    for row_E in rows_ME[1:]:
        total_E.add_(row_E)
    return total_E


def _scaled(row_E: Tensor, weight_G: Floats) -> Tensor:
    factors_G = torch.from_numpy(np.ascontiguousarray(weight_G)).to(dtype=row_E.dtype, device=row_E.device)
    row_E.view(len(weight_G), -1).mul_(factors_G[:, None])
    return row_E


def doubled_sum(rows_ME: Tensor, weights_GM: Floats, *, anchored: bool) -> Tensor:
    """Return what ``doubled.combine`` of the kernels writes, shape (E,), by the same operations."""
    rows_MGK = rows_ME.view(len(rows_ME), len(weights_GM), -1)
    anchor_GK, terms_MGK = rows_MGK[0], rows_MGK[1:] if anchored else rows_MGK
    high_GK, low_GK = torch.zeros_like(anchor_GK), torch.zeros_like(anchor_GK)
    plain_GK = torch.full_like(anchor_GK, -0.0)
    factors_MG = torch.from_numpy(np.ascontiguousarray(weights_GM.T)).to(rows_ME)
    for term_GK, factor_G in zip(terms_MGK, factors_MG, strict=True):
        factor_GK = factor_G[:, None].expand_as(term_GK)
        error_GK = torch.zeros_like(term_GK)
        if anchored:
            term_GK, error_GK = _two_sum(anchor_GK, -term_GK)
        plain_GK = plain_GK + term_GK * factor_GK
        product_GK, lost_GK = _two_product(term_GK, factor_GK)
        lost_GK = lost_GK + error_GK * factor_GK
        total_GK, error_GK = _two_sum(high_GK, product_GK)
        error_GK = error_GK + (low_GK + lost_GK)
        high_GK = total_GK + error_GK
        low_GK = error_GK - (high_GK - total_GK)
    if anchored:
        high_GK, error_GK = _two_sum(anchor_GK, -high_GK)
        low_GK, plain_GK = error_GK - low_GK, anchor_GK - (plain_GK + 0.0)
    exact_GK = high_GK + low_GK
    is_plain_GK = ~torch.isfinite(exact_GK) | ((exact_GK == 0.0) & (plain_GK == 0.0))
    return torch.where(is_plain_GK, plain_GK, exact_GK).flatten()


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    product = a * b
    cut_a, cut_b = SPLITTER * a, SPLITTER * b
    high_a, high_b = cut_a - (cut_a - a), cut_b - (cut_b - b)
    low_a, low_b = a - high_a, b - high_b
    return product, ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


def rounded(values_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values rounded once, to nearest even; float64 goes to 16 bits through a float32 that is rounded to odd.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd".
    """
    if values_E.dtype == torch.float64 and dtype.itemsize == 2:
        nearest_E = values_E.float()
        bits_E = nearest_E.view(torch.int32)
        is_away_E = nearest_E.double().abs() > values_E.abs()
        is_inexact_E = (nearest_E.double() != values_E) & torch.isfinite(values_E)
        odd_E = (bits_E - is_away_E.int()) | is_inexact_E.int()
        values_E = torch.where(is_inexact_E, odd_E, bits_E).view(torch.float32)
    return values_E.to(dtype)
