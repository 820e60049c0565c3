"""Where shards are merged: the glue between the driver and an executor."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stockflow.claims import agree_on_numerics
from stockflow.errors import CheckpointError, NotFoundError, PlanError
from stockflow.executors import local
from stockflow.manifest import read_claim, receipt_key
from stockflow.plan import ShardPlan
from stockflow.prefix import MAX_RECEIPT_BYTES
from stockflow.receipts import Receipt
from stockflow.storage import open_store, read_small, redact
from stockflow.tracking import Tracker
from stockflow.worker import OnBytes, Worker, WorkerSpec, process_name

if TYPE_CHECKING:
    from stockflow.executors import ray


def in_this_process(spec: WorkerSpec, shards: Sequence[ShardPlan], tracker: Tracker) -> Iterator[Receipt]:
    """Merge shards here, one after the other, on the worker's threads; each is published while the next begins."""
    worker = Worker(spec)

    def begin(shard: ShardPlan) -> Future[Receipt]:
        tracker.on_begin(shard.file, process_name())
        return worker.begin(shard, tracker.on_bytes)

    try:
        _agree(spec, worker)
        published: deque[Future[Receipt]] = deque()
        for future in local.run(begin, shards):
            published.append(future)
            if len(published) > 1:
                yield published.popleft().result()
        for future in published:
            yield future.result()
    finally:
        worker.close()


@dataclass(frozen=True)
class StartWorker:
    """Makes a worker in a process somewhere else; what Ray ships instead of clients and threads."""

    spec: WorkerSpec

    def __call__(self) -> Callable[[ShardPlan, OnBytes], str]:
        """Return what merges a shard there and gives its file name.

        Raises:
            PlanError: this node does not see the output prefix that the driver claimed, or computes otherwise
                than the others.
        """
        check_output_is_shared(self.spec)
        worker = Worker(self.spec)
        _agree(self.spec, worker)
        return lambda shard, on_bytes: worker.merge(shard, on_bytes).file


def _agree(spec: WorkerSpec, worker: Worker) -> None:
    store = open_store(spec.output_url, spec.storage, writable=True)
    agree_on_numerics(store, spec.plan_id, spec.run, worker.numerics_class, replace=spec.replaces_numerics)


def check_output_is_shared(spec: WorkerSpec) -> None:
    """Refuse a node that does not see the claim of the driver: its shards would end up on a disk of its own.

    Raises:
        PlanError: the claim is not there, or is another one.
    """
    store = open_store(spec.output_url, spec.storage)
    try:
        seen = read_claim(store).plan_id
    except (NotFoundError, CheckpointError):
        seen = None
    if seen != spec.plan_id:
        raise PlanError(
            f"a worker does not see the output {redact(spec.output_url)} that the driver claimed; on several nodes "
            "use object storage, or a folder that all of them share"
        )


def on_ray(
    spec: WorkerSpec, shards: Sequence[ShardPlan], tracker: Tracker, options: "ray.RayOptions"
) -> Iterator[Receipt]:
    """Merge shards on the workers of a Ray cluster; only shards, file names and counters pass through Ray."""
    from stockflow.executors import ray

    store = open_store(spec.output_url, spec.storage)
    files = ray.run(
        StartWorker(spec),
        shards,
        size=lambda shard: shard.source_bytes,
        options=options,
        on_count=tracker.on_bytes,
        on_note=tracker.on_note,
    )
    for file in files:
        key = receipt_key(spec.plan_id, file)
        yield Receipt.from_json(read_small(store, key, max_bytes=MAX_RECEIPT_BYTES), key)
