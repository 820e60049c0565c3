"""A worker: one process that merges shards, one after the other, within its memory budget."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from stockflow.engine.devices import Device
from stockflow.engine.process import peak_memory_bytes, process_name
from stockflow.engine.session import Session
from stockflow.engine.shard import OnBytes, ShardMerger, ShardRun
from stockflow.errors import StorageError
from stockflow.events import OnEvent, ignore
from stockflow.output import receipts
from stockflow.output.keys import receipt_key
from stockflow.output.ownership import check_owner
from stockflow.output.receipts import Receipt, within_bounds
from stockflow.planning.plan import CheckpointRef, OnNonfinite, ShardPlan
from stockflow.storage import StorageConfig, open_store, redact


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker of a merge is told: where things are and what it may use."""

    plan_id: str
    checkpoints: tuple[CheckpointRef, ...]
    output_url: str
    storage: StorageConfig
    on_nonfinite: OnNonfinite
    memory_bytes: int
    num_threads: int
    device: Device = "auto"
    run: str = ""
    """which run this is of; see ``claims``"""
    replaces_numerics: bool = False
    """whether shards that earlier runs made in another numerics class are given up"""


class Worker:
    """Merges shards; clients, threads and buffers live as long as it does."""

    def __init__(self, spec: WorkerSpec, on_event: OnEvent = ignore) -> None:
        """Open stores and choose the device; an event tells what keeps a shard from beginning.

        Raises:
            PlanError: a CUDA device is asked for and there is none.
        """
        self._spec = spec
        self._session = Session(
            spec.checkpoints,
            spec.storage,
            memory_bytes=spec.memory_bytes,
            num_threads=spec.num_threads,
            device=spec.device,
            on_event=on_event,
        )
        self._merger = ShardMerger(self._session, spec.checkpoints, spec.on_nonfinite)
        self._output = open_store(spec.output_url, spec.storage, writable=True)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")

    @property
    def numerics_class(self) -> str:
        """On which machines equal plans give the same bytes as here."""
        return self._session.device.numerics_class

    def check_owner(self) -> None:
        """Hold the prefix against this run: called before a shard appears.

        Raises:
            OutputConflictError: it is another one's now.
        """
        check_owner(self._output, self._spec.plan_id, self.numerics_class)

    def close(self) -> None:
        """Publish what is written and end the threads."""
        self._publisher.shutdown()
        self._session.close()

    def merge(self, shard: ShardPlan, on_bytes: OnBytes) -> Receipt:
        """Merge one shard, write it and its receipt.

        Raises:
            UserError: the inputs changed, hold NaN, or the budget is too small.
            StorageError: reading or writing failed after retries.
        """
        return self.begin(shard, on_bytes).result()

    def begin(self, shard: ShardPlan, on_bytes: OnBytes) -> Future[Receipt]:
        """Merge one shard up to its last byte; while it becomes durable and gets its receipt, begin the next.

        Raises:
            UserError: the inputs changed, hold NaN, or the budget is too small.
            StorageError: reading or writing failed after retries.
        """
        started, began = time.perf_counter(), time.time()
        sources = self._session.sources
        retries_before = sources.num_retries
        sources.check(shard.jobs)
        self._merger.prepare(shard.jobs)
        workspace = self._session.divide(shard.jobs, output_url=self._output.url, output_bytes=shard.num_bytes)
        with ExitStack() as stack:
            sink = stack.enter_context(self._output.create(shard.file, size=shard.num_bytes))
            run = self._merger.merge(shard, workspace, sink, on_bytes)
            num_retries = sources.num_retries - retries_before  # before the next shard reads
            closing = stack.pop_all()

        def publish() -> Receipt:
            begun = time.perf_counter()
            with closing:
                sink.sync()
                self.check_owner()  # as near as can be to the moment when the shard appears
            run.seconds["publish"] = time.perf_counter() - begun
            run.seconds["total"] = time.perf_counter() - started
            return self._receipt(shard, run, num_retries, began)

        return self._publisher.submit(publish)

    def _receipt(self, shard: ShardPlan, run: ShardRun, num_retries: int, began: float) -> Receipt:
        """Write the receipt of a shard that is durable."""
        self._session.sources.check(shard.jobs)
        stamp = self._output.stamp(shard.file)
        if stamp.size != run.size:
            raise StorageError(
                f"{redact(self._output.url)}/{shard.file} has {stamp.size:,} bytes after {run.size:,} were written: "
                "something else writes there; end it, then run again"
            )
        receipt = Receipt(
            plan_id=self._spec.plan_id,
            file=shard.file,
            size=run.size,
            sha256=run.sha256,
            stamp=stamp,
            numerics_class=self.numerics_class,
            bytes_read=run.bytes_read,
            seconds={stage: round(value, 6) for stage, value in run.seconds.items()},
            retries={"read": num_retries},
            peak_memory_bytes=peak_memory_bytes(),
            tensors=tuple(within_bounds(run.facts)),
            memory_bytes=self._spec.memory_bytes,
            gram=run.gram.rows(),
            began=began,
            ended=time.time(),
            worker=process_name(),
        )
        self.check_owner()
        self._output.put(receipt_key(self._spec.plan_id, shard.file), receipts.encode(receipt))
        return receipt
