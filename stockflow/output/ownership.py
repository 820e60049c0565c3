"""The output prefix: who owns it, taking and replacing it, what of an earlier run is still good."""

import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from stockflow.ahead import map_ahead
from stockflow.checkpoints.opening import CONFIG_FILE, INDEX_FILE
from stockflow.errors import (
    AlreadyExistsError,
    CheckpointError,
    InputChangedError,
    NotFoundError,
    OutputConflictError,
)
from stockflow.interruption import pause
from stockflow.output.changes import earlier_plan, other_numerics, since_then, states
from stockflow.output.claims import agreed_numerics, is_anyone_else_alive, last_seen
from stockflow.output.manifest import (
    CLAIM_FILE,
    MANIFEST_FILE,
    RECORDS,
    Claim,
    Manifest,
    read_claim,
    read_manifest,
    receipt_folder,
    receipt_key,
)
from stockflow.output.receipts import MAX_RECEIPT_BYTES, Receipt, without_coefficients
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.storage import HalfWritten, Stamp, Store, read_small, redact

SETTLE_S = 5.0
"""where creation is not exclusive: how long a claim must stand before it counts"""
NUM_READERS = 16
"""Receipts that are read at the same time: on object storage each takes a round trip."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a plan finds at its output prefix; all fields empty: nothing."""

    finished: Manifest | None = None
    """this plan's own output"""
    is_ours: bool = False
    """claimed by an unfinished run of this plan"""
    conflict: str | None = None
    """what else is there, in words; only ``--overwrite`` takes such a prefix"""


def look(store: Store, plan: MergePlan) -> Occupancy:
    """Return what is at the output prefix; nothing is written."""
    where = redact(store.url)
    try:
        with suppress(NotFoundError):
            manifest = read_manifest(store)
            if manifest.plan_id == plan.plan_id:
                return Occupancy(finished=manifest)
            changed = since_then(states(manifest.inputs), states(plan.checkpoints))
            changed += other_numerics(manifest.numerics)
            return Occupancy(
                conflict=f"{where} holds the finished output of another plan{_ids(manifest, plan)}{changed}"
            )
        with suppress(NotFoundError):
            claim = read_claim(store)
            if claim.plan_id == plan.plan_id:
                return Occupancy(is_ours=True)
            age = max(time.time() - last_seen(store), 0.0)
            earlier = earlier_plan(store, claim.plan_id)
            changed = since_then(states(earlier.plan.checkpoints), states(plan.checkpoints)) if earlier else ""
            changed += other_numerics(earlier.numerics) if earlier else ""
            return Occupancy(
                conflict=f"{where} is claimed by an unfinished run of another plan{_ids(claim, plan)}, "
                f"last seen {age:,.0f} s ago{changed}"
            )
    except CheckpointError as error:
        return Occupancy(conflict=str(error))
    occupant = next(iter(store.list_top()), None)
    if occupant is None:
        return Occupancy()
    return Occupancy(conflict=f"{where} is not empty and not an output of stockflow (it has {occupant!r})")


def admit(store: Store, plan: MergePlan, *, overwrite: bool) -> Occupancy:
    """Return what is at the output prefix, if a run of this plan may work there; nothing is written.

    Raises:
        OutputConflictError: something else is there and ``overwrite`` is false.
    """
    found = look(store, plan)
    if found.conflict and not overwrite:
        raise OutputConflictError(f"{found.conflict}; choose another output, or --overwrite to replace what is there")
    return found


def take(store: Store, plan: MergePlan, run: str, found: Occupancy, *, is_exclusive: bool) -> None:
    """Claim the output prefix for this plan, replacing what was ``found`` there if that is not ours to resume.

    A finished output of this plan is published anew: shards that are still what their receipts say are kept,
    damaged ones are merged again.

    Args:
        store: the output.
        plan: what is to be merged.
        run: this run, which beats already.
        found: what ``admit`` returned.
        is_exclusive: whether the store creates objects exclusively; where not, the last claim to arrive wins.

    Raises:
        OutputConflictError: another plan claimed it at the same moment.
    """
    if found.conflict or found.finished:
        _replace(store, plan, run)
    elif not found.is_ours:
        _claim(store, plan, run, is_exclusive=is_exclusive)


def _ids(owner: Manifest | Claim, plan: MergePlan) -> str:
    return f" ({owner.plan_id[:12]}, this one is {plan.plan_id[:12]})"


def _claim(store: Store, plan: MergePlan, run: str, *, is_exclusive: bool) -> None:
    if not is_exclusive:
        _refuse_rival(store, plan)
    with suppress(AlreadyExistsError):
        store.put_new(CLAIM_FILE, Claim.now(plan.plan_id, run).to_json())
    if not is_exclusive:
        pause(SETTLE_S)
    _refuse_rival(store, plan)


def _refuse_rival(store: Store, plan: MergePlan) -> None:
    with suppress(NotFoundError):
        other = read_claim(store)
        if other.plan_id != plan.plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was claimed by another plan ({other.plan_id[:12]}) at the same moment; "
                "choose another output"
            )


def store_warnings(output: Store, inputs: Sequence[Store], plan: MergePlan, *, is_exclusive: bool) -> Iterator[str]:
    """Say what the stores do not promise; inputs are asked, with one request for each place."""
    if not is_exclusive:
        yield (
            f"{redact(output.url)}: this store does not create objects exclusively (If-None-Match). Of two merges "
            f"started into one prefix at the same moment, the one whose claim stands after {SETTLE_S:.0f} s goes on "
            "and the other is refused; a request delayed for longer is noticed only before a shard appears and before "
            "publishing. Better start one at a time"
        )
    asked: set[str] = set()
    for source, checkpoint in zip(inputs, plan.checkpoints, strict=True):
        place = "/".join(source.url.split("/")[:3])
        if "://" in place and place not in asked and not source.pins_reads(next(iter(checkpoint.files))):
            yield (
                f"{redact(source.url)}: this store ignores If-Match, so each answer's ETag is compared here; "
                "a file that is replaced is still noticed, but only after its bytes were sent"
            )
        asked.add(place)


def _replace(store: Store, plan: MergePlan, run: str) -> None:
    """Unpublish what is there: manifest, index and config first, then whatever the new output will not replace.

    Of an output of ours every published file goes; of foreign files only weights, which loaders might pick up.
    """
    published: set[str] = set()
    with suppress(NotFoundError, CheckpointError):
        published.update(read_manifest(store).files)
    for key in (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE):
        store.delete([key])
    _delete_others(store, plan, published)
    store.put(CLAIM_FILE, Claim.now(plan.plan_id, run).to_json())
    # A run of the old plan that is still at work writes nothing more once it sees the claim.
    _delete_others(store, plan, published)


def _delete_others(store: Store, plan: MergePlan, published: set[str]) -> None:
    kept = {shard.file for shard in plan.shards}
    stale = [key for key in store.list_top() if key not in kept and (key in published or key.endswith(".safetensors"))]
    current = f"{RECORDS}{plan.plan_id}/"
    records = [key for key in store.list(RECORDS) if not key.startswith(current) and key != CLAIM_FILE]
    store.delete([*stale, *records])


def valid_receipts(store: Store, plan: MergePlan) -> dict[str, Receipt]:
    """Receipts of shards that are still what they were when the receipt was written; without coefficients."""
    known = store.list(receipt_folder(plan.plan_id))
    present = store.list_top() if known else {}
    read = partial(_read_receipt, store, plan.plan_id)
    shards = [
        shard for shard in plan.shards if receipt_key(plan.plan_id, shard.file) in known and shard.file in present
    ]
    receipts = {}
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="receipts") as pool:
        for shard, payload in zip(shards, map_ahead(pool, NUM_READERS, read, shards), strict=True):
            receipt = _receipt_of(shard, plan.plan_id, payload)
            if receipt and _is_intact(store, receipt, present[shard.file]):
                receipts[shard.file] = without_coefficients(receipt)
    return receipts


def is_finished(store: Store, plan_id: str, shard: ShardPlan, numerics_class: str) -> bool:
    """Return whether a shard is there with its receipt: a worker that was lost may have done it, and not said so."""
    try:
        found = store.stamp(shard.file)
        receipt = _receipt_of(shard, plan_id, _read_receipt(store, plan_id, shard))
        return receipt is not None and _is_intact(store, receipt, found) and receipt.numerics_class == numerics_class
    except NotFoundError:
        return False


def _read_receipt(store: Store, plan_id: str, shard: ShardPlan) -> bytes:
    return read_small(store, receipt_key(plan_id, shard.file), max_bytes=MAX_RECEIPT_BYTES)


def _receipt_of(shard: ShardPlan, plan_id: str, payload: bytes) -> Receipt | None:
    try:
        receipt = Receipt.from_json(payload, receipt_key(plan_id, shard.file))
    except CheckpointError:
        return None  # a receipt that cannot be read proves nothing: the shard is merged again
    is_of_shard = (receipt.plan_id, receipt.file, receipt.size) == (plan_id, shard.file, shard.num_bytes)
    return receipt if is_of_shard else None


def _is_intact(store: Store, receipt: Receipt, found: Stamp) -> bool:
    """Whether a shard is the one of the receipt; with another stamp but equal size its bytes decide."""
    if found == receipt.stamp and found.size == receipt.size:
        return True
    if found.size != receipt.size:
        return False
    try:
        return sha256_of(store, receipt.file, found) == receipt.sha256
    except InputChangedError:  # a run of the same plan beside this one replaced it by its own copy while it was read
        return _is_intact(store, receipt, store.stamp(receipt.file))


def check_owner(store: Store, plan_id: str, numerics_class: str) -> None:
    """Hold the claim, and the numerics class that was agreed on, against a run that is about to write a shard.

    Raises:
        OutputConflictError: another plan took the prefix, or it is merged anew on machines of another class.
    """
    with suppress(NotFoundError, CheckpointError):
        owner = read_claim(store)
        if owner.plan_id != plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was taken by another plan ({owner.plan_id[:12]}, this one is {plan_id[:12]}) "
                "while this one ran; nothing was published"
            )
    agreed = agreed_numerics(store, plan_id)
    if agreed not in (None, numerics_class):
        raise OutputConflictError(
            f"{redact(store.url)} is being merged anew on machines of class {agreed}, while this run computes as "
            f"{numerics_class}; nothing was published"
        )


def check_still_ours(store: Store, plan: MergePlan, receipts: Sequence[Receipt]) -> None:
    """Hold claim and shards against this run, right before its manifest makes them official.

    Raises:
        OutputConflictError: another run took the prefix, or replaced a shard, while this one worked.
    """
    for numerics_class in sorted({receipt.numerics_class for receipt in receipts}):
        check_owner(store, plan.plan_id, numerics_class)
    present = store.list_top()
    for receipt in receipts:
        found = present.get(receipt.file)
        if found is None or not _is_intact(store, receipt, found):
            raise OutputConflictError(
                f"{redact(store.url)}/{receipt.file} is no longer what this run wrote: another one writes there; "
                "nothing was published. End it, then run again"
            )


def abort_leftovers(store: Store, plan_id: str, run: str, files: Collection[str]) -> None:
    """Remove what writers of this output who died left half-written; nothing of a run that is still at work.

    Uploads are listed before other runs are looked for: a run says that it is alive before it uploads. Runs of every
    plan count: shards of two plans have equal names, and an upload does not say whose it is.

    Args:
        store: the output.
        plan_id: the plan of this run.
        run: this run.
        files: what is uploaded in parts.
    """
    ours = [piece for piece in store.half_written() or () if _is_of_output(piece, files)]
    if not all(piece.is_abandoned for piece in ours) and is_anyone_else_alive(store, plan_id, run):
        ours = [piece for piece in ours if piece.is_abandoned]
    store.discard(ours)


def _is_of_output(piece: HalfWritten, files: Collection[str]) -> bool:
    is_small_file = piece.is_abandoned and "/" not in piece.key
    return piece.key in files or piece.key.startswith(RECORDS) or is_small_file


def sha256_of(store: Store, key: str, stamp: Stamp, chunk_bytes: int = 8 * 2**20) -> str:
    """Return the sha256 of an object's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(chunk_bytes, stamp.size)))
    for start in range(0, stamp.size, chunk_bytes):
        part = buffer[: min(chunk_bytes, stamp.size - start)]
        store.read_into(key, start, part, stamp)
        digest.update(part)
    return digest.hexdigest()
