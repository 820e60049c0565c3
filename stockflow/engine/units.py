"""Units as the engine sees them: something whose pieces can be swept over, held in memory or read again."""

from collections.abc import Iterator
from typing import Protocol

from stockflow.engine.pieces import Piece
from stockflow.engine.prefetch import LoadedSlab, Prefetcher
from stockflow.engine.stage import DecodingStage
from stockflow.planning.reads import Step
from stockflow.planning.spans import span_bounds
from stockflow.planning.work import Work


class Unit(Protocol):
    """A run of elements that is decided as one."""

    @property
    def work(self) -> Work:
        """What is done with the reading it belongs to."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield the pieces in order; a piece is valid until the next one is asked for."""


class PackedUnit:
    """A small unit: one piece of a load that others share. The slab is released by who took the load."""

    def __init__(self, loaded: LoadedSlab, index: int, stage: DecodingStage) -> None:
        """Take piece ``index`` of a loaded slab."""
        self.work, self.start, self.stop = loaded.load.pieces[index]
        self._piece = _piece(loaded, index, stage)

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield the only piece."""
        yield self._piece


class LargeUnit:
    """A unit over several loads: held between sweeps if the schedule says so, else read once per sweep."""

    def __init__(self, step: Step, prefetcher: Prefetcher, stage: DecodingStage) -> None:
        """Take the loads of ``step`` from ``prefetcher`` as they come."""
        pieces = [load.pieces[0] for load in step.loads]
        self.work = pieces[0].work
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self._step = step
        self._prefetcher = prefetcher
        self._stage = stage
        self._held: list[LoadedSlab] = []

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield the pieces, reading, holding and releasing their slabs."""
        in_memory = iter(self._held)
        self._held = []
        for _ in self._step.loads:
            loaded = next(in_memory, None) or self._prefetcher.next()
            yield _piece(loaded, 0, self._stage)
            if self._step.held and not last:
                self._held.append(loaded)
            else:
                self._prefetcher.release(loaded)


class GroupUnit:
    """One group of a unit that has several, for what decides group by group."""

    def __init__(self, unit: Unit, start: int, stop: int) -> None:
        """Take elements ``start`` to ``stop``."""
        self.work, self.start, self.stop = unit.work, start, stop
        self._unit = unit

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield what of the unit's pieces belongs to the group."""
        for piece in self._unit.sweep(last=last):
            start, stop = max(piece.start, self.start), min(piece.stop, self.stop)
            if start < stop:
                yield piece.narrow(start, stop)


def spans_of(piece: Piece) -> list[Piece]:
    """Return the spans of a piece, in order."""
    num_elems = piece.stop - piece.start
    reading = piece.reading
    bounds = span_bounds(num_elems, min(reading.group_elems, num_elems), reading.together, reading.band)
    return [piece.narrow(piece.start + start, piece.start + stop) for start, stop in bounds]


def _piece(loaded: LoadedSlab, index: int, stage: DecodingStage) -> Piece:
    work, start, stop = loaded.load.pieces[index]
    return stage.piece(work.reading, start, stop, loaded.slab, loaded.buffer, loaded.load.offsets[index])
