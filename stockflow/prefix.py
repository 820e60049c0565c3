"""The output prefix: who owns it, taking and replacing it, what of an earlier run is still good, the heartbeat."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from stockflow.changes import planned_states, since_then, states
from stockflow.checkpoint import CONFIG_FILE, INDEX_FILE
from stockflow.errors import (
    AlreadyExistsError,
    CheckpointError,
    NotFoundError,
    OutputConflictError,
    StockflowError,
)
from stockflow.manifest import (
    CLAIM_FILE,
    MANIFEST_FILE,
    RECORDS,
    Claim,
    Manifest,
    progress_key,
    read_claim,
    read_manifest,
    receipt_folder,
    receipt_key,
)
from stockflow.plan import MergePlan
from stockflow.receipts import Receipt
from stockflow.storage import Stamp, Store, read_small, redact

HEARTBEAT_S = 10.0
MAX_RECEIPT_BYTES = 1_000_000_000


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
            return Occupancy(
                conflict=f"{where} holds the finished output of another plan{_ids(manifest, plan)}{changed}"
            )
        with suppress(NotFoundError):
            claim = read_claim(store)
            if claim.plan_id == plan.plan_id:
                return Occupancy(is_ours=True)
            age = max(time.time() - claim.heartbeat, 0.0)
            changed = since_then(planned_states(store, claim.plan_id), states(plan.checkpoints))
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


def take(store: Store, plan: MergePlan, *, overwrite: bool) -> Manifest | None:
    """Claim the output prefix for this plan; return the manifest if the plan is already published there.

    With ``overwrite`` a finished output of this plan is published anew: shards that are still what their
    receipts say are kept, damaged ones are merged again.

    Raises:
        OutputConflictError: something else is there and ``overwrite`` is false.
    """
    found = look(store, plan)
    if found.conflict and not overwrite:
        raise OutputConflictError(f"{found.conflict}; choose another output, or --overwrite to replace what is there")
    if found.finished and not overwrite:
        return found.finished
    if found.conflict or found.finished:
        _replace(store, plan)
    elif not found.is_ours:
        _claim(store, plan)
    return None


def _ids(owner: Manifest | Claim, plan: MergePlan) -> str:
    return f" ({owner.plan_id[:12]}, this one is {plan.plan_id[:12]})"


def _claim(store: Store, plan: MergePlan) -> None:
    try:
        store.put_new(CLAIM_FILE, Claim.now(plan.plan_id).to_json())
    except AlreadyExistsError:
        other = read_claim(store)
        if other.plan_id != plan.plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was claimed by another plan ({other.plan_id[:12]}) at the same moment; "
                "choose another output"
            ) from None


def weak_promises(output: Store, inputs: Sequence[Store], plan: MergePlan) -> Iterator[str]:
    """Ask stores for what not every one of them does, one request each; the claim on ``output`` is ours."""
    if not output.refuses_second(CLAIM_FILE, Claim.now(plan.plan_id).to_json()):
        yield (
            f"{redact(output.url)}: this store does not create objects exclusively (If-None-Match), so two merges "
            "started into one prefix at the same moment would not notice each other; start one at a time"
        )
    asked: set[str] = set()
    for source, checkpoint in zip(inputs, plan.checkpoints, strict=True):
        place = "/".join(source.url.split("/")[:3])
        if "://" in place and place not in asked and not source.refuses_changed(next(iter(checkpoint.files))):
            yield (
                f"{redact(source.url)}: this store ignores If-Match, so each answer's ETag is compared here; "
                "a file that is replaced is still noticed, but only after its bytes were sent"
            )
        asked.add(place)


def _replace(store: Store, plan: MergePlan) -> None:
    """Unpublish what is there: manifest, index and config first, then whatever the new output will not replace.

    Of an output of ours every published file goes; of foreign files only weights, which loaders might pick up.
    """
    published: set[str] = set()
    with suppress(NotFoundError, CheckpointError):
        published.update(read_manifest(store).files)
    for key in (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE):
        store.delete([key])
    kept = {shard.file for shard in plan.shards}
    stale = [key for key in store.list_top() if key not in kept and (key in published or key.endswith(".safetensors"))]
    current = f"{RECORDS}{plan.plan_id}/"
    records = [key for key in store.list(RECORDS) if not key.startswith(current)]
    store.delete([*stale, *records])
    store.put(CLAIM_FILE, Claim.now(plan.plan_id).to_json())


def valid_receipts(store: Store, plan: MergePlan) -> dict[str, Receipt]:
    """Receipts of shards that are still what they were when the receipt was written."""
    known = store.list(receipt_folder(plan.plan_id))
    present = store.list_top() if known else {}
    receipts = {}
    for shard in plan.shards:
        key = receipt_key(plan.plan_id, shard.file)
        if key in known and shard.file in present:
            payload = read_small(store, key, max_bytes=MAX_RECEIPT_BYTES)
            try:
                receipt = Receipt.from_json(payload, key)
            except CheckpointError:
                continue  # a receipt that cannot be read proves nothing: the shard is merged again
            is_of_shard = (receipt.plan_id, receipt.file, receipt.size) == (plan.plan_id, shard.file, shard.num_bytes)
            if is_of_shard and _is_intact(store, receipt, present[shard.file]):
                receipts[shard.file] = receipt
    return receipts


def _is_intact(store: Store, receipt: Receipt, found: Stamp) -> bool:
    """Whether a shard is the one of the receipt; with another stamp but equal size its bytes decide."""
    if found == receipt.stamp and found.size == receipt.size:
        return True
    return found.size == receipt.size and sha256_of(store, receipt.file, found) == receipt.sha256


def check_still_ours(store: Store, plan: MergePlan, receipts: Sequence[Receipt]) -> None:
    """Hold claim and shards against this run, right before its manifest makes them official.

    Raises:
        OutputConflictError: another run took the prefix, or replaced a shard, while this one worked.
    """
    with suppress(NotFoundError, CheckpointError):
        owner = read_claim(store)
        if owner.plan_id != plan.plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was taken by another plan{_ids(owner, plan)} while this one ran; "
                "nothing was published"
            )
    present = store.list_top()
    for receipt in receipts:
        found = present.get(receipt.file)
        if found is None or not _is_intact(store, receipt, found):
            raise OutputConflictError(
                f"{redact(store.url)}/{receipt.file} is no longer what this run wrote: another one writes there; "
                "nothing was published. End it, then run again"
            )


def sha256_of(store: Store, key: str, stamp: Stamp, chunk_bytes: int = 8 * 2**20) -> str:
    """Return the sha256 of an object's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(chunk_bytes, stamp.size)))
    for start in range(0, stamp.size, chunk_bytes):
        part = buffer[: min(chunk_bytes, stamp.size - start)]
        store.read_into(key, start, part, stamp)
        digest.update(part)
    return digest.hexdigest()


class Heartbeat:
    """Refreshes the claim and progress.json while a merge runs."""

    def __init__(self, store: Store, plan: MergePlan, receipts: Mapping[str, Receipt]) -> None:
        """Beat for ``plan`` in ``store``; ``receipts`` grows as shards are done."""
        self._store = store
        self._plan = plan
        self._receipts = receipts
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            # A missed beat harms nobody; a store that is really gone fails the merge itself.
            with suppress(StockflowError):
                if read_claim(self._store).plan_id != self._plan.plan_id:
                    return  # replaced by --overwrite: the prefix is another run's now
                self._store.put(CLAIM_FILE, Claim.now(self._plan.plan_id).to_json())
                self._store.put(progress_key(self._plan.plan_id), self._progress())

    def _progress(self) -> bytes:
        done = list(self._receipts.values())
        progress = {
            "plan_id": self._plan.plan_id,
            "started": self._started,
            "updated": time.time(),
            "shards": len(self._plan.shards),
            "shards_done": len(done),
            "bytes_written": sum(receipt.size for receipt in done),
            "bytes_to_write": self._plan.num_output_bytes,
        }
        return json.dumps(progress).encode()
