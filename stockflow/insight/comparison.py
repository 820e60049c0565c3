"""Two checkpoints compared tensor by tensor, streamed from wherever they are within a bound of memory.

A tensor is compared by numbers where both sides are of BF16, F16, F32 or F64, in the wider format where they differ;
everything else by bits. Each byte of both is read once, by the same means as in a merge: the prefetcher, or for local
files the threads that compare.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from stockflow.ahead import map_ahead
from stockflow.checkpoints.header import DTYPES, TensorSpec
from stockflow.checkpoints.opening import Checkpoint, open_checkpoints
from stockflow.engine.buffers import Pool, allocate
from stockflow.engine.in_place import DirectReader, Lookahead, Scratch, UnreadPiece
from stockflow.engine.inputs import NUM_LOCAL_READERS, NUM_OBJECT_READERS
from stockflow.engine.prefetch import LoadedSlab, Prefetcher
from stockflow.engine.units import LoadedPiece, Piece
from stockflow.events import Done, Moved, OnEvent, Stage, ignore
from stockflow.insight.difference import CheckpointDifference, TensorDifference, Unmatched
from stockflow.kernels import comparison
from stockflow.kernels.arrays import Floats, Unsigned
from stockflow.kernels.comparison import NUM_COUNTS, NUM_SUMS
from stockflow.kernels.floats import EXPONENTS, FORMATS, TILE, WIDTHS, slab_of
from stockflow.methods.protocol import Parameters
from stockflow.planning.budget import BASELINE_BYTES, SPANS_AHEAD, client_bytes, divide, planned_bytes
from stockflow.planning.plan import COPY_EQUAL, CheckpointRef, Source, TensorJob
from stockflow.planning.reads import Step, schedule
from stockflow.planning.spans import SPAN_ELEMS, span_bounds
from stockflow.storage import LocalStore, StorageConfig, Store, check_stamp, open_store, pin_revision

NO_PARAMETERS = Parameters({}, {})

Run = Sequence[Piece]
"""Spans that together are long enough to be one thread's task."""


@dataclass
class Tally:
    """What was found of one tensor so far, or of a run of its elements."""

    sums: Floats = field(default_factory=lambda: np.zeros(NUM_SUMS))
    counts: dict[int, int] = field(default_factory=dict)
    """by the places of ``kernels.comparison``; ``FIRST`` and ``LARGEST_AT`` only where there is one"""

    def add(self, start: int, num_elems: int, sums: Floats, counts: Unsigned) -> None:
        """Add what was found of the elements from ``start`` on, in order."""
        for place, value in enumerate(counts.tolist()):
            if place in (comparison.FIRST, comparison.LARGEST_AT):
                continue
            is_most = place == comparison.MOST_ROUNDINGS
            before = self.counts.get(place, 0)
            self.counts[place] = max(before, value) if is_most else before + value
        if counts[comparison.FIRST] < num_elems:
            self.counts.setdefault(comparison.FIRST, start + int(counts[comparison.FIRST]))
        if sums[comparison.LARGEST] > self.sums[comparison.LARGEST]:
            self.counts[comparison.LARGEST_AT] = start + int(counts[comparison.LARGEST_AT])
        largest = max(self.sums[comparison.LARGEST], sums[comparison.LARGEST])
        self.sums += sums
        self.sums[comparison.LARGEST] = largest


def compare_checkpoints(
    location_a: str,
    location_b: str,
    config: StorageConfig,
    *,
    memory_bytes: int,
    num_threads: int = len(os.sched_getaffinity(0)),
    on_event: OnEvent = ignore,
) -> CheckpointDifference:
    """Compare two checkpoints.

    Args:
        location_a: of the one that distances are relative to.
        location_b: of the other one.
        config: how to reach them.
        memory_bytes: bound of the process.
        num_threads: compute threads.
        on_event: told how it goes.

    Raises:
        UserError: one is missing, forbidden, malformed or changes meanwhile; or the memory is too small.
        StorageError: reading failed after retries.
    """
    started = time.perf_counter()
    on_event(Stage("opening checkpoints", unit="files"))
    stores = [open_store(pin_revision(location), config) for location in (location_a, location_b)]
    checkpoints = open_checkpoints(stores, lambda file: on_event(Done(file)))
    pairs, unmatched = _matched(*checkpoints)
    jobs = [_job(*pair) for pair in pairs]
    on_event(
        Stage(
            "comparing",
            total_bytes=sum(source.spec.num_bytes for job in jobs for source in job.sources),
            num_items=len(jobs),
            unit="tensors",
        )
    )
    tallies = _Comparison(stores, checkpoints, memory_bytes, num_threads, on_event).run(jobs)
    a, b = checkpoints
    return CheckpointDifference(
        url_a=a.url,
        url_b=b.url,
        only_in_a=tuple(name for name in a.specs if name not in b.specs),
        only_in_b=tuple(name for name in b.specs if name not in a.specs),
        unmatched=tuple(unmatched),
        tensors=tuple(_difference(job, tally) for job, tally in zip(jobs, tallies, strict=True)),
        num_bytes=sum(source.spec.num_bytes for job in jobs for source in job.sources),
        seconds=time.perf_counter() - started,
    )


def _matched(a: Checkpoint, b: Checkpoint) -> tuple[list[tuple[Source, Source]], list[Unmatched]]:
    pairs, unmatched = [], []
    for name, spec in a.specs.items():
        other = b.specs.get(name)
        if other is None:
            continue
        by_numbers = spec.dtype in FORMATS and other.dtype in FORMATS
        if spec.shape == other.shape and (by_numbers or spec.dtype == other.dtype):
            pairs.append((Source(0, spec, a.extents[name]), Source(1, other, b.extents[name])))
        else:
            unmatched.append(Unmatched(name, spec.dtype, other.dtype, spec.shape, other.shape))
    return pairs, unmatched


def _job(a: Source, b: Source) -> TensorJob:
    """What the schedule reads as it would for a merge without statistics: every element of both, once."""
    if a.spec.dtype in FORMATS:
        output = TensorSpec(a.spec.name, compared_in(a.spec.dtype, b.spec.dtype), a.spec.shape)
        return TensorJob(output, (a, b), "linear", NO_PARAMETERS, "tensor")
    return TensorJob(a.spec, (a, b), COPY_EQUAL, NO_PARAMETERS, "tensor")


def compared_in(dtype_a: str, dtype_b: str) -> str:
    """Return the format that holds the numbers of both exactly."""
    if dtype_a == dtype_b:
        return dtype_a
    return "F64" if "F64" in (dtype_a, dtype_b) else "F32"


class _Comparison:
    """Streams the tensors of two checkpoints past the kernels."""

    def __init__(
        self,
        stores: Sequence[Store],
        checkpoints: Sequence[Checkpoint],
        memory_bytes: int,
        num_threads: int,
        on_event: OnEvent,
    ) -> None:
        self._stores = stores
        self._checkpoints = checkpoints
        self._memory_bytes = memory_bytes
        self._num_threads = num_threads
        self._on_event = on_event
        self._threads = threading.local()

    def run(self, jobs: Sequence[TensorJob]) -> list[Tally]:
        """Return what was found, in the order of ``jobs``."""
        local_stores = [store for store in self._stores if isinstance(store, LocalStore)]
        is_local = len(local_stores) == len(self._stores)
        clients = client_bytes((store.url for store in self._stores), os.devnull, 0)
        baseline = BASELINE_BYTES["cpu"] + planned_bytes(jobs) + clients
        workspace = divide(
            jobs, self._memory_bytes, num_threads=self._num_threads, baseline_bytes=baseline, direct=is_local
        )
        self._prepare(jobs)
        slabs = Pool(allocate)
        slabs.fit(workspace.slab_bytes, workspace.num_slabs)
        refs = [CheckpointRef(each.url, each.files) for each in self._checkpoints]
        tallies = {job.output.name: Tally() for job in jobs}
        steps = list(schedule(jobs, workspace))

        def on_read(num_bytes: int, _: float) -> None:
            self._on_event(Moved(num_bytes))

        with (
            ThreadPoolExecutor(self._num_threads, thread_name_prefix="compare") as pool,
            Prefetcher(
                steps,
                checkpoints=refs,
                stores=self._stores,
                pool=slabs,
                num_slabs=workspace.num_slabs,
                num_readers=NUM_LOCAL_READERS if is_local else NUM_OBJECT_READERS,
                on_read=on_read,
            ) as prefetcher,
            DirectReader(refs, local_stores, Scratch(), on_read) as reader,
        ):
            work = map_ahead(pool, SPANS_AHEAD * self._num_threads, self._compare, _tasks(steps, prefetcher, reader))
            for run, found in work:
                for span, (sums, counts) in zip(run, found, strict=True):
                    tallies[span.job.output.name].add(span.start, span.stop - span.start, sums, counts)
                    if span.stop == span.job.num_elems:
                        self._on_event(Done(span.job.output.name))
        self._check_inputs()
        return list(tallies.values())

    def _prepare(self, jobs: Sequence[TensorJob]) -> None:
        """Compile the kernel for these tensors, or load it: compiling takes memory that buffers would not leave."""
        for job in {job.float_bits: job for job in jobs if not job.is_copy}.values():
            memory = np.zeros(8 * len(job.sources), np.uint8)
            self._compare_span(LoadedPiece(job, 0, 1, slab_of(memory), memory, (0,) * len(job.sources)))

    def _compare(self, task: "Task") -> tuple[Run, list[tuple[Floats, Unsigned]]]:
        try:
            return task.run, [self._compare_span(span.loaded()) for span in task.run]
        finally:
            task.finish()

    def _compare_span(self, span: LoadedPiece) -> tuple[Floats, Unsigned]:
        sums, counts = np.zeros(NUM_SUMS), np.zeros(NUM_COUNTS, np.uint64)
        if span.job.is_copy:
            _compare_bits(span, counts)
            return sums, counts
        dtype, dtypes = span.job.output.dtype, [source.spec.dtype for source in span.job.sources]
        comparison.compare(
            span.slab,
            span.firsts_M,
            np.array([FORMATS[each] for each in dtypes], np.uint64),
            np.uint64(span.stop - span.start),
            WIDTHS[dtype] == 2,
            np.uint64(EXPONENTS[dtype]),
            *self._tiles(span.job.float_bits),
            sums,
            counts,
        )
        return sums, counts

    def _tiles(self, float_bits: int) -> tuple[Floats, Unsigned]:
        """Two tiles of working precision, as numbers and as patterns, of this thread."""
        wide_2T = getattr(self._threads, f"wide_{float_bits}", None)
        if wide_2T is None:
            wide_2T = np.zeros((2, TILE), f"f{float_bits // 8}")
            setattr(self._threads, f"wide_{float_bits}", wide_2T)
        return wide_2T, wide_2T.view(f"u{float_bits // 8}")

    def _check_inputs(self) -> None:
        """Compare stamps where the store cannot pin a read to one."""
        for store, checkpoint in zip(self._stores, self._checkpoints, strict=True):
            for file, stamp in checkpoint.files.items() if store.pin == "stat" else ():
                check_stamp(store, file, stamp)


@dataclass
class Task:
    """Spans of one slab, and what to do when they are compared."""

    run: Run
    finish: Callable[[], None]


def _tasks(steps: Sequence[Step], prefetcher: Prefetcher, reader: DirectReader) -> Iterator[Task]:
    """Yield runs of spans: those that are read directly, and others as their slabs arrive.

    A slab is given back when the last of its runs is compared.
    """
    lookahead = Lookahead(steps, reader)
    for step in steps:
        for load in step.loads:
            if step.direct:
                lookahead.passed(load)
                for run in _runs([UnreadPiece(*piece, reader) for piece in load.pieces]):
                    yield Task(run, lambda: None)
                continue
            loaded = prefetcher.next()
            runs = list(_runs(_pieces(loaded)))
            countdown = _Countdown(len(runs), partial(prefetcher.release, loaded))
            for run in runs:
                yield Task(run, countdown.count)


class _Countdown:
    """Calls something when it was counted often enough, from any thread."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._left = number
        self._then = then
        self._lock = threading.Lock()

    def count(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._then()


def _pieces(loaded: LoadedSlab) -> Iterator[LoadedPiece]:
    for piece, offsets in zip(loaded.load.pieces, loaded.load.offsets, strict=True):
        yield LoadedPiece(*piece, loaded.slab, loaded.buffer, offsets)


def _runs(pieces: Iterable[Piece]) -> Iterator[Run]:
    """Cut pieces into spans, and put small ones together."""
    run: list[Piece] = []
    for piece in pieces:
        num_elems = piece.stop - piece.start
        bounds = list(span_bounds(num_elems, num_elems)) or [(0, 0)]
        for start, stop in bounds:
            run.append(piece.narrow(piece.start + start, piece.start + stop))
            if sum(span.stop - span.start for span in run) >= SPAN_ELEMS:
                yield run
                run = []
    if run:
        yield run


def _compare_bits(span: LoadedPiece, counts: Unsigned) -> None:
    """Fill ``counts`` with what differs between elements whose meaning is not looked at."""
    width = unit_bytes(span.job.output.dtype)
    a, b = (span.source(index).view(f"u{width}") for index in range(2))
    differs = a != b
    counts[comparison.DIFFERING] = np.count_nonzero(differs)
    counts[comparison.SAME] = differs.size - int(counts[comparison.DIFFERING])
    counts[comparison.FIRST] = differs.argmax() * width if counts[comparison.DIFFERING] else span.stop - span.start


def unit_bytes(dtype: str) -> int:
    """Return the size of what is counted as one: an element, or a byte where elements are smaller than one."""
    bits = DTYPES[dtype].bits
    return bits // 8 if bits % 8 == 0 else 1


def _difference(job: TensorJob, tally: Tally) -> TensorDifference:
    a, b = (source.spec for source in job.sources)
    counts = tally.counts
    width = unit_bytes(job.output.dtype) if job.is_copy else 1
    first = counts.get(comparison.FIRST)
    by_bits = TensorDifference(
        name=job.output.name,
        shape=a.shape,
        dtype_a=a.dtype,
        dtype_b=b.dtype,
        num_elems=job.num_elems // width,
        num_differing=counts.get(comparison.DIFFERING, 0),
        first_differing=None if first is None else first // width,
    )
    if job.is_copy:
        return by_bits
    squares_a, squares_b, squares_change, largest = map(float, tally.sums)
    return replace(
        by_bits,
        norm_a=math.sqrt(squares_a),
        norm_b=math.sqrt(squares_b),
        distance=math.sqrt(squares_change),
        largest_change=largest,
        largest_at=counts.get(comparison.LARGEST_AT),
        most_roundings=counts.get(comparison.MOST_ROUNDINGS, 0),
        roundings=tuple(counts.get(place, 0) for place in range(comparison.SAME, comparison.NONFINITE)),
        num_nonfinite=counts.get(comparison.NONFINITE, 0),
    )
