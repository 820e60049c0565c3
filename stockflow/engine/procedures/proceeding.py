"""What a procedure is: it asks for sweeps over a unit, one after the other, and ends with what fills its result."""

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from stockflow.engine.alarm import Alarm
from stockflow.engine.arithmetic import Arithmetic
from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece, Piece
from stockflow.engine.units import Unit, spans_of
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.planning.job import Result, TensorJob

T = TypeVar("T")
R = TypeVar("R")

Write = Callable[[LoadedPiece, Bytes], None]
Load = Callable[[Piece], LoadedPiece]


def as_it_is(piece: Piece) -> LoadedPiece:
    """Return a piece with all its operands."""
    return piece.loaded()


@dataclass(frozen=True)
class Fill:
    """What writes the result of a span, and how it takes the span into memory; from any thread."""

    write: Write
    load: Load = as_it_is


class MapSpans(Protocol):
    """``map``, or that of a thread pool: results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Apply ``function`` to every item."""


class Sweep(Protocol):
    """What is wanted of one pass over the elements of a unit."""

    @property
    def key(self) -> Hashable:
        """Equal for sweeps of one unit that come to the same."""

    def begin(self) -> Any:
        """Return the state before the first span."""

    def look(self, span: LoadedPiece) -> Any:
        """Return what a span says; from any thread."""

    def add(self, state: Any, start: int, said: Any) -> Any:
        """Return the state with what the span from element ``start`` on said; called in order."""


@dataclass
class StageClock:
    """Seconds by stage, added up over the threads that spend them."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stage: str, started: float) -> None:
        """Count the time since ``started`` (``time.perf_counter``)."""
        elapsed = time.perf_counter() - started
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed


def known_nowhere(job: TensorJob) -> Floats:
    """Refuse: no factors were read."""
    raise LookupError(f"nothing was read of the changes of {job.reading.name!r}")


@dataclass(frozen=True)
class Tools:
    """What procedures share."""

    arithmetic: Arithmetic
    """where linear methods are computed"""
    alarm: Alarm
    """what is said of numbers that cannot be merged"""
    clock: StageClock
    """receives the seconds of statistics and combine"""
    known: Callable[[TensorJob], Floats] = known_nowhere
    """products (M, M) of a tensor whose changes are known, zero for the anchor"""
    firsts: Mapping[str, int] = field(default_factory=dict)
    """flat index of a reading's first element in a unit that it is a part of, by its name"""
    threads: threading.local = field(default_factory=threading.local)
    """scratch of each thread"""


Steps = Generator[Sweep, Any, Fill]
Procedure = Callable[[Unit, Result, Ledger, Tools], Steps | Fill]
"""Yields the sweeps it needs, is sent the state after each, and returns what fills the result."""


class Proceeding:
    """A procedure on its way."""

    def __init__(self, steps: Steps | Fill) -> None:
        """Ask for the first sweep."""
        self.wanted: Sweep | None = None
        self._steps: Steps | None = None
        self._fill: Fill | None = None
        if isinstance(steps, Generator):
            self._steps = steps
            self.tell(None)
        else:
            self._fill = steps

    def tell(self, state: Any) -> None:
        """Tell what the sweep led to that was asked for."""
        assert self._steps is not None
        try:
            self.wanted = self._steps.send(state)
        except StopIteration as stop:
            self.wanted, self._fill = None, stop.value

    @property
    def fill(self) -> Fill:
        """What was decided."""
        assert self._fill is not None, "a method asked for more rounds than it declared"
        return self._fill


def swept(unit: Unit, sweeps: Sequence[Sweep], map_spans: MapSpans, *, last: bool) -> list[Any]:
    """Go over a unit once, for several purposes, and return the state of each."""
    states = [sweep.begin() for sweep in sweeps]

    def look(unread: Piece) -> list[Any]:
        span = unread.loaded()
        return [sweep.look(span) for sweep in sweeps]

    for piece in unit.sweep(last=last):
        spans = spans_of(piece) if sweeps else []
        for span, said in zip(spans, map_spans(look, spans), strict=True):
            triples = zip(sweeps, states, said, strict=True)
            states = [sweep.add(state, span.start, each) for sweep, state, each in triples]
    return states
