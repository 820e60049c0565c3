"""How a merge ran: time by stage, throughput over time, who worked when, memory, retries."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from stockflow.output.receipts import Receipt

STAGES = {
    "read": "reading ranges",
    "statistics": "statistics",
    "combine": "combining",
    "hash": "hashing",
    "write": "writing",
    "publish": "making durable",
    "wait_read": "waiting for reads",
    "wait_write": "waiting for writes",
}
"""Stages in the order of the work, in words."""
NUM_STEPS = 96
"""Columns of the throughput chart."""
LONGEST_PAUSE_SHARE = 0.1
"""A time without work that is longer than this share of the working time, and than a minute, is cut out."""
LONGEST_PAUSE_S = 60.0
LATEST = 4e9
"""Seconds since the epoch; a later time is no time of a merge."""
MAX_LANES = 24
MAX_SPANS = 125
"""Blocks of a lane; with more shards, neighbours share one."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage, over all threads and shards."""

    name: str
    seconds: float
    is_waiting: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A shard, or neighbouring ones, on their worker, in seconds of working time since the first began."""

    start: float
    stop: float
    num_retries: int


@dataclass(frozen=True, slots=True)
class Lane:
    """What one worker did."""

    worker: str
    num_shards: int
    spans: tuple[Span, ...]
    """of the shards whose times are known"""
    num_bytes: int
    peak_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Pause:
    """A time without work that the time axis leaves out."""

    at: float
    seconds: float


@dataclass(frozen=True)
class Course:
    """What a report shows of the run."""

    stages: tuple[StageTime, ...]
    lanes: tuple[Lane, ...]
    """workers, the busiest first"""
    pauses: tuple[Pause, ...]
    working_s: float | None
    """from the first shard's begin to the last one's end, without pauses; None if no receipt says when"""
    began: float | None
    ended: float | None
    rates: tuple[float, ...]
    """bytes read and written per second, in equal steps of the working time"""
    num_bytes: int
    peak_bytes: int
    memory_bytes: int | None
    retries: Mapping[str, int]
    """by cause"""
    retried_shards: tuple[tuple[str, int], ...]
    """the shards with most of them"""

    @property
    def num_retries(self) -> int:
        """How many requests were repeated."""
        return sum(self.retries.values())

    @property
    def mean_rate(self) -> float | None:
        """Bytes read and written per second of working time."""
        return self.num_bytes / self.working_s if self.working_s else None

    def facts(self) -> dict[str, object]:
        """Return it for programs, without single shards."""
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "workers": [
                {
                    "worker": lane.worker, "shards": lane.num_shards, "bytes": lane.num_bytes,
                    "peak_memory_bytes": lane.peak_bytes, "memory_bytes": lane.memory_bytes,
                }
                for lane in self.lanes
            ],
            "began": self.began,
            "ended": self.ended,
            "working_seconds": self.working_s,
            "pauses": [asdict(pause) for pause in self.pauses],
            "bytes_per_second": self.mean_rate,
            "peak_memory_bytes": self.peak_bytes,
            "memory_bytes": self.memory_bytes,
            "retries": dict(self.retries),
        }  # fmt: skip


def course_of(receipts: Sequence[Receipt], summary: Mapping[str, float]) -> Course:
    """Return how the merge ran, as its receipts and the manifest's summary tell."""
    timed = [receipt for receipt in receipts if _is_timed(receipt)]
    clock = _Clock(timed)
    retries: Counter[str] = Counter()
    for receipt in receipts:
        retries.update({cause: count for cause, count in receipt.retries.items() if count})
    if (without_cause := int(summary.get("retries", 0)) - sum(retries.values())) > 0:
        retries["cause not on record"] = without_cause  # the receipts are gone, the manifest has the sum
    retried = sorted(((sum(receipt.retries.values()), receipt.file) for receipt in receipts), reverse=True)
    peaks = [receipt.peak_memory_bytes for receipt in receipts]
    return Course(
        stages=tuple(_stages(summary)),
        lanes=tuple(_lanes(receipts, clock)),
        pauses=clock.pauses,
        working_s=clock.working_s if timed else None,
        began=min((receipt.began for receipt in timed), default=None),
        ended=max((receipt.ended for receipt in timed), default=None),
        rates=_rates(timed, clock),
        num_bytes=sum(receipt.bytes_read + receipt.size for receipt in timed),
        peak_bytes=max([int(summary.get("peak_memory_bytes", 0)), *peaks]),
        memory_bytes=max((receipt.memory_bytes for receipt in receipts), default=None),
        retries=dict(retries.most_common()),
        retried_shards=tuple((file, count) for count, file in retried[:10] if count),
    )


def _is_timed(receipt: Receipt) -> bool:
    """Whether it says when its shard was merged; a clock that was set back meanwhile says nothing."""
    return 0.0 < receipt.began <= receipt.ended < LATEST


class _Clock:
    """Seconds since the epoch to seconds of working time: long times without any work are left out."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        spans = sorted((receipt.began, receipt.ended) for receipt in receipts)
        runs: list[list[float]] = []
        for began, ended in spans:
            if runs and began <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], ended)
            else:
                runs.append([began, ended])
        busy_s = sum(ended - began for began, ended in runs)
        longest = max(LONGEST_PAUSE_S, LONGEST_PAUSE_SHARE * busy_s)
        self._points = [runs[0][0]] if runs else [0.0]
        self._working = [0.0]
        pauses = []
        for left, right in pairwise(runs):
            if right[0] - left[1] > longest:
                at = self._working[-1] + left[1] - self._points[-1]
                self._points += [left[1], right[0]]
                self._working += [at, at]
                pauses.append(Pause(at, right[0] - left[1]))
        last = runs[-1][1] if runs else 0.0
        self.working_s = self._working[-1] + last - self._points[-1]
        self._points.append(last)
        self._working.append(self.working_s)
        self.pauses = tuple(pauses)

    def at(self, moment: float) -> float:
        """Return the working time at a moment."""
        return float(np.interp(moment, self._points, self._working))


def _stages(summary: Mapping[str, float]) -> Iterator[StageTime]:
    for stage, words in STAGES.items():
        seconds = summary.get(f"seconds_{stage}")
        if seconds is not None and seconds >= 0.0:
            yield StageTime(words, seconds, is_waiting=stage.startswith("wait"))


def _lanes(receipts: Sequence[Receipt], clock: _Clock) -> Iterator[Lane]:
    by_worker: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        by_worker[receipt.worker].append(receipt)
    lanes = [_lane(worker, members, clock) for worker, members in by_worker.items()]
    yield from sorted(lanes, key=lambda lane: (-lane.num_bytes, lane.worker))


def _lane(worker: str, receipts: Sequence[Receipt], clock: _Clock) -> Lane:
    spans = [
        Span(
            clock.at(receipt.began),
            clock.at(receipt.ended),
            sum(receipt.retries.values()),
        )
        for receipt in receipts
        if _is_timed(receipt)
    ]
    return Lane(
        worker,
        len(receipts),
        tuple(_blocks(sorted(spans, key=lambda span: span.start))),
        sum(receipt.bytes_read + receipt.size for receipt in receipts),
        max(receipt.peak_memory_bytes for receipt in receipts),
        max(receipt.memory_bytes for receipt in receipts),
    )


def _blocks(spans: Sequence[Span]) -> Iterator[Span]:
    """Yield at most ``MAX_SPANS`` of what one worker did, in order of time."""
    size = -(-len(spans) // MAX_SPANS) or 1
    for first in range(0, len(spans), size):
        members = spans[first : first + size]
        stop = max(span.stop for span in members)
        yield Span(members[0].start, stop, sum(span.num_retries for span in members))


def _rates(receipts: Sequence[Receipt], clock: _Clock) -> tuple[float, ...]:
    """Return bytes per second in equal steps; a shard's bytes count evenly over the time it took."""
    if not clock.working_s:
        return ()
    edges = np.linspace(0.0, clock.working_s, NUM_STEPS + 1)
    moved = np.zeros(NUM_STEPS)
    for receipt in receipts:
        start, stop = clock.at(receipt.began), clock.at(receipt.ended)
        if stop > start:
            overlap = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0.0, None)
            moved += (receipt.bytes_read + receipt.size) * overlap / (stop - start)
    return tuple(map(float, moved / (clock.working_s / NUM_STEPS)))
