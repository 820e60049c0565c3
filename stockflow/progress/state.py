"""The sum of events: how far a stage and its run are, how fast they go, how long the stage will still take.

State  --snapshot()-->  Snapshot   the stage that goes on: what is shown and said
--overview()-->  Overview   the whole run and its output, after merging too: progress.json, metrics
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from stockflow.events import Begun, Done, Dropped, Event, Moved, Retry, Run, Stage

WINDOW_S = 30.0
"""Rates are those of the last half minute: long enough to be steady, short enough to show a stall."""
NUM_SAMPLES = 60
"""of a window"""


@dataclass(slots=True)
class Contribution:
    """What one worker has done in a stage."""

    worker: str
    num_read: int = 0
    num_written: int = 0
    num_done: int = 0
    last_item: str = ""
    elapsed_s: float = 0.0
    """until it was last heard of"""


@dataclass(frozen=True, slots=True)
class InWork:
    """An item that a worker is at."""

    begun: Begun
    since: float
    """by the clock of the state"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stage at one moment."""

    stage: Stage
    elapsed_s: float
    num_read: int
    """bytes, in this stage and run"""
    num_written: int
    done_bytes: int
    """of ``stage.total_bytes``, with what an earlier run has done; lost work is not done, as far as can be told"""
    finished_bytes: int
    """of those, what is of items that are done"""
    num_done: int
    """of ``stage.num_items``, likewise"""
    num_resumed: int
    """of those, what an earlier run has done"""
    bytes_per_s: float
    """read and written ones together, lately"""
    left_s: float | None
    """None: not known"""
    last_item: str
    in_work: tuple[InWork, ...]
    """what was begun first comes first"""
    workers: tuple[Contribution, ...] = ()

    @property
    def share(self) -> float | None:
        """How much of the stage is done, from 0 to 1; None if not known."""
        if self.stage.total_bytes:
            return min(self.done_bytes / self.stage.total_bytes, 1.0)
        return min(self.num_done / self.stage.num_items, 1.0) if self.stage.num_items else None


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at one moment."""

    run: Run | None
    """None: not known yet"""
    at: float
    """by the clock of the state"""
    stage: Stage
    num_read: int
    """bytes, in all stages"""
    num_written: int
    retries: Mapping[str, int]
    """by cause: items, starts of workers, and requests of items that are done"""
    output: Snapshot
    """the last stage whose written bytes count, whether it goes on or not; one without a name: there was none yet"""
    finished: frozenset[str]
    """names of its items that are done"""


class State:
    """Takes events from any thread and says how things stand."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = WINDOW_S) -> None:
        """Begin before the first stage.

        Args:
            clock: seconds, never going back.
            window_s: rates are those of the last so many seconds.
        """
        self.run: Run | None = None
        """which run this is, once it is known"""
        self._clock = clock
        self._window_s = window_s
        self._lock = threading.Lock()
        self._stage = self._output = _Sum(Stage(""), clock(), window_s)
        self._read_before = self._written_before = 0
        """in the stages before"""
        self._retries: Counter[str] = Counter()

    def take(self, event: Event) -> Snapshot | None:
        """Count an event; return the last state of a stage that it ends."""
        with self._lock:
            match event:
                case Moved():
                    self._stage.move(event, self._clock())
                case Begun():
                    self._stage.begin(event, self._clock())
                case Retry():
                    self._retries[event.cause] += 1
                    self._stage.give_up(event.item)
                case Done():
                    self._retries.update(event.cost.retries if event.cost else ())
                    self._stage.finish(event)
                case Dropped():
                    self._stage.drop(event)
                case Run():
                    self.run = event
                case Stage():
                    return self._begin(event)
        return None

    def snapshot(self) -> Snapshot:
        """Return how the stage stands."""
        with self._lock:
            return self._stage.snapshot(self._clock())

    def overview(self) -> Overview:
        """Return how the run stands."""
        with self._lock:
            now = self._clock()
            return Overview(
                run=self.run,
                at=now,
                stage=self._stage.stage,
                num_read=self._read_before + self._stage.num_read,
                num_written=self._written_before + self._stage.num_written,
                retries=dict(self._retries),
                output=self._output.snapshot(now),
                finished=frozenset(self._output.resumed | self._output.finished),
            )

    def worker_at(self, item: str) -> str | None:
        """Return who is at an item; None if nobody is, or nobody knows."""
        with self._lock:
            found = self._stage.in_work.get(item)
            return found.begun.worker if found else None

    def _begin(self, stage: Stage) -> Snapshot | None:
        ended, now = self._stage, self._clock()
        self._read_before += ended.num_read
        self._written_before += ended.num_written
        self._stage = _Sum(stage, now, self._window_s)
        if stage.counts_written:
            self._output = self._stage
        return ended.snapshot(now) if ended.stage.name else None


class _Sum:
    """The sum of one stage; whoever calls holds the lock."""

    def __init__(self, stage: Stage, now: float, window_s: float) -> None:
        self.stage = stage
        self.num_read = self.num_written = 0
        self.in_work: dict[str, InWork] = {}
        self.resumed = set(stage.resumed)
        self.finished: set[str] = set()
        """shards that this run has done"""
        self._began = now
        self._num_done = self._done_bytes = 0
        """by this run"""
        self._num_resumed, self._resumed_bytes = stage.num_done, stage.done_bytes
        self._vain_bytes = 0
        """written by this run, for items that are not good after all"""
        self._last_item = ""
        self._workers: dict[str, Contribution] = {}
        self._window = _Window(now, window_s)

    def move(self, event: Moved, now: float) -> None:
        self.num_read += event.num_read
        self.num_written += event.num_written
        worker = self._worker(event.worker)
        worker.num_read += event.num_read
        worker.num_written += event.num_written
        worker.elapsed_s = now - self._began
        self._window.sample(now, self.num_read + self.num_written, self._counted())

    def begin(self, event: Begun, now: float) -> None:
        self.in_work[event.item] = InWork(event, now)

    def give_up(self, item: str | None) -> None:
        if item is not None:
            self.in_work.pop(item, None)

    def finish(self, event: Done) -> None:
        found = self.in_work.pop(event.item, None)
        shard = event.cost or (found.begun if found else None)
        if shard:
            self.finished.add(event.item)
            self._done_bytes += shard.num_bytes
        self._num_done += 1
        self._last_item = event.item
        worker = self._worker(event.worker)
        worker.num_done += 1
        worker.last_item = event.item

    def drop(self, event: Dropped) -> None:
        if event.item in self.finished:
            self.finished.remove(event.item)
            self._num_done -= 1
            self._done_bytes -= event.num_bytes
            self._vain_bytes += event.num_bytes
        else:
            self.resumed.discard(event.item)
            self._num_resumed -= 1
            self._resumed_bytes -= event.num_bytes

    def snapshot(self, now: float) -> Snapshot:
        stage, done_bytes = self.stage, self._stage_bytes()
        bytes_per_s, counted_per_s = self._window.rates(now, self.num_read + self.num_written, self._counted())
        left_s = None
        if stage.total_bytes is not None and counted_per_s > 0:
            left_s = (stage.total_bytes - done_bytes) / counted_per_s
        return Snapshot(
            stage=stage,
            elapsed_s=now - self._began,
            num_read=self.num_read,
            num_written=self.num_written,
            done_bytes=done_bytes,
            finished_bytes=self._resumed_bytes + self._done_bytes,
            num_done=self._num_resumed + self._num_done,
            num_resumed=self._num_resumed,
            bytes_per_s=bytes_per_s,
            left_s=left_s,
            last_item=self._last_item,
            in_work=tuple(sorted(self.in_work.values(), key=lambda one: one.since)),
            workers=tuple(replace(self._workers[name]) for name in sorted(self._workers)),
        )

    def _counted(self) -> int:
        return self.num_written if self.stage.counts_written else self.num_read

    def _stage_bytes(self) -> int:
        """How much of the stage is done: in a merge at most what is finished and what workers are at.

        What lost workers wrote was written in vain, and nobody says how much of what is written that is.
        """
        done = self._resumed_bytes + self._counted() - self._vain_bytes
        if self.stage.counts_written:
            finished = self._resumed_bytes + self._done_bytes
            done = max(finished, min(done, finished + sum(one.begun.num_bytes for one in self.in_work.values())))
        return done if self.stage.total_bytes is None else min(done, self.stage.total_bytes)

    def _worker(self, name: str) -> Contribution:
        found = self._workers.get(name)
        if found is None:
            found = self._workers[name] = Contribution(name)
        return found


class _Window:
    """Two counts that rise, over the last seconds: all bytes that moved, and those that count towards the stage."""

    def __init__(self, now: float, length_s: float) -> None:
        self._length_s = length_s
        self._sample_s = length_s / NUM_SAMPLES
        self._samples = deque([(now, 0, 0)])

    def sample(self, now: float, moved: int, counted: int) -> None:
        samples = self._samples
        if now - samples[-1][0] >= self._sample_s:
            samples.append((now, moved, counted))
        while len(samples) > 1 and now - samples[1][0] >= self._length_s:
            samples.popleft()

    def rates(self, now: float, moved: int, counted: int) -> tuple[float, float]:
        """Return both per second."""
        self.sample(now, moved, counted)
        since, moved_before, counted_before = self._samples[0]
        passed = max(now - since, 1e-9)
        return (moved - moved_before) / passed, (counted - counted_before) / passed
