"""Where shards are merged: the glue between the driver and an executor."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stockflow.engine.devices import check_gpu_is_seen
from stockflow.engine.process import process_name
from stockflow.engine.shard import OnBytes
from stockflow.engine.survey import Look, Surveyor, SurveySpec
from stockflow.engine.worker import Worker, WorkerSpec
from stockflow.errors import BudgetError, CheckpointError, LostUploadError, NotFoundError, PlanError
from stockflow.events import Event, Moved, Note, OnEvent, Retry
from stockflow.interruption import pause
from stockflow.output import claims, receipts
from stockflow.output.numerics import agree_on_numerics
from stockflow.output.receipts import Receipt
from stockflow.output.shards import is_finished
from stockflow.planning.plan import ShardPlan
from stockflow.run import shard_events
from stockflow.run.executors import local
from stockflow.storage import Store, open_store, redact
from stockflow.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from stockflow.run.executors import ray

MAX_UPLOADS = 3
"""Of one shard: as often as Ray's workers are given one that failed on storage."""
MAX_BATCH_TENSORS = 64
"""Rows of these pass through Ray: 70 kB with sixteen models."""
MAX_ANSWER_BYTES = 64_000
"""A receipt of up to so many comes back through Ray, which keeps less than 100 kB out of its object store (2.60)."""
MAX_BATCH_BYTES = 2 * 10**9
"""Of sources; a larger tensor is a batch of its own."""


def in_this_process(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
    """Merge shards here, one after the other, on the worker's threads; each is published while the next begins."""
    worker = Worker(spec, on_event)
    try:
        _agree(spec, worker)
        yield from _ShardsHere(worker, on_event).merged(shards)
    finally:
        worker.close()


class _ShardsHere:
    """Shards in work in this process; one whose upload is lost is merged again at once, a bounded number of times."""

    def __init__(self, worker: Worker, on_event: OnEvent) -> None:
        self._worker, self._on_event, self._name = worker, on_event, process_name()
        self._num_lost: Counter[str] = Counter()

    def merged(self, shards: Sequence[ShardPlan]) -> Iterator[Receipt]:
        published: deque[tuple[ShardPlan, Future[Receipt]]] = deque()
        for begun in local.run(lambda shard: (shard, self._begin(shard)), shards):
            published.append(begun)
            if len(published) > 1:
                yield self._receipt(*published.popleft())
        for begun in published:
            yield self._receipt(*begun)

    def _begin(self, shard: ShardPlan) -> Future[Receipt]:
        self._on_event(shard_events.begun(shard, self._name))
        try:
            return self._worker.begin(shard, self._moved)
        except LostUploadError as error:
            return self._begin_again(shard, error)

    def _receipt(self, shard: ShardPlan, published: Future[Receipt]) -> Receipt:
        try:
            return published.result()
        except LostUploadError as error:
            return self._receipt(shard, self._begin_again(shard, error))

    def _begin_again(self, shard: ShardPlan, error: LostUploadError) -> Future[Receipt]:
        self._num_lost[shard.file] += 1
        if self._num_lost[shard.file] == MAX_UPLOADS:
            raise error.of_tries(shard.file, MAX_UPLOADS)
        self._on_event(Retry("storage", shard.file))
        self._on_event(Note(f"{shard.file} is merged again: {error}"))
        pause(RetryPolicy().delay_s(self._num_lost[shard.file]))
        return self._begin(shard)

    def _moved(self, num_read: int, num_written: int) -> None:
        self._on_event(Moved(num_read, num_written, self._name))


@dataclass(frozen=True)
class StartWorker:
    """Makes a worker in a process somewhere else; what Ray ships instead of clients and threads."""

    spec: WorkerSpec

    def __call__(self) -> "ShardWork":
        """Return what merges shards there.

        Raises:
            PlanError: this node does not see its GPUs, or the output prefix that the driver claimed, or computes
                otherwise than the others.
        """
        check_gpu_is_seen(self.spec.device)
        check_output_is_shared(self.spec)
        work = ShardWork(self.spec)
        _agree(self.spec, work.worker)
        return work


Answer = bytes | str
"""of a worker that has merged a shard: its receipt; or, where that is large or of another worker, its file name"""


class ShardWork:
    """Merges shards in a process somewhere else; a shard that ran out of memory before with less of it."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Open a worker with the whole budget."""
        self._spec = spec
        self._output = open_store(spec.output_url, spec.storage)
        self._memory_halvings = 0
        self.worker = Worker(spec)

    def __call__(self, shard: ShardPlan, on_bytes: OnBytes, memory_halvings: int) -> Answer:
        """Merge a shard; smaller buffers mean more passes and the same bytes.

        Raises:
            StockflowError: see ``Worker.merge``.
        """
        if is_finished(self._output, self._spec.plan_id, shard, self.worker.numerics_class):
            return shard.file
        for halvings in range(memory_halvings, -1, -1):
            self._reopen(halvings)
            try:
                receipt = receipts.encode(self.worker.merge(shard, on_bytes))
                return receipt if len(receipt) <= MAX_ANSWER_BYTES else shard.file
            except BudgetError:  # as little as that is not enough for it
                if not halvings:
                    raise
        raise AssertionError("not reached")

    def _reopen(self, halvings: int) -> None:
        if halvings != self._memory_halvings:
            self.worker.close()
            self.worker = Worker(replace(self._spec, memory_bytes=self._spec.memory_bytes >> halvings))
            self._memory_halvings = halvings


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
        seen = claims.read(store).plan_id
    except (NotFoundError, CheckpointError):
        seen = None
    if seen != spec.plan_id:
        raise PlanError(
            f"a worker does not see the output {redact(spec.output_url)} that the driver claimed; on several nodes "
            "use object storage, or a folder that all of them share"
        )


def on_ray(
    spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent, options: "ray.RayOptions"
) -> Iterator[Receipt]:
    """Merge shards on the workers of a Ray cluster; only shards, receipts and counters pass through Ray."""
    from stockflow.run.executors import ray

    spec = _on_what_was_asked_for(spec, options)
    store = open_store(spec.output_url, spec.storage)
    answers = ray.run(
        StartWorker(spec),
        shards,
        size=lambda shard: shard.source_bytes,
        options=options,
        on_event=on_event,
        begun=shard_events.begun,
        name=lambda shard: shard.file,
    )
    for answer in answers:
        yield receipt_of(answer, store, spec.plan_id)


def receipt_of(answer: Answer, store: Store, plan_id: str) -> Receipt:
    """Return the receipt of a shard from what its worker answered."""
    if isinstance(answer, bytes):
        return receipts.parse(answer, "what a worker answered")
    return receipts.read(store, plan_id, answer)


def _on_what_was_asked_for(spec: WorkerSpec, options: "ray.RayOptions") -> WorkerSpec:
    """Keep workers that hold no GPU off those of their node: Ray hides none from them (2.60)."""
    if options.gpus_per_worker:
        return spec
    check_gpus(spec.device, options.gpus_per_worker)
    return replace(spec, device="cpu")


def check_gpus(device: str, gpus_per_worker: float) -> None:
    """Refuse to compute on GPUs that nobody asked Ray for.

    Raises:
        PlanError: a worker must use a GPU, and gets none.
    """
    if device == "cuda" and not gpus_per_worker:
        raise PlanError("--device cuda on Ray: say how many GPUs a worker gets (--gpus-per-worker 1)")


def survey_in_this_process(spec: SurveySpec, looks: Sequence[Look], on_event: OnEvent) -> Iterator[tuple[int, Any]]:
    """Look at tensors here; yield the number and the row of each."""
    surveyor = Surveyor(spec, on_event)
    try:
        yield from enumerate(surveyor.survey(looks, lambda num_bytes: on_event(Moved(num_bytes))))
    finally:
        surveyor.close()


@dataclass(frozen=True)
class Batch:
    """Neighbouring tensors that one worker looks at; what Ray ships instead of a shard."""

    first: int
    """number of the first one"""
    looks: tuple[Look, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(look.reading.num_bytes for look in self.looks)


@dataclass(frozen=True)
class StartSurveyor:
    """Makes a surveyor in a process somewhere else."""

    spec: SurveySpec

    def __call__(self) -> Callable[[Batch, OnBytes, int], tuple[int, list[Any]]]:
        """Return what looks at a batch there, and gives the number of its first tensor and all rows.

        Raises:
            PlanError: this node does not see its GPUs.
        """
        check_gpu_is_seen(self.spec.device)
        surveyor = Surveyor(self.spec)

        def survey(batch: Batch, on_bytes: OnBytes, memory_halvings: int) -> tuple[int, list[Any]]:
            del memory_halvings  # its buffers are small already
            return batch.first, list(surveyor.survey(batch.looks, lambda num_bytes: on_bytes(num_bytes, 0)))

        return survey


def batches(looks: Sequence[Look]) -> Iterator[Batch]:
    """Yield tensors in order, in batches whose rows are small and whose sources take some seconds to read."""
    first, filled = 0, 0
    for number, look in enumerate(looks):
        size = look.reading.num_bytes
        if number > first and (number - first == MAX_BATCH_TENSORS or filled + size > MAX_BATCH_BYTES):
            yield Batch(first, tuple(looks[first:number]))
            first, filled = number, 0
        filled += size
    if first < len(looks):
        yield Batch(first, tuple(looks[first:]))


def survey_on_ray(
    spec: SurveySpec, looks: Sequence[Look], on_event: OnEvent, options: "ray.RayOptions"
) -> Iterator[tuple[int, Any]]:
    """Look at tensors on the workers of a Ray cluster; rows come back by value, some kilobytes per batch."""
    from stockflow.run.executors import ray

    def tell(event: Event) -> None:
        if isinstance(event, Moved | Note):  # the rest is of batches, which are not the items of the stage
            on_event(event)

    found = ray.run(
        StartSurveyor(spec),
        list(batches(looks)),
        size=lambda batch: batch.source_bytes,
        options=options,
        on_event=tell,
        name=lambda batch: f"{len(batch.looks)} tensors from {batch.looks[0].reading.name}",
    )
    for first, rows in found:
        yield from enumerate(rows, start=first)
