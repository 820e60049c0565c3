"""Merging one unit: statistics, decision, combine. Where methods meet kernels."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stockflow import kernels
from stockflow.errors import NumericsError
from stockflow.gram import Floats, Gram
from stockflow.ledger import Ledger
from stockflow.methods.protocol import Block, Elementwise, Method, TensorContext
from stockflow.plan import COPY_EQUAL, CheckpointRef, OnNonfinite, TensorJob, method_of
from stockflow.spans import span_bounds
from stockflow.storage import redact
from stockflow.units import LoadedPiece, Unit

T = TypeVar("T")
R = TypeVar("R")


class MapSpans(Protocol):
    """``map``, or that of a thread pool: results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Apply ``function`` to every item."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of elements computed by one thread, with the bytes of its sources."""

    job: TensorJob
    start: int
    stop: int
    sources: list[Tensor]


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
    """Merges units of one plan on one device; safe to use from several threads."""

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        *,
        on_nonfinite: OnNonfinite,
        scratch_bytes: int,
        device: torch.device,
        clock: StageClock,
    ) -> None:
        """Prepare.

        Args:
            checkpoints: the inputs, to be named in messages.
            on_nonfinite: whether NaN and infinity are errors.
            scratch_bytes: working memory per thread.
            device: where to compute.
            clock: receives the seconds of statistics and combine.
        """
        self._checkpoints = checkpoints
        self._on_nonfinite = on_nonfinite
        self._scratch_bytes = scratch_bytes
        self._device = device
        self._clock = clock
        self._threads = threading.local()

    def merge(self, unit: Unit, out: Callable[[LoadedPiece], Tensor], ledger: Ledger, map_spans: MapSpans) -> None:
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
            self._copy(unit, out)
        elif method.linear is not None:
            self._merge_linear(method, unit, out, ledger, map_spans)
        else:
            self._merge_elementwise(method, unit, out, ledger, map_spans)

    def _copy(self, unit: Unit, out: Callable[[LoadedPiece], Tensor]) -> None:
        for piece in unit.sweep(last=True):
            first, *others = piece.sources
            for source, other in zip(unit.job.sources[1:], others, strict=True):
                if unit.job.method == COPY_EQUAL and not torch.equal(first, other):
                    raise NumericsError(self._integers_differ(unit.job, source.checkpoint))
            out(piece).copy_(first)

    def _merge_linear(
        self,
        method: Method,
        unit: Unit,
        out: Callable[[LoadedPiece], Tensor],
        ledger: Ledger,
        map_spans: MapSpans,
    ) -> None:
        assert method.linear is not None
        job = unit.job
        num_groups = (unit.stop - unit.start) // job.group_elems
        gram = self._gram(unit, num_groups, map_spans) if method.needs_gram else None
        try:
            decided = method.linear(gram or _no_gram(job), job.parameters)
        except NumericsError as error:
            raise NumericsError(f"tensor {job.output.name!r}: {error}") from None
        ledger.record(decided, gram)

        def combine(span: Span) -> Tensor:
            rows_ME = self._rows(span)
            first = (span.start - unit.start) // job.group_elems
            weights_GM = decided.weights_GM[first : -(-(span.stop - unit.start) // job.group_elems)]
            if not decided.anchored:
                return kernels.combine_plain(rows_ME, weights_GM)
            kernels.subtract_from_anchor(rows_ME)
            return kernels.combine_anchored(rows_ME, weights_GM)

        self._combine(unit, combine, out, map_spans)

    def _gram(self, unit: Unit, num_groups: int, map_spans: MapSpans) -> Gram:
        job = unit.job
        num_sources = len(job.sources)
        total_GMM = np.zeros((num_groups, num_sources, num_sources))

        def products(span: Span) -> Floats:
            started = time.perf_counter()
            rows_ME = self._rows(span)
            kernels.subtract_from_anchor(rows_ME)
            products_GBMM = kernels.block_products(rows_ME, job.group_elems)
            if not np.isfinite(products_GBMM).all():
                self._refuse_nonfinite(span, "a product of task vectors")
            self._clock.add("statistics", started)
            return products_GBMM

        for piece in unit.sweep(last=False):
            spans = _spans(piece)
            for span, products_GBMM in zip(spans, map_spans(products, spans), strict=True):
                first = (span.start - unit.start) // job.group_elems
                groups = slice(first, first + len(products_GBMM))
                total_GMM[groups] = kernels.add_in_order(total_GMM[groups], products_GBMM)
        return Gram(total_GMM)

    def _merge_elementwise(
        self,
        method: Method,
        unit: Unit,
        out: Callable[[LoadedPiece], Tensor],
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

            def update(span: Span, statistic: Any = statistic) -> Any:
                started = time.perf_counter()
                state = statistic.update(statistic.zero(), self._block(span))
                self._clock.add("statistics", started)
                return state

            state = statistic.zero()
            for piece in unit.sweep(last=False):
                for partial in map_spans(update, _spans(piece)):
                    state = statistic.combine(state, partial)
            result = statistic.finish(state)
        decided = _returned(rounds, result)
        ledger.scalars.update(decided.facts)

        def combine(span: Span) -> Tensor:
            block = self._block(span)
            return kernels.apply_update(block.base_E, decided.update(block))

        self._combine(unit, combine, out, map_spans)

    def _combine(
        self,
        unit: Unit,
        combine: Callable[[Span], Tensor],
        out: Callable[[LoadedPiece], Tensor],
        map_spans: MapSpans,
    ) -> None:
        dtype, width = unit.job.output.dtype, unit.job.output_width
        for piece in unit.sweep(last=True):
            target, first = out(piece), piece.start

            def round_span(span: Span, target: Tensor = target, first: int = first) -> None:
                started = time.perf_counter()
                part = target[width * (span.start - first) : width * (span.stop - first)]
                if not kernels.round_into(combine(span).cpu(), part, dtype):
                    self._refuse_nonfinite(span, f"the merged tensor, rounded to {dtype},")
                self._clock.add("combine", started)

            for _ in map_spans(round_span, _spans(piece)):
                pass

    def _rows(self, span: Span) -> Tensor:
        """The sources of a span, widened into this thread's scratch, shape (M, E)."""
        if not hasattr(self._threads, "scratch"):
            torch.set_num_threads(1)  # per thread: without it each operation would start threads of its own
            self._threads.scratch = kernels.Scratch(self._scratch_bytes, self._device)
        precision = torch.float64 if span.job.float_bits == 64 else torch.float32
        dtypes = [source.spec.dtype for source in span.job.sources]
        return kernels.load_rows(span.sources, dtypes, self._threads.scratch.rows(len(dtypes), precision))

    def _block(self, span: Span) -> Block:
        rows_ME = self._rows(span)
        deltas_NE = kernels.task_vectors(rows_ME)
        return Block(span.job.output.name, span.start, span.job.output.shape, rows_ME[0], deltas_NE)

    def _refuse_nonfinite(self, span: Span, result: str) -> None:
        """Name the first NaN or infinity in the sources of a span, or the result that overflowed."""
        if self._on_nonfinite == "propagate":
            return
        name = span.job.output.name
        advice = "mend the checkpoint, or set `stockflow: {on_nonfinite: propagate}`"
        for source, raw in zip(span.job.sources, span.sources, strict=True):
            index = kernels.first_nonfinite(raw, source.spec.dtype)
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


def _spans(piece: LoadedPiece) -> list[Span]:
    num_elems = piece.stop - piece.start
    return [
        Span(
            piece.job,
            piece.start + start,
            piece.start + stop,
            piece.narrow(piece.start + start, piece.start + stop),
        )
        for start, stop in span_bounds(num_elems, min(piece.job.group_elems, num_elems))
    ]


def _no_gram(job: TensorJob) -> Gram:
    return Gram(np.zeros((1, len(job.sources), len(job.sources))))


def _returned(rounds: Any, result: Any) -> Elementwise:
    try:
        rounds.send(result)
    except StopIteration as stop:
        decided: Elementwise = stop.value
        return decided
    raise AssertionError("a method asked for more rounds than it declared")
