"""Cleaning: what runs that were killed left in an output prefix, shown and removed; never what is published."""

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from stockflow.checkpoints.adapters.config import WEIGHTS_KEY
from stockflow.checkpoints.files.candidates import WRITTEN_STEMS
from stockflow.errors import AccessDeniedError, CheckpointError, NotFoundError, OutputConflictError, StockflowError
from stockflow.events import Note, OnEvent
from stockflow.interruption import finishing, last_act
from stockflow.output import claims, receipts
from stockflow.output import manifest as manifest_file
from stockflow.output.claims import ABANDONED_S, Claim, is_anyone_else_alive, last_seen
from stockflow.output.keys import CLAIM_FILE, RECORDS, factors_folder, receipt_folder, receipted_file, run_folder
from stockflow.output.manifest import Manifest
from stockflow.output.shards import present_files
from stockflow.storage import HalfWritten, Stamp, Store, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import duration

_SHARD = re.compile(rf"({'|'.join(WRITTEN_STEMS)})(-\d{{5,}}-of-\d{{5,}})?\.safetensors|{re.escape(WEIGHTS_KEY)}")
"""names of what a merge uploads in parts; everything else of an output is one small object"""
_PLAN_FOLDER = re.compile(re.escape(RECORDS) + r"([0-9a-f]{64})/")


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a prefix holds that belongs to no output, to no run at work and to none that can be resumed."""

    url: str
    plan_id: str
    is_published: bool
    seen_s_ago: float | None
    """how long ago a run that did not end by itself was last seen, in seconds; None: all did"""
    num_finished_shards: int
    """of an unfinished run; they stay, so that it can be resumed"""
    half_written: tuple[HalfWritten, ...]
    records: tuple[str, ...]
    """keys of receipts without their shard, of ended runs, and of plans that own the prefix no more"""
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many things there are to remove."""
        return len(self.half_written) + len(self.records)


def find_leftovers(store: Store) -> Leftovers:
    """Return what may be removed; nothing is.

    Raises:
        NotFoundError: the prefix is no output of stockflow.
        OutputConflictError: a run is at work there, or was seen less than 15 minutes ago.
        CheckpointError: claim or manifest cannot be read, so nobody knows what is part of the output.
    """
    published, claim = _owners(store)
    owner = published or claim
    if owner is None:
        raise NotFoundError(
            f"{redact(store.url)} has neither a manifest nor a claim of stockflow: nothing there is ours to remove"
        )
    # Runs are looked for after all else is listed: one says that it is alive before it writes anything.
    half_written, notes = _half_written(store)
    keys = list(store.list(RECORDS))
    receipted = [file for key in keys if (file := receipted_file(owner.plan_id, key))]
    present = present_files(store, receipted)
    seen_s_ago = check_abandoned(store)
    records = list(_stale_records(store, keys, {o.plan_id for o in (published, claim) if o}, present))
    if published:
        folder = factors_folder(published.plan_id)
        records += [key for key in keys if folder in key and key not in records]
    files = published.files.keys() if published else ()
    valid = {key for key in keys if key.startswith(receipt_folder(owner.plan_id))} - set(records)
    return Leftovers(
        url=store.url,
        plan_id=owner.plan_id,
        is_published=published is not None,
        seen_s_ago=seen_s_ago,
        num_finished_shards=0 if published else len(valid),
        half_written=tuple(half_written),
        records=tuple(key for key in records if key not in files),
        notes=tuple(notes),
    )


def remove(store: Store, leftovers: Leftovers) -> None:
    """Remove what ``find_leftovers`` found.

    Raises:
        OutputConflictError: a run has come meanwhile.
    """
    check_abandoned(store)
    store.discard(leftovers.half_written)
    store.delete(leftovers.records)


def check_abandoned(store: Store) -> float | None:
    """Return how many seconds ago a run that has not ended was last seen in a prefix, None if there is none.

    Raises:
        OutputConflictError: that is less than 15 minutes.
    """
    seen = last_seen(store)
    age = time.time() - seen
    if age < ABANDONED_S:
        raise OutputConflictError(
            f"a run was seen in {redact(store.url)} {max(age, 0.0):,.0f} s ago; what it writes is not left over. "
            f"End it, or run this again once none was seen for {ABANDONED_S / 60:.0f} minutes"
        )
    return age if seen else None


def abort_leftovers(store: Store, plan_id: str, run: str, files: Collection[str]) -> None:
    """Remove what writers of this output left half-written; nothing of another run that is still at work.

    A worker of ours that hangs beyond our reach may hold a temporary file: without it nothing of it can appear.

    Uploads are listed before other runs are looked for: a run says that it is alive before it uploads. Runs of every
    plan count: shards of two plans have equal names, and an upload does not say whose it is.

    Args:
        store: the output.
        plan_id: the plan of this run.
        run: this run.
        files: what is uploaded in parts.
    """
    ours = [piece for piece in store.half_written(also_held=True) or () if _is_of_output(piece, files)]
    if not all(piece.is_abandoned for piece in ours) and is_anyone_else_alive(store, plan_id, run):
        ours = [piece for piece in ours if piece.is_abandoned]
    store.discard(ours)


@contextmanager
def swept(store: Store, plan_id: str, run: str, files: Collection[str], on_event: OnEvent) -> Iterator[None]:
    """Leave nothing half-written of an output, however the block ends, or hangs when the process must end.

    Args:
        store: the output.
        plan_id: the plan of this run.
        run: this run.
        files: what is uploaded in parts.
        on_event: told what may be left.
    """
    with last_act(partial(abort_leftovers, store, plan_id, run, files)):
        try:
            yield
        finally:
            try:
                with finishing():
                    abort_leftovers(store, plan_id, run, files)
            except StockflowError as error:
                text = f"something half-written may be left, `stockflow clean {redact(store.url)}` shows it: {error}"
                on_event(Note(text))


def _is_of_output(piece: HalfWritten, files: Collection[str]) -> bool:
    is_small_file = piece.is_abandoned and "/" not in piece.key
    return piece.key in files or piece.key.startswith(RECORDS) or is_small_file


def _owners(store: Store) -> tuple[Manifest | None, Claim | None]:
    published = claim = None
    with suppress(NotFoundError):
        published = manifest_file.read(store)
    with suppress(NotFoundError):
        claim = claims.read(store)
    return published, claim


def _half_written(store: Store) -> tuple[list[HalfWritten], list[str]]:
    """What was being written under names that a merge writes, directly in the prefix or among its records."""
    where = redact(store.url)
    try:
        found = store.half_written()
    except AccessDeniedError as error:
        return [], [f"open uploads are not looked for: {error}"]
    if found is None:
        return [], [
            f"{where}: this store does not list open uploads. Have it remove them by itself: a lifecycle rule "
            "(docs/promises.md#rights) on S3 and Google; Azure drops uncommitted blocks after a week"
        ]
    return [piece for piece in found if _is_merges_own(piece)], []


def _is_merges_own(piece: HalfWritten) -> bool:
    if piece.is_abandoned:  # a temporary file: its name says that it is ours
        return "/" not in piece.key or piece.key.startswith(RECORDS)
    return bool(_SHARD.fullmatch(piece.key)) or piece.key.startswith(RECORDS)


def _stale_records(
    store: Store, keys: Sequence[str], plan_ids: set[str], present: Mapping[str, Stamp]
) -> Iterator[str]:
    for key in keys:
        match = _PLAN_FOLDER.match(key)
        if match is None or key == CLAIM_FILE:
            continue
        plan_id = match[1]
        is_receipt = key.startswith(receipt_folder(plan_id))
        is_stale = plan_id not in plan_ids or key.startswith(run_folder(plan_id))
        if is_stale or (is_receipt and not _proves_something(store, plan_id, key, present)):
            yield key


def _proves_something(store: Store, plan_id: str, key: str, present: Mapping[str, Stamp]) -> bool:
    file = receipted_file(plan_id, key)
    if file is None or file not in present:
        return False
    try:
        receipt = receipts.read(store, plan_id, file)
    except (CheckpointError, NotFoundError):
        return False
    return receipt.file == file and present[file].size == receipt.size


def leftover_lines(leftovers: Leftovers, *, is_removed: bool) -> Iterator[str]:
    """Yield what was found, and what became of it, line by line."""
    state = "a finished output" if leftovers.is_published else "an unfinished merge"
    seen = leftovers.seen_s_ago
    runs = "whose runs have ended" if seen is None else f"last run seen {duration(seen)} ago"
    yield f"{redact(leftovers.url)}: {state} of plan {leftovers.plan_id[:12]}, {runs}"
    for piece in leftovers.half_written:
        kind = "temporary file" if piece.is_abandoned else "open upload"
        yield f"  {kind:<14}  {in_a_line(piece.key)} ({in_a_line(piece.name)})"
    for key in leftovers.records:
        yield f"  {'stale record':<14}  {in_a_line(key)}"
    for note in leftovers.notes:
        yield f"  {'note':<14}  {note}"
    if leftovers.num_finished_shards:
        yield (
            f"  {leftovers.num_finished_shards} finished shards stay: the same merge run again resumes with them; to "
            "drop them, delete the prefix"
        )
    if not leftovers.count:
        yield "nothing is left over"
    elif is_removed:
        yield f"removed: {leftovers.count}"
    else:
        yield f"to remove: {leftovers.count}. Nothing was removed; --yes removes them"


def leftover_facts(leftovers: Leftovers, *, is_removed: bool) -> dict[str, object]:
    """Return what was found, and what became of it, for programs."""
    uploads = [piece for piece in leftovers.half_written if not piece.is_abandoned]
    files = [piece for piece in leftovers.half_written if piece.is_abandoned]
    return {
        "output": redact(leftovers.url),
        "plan_id": leftovers.plan_id,
        "published": leftovers.is_published,
        "seen_seconds_ago": leftovers.seen_s_ago,
        "uploads": [{"key": piece.key, "upload_id": piece.name} for piece in uploads],
        "temporary_files": [{"key": piece.key, "name": piece.name} for piece in files],
        "records": list(leftovers.records),
        "notes": list(leftovers.notes),
        "removed": is_removed,
    }
