"""What linear methods need of the elements: the Gram of a span, and the weighted sum of its sources.

A *span* is a run of elements of one tensor: whole groups, or a run inside one large group. Its sources lie in one
slab, each from an offset of its own. Everything happens tile by tile, in the first-level cache.

Shape suffixes: M sources (anchor first), N = M - 1, G groups, T elements of a tile, L lanes.
"""

import numpy as np

from stockflow.kernels.arrays import Floats, Unsigned, Values
from stockflow.kernels.floats import TILE, Index, Slab, narrow, widen
from stockflow.kernels.jit import jit

LANES = 16
"""Partial sums per product; part of the numerics."""
RUN = 256
"""Elements whose products are added up pairwise before they join the partial sums; part of the numerics."""


@jit
def gram(
    slab: Slab,
    firsts_M: Unsigned,
    formats_M: Unsigned,
    tile_T: Values,
    group_elems: Index,
    with_anchor: bool,
    is_rounded: bool,
    from_anchor: bool,
    products_GMM: Floats,
) -> None:
    """Fill ``products_GMM`` with the products of [w_0, d_1 .. d_N], ``d_i = w_i - w_0``, per group of the span.

    Task vectors are differences in float64, or rounded to float32; products and sums are float64, so that nothing
    under- or overflows before the norms themselves do. Element k of a group belongs to partial sum ``k % 16``, added
    in index order: the result depends neither on the processor nor on the order of the models. Non-finite sources
    give non-finite products.

    Args:
        slab: holds the sources.
        firsts_M: where each source's part of the span begins, in its elements.
        formats_M: format of each source.
        tile_T: a tile of float32, or of float64 if a source is F64; overwritten.
        group_elems: elements per group.
        with_anchor: whether the products of w_0 with the task vectors are wanted; without them they are 0, and
            five sources take a seventh less time.
        is_rounded: whether task vectors are rounded to the tile's precision.
        from_anchor: whether task vectors are taken; without, the sources themselves stand in their place.
        products_GMM: receives the products.
    """
    num_sources = len(firsts_M)
    anchor, wide, nothing = tile_T, np.empty_like(tile_T), np.zeros_like(tile_T)
    origin = anchor if from_anchor else nothing
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    runs_RMK = np.empty((TILE // RUN, num_sources, RUN))
    sums_MML = np.empty((num_sources, num_sources, LANES))
    for g in range(np.uint64(len(products_GMM))):
        sums_MML[:] = 0.0
        start, stop = g * group_elems, (g + np.uint64(1)) * group_elems
        while start < stop:
            count = min(np.uint64(TILE), stop - start)
            widen(slab, firsts_M[0] + start, count, formats_M[0], bits, floats, anchor)
            if count < np.uint64(TILE):
                anchor[count:] = wide[count:] = nothing[0]
            _cut(anchor, nothing, False, runs_RMK, 0)
            for m in range(1, num_sources):
                widen(slab, firsts_M[m] + start, count, formats_M[m], bits, floats, wide)
                _cut(wide, origin, is_rounded, runs_RMK, m)
            for r in range((count + np.uint64(RUN - 1)) // np.uint64(RUN)):
                _add_products(runs_RMK[r], with_anchor, sums_MML)
            start += count
        for i in range(num_sources):
            for j in range(i, num_sources):
                total = 0.0
                for n in range(LANES):
                    total += sums_MML[i, j, n]
                products_GMM[g, i, j] = total
                products_GMM[g, j, i] = total


@jit
def _cut(values: Values, origin: Values, is_rounded: bool, runs_RMK: Values, m: int) -> None:
    """Lay ``values - origin`` of a whole tile out as runs of source ``m``, in float64."""
    for r in range(np.uint64(TILE // RUN)):
        run, first = runs_RMK[r, m], r * np.uint64(RUN)
        if is_rounded:
            for k in range(np.uint64(RUN)):
                run[k] = values[first + k] - origin[first + k]
        else:
            for k in range(np.uint64(RUN)):
                run[k] = np.float64(values[first + k]) - np.float64(origin[first + k])


@jit
def _add_products(rows_MK: Values, with_anchor: bool, sums_MML: Values) -> None:
    """Add the products of ``RUN`` elements: sixteen of them per lane, added up pairwise."""
    for i in range(len(rows_MK)):
        a = rows_MK[i]
        for j in range(i, len(rows_MK) if i or with_anchor else 1):
            b, sums = rows_MK[j], sums_MML[i, j]
            for n in range(LANES):
                first = (a[n] * b[n] + a[n + 16] * b[n + 16]) + (a[n + 32] * b[n + 32] + a[n + 48] * b[n + 48])
                second = (a[n + 64] * b[n + 64] + a[n + 80] * b[n + 80]) + (
                    a[n + 96] * b[n + 96] + a[n + 112] * b[n + 112]
                )
                third = (a[n + 128] * b[n + 128] + a[n + 144] * b[n + 144]) + (
                    a[n + 160] * b[n + 160] + a[n + 176] * b[n + 176]
                )
                fourth = (a[n + 192] * b[n + 192] + a[n + 208] * b[n + 208]) + (
                    a[n + 224] * b[n + 224] + a[n + 240] * b[n + 240]
                )
                sums[n] += (first + second) + (third + fourth)


@jit
def combine_anchored(
    slab: Slab,
    firsts_M: Unsigned,
    formats_M: Unsigned,
    group_elems: Index,
    weights_GN: Values,
    out: Values,
    out_format: int,
) -> bool:
    """Write ``w_0 + sum_i c_i d_i``, rounded once, and return whether every result is finite.

    Task vectors are taken negated: ``w_0 - c (w_0 - w_i)`` keeps the sign of a zero where nothing changed, which
    ``w_0 + c (w_i - w_0)`` would turn from -0.0 into 0.0. Multiplications and additions are rounded separately, in
    recipe order; equal weights multiply the sum.

    Args:
        slab: holds the sources.
        firsts_M: where each source's part of the span begins, in its elements.
        formats_M: format of each source.
        group_elems: elements per group.
        weights_GN: in working precision, per group and task vector.
        out: receives the results.
        out_format: their format.
    """
    num_groups, num_tuned = weights_GN.shape
    anchor = np.empty(TILE, weights_GN.dtype)
    wide, total = np.empty_like(anchor), np.empty_like(anchor)
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    zero = weights_GN.dtype.type(0.0)
    is_finite = True
    for g in range(np.uint64(num_groups)):
        weights = weights_GN[g]
        is_shared = np.all(weights == weights[0]) if num_tuned else False
        start, stop = g * group_elems, (g + np.uint64(1)) * group_elems
        while start < stop:
            count = min(np.uint64(TILE), stop - start)
            widen(slab, firsts_M[0] + start, count, formats_M[0], bits, floats, anchor)
            total[:] = zero
            for m in range(1, num_tuned + 1):
                widen(slab, firsts_M[m] + start, count, formats_M[m], bits, floats, wide)
                weight = weights[m - 1]
                if is_shared:
                    for k in range(count):
                        total[k] += anchor[k] - wide[k]
                else:
                    for k in range(count):
                        total[k] += (anchor[k] - wide[k]) * weight
            if is_shared:
                weight = weights[0]
                for k in range(count):
                    total[k] *= weight
            for k in range(count):
                total[k] = anchor[k] - (total[k] + zero)  # -0.0 + 0.0 is 0.0
            is_finite &= narrow(total, count, out_format, bits, floats, out, start)
            start += count
    return is_finite


@jit
def combine_plain(
    slab: Slab,
    firsts_M: Unsigned,
    formats_M: Unsigned,
    group_elems: Index,
    weights_GM: Values,
    out: Values,
    out_format: int,
) -> bool:
    """Write ``sum_i c_i w_i``, rounded once, and return whether every result is finite.

    Arguments are those of ``combine_anchored``, with one weight per source.
    """
    num_groups, num_sources = weights_GM.shape
    wide = np.empty(TILE, weights_GM.dtype)
    total = np.empty_like(wide)
    bits = np.empty(TILE, np.uint32)
    floats = bits.view(np.float32)
    is_finite = True
    for g in range(np.uint64(num_groups)):
        start, stop = g * group_elems, (g + np.uint64(1)) * group_elems
        while start < stop:
            count = min(np.uint64(TILE), stop - start)
            for m in range(num_sources):
                widen(slab, firsts_M[m] + start, count, formats_M[m], bits, floats, wide)
                weight = weights_GM[g, m]
                if m == 0:
                    for k in range(count):
                        total[k] = wide[k] * weight
                else:
                    for k in range(count):
                        total[k] += wide[k] * weight
            is_finite &= narrow(total, count, out_format, bits, floats, out, start)
            start += count
    return is_finite
