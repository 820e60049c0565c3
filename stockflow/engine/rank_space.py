"""Gram matrices in rank space: of changes that are known as products of low rank, from the factors alone.

Shape suffixes: M sources, K and L ranks, R rows, C columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stockflow.checkpoints.decodes.low_rank import LowRank
from stockflow.engine.decoding import Memory, numbers
from stockflow.engine.inputs import OnRead
from stockflow.engine.session import Session
from stockflow.engine.units import Unit, spans_of
from stockflow.kernels import low_rank
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import slab_of
from stockflow.planning.budget import Workspace
from stockflow.planning.factors import Factor, FactorRanges, factors_of
from stockflow.planning.job import TensorJob
from stockflow.planning.reads import Request

_SUMMED = 512
"""Elements of a row of which products are summed before they are added to those of others: they stay in a cache."""


class _KnownChange(NamedTuple):
    """``scale`` times the product of two factors."""

    scale: float
    left_RK: Floats
    right_KC: Floats


class KnownGrams(NamedTuple):
    """The Gram matrices of tensors whose changes are known, and the bytes that were read for them."""

    by_tensor: Mapping[str, Floats]
    """(M, M), by the name of the reading; of the anchor nothing but zeros"""
    bytes_read: int
    held: "HeldFactors"


class HeldFactors:
    """Factors that were read for their products and are wanted again."""

    def __init__(self, ranges: FactorRanges) -> None:
        """Take where those lie that are to be held."""
        self._ranges = ranges
        self._payloads: dict[tuple[int, str, int], Bytes] = {}

    def take(self, factor: Factor, payload: Bytes) -> None:
        """Keep the bytes of a factor if it is to be held."""
        checkpoint, (file, start), size = factor.place
        if self._ranges.covering(checkpoint, file, start, start + size):
            self._payloads[checkpoint, file, start] = payload[:size]

    def parts(self, request: Request) -> Iterator[Bytes]:
        """Yield what a request is for, if all of it is held."""
        checkpoint, file, first, last, _ = request
        for start, stop in self._ranges.covering(checkpoint, file, first, last):
            payload = self._payloads[checkpoint, file, start]
            yield payload[max(first - start, 0) : min(last, stop) - start]


def known_grams(
    session: Session, jobs: Sequence[TensorJob], workspace: Workspace, on_read: OnRead, ranges: FactorRanges
) -> KnownGrams:
    """Read the factors of all tensors whose changes are known, and return their products.

    Args:
        session: to read through.
        jobs: the tensors.
        workspace: how the memory is divided.
        on_read: told of what is read.
        ranges: where factors lie that are held for the merge.

    Raises:
        InputChangedError: an adapter is not the planned one any more.
        StorageError: reading failed after retries.
    """
    known = [job for job in jobs if job.has_known_changes]
    factors = list(factors_of(known))
    grams = {job.reading.name: _gram(session, job, {}) for job in known if not any(factors_of([job]))}
    kept = HeldFactors(ranges)
    if not factors:
        return KnownGrams(grams, 0, kept)
    held: dict[tuple[int, bool], Bytes] = {}
    with session.stream(factors, workspace, on_read) as stream:
        for unit in (unit for units in stream for unit in units):
            factor = unit.work
            assert isinstance(factor, Factor)
            held[factor.operand, factor.is_b] = payload = _bytes_of(unit)
            kept.take(factor, payload)
            if len(held) == 2 * _num_changed(factor.job):
                grams[factor.job.reading.name] = _gram(session, factor.job, held)
                held = {}
        return KnownGrams(grams, stream.bytes_read, kept)


def compile_kernels() -> None:
    """Compile, or load, what products in rank space take."""
    one = np.ones((1, 1))
    _product(_KnownChange(1.0, one, one), _KnownChange(1.0, one, one))


def _num_changed(job: TensorJob) -> int:
    return sum(isinstance(operand.decode, LowRank) for operand in job.reading.operands)


def _bytes_of(unit: Unit) -> Bytes:
    found: Bytes = np.empty(-(-(unit.stop - unit.start) // 8) * 8, np.uint8)
    for piece in unit.sweep(last=True):
        for unread in spans_of(piece):
            span = unread.loaded()
            found[span.start : span.stop] = span.operand(0)
    return found


def _gram(session: Session, job: TensorJob, held: Mapping[tuple[int, bool], Bytes]) -> Floats:
    num_sources = len(job.reading.operands)
    changes = {number: _change(job, number, held) for number, is_b in held if is_b}
    pairs = [(i, j) for i in changes for j in changes if i <= j]
    gram_MM: Floats = np.zeros((num_sources, num_sources))

    def product(pair: tuple[int, int]) -> float:
        return _product(changes[pair[0]], changes[pair[1]])

    for (i, j), value in zip(pairs, session.map_spans(product, pairs), strict=True):
        gram_MM[i, j] = gram_MM[j, i] = value
    return gram_MM


def _change(job: TensorJob, number: int, held: Mapping[tuple[int, bool], Bytes]) -> _KnownChange:
    decode = job.reading.operands[number].decode
    assert isinstance(decode, LowRank)
    a_KC = _numbers(held[number, False], decode.dtypes[0], decode.rank * decode.num_a_columns)
    b_RK = _numbers(held[number, True], decode.dtypes[1], decode.rank * decode.num_b_rows)
    a_KC, b_RK = a_KC.reshape(decode.rank, -1), b_RK.reshape(-1, decode.rank)
    return _KnownChange(decode.scale, *((a_KC.T, b_RK.T) if decode.is_transposed else (b_RK, a_KC)))


def _numbers(payload: Bytes, dtype: str, count: int) -> Floats:
    return numbers(dtype, Memory(slab_of(payload), payload), 0, count, np.dtype(np.float64))


def _product(one: _KnownChange, other: _KnownChange) -> float:
    """Return the product of two changes, element by element, summed."""
    left_KL = _summed(one.left_RK.T, other.left_RK)
    right_KL = _summed(one.right_KC, other.right_KC.T)
    return one.scale * other.scale * low_rank.sum_of_products(left_KL, right_KL)


def _summed(left_KC: Floats, right_CL: Floats) -> Floats:
    """Return the product of two matrices, in an order of additions that is the same on every processor."""
    product_KL: Floats = np.zeros((len(left_KC), right_CL.shape[1]))
    for start in range(0, len(right_CL), _SUMMED):
        some = slice(start, start + _SUMMED)
        left, right = np.ascontiguousarray(left_KC[:, some]), np.ascontiguousarray(right_CL[some])
        low_rank.add_product(left, right, 1.0, 0, product_KL.reshape(-1))
    return product_KL
