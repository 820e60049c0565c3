"""The driver: from a recipe and an output location to a published manifest, resuming what an earlier run left."""

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Literal, Protocol

from stockflow.budget import BASELINE_BYTES, OBJECT_CLIENT_BYTES, Workspace, divide
from stockflow.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoints
from stockflow.errors import (
    AlreadyExistsError,
    CheckpointError,
    InterruptedRunError,
    NotFoundError,
    OutputConflictError,
    PlanError,
    StorageError,
)
from stockflow.manifest import (
    CLAIM_FILE,
    MANIFEST_FILE,
    RECORDS,
    Claim,
    Manifest,
    plan_key,
    progress_key,
    read_claim,
    read_manifest,
    receipt_folder,
    receipt_key,
)
from stockflow.plan import MergePlan, ShardPlan, make_plan
from stockflow.receipts import Receipt
from stockflow.recipe import Recipe
from stockflow.storage import Stamp, Store, is_within, open_store, read_small, redact

if TYPE_CHECKING:
    from stockflow.worker import Device, WorkerSpec

HEARTBEAT_S = 10.0
MAX_RECEIPT_BYTES = 1_000_000_000
Outcome = Literal["merged", "already_finished"]


class Observer(Protocol):
    """Who is told how a merge goes; called from several threads."""

    def on_stage(self, text: str) -> None:
        """A new stage begins."""

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Merging begins; ``resumed`` shards need no work."""

    def on_bytes(self, num_read: int, num_written: int) -> None:
        """Bytes went by."""

    def on_shard(self, receipt: Receipt) -> None:
        """A shard is done."""


Execute = Callable[["WorkerSpec", Sequence[ShardPlan], Observer], Iterator[Receipt]]
"""Merges shards somewhere and yields their receipts."""


@dataclass(frozen=True)
class MergeOptions:
    """What may change from run to run without changing a byte of the output."""

    memory_bytes: int
    num_threads: int
    device: "Device" = "auto"
    shard_size: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class MergeResult:
    """What a finished merge was."""

    outcome: Outcome
    plan: MergePlan
    manifest: Manifest
    output_url: str
    num_resumed: int
    seconds: float


@dataclass
class Inputs:
    """An opened recipe: stores and checkpoints, in the order of ``recipe.checkpoints``."""

    recipe: Recipe
    stores: list[Store]
    checkpoints: list[Checkpoint] = field(default_factory=list)

    @classmethod
    def open(cls, recipe: Recipe) -> "Inputs":
        """Open every checkpoint concurrently.

        Raises:
            UserError: one is missing, forbidden or malformed.
            StorageError: reading failed after retries.
        """
        stores = [open_store(location, recipe.storage) for location in recipe.checkpoints]
        return cls(recipe, stores, open_checkpoints(stores))


def plan_merge(inputs: Inputs, output: str, options: MergeOptions) -> tuple[MergePlan, Workspace]:
    """Return the plan, and how a worker would divide its memory; nothing is written.

    Raises:
        PlanError: the output overlaps an input, or the inputs do not fit together.
        BudgetError: the memory is too small.
    """
    output_url = open_store(output, inputs.recipe.storage, writable=True).url
    for store in inputs.stores:
        if is_within(output_url, store.url):
            raise PlanError(f"the output {redact(output_url)} is, or lies in, the input {redact(store.url)}; move it")
    plan = make_plan(inputs.recipe, inputs.checkpoints, shard_size=options.shard_size)
    remote = any("://" in url for url in (output_url, *(store.url for store in inputs.stores)))
    baseline = BASELINE_BYTES["cuda" if options.device == "cuda" else "cpu"] + (OBJECT_CLIENT_BYTES if remote else 0)
    workspace = divide(list(plan.jobs), options.memory_bytes, num_threads=options.num_threads, baseline_bytes=baseline)
    return plan, workspace


def merge(inputs: Inputs, output: str, options: MergeOptions, execute: Execute, observer: Observer) -> MergeResult:
    """Merge, or finish what an earlier run of the same plan began.

    Raises:
        OutputConflictError: the prefix belongs to another plan or to foreign files.
        UserError: see ``plan_merge`` and ``Worker.merge``.
        StorageError: storage failed; running again resumes.
    """
    started = time.perf_counter()
    recipe = inputs.recipe
    observer.on_stage("planning")
    plan, _ = plan_merge(inputs, output, options)
    store = open_store(output, recipe.storage, writable=True)
    finished = _take_prefix(store, plan, overwrite=options.overwrite)
    if finished is not None:
        return MergeResult("already_finished", plan, finished, store.url, len(plan.shards), 0.0)
    store.put(plan_key(plan.plan_id), json.dumps(plan.to_json(), ensure_ascii=False).encode())
    observer.on_stage("looking for finished shards")
    receipts = _valid_receipts(store, plan)
    num_resumed = len(receipts)
    observer.on_start(plan, list(receipts.values()))
    remaining = [shard for shard in plan.shards if shard.file not in receipts]
    with _Heartbeat(store, plan, receipts):
        if remaining:
            for receipt in execute(_worker_spec(recipe, plan, store.url, options), remaining, observer):
                receipts[receipt.file] = receipt
                observer.on_shard(receipt)
        observer.on_stage("publishing")
        from stockflow.commit import commit

        manifest = commit(store, inputs.stores, recipe, plan, [receipts[shard.file] for shard in plan.shards])
    return MergeResult("merged", plan, manifest, store.url, num_resumed, time.perf_counter() - started)


def _worker_spec(recipe: Recipe, plan: MergePlan, output_url: str, options: MergeOptions) -> "WorkerSpec":
    from stockflow.worker import WorkerSpec

    return WorkerSpec(
        plan_id=plan.plan_id,
        checkpoints=plan.checkpoints,
        output_url=output_url,
        storage=recipe.storage,
        on_nonfinite=plan.on_nonfinite,
        memory_bytes=options.memory_bytes,
        num_threads=options.num_threads,
        device=options.device,
    )


def _take_prefix(store: Store, plan: MergePlan, *, overwrite: bool) -> Manifest | None:
    """Claim the output prefix for this plan; return the manifest if the plan is already published there."""
    try:
        owner = _owner(store)
    except CheckpointError as error:
        if not overwrite:
            raise OutputConflictError(f"{error}; choose another output, or --overwrite to replace it") from None
        _replace(store, plan)
        return None
    if isinstance(owner, Manifest) and owner.plan_id == plan.plan_id:
        return owner
    if isinstance(owner, Claim) and owner.plan_id == plan.plan_id:
        return None
    if owner is None:
        occupants = store.list_top()
        if occupants and not overwrite:
            raise OutputConflictError(
                f"{redact(store.url)} is not empty and not an output of stockflow (it has {next(iter(occupants))!r}); "
                "choose another output, or --overwrite to replace what is there"
            )
        if not occupants:
            _claim(store, plan)
            return None
    elif not overwrite:
        state = "holds the finished output" if isinstance(owner, Manifest) else "is claimed by an unfinished run"
        raise OutputConflictError(
            f"{redact(store.url)} {state} of another plan ({owner.plan_id[:12]}, this one is {plan.plan_id[:12]}); "
            "choose another output, or --overwrite to replace it"
        )
    _replace(store, plan)
    return None


def _owner(store: Store) -> Manifest | Claim | None:
    with suppress(NotFoundError):
        return read_manifest(store)
    with suppress(NotFoundError):
        return read_claim(store)
    return None


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


def _replace(store: Store, plan: MergePlan) -> None:
    """Unpublish what is there: manifest, index and config first, then shards that the new layout does not have."""
    for key in (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE):
        store.delete([key])
    layout = {shard.file for shard in plan.shards}
    stale = [key for key in store.list_top() if key.endswith(".safetensors") and key not in layout]
    current = f"{RECORDS}{plan.plan_id}/"
    records = [key for key in store.list(RECORDS) if not key.startswith(current)]
    store.delete([*stale, *records])
    store.put(CLAIM_FILE, Claim.now(plan.plan_id).to_json())


def _valid_receipts(store: Store, plan: MergePlan) -> dict[str, Receipt]:
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
            if receipt.plan_id == plan.plan_id and _is_intact(store, receipt, present[shard.file]):
                receipts[shard.file] = receipt
    return receipts


def _is_intact(store: Store, receipt: Receipt, found: Stamp) -> bool:
    """Whether a shard is the one of the receipt; with another stamp but equal size its bytes decide."""
    if found == receipt.stamp:
        return True
    return found.size == receipt.size and sha256_of(store, receipt.file, found) == receipt.sha256


def sha256_of(store: Store, key: str, stamp: Stamp, chunk_bytes: int = 8 * 2**20) -> str:
    """Return the sha256 of an object's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(chunk_bytes, stamp.size)))
    for start in range(0, stamp.size, chunk_bytes):
        part = buffer[: min(chunk_bytes, stamp.size - start)]
        store.read_into(key, start, part, stamp)
        digest.update(part)
    return digest.hexdigest()


class _Heartbeat:
    """Refreshes the claim and progress.json while a merge runs."""

    def __init__(self, store: Store, plan: MergePlan, receipts: dict[str, Receipt]) -> None:
        self._store = store
        self._plan = plan
        self._receipts = receipts
        self._started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "_Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
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
            # A missed beat harms nobody; a store that is really gone fails the merge itself.
            with suppress(StorageError):
                self._store.put(CLAIM_FILE, Claim.now(self._plan.plan_id).to_json())
                self._store.put(progress_key(self._plan.plan_id), json.dumps(progress).encode())


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into InterruptedRunError, so that everything is closed on the way out."""

    def interrupt(number: int, _: FrameType | None) -> None:
        error = InterruptedRunError(f"stopped by {signal.Signals(number).name}; run the same command again to resume")
        error.exit_code = 128 + number  # type: ignore[misc]  # per instance: 130 or 143
        raise error

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
