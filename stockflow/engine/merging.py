"""Merging one unit: statistics, decision, combine. Where methods meet kernels."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from stockflow.engine.cpu import formats_of, working_dtype
from stockflow.engine.facts import Ledger
from stockflow.engine.units import LoadedPiece, Piece, Unit
from stockflow.errors import NumericsError
from stockflow.kernels import elementwise
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import FORMATS, first_nonfinite, results_in
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import Block, Elementwise, Method, TensorContext
from stockflow.planning.plan import COPY_EQUAL, CheckpointRef, OnNonfinite, TensorJob, method_of
from stockflow.planning.spans import span_bounds
from stockflow.storage import redact

COMPARED_BYTES = 2**20
"""How much of two integer tensors is compared at a time."""

T = TypeVar("T")
R = TypeVar("R")


class MapSpans(Protocol):
    """``map``, or that of a thread pool: results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Apply ``function`` to every item."""


class Arithmetic(Protocol):
    """Where linear methods are computed; every method may be called from several threads."""

    def gram(self, span: LoadedPiece, group_elems: int, *, with_anchor: bool = True) -> Floats:
        """Return the products of [w_0, d_1 .. d_N] per group of a span, shape (G, M, M)."""

    def combine(self, span: LoadedPiece, weights_GM: Floats, out: Bytes, *, anchored: bool) -> bool:
        """Write the weighted sum of a span into ``out``; return whether every result is finite."""

    def prepare(self, jobs: Iterable[TensorJob]) -> None:
        """Load what computing these tensors needs, before buffers take memory."""


@dataclass
class StageClock:
    """Seconds by stage, added up over the threads that spend them."""

    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stage: str, started: float) -> None:
        """Count the time since ``started`` (``time.perf_counter``)."""
        elapsed = time.perf_counter() - started
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed


class UnitMerger:
    """Merges units of one plan; safe to use from several threads."""

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        *,
        on_nonfinite: OnNonfinite,
        arithmetic: Arithmetic,
        clock: StageClock,
    ) -> None:
        """Prepare.

        Args:
            checkpoints: the inputs, to be named in messages.
            on_nonfinite: whether NaN and infinity are errors.
            arithmetic: where linear methods are computed.
            clock: receives the seconds of statistics and combine.
        """
        self._checkpoints = checkpoints
        self._on_nonfinite = on_nonfinite
        self._arithmetic = arithmetic
        self._clock = clock
        self._threads = threading.local()

    def merge(self, unit: Unit, out: Callable[[Piece], Bytes], ledger: Ledger, map_spans: MapSpans) -> None:
        """Decide and combine one unit.

        Args:
            unit: the elements and their sources.
            out: returns where the output bytes of a piece go; called once per piece, in order.
            ledger: receives the facts.
            map_spans: how spans are spread over threads.

        Raises:
            NumericsError: NaN, infinity, integers that differ, or a geometry the method refuses.
        """
        method = method_of(unit.job)
        if method is None:
            self._copy(unit, out, map_spans)
        elif method.linear is not None:
            self._merge_linear(method, unit, out, ledger, map_spans)
        else:
            self._merge_elementwise(method, unit, out, ledger, map_spans)

    def _copy(self, unit: Unit, out: Callable[[Piece], Bytes], map_spans: MapSpans) -> None:
        def copy(span: LoadedPiece, target: Bytes) -> None:
            donated = span.source(0)
            if unit.job.method == COPY_EQUAL:
                for index, source in enumerate(unit.job.sources[1:], start=1):
                    if not _same_bytes(donated, span.source(index)):
                        raise NumericsError(self._integers_differ(unit.job, source.checkpoint))
            np.copyto(target, donated)

        _fill(unit, copy, out, map_spans)

    def _merge_linear(
        self,
        method: Method,
        unit: Unit,
        out: Callable[[Piece], Bytes],
        ledger: Ledger,
        map_spans: MapSpans,
    ) -> None:
        assert method.linear is not None
        job = unit.job
        num_groups = (unit.stop - unit.start) // job.group_elems
        gram = self._gram(method, unit, num_groups, map_spans) if method.needs_gram else None
        try:
            decided = method.linear(gram or _no_gram(job), job.parameters)
        except NumericsError as error:
            raise NumericsError(f"tensor {job.output.name!r}: {error}") from None
        ledger.record(decided, gram)

        def combine(span: LoadedPiece, target: Bytes) -> bool:
            first = (span.start - unit.start) // job.group_elems
            weights_GM = decided.weights_GM[first : -(-(span.stop - unit.start) // job.group_elems)]
            return self._arithmetic.combine(span, weights_GM, target, anchored=decided.anchored)

        self._combine(unit, combine, out, map_spans)

    def _gram(self, method: Method, unit: Unit, num_groups: int, map_spans: MapSpans) -> Gram:
        job = unit.job
        num_sources = len(job.sources)
        total_GMM = np.zeros((num_groups, num_sources, num_sources))

        def products(unread: Piece) -> Floats:
            span = unread.loaded()
            started = time.perf_counter()
            products_GMM = self._arithmetic.gram(
                span, min(job.group_elems, span.stop - span.start), with_anchor=method.needs_anchor
            )
            if not np.isfinite(products_GMM).all():
                self._refuse_nonfinite(span, "a product of task vectors")
            self._clock.add("statistics", started)
            return products_GMM

        for piece in unit.sweep(last=False):
            spans = spans_of(piece)
            for span, products_GMM in zip(spans, map_spans(products, spans), strict=True):
                first = (span.start - unit.start) // job.group_elems
                total_GMM[first : first + len(products_GMM)] += products_GMM
        return Gram(total_GMM)

    def _merge_elementwise(
        self,
        method: Method,
        unit: Unit,
        out: Callable[[Piece], Bytes],
        ledger: Ledger,
        map_spans: MapSpans,
    ) -> None:
        assert method.rounds is not None
        job = unit.job
        context = TensorContext(len(job.sources) - 1, job.num_elems, job.float_bits)
        rounds = method.rounds(context, job.parameters)
        result: Any = None
        for _ in range(job.num_statistic_passes):
            statistic = rounds.send(result)

            def update(unread: Piece, statistic: Any = statistic) -> Any:
                span = unread.loaded()
                started = time.perf_counter()
                state = statistic.update(statistic.zero(), self._block(span))
                self._clock.add("statistics", started)
                return state

            state = statistic.zero()
            for piece in unit.sweep(last=False):
                for partial in map_spans(update, spans_of(piece)):
                    state = statistic.combine(state, partial)
            result = statistic.finish(state)
        decided = _returned(rounds, result)
        ledger.scalars.update(decided.facts)

        def combine(span: LoadedPiece, target: Bytes) -> bool:
            block = self._block(span)
            results = results_in(target, job.output.dtype)
            return elementwise.add_update(block.base_E, decided.update(block), results, FORMATS[job.output.dtype])

        self._combine(unit, combine, out, map_spans)

    def _combine(
        self,
        unit: Unit,
        combine: Callable[[LoadedPiece, Bytes], bool],
        out: Callable[[Piece], Bytes],
        map_spans: MapSpans,
    ) -> None:
        def combine_span(span: LoadedPiece, target: Bytes) -> None:
            started = time.perf_counter()
            if not combine(span, target):
                self._refuse_nonfinite(span, f"the merged tensor, rounded to {unit.job.output.dtype},")
            self._clock.add("combine", started)

        _fill(unit, combine_span, out, map_spans)

    def _block(self, span: LoadedPiece) -> Block:
        """The sources of a span in working precision, as base and task vectors, in this thread's scratch."""
        job, num_elems = span.job, span.stop - span.start
        num_bytes = len(job.sources) * num_elems * job.float_bits // 8
        if getattr(self._threads, "scratch", np.empty(0, np.uint8)).nbytes < num_bytes:
            self._threads.scratch = np.empty(num_bytes, np.uint8)
        rows_ME = self._threads.scratch[:num_bytes].view(working_dtype(job)).reshape(len(job.sources), num_elems)
        elementwise.load_task_vectors(span.slab, span.firsts_M, formats_of(job), rows_ME[0], rows_ME[1:])
        return Block(job.output.name, span.start, job.output.shape, rows_ME[0], rows_ME[1:])

    def _refuse_nonfinite(self, span: LoadedPiece, result: str) -> None:
        """Name the first NaN or infinity in the sources of a span, or the result that overflowed."""
        if self._on_nonfinite == "propagate":
            return
        name = span.job.output.name
        advice = "mend the checkpoint, or set `stockflow: {on_nonfinite: propagate}`"
        for number, source in enumerate(span.job.sources):
            index = first_nonfinite(span.source(number), source.spec.dtype)
            if index is not None:
                where = redact(self._checkpoints[source.checkpoint].url)
                raise NumericsError(
                    f"tensor {name!r} of {where} has NaN or infinity at flat index {span.start + index:,}; {advice}"
                )
        raise NumericsError(
            f"{result} of {name!r} overflows between elements {span.start:,} and {span.stop:,}; {advice}"
        )

    def _integers_differ(self, job: TensorJob, checkpoint: int) -> str:
        donor, other = (redact(self._checkpoints[i].url) for i in (job.sources[0].checkpoint, checkpoint))
        return (
            f"tensor {job.output.name!r} holds {job.output.dtype}, which is not averaged, and differs between "
            f"{donor} and {other}; name it in a rule with `action: copy` to take the former's"
        )


def _fill(
    unit: Unit,
    fill_span: Callable[[LoadedPiece, Bytes], None],
    out: Callable[[Piece], Bytes],
    map_spans: MapSpans,
) -> None:
    """Fill the output of a unit, span by span, in its last sweep."""
    width = unit.job.output_width
    for piece in unit.sweep(last=True):
        target = out(piece)

        def fill(span: Piece, target: Bytes = target, first: int = piece.start) -> None:
            fill_span(span.loaded(), target[width * (span.start - first) : width * (span.stop - first)])

        for _ in map_spans(fill, spans_of(piece)):
            pass


def spans_of(piece: Piece) -> list[Piece]:
    """Return the spans of a piece, in order."""
    num_elems = piece.stop - piece.start
    bounds = span_bounds(num_elems, min(piece.job.group_elems, num_elems))
    return [piece.narrow(piece.start + start, piece.start + stop) for start, stop in bounds]


def _same_bytes(left: Bytes, right: Bytes) -> bool:
    parts = range(0, left.nbytes, COMPARED_BYTES)
    return all(np.array_equal(left[at : at + COMPARED_BYTES], right[at : at + COMPARED_BYTES]) for at in parts)


def _no_gram(job: TensorJob) -> Gram:
    return Gram(np.zeros((1, len(job.sources), len(job.sources))))


def _returned(rounds: Any, result: Any) -> Elementwise:
    try:
        rounds.send(result)
    except StopIteration as stop:
        decided: Elementwise = stop.value
        return decided
    raise AssertionError("a method asked for more rounds than it declared")
