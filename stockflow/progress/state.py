"""What events add up to: how far a stage is, how fast it goes, how long it will still take."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stockflow.events import Begun, Done, Dropped, Event, Moved, Retry, Stage
from stockflow.planning.budget import gb
from stockflow.progress.file import bytes_done

WINDOW_S = 30.0
"""Rates are those of the last half minute: long enough to be steady, short enough to show a stall."""
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Lane:
    """What one worker has done in a stage."""

    worker: str
    num_read: int = 0
    num_written: int = 0
    num_done: int = 0
    last_item: str = ""
    elapsed_s: float = 0.0
    """until it was last heard of"""


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
    num_done: int
    """of ``stage.num_items``, likewise"""
    bytes_per_s: float
    """read and written ones together, lately"""
    left_s: float | None
    """None: not known"""
    last_item: str
    lanes: tuple[Lane, ...] = ()

    @property
    def share(self) -> float | None:
        """How much of the stage is done, from 0 to 1; None if not known."""
        if self.stage.total_bytes:
            return min(self.done_bytes / self.stage.total_bytes, 1.0)
        return min(self.num_done / self.stage.num_items, 1.0) if self.stage.num_items else None


@dataclass
class _Counts:
    num_read: int = 0
    num_written: int = 0
    num_done: int = 0
    finished_bytes: int = 0
    """of items that are done"""
    dropped_bytes: int = 0
    """of items that were done and are not good after all"""
    in_flight: dict[str, int] = field(default_factory=dict)
    """bytes of the items that workers are at"""
    last_item: str = ""
    lanes: dict[str, Lane] = field(default_factory=dict)


class State:
    """Takes events from any thread and says how things stand."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin before the first stage.

        Args:
            clock: seconds, never going back.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._begin(Stage(""))

    def take(self, event: Event) -> Snapshot | None:
        """Count an event; return the last state of a stage that it ends."""
        if isinstance(event, Stage):
            ended = self.snapshot()
            with self._lock:
                self._begin(event)
            return ended if ended.stage.name else None
        with self._lock:
            match event:
                case Moved():
                    self._move(event)
                case Begun():
                    self._counts.in_flight[event.item] = event.num_bytes
                case Retry():
                    self._counts.in_flight.pop(event.item or "", None)
                case Done():
                    self._finish(event)
                case Dropped():
                    self._drop(event)
        return None

    def snapshot(self) -> Snapshot:
        """Return how things stand."""
        with self._lock:
            now, counts, stage = self._clock(), self._counts, self._stage
            elapsed = now - self._began
            moved = counts.num_read + counts.num_written
            counted = counts.num_written if stage.counts_written else counts.num_read
            since, moved_before, counted_before = self._samples[0]
            passed = max(now - since, 1e-9)
            done = stage.done_bytes + counted
            if stage.counts_written:
                num_finished = stage.done_bytes + counts.finished_bytes - counts.dropped_bytes
                done = bytes_done(num_finished, done - counts.dropped_bytes, sum(counts.in_flight.values()))
            if stage.total_bytes is not None:
                done = min(done, stage.total_bytes)
            left = None
            if stage.total_bytes is not None and counted > counted_before:
                left = (stage.total_bytes - done) * passed / (counted - counted_before)
            return Snapshot(
                stage=stage,
                elapsed_s=elapsed,
                num_read=counts.num_read,
                num_written=counts.num_written,
                done_bytes=done,
                num_done=stage.num_done + counts.num_done,
                bytes_per_s=(moved - moved_before) / passed,
                left_s=left,
                last_item=counts.last_item,
                lanes=tuple(sorted(counts.lanes.values(), key=lambda lane: lane.worker)),
            )

    def _begin(self, stage: Stage) -> None:
        self._stage = stage
        self._began = self._clock()
        self._counts = _Counts()
        self._samples = deque([(self._began, 0, 0)])

    def _move(self, event: Moved) -> None:
        counts, now = self._counts, self._clock()
        counts.num_read += event.num_read
        counts.num_written += event.num_written
        counted = counts.num_written if self._stage.counts_written else counts.num_read
        if now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, counts.num_read + counts.num_written, counted))
        while len(self._samples) > 1 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()
        lane = self._lane(event.worker)
        counts.lanes[event.worker] = replace(
            lane,
            num_read=lane.num_read + event.num_read,
            num_written=lane.num_written + event.num_written,
            elapsed_s=now - self._began,
        )

    def _finish(self, event: Done) -> None:
        counts = self._counts
        begun_bytes = counts.in_flight.pop(event.item, 0)
        counts.finished_bytes += event.cost.num_bytes if event.cost else begun_bytes
        counts.num_done += 1
        counts.last_item = event.item
        lane = self._lane(event.worker)
        counts.lanes[event.worker] = replace(lane, num_done=lane.num_done + 1, last_item=event.item)

    def _drop(self, event: Dropped) -> None:
        self._counts.num_done -= 1
        self._counts.dropped_bytes += event.num_bytes

    def _lane(self, worker: str) -> Lane:
        return self._counts.lanes.get(worker) or Lane(worker)


def in_words(state: Snapshot) -> str:
    """Return a stage at one moment as one line, its name left out."""
    stage, parts = state.stage, []
    if state.share is not None:
        parts.append(f"{100 * state.share:.0f} %")
    moved = "written" if stage.counts_written else "read"
    if stage.total_bytes is not None:
        parts.append(f"{gb(state.done_bytes)} of {gb(stage.total_bytes)} {moved}")
    if state.num_read + state.num_written:
        parts.append(f"{gb(state.bytes_per_s)}/s")
    if stage.num_items is not None:
        parts.append(f"{state.num_done:,}/{stage.num_items:,} {stage.unit}")
    elif state.num_done:
        parts.append(f"{state.num_done:,} {stage.unit}")
    if state.left_s is not None and state.done_bytes != stage.total_bytes:
        parts.append(f"about {duration(state.left_s)} left")
    elif state.elapsed_s >= 1.0:
        parts.append(f"for {duration(state.elapsed_s)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return a time for people."""
    whole = max(round(seconds), 1)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
