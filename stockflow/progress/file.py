"""How a merge gets on: counted where the driver is, and told in progress.json to whoever asks from elsewhere."""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from stockflow.errors import (
    CheckpointError,
    NotFoundError,
    OutputConflictError,
    StockflowError,
    StorageError,
    exit_code_of,
)
from stockflow.interruption import finishing
from stockflow.output.claims import HEARTBEAT_S
from stockflow.output.manifest import progress_key, read_claim
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import MergePlan
from stockflow.storage import Store, read_small
from stockflow.text.records import fields_of, parse_record

PROGRESS_FORMAT = "stockflow-progress-1"
MAX_PROGRESS_BYTES = 16_000_000
"""A worker takes about 150 bytes; Ray runs some thousands."""
LATELY_S = 60.0
"""Rates are those of the last minute, and of all of it."""
SAMPLE_S = 1.0
LAST_REPORT_S = 5.0
"""How long a run that storage has failed waits for it to take the last report."""

PLANNING = "planning"
"""the stage before the output prefix is claimed; nothing is reported of it"""

Outcome = Literal["finished", "failed", "stopped"]


class Observer(Protocol):
    """Who is told how a merge goes; called from several threads."""

    def on_run(self, run: str, plan_id: str) -> None:
        """This run begins to work on this plan."""

    def on_stage(self, text: str) -> None:
        """A new stage begins."""

    def on_note(self, text: str) -> None:
        """Something the user should know, and need not act on."""

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Merging begins; ``resumed`` shards need no work."""

    def on_begin(self, shard: str, worker: str) -> None:
        """A worker begins with a shard."""

    def on_bytes(self, num_read: int, num_written: int, worker: str = "") -> None:
        """Bytes went by, moved by ``worker`` where there are several."""

    def on_failure(self, cause: str, shard: str | None = None) -> None:
        """A shard, or (None) the start of a worker, is to be tried again."""

    def on_shard(self, receipt: Receipt) -> None:
        """A shard is done."""

    def on_drop(self, shard: str) -> None:
        """A shard that was done is not good after all."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A shard that a worker is at."""

    shard: str
    worker: str
    """``node:pid``"""
    since: float
    """seconds since the epoch, by the driver's clock"""


@dataclass(frozen=True, slots=True)
class Progress:
    """What progress.json says; times are seconds since the epoch, by the driver's clock."""

    plan_id: str
    run: str
    """which run this is; several may be at work on one plan, and the last one to write is heard"""
    stage: str
    """what the run is at: looking for finished shards, merging, publishing; or how it ended: see ``Outcome``"""
    started: float
    updated: float
    """the heartbeat: a run at work writes every ``heartbeat_s``"""
    heartbeat_s: float
    shards: int
    shards_done: int
    shards_resumed: int
    """of those, how many an earlier run had done"""
    bytes_to_write: int
    """all shards of the output"""
    bytes_done: int
    """of those, what is written, shards in flight included"""
    bytes_read: int
    """by this run, from its inputs"""
    bytes_written: int
    """by this run, to its output"""
    bytes_per_s_lately: float
    """read and written together, in the last minute"""
    bytes_per_s: float
    """likewise, since merging began"""
    seconds_left: float | None
    """at the pace of the last minute; None: nothing was written in it"""
    in_flight: tuple[InFlight, ...]
    retries: Mapping[str, int]
    """by cause, in this run: ``read`` (a request), ``storage`` (a shard), ``lost``, ``out of memory``, ..."""
    exit_code: int | None = None
    """of a run that has ended"""
    message: str = ""
    """why it failed"""

    def to_json(self) -> bytes:
        """Return the text of progress.json."""
        return json.dumps({"format": PROGRESS_FORMAT, **asdict(self)}, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, payload: bytes, where: str) -> "Progress":
        """Parse progress.json.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            return parse_record(cls, fields_of(payload, PROGRESS_FORMAT))
        except ValueError as error:
            raise CheckpointError(f"{where} is not a report of stockflow: {error}") from None


def read_progress(store: Store, plan_id: str) -> Progress | None:
    """Return what a run of this plan reported last; None if none did, or another version of stockflow wrote it."""
    with suppress(NotFoundError, CheckpointError):
        key = progress_key(plan_id)
        return Progress.from_json(read_small(store, key, max_bytes=MAX_PROGRESS_BYTES), key)
    return None


def bytes_done(finished: int, written: int, in_flight: int) -> int:
    """Return how much of an output is done: at most what is finished and what workers are at.

    What lost workers wrote was written in vain, and nobody says how much of ``written`` that is.
    """
    return max(finished, min(written, finished + in_flight))


class Tracker:
    """Counts what the driver is told of a merge, and tells an observer; may be told from several threads."""

    def __init__(self, observer: Observer, plan: MergePlan, run: str, clock: Callable[[], float] = time.time) -> None:
        """Begin to count for ``run``."""
        self.plan = plan
        self.run = run
        self._observer = observer
        self._clock = clock
        self._lock = threading.Lock()
        self._stage = PLANNING
        self._started = self._merging_since = clock()
        self._resumed: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._in_flight: dict[str, InFlight] = {}
        self._sizes = {shard.file: shard.num_bytes for shard in plan.shards}
        self._retries: Counter[str] = Counter()
        self._read = self._written = 0
        self._samples = deque([(self._started, 0, 0)])
        self._exit_code: int | None = None
        self._message = ""

    @property
    def has_begun(self) -> bool:
        """Whether the output prefix is this run's to write into."""
        return self._stage != PLANNING

    def on_stage(self, text: str) -> None:
        """A new stage begins, once the prefix is claimed."""
        self._stage = text
        self._observer.on_stage(text)

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self._observer.on_note(text)

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Merging begins."""
        with self._lock:
            self._stage = "merging"
            self._merging_since = self._clock()
            self._samples = deque([(self._merging_since, 0, 0)])
            self._resumed = {receipt.file: receipt.size for receipt in resumed}
        self._observer.on_start(plan, resumed)

    def on_begin(self, shard: str, worker: str) -> None:
        """A worker begins with a shard."""
        with self._lock:
            self._in_flight[shard] = InFlight(shard, worker, self._clock())
        self._observer.on_begin(shard, worker)

    def on_failure(self, cause: str, shard: str | None = None) -> None:
        """A shard, or the start of a worker, is to be tried again."""
        with self._lock:
            self._retries[cause] += 1
            if shard is not None:
                self._in_flight.pop(shard, None)
        self._observer.on_failure(cause, shard)

    def on_bytes(self, num_read: int, num_written: int, worker: str = "") -> None:
        """Count bytes."""
        with self._lock:
            self._read += num_read
            self._written += num_written
            self._sample()
        self._observer.on_bytes(num_read, num_written, worker)

    def on_shard(self, receipt: Receipt) -> None:
        """A shard is done."""
        with self._lock:
            self._in_flight.pop(receipt.file, None)
            self._done[receipt.file] = receipt.size
            self._retries.update(receipt.retries)
        self._observer.on_shard(receipt)

    def drop(self, files: set[str]) -> None:
        """These shards are not good after all."""
        with self._lock:
            counted = files & (self._resumed.keys() | self._done.keys())
            for file in counted:
                self._resumed.pop(file, None)
                self._done.pop(file, None)
        for file in sorted(counted):
            self._observer.on_drop(file)

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Nothing more happens."""
        with self._lock:
            self._stage = outcome
            self._in_flight.clear()
            self._exit_code = 0 if error is None else exit_code_of(error)
            self._message = str(error) if isinstance(error, StockflowError) else type(error).__name__ if error else ""

    def progress(self) -> Progress:
        """Return how things stand."""
        with self._lock:
            now = self._clock()
            self._sample()
            since, moved_before, written_before = self._samples[0]
            passed = max(now - since, 1e-9)
            num_to_write = self.plan.num_output_bytes
            num_finished = sum(self._resumed.values()) + sum(self._done.values())
            num_in_flight = sum(self._sizes[shard] for shard in self._in_flight)
            num_done = bytes_done(num_finished, sum(self._resumed.values()) + self._written, num_in_flight)
            num_done = max(num_finished, min(num_done, num_to_write))
            written_lately = (self._written - written_before) / passed
            return Progress(
                plan_id=self.plan.plan_id,
                run=self.run,
                stage=self._stage,
                started=self._started,
                updated=now,
                heartbeat_s=HEARTBEAT_S,
                shards=len(self.plan.shards),
                shards_done=len(self._resumed) + len(self._done),
                shards_resumed=len(self._resumed),
                bytes_to_write=num_to_write,
                bytes_done=num_done,
                bytes_read=self._read,
                bytes_written=self._written,
                bytes_per_s_lately=(self._read + self._written - moved_before) / passed,
                bytes_per_s=(self._read + self._written) / max(now - self._merging_since, 1e-9),
                seconds_left=(num_to_write - num_done) / written_lately if written_lately > 0 else None,
                in_flight=tuple(sorted(self._in_flight.values(), key=lambda one: one.since)),
                retries={cause: count for cause, count in sorted(self._retries.items()) if count},
                exit_code=self._exit_code,
                message=self._message,
            )

    def _sample(self) -> None:
        now = self._clock()
        if now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, self._read + self._written, self._written))
        while len(self._samples) > 1 and now - self._samples[1][0] >= LATELY_S:
            self._samples.popleft()


@contextmanager
def reported(store: Store, tracker: Tracker) -> Iterator[Callable[[], None]]:
    """Provide what writes progress.json, and see that its last state is how the block ended.

    A run that ended before it reported anything leaves no progress.json if it was successful: the manifest says it.
    """
    key = progress_key(tracker.plan.plan_id)
    num_reports = 0

    def report() -> None:
        nonlocal num_reports
        if tracker.has_begun:
            store.put(key, tracker.progress().to_json())
            num_reports += 1

    def report_end(outcome: Outcome, error: BaseException | None = None) -> None:
        if tracker.has_begun:
            tracker.end(outcome, error)
            with finishing(), suppress(StockflowError):  # status then finds that no run is at work
                report()

    def report_if_taken(error: StockflowError) -> None:
        """Try it once, where storage may be gone or the prefix another one's; nothing waits for it for long."""

        def attempt() -> None:
            with suppress(StockflowError):
                if isinstance(error, StorageError) or read_claim(store).plan_id == tracker.plan.plan_id:
                    report()

        if tracker.has_begun:
            tracker.end("failed", error)
            thread = threading.Thread(target=attempt, name="last report", daemon=True)
            thread.start()
            thread.join(LAST_REPORT_S)

    try:
        yield report
    except (OutputConflictError, StorageError) as error:
        report_if_taken(error)
        raise
    except BaseException as error:
        report_end("stopped" if exit_code_of(error) in (130, 143) else "failed", error)
        raise
    else:
        if num_reports:
            report_end("finished")
