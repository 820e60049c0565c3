"""Units as the engine sees them: something whose pieces can be swept over, held in memory or read again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stockflow.engine.prefetch import LoadedSlab, Prefetcher
from stockflow.kernels.arrays import Bytes
from stockflow.kernels.floats import Slab
from stockflow.planning.plan import TensorJob
from stockflow.planning.reads import Step


class Piece(Protocol):
    """A run of elements of one tensor, in memory or about to be."""

    @property
    def job(self) -> TensorJob:
        """The tensor it belongs to."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""

    def narrow(self, start: int, stop: int) -> "Piece":
        """Return what lies between two elements of the tensor."""

    def loaded(self) -> "LoadedPiece":
        """Return it with its source bytes in memory, for the thread that asks."""


@dataclass(frozen=True, slots=True)
class LoadedPiece:
    """A run of elements whose source bytes are in memory."""

    job: TensorJob
    start: int
    stop: int
    slab: Slab
    buffer: Bytes
    """the slab's memory"""
    offsets: tuple[int, ...]
    """per source, anchor first, where in the slab its bytes begin"""

    def narrow(self, start: int, stop: int) -> "LoadedPiece":
        """Return what lies between two elements of the tensor."""
        offsets = (
            offset + width * (start - self.start)
            for offset, width in zip(self.offsets, self.job.source_widths, strict=True)
        )
        return LoadedPiece(self.job, start, stop, self.slab, self.buffer, tuple(offsets))

    def loaded(self) -> "LoadedPiece":
        """Return itself."""
        return self

    def source(self, index: int) -> Bytes:
        """Return the bytes of one source."""
        first, width = self.offsets[index], self.job.source_widths[index]
        return self.buffer[first : first + width * (self.stop - self.start)]

    @property
    def firsts_M(self) -> "np.typing.NDArray[np.uint64]":
        """Per source, where it begins in the slab, counted in its own elements."""
        pairs = zip(self.offsets, self.job.source_widths, strict=True)
        return np.array([offset // width for offset, width in pairs], np.uint64)


class Unit(Protocol):
    """A run of elements that is decided as one."""

    @property
    def job(self) -> TensorJob:
        """The tensor it belongs to."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield the pieces in order; a piece is valid until the next one is asked for."""


def _piece(loaded: LoadedSlab, index: int) -> LoadedPiece:
    piece = loaded.load.pieces[index]
    return LoadedPiece(piece.job, piece.start, piece.stop, loaded.slab, loaded.buffer, loaded.load.offsets[index])


class PackedUnit:
    """A small unit: one piece of a load that others share. The slab is released by who took the load."""

    def __init__(self, loaded: LoadedSlab, index: int) -> None:
        """Take piece ``index`` of a loaded slab."""
        self._piece = _piece(loaded, index)
        self.job = self._piece.job
        self.start, self.stop = self._piece.start, self._piece.stop

    def sweep(self, *, last: bool) -> Iterator[LoadedPiece]:
        """Yield the only piece."""
        yield self._piece


class LargeUnit:
    """A unit over several loads: held between sweeps if the schedule says so, else read once per sweep."""

    def __init__(self, step: Step, prefetcher: Prefetcher) -> None:
        """Take the loads of ``step`` from ``prefetcher`` as they come."""
        pieces = [load.pieces[0] for load in step.loads]
        self.job = pieces[0].job
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self._step = step
        self._prefetcher = prefetcher
        self._held: list[LoadedSlab] = []

    def sweep(self, *, last: bool) -> Iterator[LoadedPiece]:
        """Yield the pieces, reading, holding and releasing their slabs."""
        in_memory = iter(self._held)
        self._held = []
        for _ in self._step.loads:
            loaded = next(in_memory, None) or self._prefetcher.next()
            yield _piece(loaded, 0)
            if self._step.held and not last:
                self._held.append(loaded)
            else:
                self._prefetcher.release(loaded)
