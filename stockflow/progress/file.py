"""The file progress.json: how a merge gets on, for whoever asks from elsewhere; written where the driver is."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from stockflow.errors import (
    CheckpointError,
    NotFoundError,
    OutputConflictError,
    StockflowError,
    StorageError,
    exit_code_of,
)
from stockflow.events import Event
from stockflow.interruption import cause_of, finishing
from stockflow.output import claims
from stockflow.output.claims import HEARTBEAT_S
from stockflow.output.keys import progress_key
from stockflow.planning.plan import ShardPlan
from stockflow.progress.state import State
from stockflow.storage import Store
from stockflow.text.records import Place, RecordKind, parse_record

LATELY_S = 60.0
"""Rates are those of the last minute, and of all of it."""
LAST_REPORT_S = 5.0
"""How long a run that storage has failed waits for it to take the last report."""

Ending = Literal["finished", "failed", "stopped"]
Things = Literal["shards", "tensors"]
"""What is counted: of adapters the tensors that are looked at."""


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
    """what the run is at: looking for finished shards, merging, publishing; or how it ended: see ``Ending``"""
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
    of: Things = "shards"
    """what ``shards`` and its like count"""


KIND = RecordKind(
    noun="a report",
    decode=partial(parse_record, Progress),
    format="stockflow-progress-1",
    max_bytes=16_000_000,  # a worker takes about 150 bytes and three values; Ray runs some thousands
    max_values=1_000_000,
)
encode, parse = KIND.encode, KIND.parse


def read(store: Place, plan_id: str) -> Progress | None:
    """Return what a run of this plan reported last; None if none did, or it cannot be read."""
    with suppress(NotFoundError, CheckpointError):
        return KIND.read(store, progress_key(plan_id))
    return None


class Tracked(Protocol):
    """A plan, as far as its progress goes; an adapter's has no shards."""

    @property
    def plan_id(self) -> str:
        """What it is known by."""

    @property
    def shards(self) -> Sequence[ShardPlan]:
        """What is written."""

    @property
    def num_output_bytes(self) -> int:
        """Size of all of that."""


class Tracker:
    """Adds up the events of a run for progress.json; told from several threads."""

    def __init__(self, plan: Tracked, run: str, clock: Callable[[], float] = time.time) -> None:
        """Begin to count for ``run``."""
        self.plan = plan
        self.run = run
        self._state = State(clock, LATELY_S)
        self._started = clock()
        self._header_bytes = {shard.file: len(shard.header) for shard in plan.shards}
        """events count tensor bytes, and this file whole shards"""
        self._end: tuple[Ending | None, int | None, str] = (None, None, "")
        """how the run ended, its exit code, and why it failed"""

    def __call__(self, event: Event) -> None:
        """Count an event."""
        self._state.take(event)

    @property
    def has_begun(self) -> bool:
        """Whether the output prefix is this run's to write into: its stages begin once that is so."""
        return bool(self._state.overview().stage.name)

    def end(self, ending: Ending, error: BaseException | None = None) -> None:
        """Nothing more happens."""
        message = str(error) if isinstance(error, StockflowError) else type(error).__name__ if error else ""
        self._end = ending, 0 if error is None else exit_code_of(error), message

    def progress(self) -> Progress:
        """Return how things stand."""
        now, (ending, exit_code, message) = self._state.overview(), self._end
        things: Things = "shards" if self.plan.shards else "tensors"
        output = now.output if things == "shards" else self._state.snapshot()
        in_work = () if ending else output.in_work
        done_bytes = now.num_written if things == "tensors" else output.done_bytes
        return Progress(
            plan_id=self.plan.plan_id,
            run=self.run,
            stage=ending or now.stage.name,
            started=self._started,
            updated=now.at,
            heartbeat_s=HEARTBEAT_S,
            shards=len(self.plan.shards) or output.stage.num_items or 0,
            shards_done=output.num_done,
            shards_resumed=output.num_resumed,
            bytes_to_write=self.plan.num_output_bytes,
            bytes_done=done_bytes + sum(self._header_bytes[file] for file in now.finished),
            bytes_read=now.num_read,
            bytes_written=now.num_written,
            bytes_per_s_lately=output.bytes_per_s,
            bytes_per_s=(output.num_read + output.num_written) / max(output.elapsed_s, 1e-9),
            seconds_left=output.left_s,
            in_flight=tuple(InFlight(one.begun.item, one.begun.worker, one.since) for one in in_work),
            retries={cause: count for cause, count in sorted(now.retries.items()) if count},
            exit_code=exit_code,
            message=message,
            of=things,
        )


@contextmanager
def progress_file(store: Store, tracker: Tracker, last_report_s: float = LAST_REPORT_S) -> Iterator[Callable[[], None]]:
    """Provide what writes progress.json, and see that its last state is how the block ended.

    A run that ended before it reported anything leaves no progress.json if it was successful: the manifest says it.
    """
    file = _File(store, tracker)
    try:
        yield file.write
    except (OutputConflictError, StorageError) as error:
        file.end_if_taken(error, last_report_s)
        raise
    except BaseException as error:
        cause = cause_of(error)
        file.end("stopped" if exit_code_of(cause) in (130, 143) else "failed", cause)
        raise
    else:
        if file.was_written:
            file.end("finished")


class _File:
    """progress.json in an output prefix; nothing is written before the prefix is this run's."""

    def __init__(self, store: Store, tracker: Tracker) -> None:
        self._store = store
        self._tracker = tracker
        self._key = progress_key(tracker.plan.plan_id)
        self.was_written = False

    def write(self) -> None:
        if self._tracker.has_begun:
            self._store.put(self._key, encode(self._tracker.progress()))
            self.was_written = True

    def end(self, ending: Ending, error: BaseException | None = None) -> None:
        self._tracker.end(ending, error)
        with finishing(), suppress(StockflowError):  # status then finds that no run is at work
            self.write()

    def end_if_taken(self, error: StockflowError, last_report_s: float) -> None:
        """Try it once, where storage may be gone or the prefix another one's; nothing waits for it for long."""
        self._tracker.end("failed", error)
        if self._tracker.has_begun:
            thread = threading.Thread(target=self._write_if_ours, args=(error,), name="last report", daemon=True)
            thread.start()
            thread.join(last_report_s)

    def _write_if_ours(self, error: StockflowError) -> None:
        with suppress(StockflowError):
            plan_id = self._tracker.plan.plan_id
            if isinstance(error, StorageError) or claims.read(self._store).plan_id == plan_id:
                self.write()
