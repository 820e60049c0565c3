"""The arithmetic, in torch: widen, subtract, accumulate the Gram, combine, round. No names, no I/O.

Work happens in *spans*: short runs of elements of all sources that stay in cache, one span on one thread.
Results do not depend on how a tensor is cut into spans' batches, on threads or on memory: a Gram is summed
over blocks of 256 elements counted from the start of its group, in float32 (float64 for F64 tensors)
within a block and in float64 in index order across blocks.

Shape suffixes: M sources (anchor first), N = M - 1, E elements of a span, G groups of K elements in a span,
B blocks of a group.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from stockflow.gram import Floats
from stockflow.spans import GRAM_BLOCK, SPAN_ELEMS

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes that are merged."""

TILE_ROWS = 4
"""Rows whose products MKL computes side by side, each in the same order of additions."""

_SAFE_SQUARES = {torch.float32: (2.0**-60, 2.0**100), torch.float64: (2.0**-500, 2.0**900)}
"""Between these, the sum of squares of a block loses nothing to under- or overflow of single products."""


class Scratch:
    """Working memory of one thread, reused for every span."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocate ``num_bytes`` on ``device``: SPAN_ELEMS elements of working precision per source."""
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def rows(self, num_sources: int, dtype: torch.dtype) -> Tensor:
        """Return rows of a constant stride, shape (M, SPAN_ELEMS)."""
        num_bytes = num_sources * SPAN_ELEMS * dtype.itemsize
        return self._bytes[:num_bytes].view(dtype).view(num_sources, SPAN_ELEMS)


def numerics_class(device: torch.device) -> str:
    """Return the class of machines on which equal plans give equal bytes, for example ``cpu-AVX512``."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    return f"cpu-{torch.backends.cpu.get_cpu_capability()}"


def view_as(raw: Tensor, dtype: str) -> Tensor:
    """Return bytes as elements; bytes that do not start on an element boundary in memory are copied first."""
    element = TORCH_DTYPES[dtype]
    aligned = raw if raw.storage_offset() % element.itemsize == 0 else raw.clone()
    return aligned.view(element)


def load_rows(sources: Sequence[Tensor], dtypes: Sequence[str], rows_ME: Tensor) -> Tensor:
    """Widen the bytes of each source into a row of scratch and return the filled part, shape (M, E)."""
    num_elems = sources[0].numel() // TORCH_DTYPES[dtypes[0]].itemsize
    for row_E, source, dtype in zip(rows_ME, sources, dtypes, strict=True):
        row_E[:num_elems].copy_(view_as(source, dtype))
    return rows_ME[:, :num_elems]


def subtract_from_anchor(rows_ME: Tensor) -> None:
    """Replace every row but the first by ``w_0 - w_i``, the negated task vector.

    Negated, because ``w_0 - c (w_0 - w_i)`` keeps the sign of a zero where nothing changed;
    ``w_0 + c (w_i - w_0)`` would turn -0.0 into 0.0.
    """
    torch.sub(rows_ME[:1], rows_ME[1:], out=rows_ME[1:])


def task_vectors(rows_ME: Tensor) -> Tensor:
    """Replace every row but the first by ``w_i - w_0`` and return them, shape (N, E)."""
    return torch.sub(rows_ME[1:], rows_ME[:1], out=rows_ME[1:])


def block_products(rows_ME: Tensor, group_elems: int) -> Floats:
    """Return the products of all rows with all rows per Gram block, shape (G, B, M, M).

    ``rows_ME`` holds whole groups of ``group_elems``, or a run within one group that starts on a block
    boundary. Row 0 is the anchor, the others are negated task vectors; the products are those of
    [w_0, d_1 .. d_N]. Non-finite input gives non-finite products. The rows may be overwritten.
    """
    num_sources, num_elems = rows_ME.shape
    rows_MGK = rows_ME.view(num_sources, -1, min(group_elems, num_elems))
    num_whole = rows_MGK.shape[2] // GRAM_BLOCK * GRAM_BLOCK
    parts = []
    if num_whole:
        parts.append(_products(rows_MGK[:, :, :num_whole].view(*rows_MGK.shape[:2], -1, GRAM_BLOCK)))
    if num_whole < rows_MGK.shape[2]:
        parts.append(_products(rows_MGK[:, :, num_whole:].unsqueeze(2)))
    products_GBMM: Floats = torch.cat(parts, dim=1).cpu().numpy()
    products_GBMM[:, :, 0, 1:] *= -1.0
    products_GBMM[:, :, 1:, 0] *= -1.0
    return products_GBMM


def _products(rows_MGBK: Tensor) -> Tensor:
    """Products per block in float64; blocks whose squares under- or overflow are scaled by powers of two."""
    num_sources, num_groups, num_blocks, _ = rows_MGBK.shape
    blocks_XMK = rows_MGBK.flatten(1, 2).transpose(0, 1)
    products_XMM = _batched_products(blocks_XMK)
    low, high = _SAFE_SQUARES[products_XMM.dtype]
    squares_XM = torch.diagonal(products_XMM, dim1=1, dim2=2)
    suspect_XM = ~((squares_XM >= low) & (squares_XM <= high))
    products_XMM = products_XMM.double()
    if suspect_XM.any():
        unsafe_X = (suspect_XM & (blocks_XMK.abs().amax(dim=2) != 0)).any(dim=1)
        if unsafe_X.any():
            products_XMM = torch.where(unsafe_X[:, None, None], _scaled_products(blocks_XMK), products_XMM)
    return products_XMM.view(num_groups, num_blocks, num_sources, num_sources)


def _batched_products(blocks_XMK: Tensor) -> Tensor:
    """Products of all rows with all rows, in which the order of the task vectors makes no difference.

    One large product does not add up alike for every pair: with five rows (MKL in torch 2.13) swapping two
    models changed their cosine by 4e-8. Tiles of equal size do; where they overlap, they agree.
    """
    num_sources = blocks_XMK.shape[1]
    products_XMM = blocks_XMK.new_empty(len(blocks_XMK), num_sources, num_sources)
    products_XMM[:, :1] = torch.bmm(blocks_XMK[:, :1], blocks_XMK.transpose(1, 2))
    products_XMM[:, 1:, 0] = products_XMM[:, 0, 1:]
    for left, right in combinations_with_replacement(_tiles(num_sources - 1), 2):
        products_XTT = torch.bmm(blocks_XMK[:, left], blocks_XMK[:, right].transpose(1, 2))
        products_XMM[:, left, right] = products_XTT
        products_XMM[:, right, left] = products_XTT.transpose(1, 2)
    return products_XMM


def _tiles(num_deltas: int) -> list[slice]:
    """The rows of all task vectors in runs of equal length, at most TILE_ROWS; the last may overlap its neighbour."""
    num_tiles = -(-num_deltas // TILE_ROWS)
    length = -(-num_deltas // num_tiles)
    starts = [min(number * length, num_deltas - length) for number in range(num_tiles)]
    return [slice(1 + start, 1 + start + length) for start in starts]


def _scaled_products(blocks_XMK: Tensor) -> Tensor:
    """Products of blocks whose rows are first brought to about 1, exactly and in place.

    In place, because products depend on how rows lie in memory: a scaled block must give the very products
    that it would give unscaled if nothing under- or overflowed.
    """
    largest_XM = blocks_XMK.abs().amax(dim=2)
    _, exponent_XM = torch.frexp(torch.where(torch.isfinite(largest_XM), largest_XM, 1.0))
    # Two exact steps: 2**-exponent itself may lie outside the range of the working precision.
    half_XM = exponent_XM // 2
    for step_XM in (-half_XM, half_XM - exponent_XM):
        blocks_XMK.ldexp_(step_XM[:, :, None].to(blocks_XMK.dtype))
    products_XMM = _batched_products(blocks_XMK).double()
    return torch.ldexp(products_XMM, (exponent_XM[:, :, None] + exponent_XM[:, None, :]).double())


def add_in_order(total_GMM: Floats, products_GBMM: Floats) -> Floats:
    """Return ``total_GMM`` plus the block products, added block by block in index order."""
    summed_GMM: Floats = np.add.reduce(np.concatenate([total_GMM[:, None], products_GBMM], axis=1), axis=1)
    return summed_GMM


def combine_anchored(rows_ME: Tensor, weights_GN: Floats) -> Tensor:
    """Return ``w_0 + sum_i c_i d_i`` in working precision, shape (E,); the rows are overwritten.

    Expects rows as ``subtract_from_anchor`` leaves them and one weight per group and task vector.
    Multiplications and additions are rounded separately, in recipe order.
    """
    if len(rows_ME) == 1:
        return rows_ME[0]
    if np.all(weights_GN == weights_GN[:, :1]):
        total_E = _sum_rows(rows_ME[1:])
        _scale(total_E, weights_GN[:, 0])
    else:
        for row_E, weight_G in zip(rows_ME[1:], weights_GN.T, strict=True):
            _scale(row_E, weight_G)
        total_E = _sum_rows(rows_ME[1:])
    total_E.add_(0.0)  # -0.0 becomes 0.0, so that an unchanged -0.0 of the anchor stays
    return rows_ME[0].sub_(total_E)


def combine_plain(rows_ME: Tensor, weights_GM: Floats) -> Tensor:
    """Return ``sum_i c_i w_i`` in working precision, shape (E,); the rows are overwritten."""
    for row_E, weight_G in zip(rows_ME, weights_GM.T, strict=True):
        _scale(row_E, weight_G)
    return _sum_rows(rows_ME)


def _sum_rows(rows: Tensor) -> Tensor:
    total_E = rows[0]
    for row_E in rows[1:]:
        total_E.add_(row_E)
    return total_E


def _scale(row_E: Tensor, weight_G: Floats) -> None:
    if len(weight_G) == 1:
        row_E.mul_(float(weight_G[0]))
    else:
        factors_G = torch.from_numpy(weight_G).to(dtype=row_E.dtype, device=row_E.device)
        row_E.view(len(weight_G), -1).mul_(factors_G[:, None])


def apply_update(base_E: Tensor, update_E: Tensor) -> Tensor:
    """Return ``w_0 + update``, with the base's own bits where the update is zero."""
    return torch.where(update_E == 0, base_E, base_E + update_E)


def round_into(values_E: Tensor, out: Tensor, dtype: str) -> bool:
    """Round once, to nearest even, into the bytes ``out``; return whether every result is finite."""
    element = TORCH_DTYPES[dtype]
    aligned = out if out.storage_offset() % element.itemsize == 0 else torch.empty_like(out)
    rounded_E = aligned.view(element)
    if values_E.dtype == torch.float64 and element.itemsize == 2:
        values_E = _round_to_odd(values_E)
    rounded_E.copy_(values_E)
    if aligned is not out:
        out.copy_(aligned)
    return bool(torch.isfinite(rounded_E.sum(dtype=torch.float64))) or bool(torch.isfinite(rounded_E).all())


def _round_to_odd(values_E: Tensor) -> Tensor:
    """Return float32 that a further rounding to 16 bits turns into what direct rounding would give.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd".
    """
    nearest_E = values_E.float()
    bits_E = nearest_E.view(torch.int32)
    away_E = nearest_E.double().abs() > values_E.abs()
    inexact_E = (nearest_E.double() != values_E) & torch.isfinite(values_E)
    odd_E = (bits_E - away_E.int()) | inexact_E.int()
    return torch.where(inexact_E, odd_E, bits_E).view(torch.float32)


def first_nonfinite(raw: Tensor, dtype: str) -> int | None:
    """Return the index of the first NaN or infinity among the elements in ``raw``, None if there is none."""
    bad_E = ~torch.isfinite(view_as(raw, dtype))
    return int(bad_E.int().argmax()) if bool(bad_E.any()) else None
