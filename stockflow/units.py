"""Units as the engine sees them: something whose pieces can be swept over, held in memory or read again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stockflow.plan import TensorJob
from stockflow.reader import LoadedSlab, Prefetcher
from stockflow.schedule import Step


@dataclass(frozen=True, slots=True)
class LoadedPiece:
    """A run of elements whose source bytes are in memory."""

    job: TensorJob
    start: int
    stop: int
    sources: list[Tensor]
    """bytes of each source, anchor first"""

    def narrow(self, start: int, stop: int) -> list[Tensor]:
        """Return the bytes of each source between two elements of the tensor."""
        return [
            raw[width * (start - self.start) : width * (stop - self.start)]
            for raw, width in zip(self.sources, self.job.source_widths, strict=True)
        ]


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

    def sweep(self, *, last: bool) -> Iterator[LoadedPiece]:
        """Yield the pieces in order; a piece is valid until the next one is asked for."""


def _piece(loaded: LoadedSlab, index: int) -> LoadedPiece:
    piece = loaded.load.pieces[index]
    return LoadedPiece(piece.job, piece.start, piece.stop, loaded.sources(index))


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
