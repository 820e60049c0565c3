"""How a merge stands, told from its output prefix alone: from any machine that may list and read there."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from stockflow.errors import NotFoundError
from stockflow.output import claims
from stockflow.output import manifest as manifest_file
from stockflow.output.claims import ABANDONED_S, HEARTBEAT_S, beats
from stockflow.output.keys import RECORDS, receipted_file, run_key
from stockflow.output.shards import present_files
from stockflow.progress import file as progress_file
from stockflow.progress.file import InFlight, Progress, Things
from stockflow.storage import Store, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import duration, gb

Standing = Literal["finished", "running", "silent", "failed", "stopped", "dead"]

SILENT_S = 60.0
"""Six heartbeats missed: a run that is at work would have been seen."""
BEAT_DUE_S = 2 * HEARTBEAT_S
"""One that is at work beats in this time."""
ENDS = ("finished", "failed", "stopped")
"""what the last report of a run calls its stage"""
NUM_SHOWN = 20
"""Workers that are listed for people."""


@dataclass(frozen=True, slots=True)
class Status:
    """What an output prefix tells of the merge into it."""

    output: str
    plan_id: str
    state: Standing
    """``silent``: no heartbeat for a minute; ``dead``: none for a quarter of an hour, or the run is gone"""
    seen_s_ago: float | None
    """how long ago a run was last seen, by this machine's clock; None: a finished merge has none"""
    num_runs: int
    """at work at the same time; more than one share the plan and do the work twice"""
    shards: int | None
    """None: nothing was reported yet"""
    shards_done: int
    """shards with a receipt, counted now"""
    bytes_done: int
    bytes_to_write: int | None
    progress: Progress | None
    """what the run reported last; up to ``heartbeat_s`` old"""
    of: Things = "shards"
    """what ``shards`` and ``shards_done`` count"""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is expected to happen by itself."""
        return self.state != "running"

    @property
    def is_killed(self) -> bool:
        """Whether it ended without a word, as far as anybody can see."""
        return self.state in ("silent", "dead")

    def facts(self) -> dict[str, object]:
        """Return what `stockflow status --json` prints."""
        return asdict(self)


def read_status(store: Store) -> Status:
    """Return how the merge into a prefix stands; nothing is written.

    Raises:
        NotFoundError: there is neither a manifest nor a claim of stockflow.
        CheckpointError: one of them cannot be read.
        AccessDeniedError: the credentials may not list or read there.
    """
    if finished := _finished(store):
        return finished
    try:
        claim = claims.read(store)
    except NotFoundError:
        store.list_top()  # says so if there is no such bucket
        raise NotFoundError(
            f"{redact(store.url)} has neither a manifest nor a claim of stockflow: no merge began there. "
            "Check the location, or wait until the merge has planned"
        ) from None
    status = _unfinished(store, claim.plan_id, claim.heartbeat)
    # It may have published, and taken its record away, between the first look and the listing.
    return (_finished(store) if status.is_over else None) or status


def status_lines(status: Status) -> Iterator[str]:
    """Yield what `stockflow status` prints."""
    yield f"{status.output}: {_state_in_words(status)}"
    shards = f"{status.shards_done:,}" + ("" if status.shards is None else f" of {status.shards:,}")
    size = gb(status.bytes_done) + ("" if status.bytes_to_write is None else f" of {gb(status.bytes_to_write)}")
    yield f"  plan {status.plan_id[:12]}: {shards} {status.of}, {size} written"
    report = status.progress
    if report is None or status.state == "finished":
        return
    if not status.is_over:
        left = "time left not known" if report.seconds_left is None else f"about {duration(report.seconds_left)} left"
        rate = "rate not known yet"
        if report.bytes_read or report.bytes_written:
            lately, overall = gb(report.bytes_per_s_lately), gb(report.bytes_per_s)
            rate = f"{lately}/s read and written in the last minute, {overall}/s in all"
        yield f"  {rate}; {left}; {report.stage}"
    if report.retries:
        yield "  tried again: " + ", ".join(f"{count:,} x {cause}" for cause, count in report.retries.items())
    if status.is_over and report.message:
        yield f"  it said: {report.message}"
    yield from _workers(report.in_flight, report.updated)


def status_line(status: Status) -> str:
    """Return a status in one line, for who watches."""
    report = status.progress
    size = gb(status.bytes_done) + ("" if status.bytes_to_write is None else f" of {gb(status.bytes_to_write)}")
    shards = f"{status.shards_done:,}" + ("" if status.shards is None else f"/{status.shards:,}")
    parts = [status.state, f"{shards} {status.of}", size]
    if report is not None and not status.is_over:
        parts += [f"{gb(report.bytes_per_s_lately)}/s", f"{len(report.in_flight)} in flight", in_a_line(report.stage)]
        parts += [] if report.seconds_left is None else [f"about {duration(report.seconds_left)} left"]
    if status.seen_s_ago is not None:
        parts.append(f"seen {status.seen_s_ago:,.0f} s ago")
    return "  ".join(parts)


def exit_code(status: Status) -> int:
    """Return what a merge that is over would have told the shell; 5 for one that died without a word."""
    if status.state == "finished":
        return 0
    reported = status.progress.exit_code if status.progress and status.state in ("failed", "stopped") else None
    return reported or 5


def _finished(store: Store) -> Status | None:
    try:
        published = manifest_file.read(store)
    except NotFoundError:
        return None
    sizes = [file.size for name, file in published.files.items() if name.endswith(".safetensors")]
    num_done = int(published.summary["tensors"]) if published.is_adapter else len(sizes)
    return Status(
        output=redact(store.url),
        plan_id=published.plan_id,
        state="finished",
        seen_s_ago=None,
        num_runs=0,
        shards=num_done,
        shards_done=num_done,
        bytes_done=sum(sizes),
        bytes_to_write=sum(sizes),
        progress=progress_file.read(store, published.plan_id),
        of="tensors" if published.is_adapter else "shards",
    )


def _unfinished(store: Store, plan_id: str, claimed: float) -> Status:
    progress = progress_file.read(store, plan_id)
    keys = store.list(RECORDS)
    receipted = [file for key in keys if (file := receipted_file(plan_id, key))]
    present = present_files(store, receipted)
    done = [file for file in receipted if file in present]
    now = time.time()
    alive = _alive(store, keys, plan_id, progress, now)
    last = max([claimed, *alive, *([progress.updated] if progress else [])])
    seen_s_ago = max(now - last, 0.0)
    num_written = sum(present[file].size for file in done)
    is_counted = progress is not None and progress.of == "tensors"
    return Status(
        output=redact(store.url),
        plan_id=plan_id,
        state=_state(progress, seen_s_ago, has_run=bool(alive)),
        seen_s_ago=seen_s_ago,
        num_runs=sum(now - beat < SILENT_S for beat in alive),
        shards=progress.shards if progress else None,
        shards_done=progress.shards_done if progress and is_counted else len(done),
        bytes_done=max(num_written, progress.bytes_done if progress else 0),
        bytes_to_write=progress.bytes_to_write if progress and not is_counted else None,
        progress=progress,
        of=progress.of if progress else "shards",
    )


def _alive(store: Store, keys: Iterable[str], plan_id: str, progress: Progress | None, now: float) -> Sequence[float]:
    """Return when each run that may still be at work was last seen.

    A run that ends takes its record away. One that is killed cannot: its record stays and must not hide, for ever or
    for a quarter of an hour, how a later run ended. Who has beaten since that end is at work, or has just now.
    """
    if progress is None or progress.stage not in ENDS:
        return [beat for beat in beats(store, keys, plan_id) if now - beat < ABANDONED_S]
    others = [key for key in keys if key != run_key(plan_id, progress.run)]
    since = min(progress.updated, now - BEAT_DUE_S)
    return [beat for beat in beats(store, others, plan_id) if beat > since and now - beat < ABANDONED_S]


def _state(progress: Progress | None, seen_s_ago: float, *, has_run: bool) -> Standing:
    """Judge an unfinished merge."""
    if has_run:
        return "running" if seen_s_ago < SILENT_S else "silent"
    if progress and progress.stage in ("failed", "stopped"):
        return "failed" if progress.stage == "failed" else "stopped"
    return "dead"


def _state_in_words(status: Status) -> str:
    ago = "" if status.seen_s_ago is None else f"last seen {duration(status.seen_s_ago)} ago"
    silence = ago.removeprefix("last seen ").removesuffix(" ago")
    words = {
        "finished": "finished; `stockflow verify` checks every byte",
        "running": f"running, {ago}" + (f", {status.num_runs} runs" if status.num_runs > 1 else ""),
        "silent": f"killed, or cut off from storage: no sign of life for {silence}; the same command again resumes",
        "failed": f"failed, {ago}; mend what it said and the same command again resumes",
        "stopped": f"stopped, {ago}; the same command again resumes",
        "dead": f"unfinished, and nobody is at work ({ago}); the same command again resumes",
    }
    return words[status.state]


def _workers(in_flight: Sequence[InFlight], now: float) -> Iterator[str]:
    for one in in_flight[:NUM_SHOWN]:
        yield f"  {in_a_line(one.worker)}: at {in_a_line(one.shard)} for {duration(max(now - one.since, 0.0))}"
    if len(in_flight) > NUM_SHOWN:
        yield f"  ... and {len(in_flight) - NUM_SHOWN:,} more workers"


def _shard_of(key: str, folder: str) -> str:
    return key.removeprefix(folder).removesuffix(".json")
