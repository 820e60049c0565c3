"""A worker: one process that merges shards, one after the other, within its memory budget."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from stockflow.ahead import map_ahead
from stockflow.engine.buffers import Pool
from stockflow.engine.devices import Device, open_device
from stockflow.engine.facts import GramSum, Ledger
from stockflow.engine.inputs import Sources
from stockflow.engine.merging import StageClock, UnitMerger
from stockflow.engine.units import Piece, Unit
from stockflow.engine.writer import OrderedWriter
from stockflow.errors import StorageError
from stockflow.kernels.arrays import Bytes
from stockflow.output.manifest import receipt_key
from stockflow.output.ownership import check_owner
from stockflow.output.receipts import Receipt, TensorFacts, within_bounds
from stockflow.planning.budget import (
    BASELINE_BYTES,
    MIB,
    NUM_OUT_BUFFERS,
    SPANS_AHEAD,
    Workspace,
    client_bytes,
    divide,
)
from stockflow.planning.plan import CheckpointRef, OnNonfinite, ShardPlan, TensorJob
from stockflow.planning.reads import schedule
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.storage import Sink, StorageConfig, open_store, redact

GROWTH_BYTES = {"cpu": 24 * MIB, "cuda": 96 * MIB}
"""What a process still grows once its kernels are loaded: thread stacks, small allocations, lazily loaded code."""


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


OnBytes = Callable[[int, int], None]
"""Told of bytes read and bytes written, from several threads."""


class Worker:
    """Merges shards; clients, threads and buffers live as long as it does."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Open stores and choose the device.

        Raises:
            PlanError: a CUDA device is asked for and there is none.
        """
        self._spec = spec
        self._device = open_device(spec.device)
        self._sources = Sources(spec.checkpoints, spec.storage, self._device)
        self._output = open_store(spec.output_url, spec.storage, writable=True)
        self._pool = ThreadPoolExecutor(spec.num_threads, thread_name_prefix="compute")
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._outs = Pool(self._device.allocate)

    @property
    def numerics_class(self) -> str:
        """On which machines equal plans give the same bytes as here."""
        return self._device.numerics_class

    def check_owner(self) -> None:
        """Hold the prefix against this run: called before a shard appears.

        Raises:
            OutputConflictError: it is another one's now.
        """
        check_owner(self._output, self._spec.plan_id, self.numerics_class)

    def close(self) -> None:
        """Publish what is written and end the threads."""
        self._publisher.shutdown()
        self._pool.shutdown(cancel_futures=True)

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
        retries_before = self._sources.num_retries
        self._sources.check(shard.jobs)
        self._device.prepare(shard.jobs)
        workspace = divide(
            shard.jobs,
            self._spec.memory_bytes,
            num_threads=self._spec.num_threads,
            baseline_bytes=self._baseline_bytes + self._client_bytes(shard),
            direct=self._sources.is_direct,
        )
        run = _ShardRun(self, shard, workspace, on_bytes)
        with ExitStack() as stack:
            sink = stack.enter_context(self._output.create(shard.file, size=shard.num_bytes))
            run.execute(sink)
            num_retries = self._sources.num_retries - retries_before  # before the next shard reads
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

    def _receipt(self, shard: ShardPlan, run: "_ShardRun", num_retries: int, began: float) -> Receipt:
        """Write the receipt of a shard that is durable."""
        self._sources.check(shard.jobs)
        stamp = self._output.stamp(shard.file)
        if stamp.size != run.size:
            raise StorageError(
                f"{redact(self._output.url)}/{shard.file} has {stamp.size:,} bytes after {run.size:,} were written: "
                "something else writes there; end it, then run again to resume"
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
        self._output.put(receipt_key(self._spec.plan_id, shard.file), receipt.to_json())
        return receipt

    @cached_property
    def _baseline_bytes(self) -> int:
        """What this process takes by itself, measured once: when kernels are loaded and before there are buffers."""
        return max(BASELINE_BYTES[self._device.kind], current_memory_bytes() + GROWTH_BYTES[self._device.kind])

    def _client_bytes(self, shard: ShardPlan) -> int:
        return client_bytes(self._sources.urls, self._output.url, shard.num_bytes)


T = TypeVar("T")
R = TypeVar("R")


class _ShardRun:
    """The state of one shard while it is merged."""

    def __init__(self, worker: Worker, shard: ShardPlan, workspace: Workspace, on_bytes: OnBytes) -> None:
        self._worker = worker
        self._shard = shard
        self._workspace = workspace
        self._on_bytes = on_bytes
        self._clock = StageClock()
        self._pool = worker._pool
        self._num_threads = worker._spec.num_threads
        self._merger = UnitMerger(
            worker._spec.checkpoints,
            on_nonfinite=worker._spec.on_nonfinite,
            arithmetic=worker._device,
            clock=self._clock,
        )
        self._ledgers: dict[str, Ledger] = {}
        self.facts: list[TensorFacts] = []
        self.gram = GramSum(len(worker._spec.checkpoints))
        self.seconds: dict[str, float] = {}
        self.bytes_read = 0
        self.size, self.sha256 = 0, ""

    def execute(self, sink: Sink) -> None:
        """Read, merge and write everything."""
        worker, workspace = self._worker, self._workspace
        steps = list(schedule(self._shard.jobs, workspace))
        worker._outs.fit(workspace.out_bytes, NUM_OUT_BUFFERS)
        with ExitStack() as stack:
            writer = stack.enter_context(OrderedWriter(sink, pool=worker._outs, num_buffers=NUM_OUT_BUFFERS))
            reading = stack.enter_context(worker._sources.reading(steps, workspace, self._count_read))
            writer.write_header(self._shard.header)
            for units in reading:
                if len(units) > 1:
                    self._merge_packed(units, writer)
                else:
                    self._merge_large(units[0], writer)
            self.size, self.sha256 = writer.finish()
        self.bytes_read = reading.bytes_read
        self.seconds = {
            **self._clock.seconds,
            **reading.seconds,
            "hash": writer.hash_s,
            "write": writer.write_s,
            "wait_write": writer.wait_s,
        }

    def _merge_packed(self, units: Sequence[Unit], writer: OrderedWriter) -> None:
        """Merge the units that share a load: side by side if there are enough, else span by span."""
        buffer = writer.buffer()
        ends = [0]
        for unit in units:
            ends.append(ends[-1] + unit.job.output_width * (unit.stop - unit.start))
        targets = [buffer[start:stop] for start, stop in pairwise(ends)]
        ledgers = [self._ledger_of(unit.job) for unit in units]
        distinct = len({unit.job.output.name for unit in units}) == len(units)
        side_by_side = distinct and len(units) >= 2 * self._num_threads

        map_spans = map if side_by_side else self._map_spans

        def merge(run: range) -> None:
            for index in run:

                def target(_: Piece, index: int = index) -> Bytes:
                    return targets[index]

                self._merger.merge(units[index], target, ledgers[index], map_spans)

        for _ in (self._pool.map if side_by_side else map)(merge, runs(units)):
            pass
        for unit in units:
            self._close_ledger_at_end(unit)
        self._emit(writer, buffer, ends[-1])

    def _merge_large(self, unit: Unit, writer: OrderedWriter) -> None:
        """Merge a unit that may fill several output buffers, its spans side by side."""
        filled: list[tuple[Bytes, int]] = []

        def target(piece: Piece) -> Bytes:
            self._emit_all(writer, filled)
            buffer = writer.buffer()
            num_bytes = unit.job.output_width * (piece.stop - piece.start)
            filled.append((buffer, num_bytes))
            return buffer[:num_bytes]

        self._merger.merge(unit, target, self._ledger_of(unit.job), self._map_spans)
        self._emit_all(writer, filled)
        self._close_ledger_at_end(unit)

    def _map_spans(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        return map_ahead(self._pool, SPANS_AHEAD * self._num_threads, function, items)

    def _emit_all(self, writer: OrderedWriter, filled: list[tuple[Bytes, int]]) -> None:
        while filled:
            self._emit(writer, *filled.pop(0))

    def _emit(self, writer: OrderedWriter, buffer: Bytes, num_bytes: int) -> None:
        writer.emit(buffer, num_bytes)
        self._on_bytes(0, num_bytes)

    def _count_read(self, num_bytes: int) -> None:
        self._on_bytes(num_bytes, 0)

    def _ledger_of(self, job: TensorJob) -> Ledger:
        return self._ledgers.setdefault(job.output.name, Ledger(job, self._shard.file))

    def _close_ledger_at_end(self, unit: Unit) -> None:
        if unit.stop == unit.job.num_elems:
            ledger = self._ledgers.pop(unit.job.output.name)
            self.facts.append(ledger.close())
            self.gram.add(ledger)


def runs(units: Sequence[Unit]) -> Iterator[range]:
    """Yield the indices of consecutive units that together are long enough to be one thread's task."""
    first, num_elems = 0, 0
    for index, unit in enumerate(units):
        num_elems += unit.stop - unit.start
        if num_elems >= SPAN_ELEMS or index + 1 == len(units):
            yield range(first, index + 1)
            first, num_elems = index + 1, 0


def process_name() -> str:
    """Return which process of which machine this is, as ``node:pid``."""
    return f"{os.uname().nodename}:{os.getpid()}"


def current_memory_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
