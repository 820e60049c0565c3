"""Merging one unit: the procedures of all its results, side by side over the same loaded spans."""

from collections.abc import Sequence

import numpy as np

from stockflow.checkpoints.decodes.transposed import within_rows
from stockflow.engine.buffers import Scratch
from stockflow.engine.facts import Ledger
from stockflow.engine.layers import Layers
from stockflow.engine.losses import counting
from stockflow.engine.noise import is_looked_at, look
from stockflow.engine.pieces import Piece
from stockflow.engine.procedures import PROCEDURES
from stockflow.engine.procedures.proceeding import Fill, MapSpans, Proceeding, Tools, swept
from stockflow.engine.units import GroupUnit, Unit, spans_of
from stockflow.engine.warm import small_units
from stockflow.engine.ways import Coder, Destination, PartsOf, Way, Written
from stockflow.errors import NumericsError
from stockflow.kernels.arrays import Bytes
from stockflow.methods.protocol import Elementwise
from stockflow.planning.job import Result, TensorJob


class UnitMerger:
    """Merges units of one plan; safe to use from several threads."""

    def __init__(self, tools: Tools, layers: Layers) -> None:
        """Take what its procedures need, and what is decided ahead."""
        self._tools, self._layers = tools, layers
        self._waiting = Scratch()

    def prepare(self, jobs: Sequence[TensorJob]) -> None:
        """Compile, or load, every kernel that these tensors will call."""
        for unit in small_units(jobs):
            job = unit.work
            assert isinstance(job, TensorJob)
            targets = [_discarded(job, result) for result in job.results]
            try:
                self.merge(unit, targets, [Ledger(job, result, "") for result in job.results], map)
            except NumericsError:  # of parameters that fit no tensor: said of the first that is merged, by its name
                continue

    def merge(self, unit: Unit, targets: Sequence[Destination], ledgers: Sequence[Ledger], map_spans: MapSpans) -> None:
        """Decide and combine one unit.

        Args:
            unit: the elements and their operands.
            targets: where each result goes.
            ledgers: receive the facts of each result.
            map_spans: how spans are spread over threads.

        Raises:
            NumericsError: NaN, infinity, integers that differ, or a geometry a method refuses.
        """
        job = unit.work
        assert isinstance(job, TensorJob)
        ways = [
            self._coder(job, result, target, map_spans) if result.rule else Written(target, result.width)
            for result, target in zip(job.results, targets, strict=True)
        ]
        group_elems = job.reading.group_elems
        if unit.stop - unit.start <= group_elems or not _decides_by_group(job):
            self._merge(job, unit, ways, ledgers, map_spans)
        else:
            parts = [PartsOf(way, unit) for way in ways]
            for start in range(unit.start, unit.stop, group_elems):
                self._merge(job, GroupUnit(unit, start, start + group_elems), parts, ledgers, map_spans)
        for way in ways:
            way.finish()

    def _coder(self, job: TensorJob, result: Result, target: Destination, map_spans: MapSpans) -> Coder:
        is_small = map_spans is map  # one of many, side by side: not every thread may keep what the largest takes
        scratch = Scratch() if is_small else self._waiting
        return Coder(job, result, target, scratch, map_spans, self._tools.alarm)

    def _merge(
        self, job: TensorJob, unit: Unit, ways: Sequence[Way], ledgers: Sequence[Ledger], map_spans: MapSpans
    ) -> None:
        decided = self._decided(job, unit, ledgers, map_spans)
        triples = zip(decided, job.results, ledgers, strict=True)
        fills = [(counting(fill, job, result, ledger), result.width) for fill, result, ledger in triples]
        load = decided[0].load
        has_noise = is_looked_at(job)
        for piece in unit.sweep(last=True):
            targets = [way.begin(piece) for way in ways]

            def fill(unread: Piece, first: int = piece.start, targets: Sequence[Bytes] = targets) -> None:
                span = load(unread)
                for (fill_span, width), target, way in zip(fills, targets, ways, strict=True):
                    part = target[width * (span.start - first) : width * (span.stop - first)]
                    fill_span(span, part)
                    way.look(span, part)
                if has_noise:
                    ledgers[0].see(look(span))

            for _ in map_spans(fill, spans_of(piece)):
                pass

    def _decided(self, job: TensorJob, unit: Unit, ledgers: Sequence[Ledger], map_spans: MapSpans) -> list[Fill]:
        """Return what fills each result."""
        if job.decided_in:
            return [self._layers.fill(job, ledger) for ledger in ledgers]
        pairs = zip(job.results, ledgers, strict=True)
        proceedings = [
            Proceeding(PROCEDURES[type(result.declared.rule)](unit, result, ledger, self._tools))
            for result, ledger in pairs
        ]
        for _ in range(job.num_statistic_passes):
            asking = [(each, each.wanted) for each in proceedings if each.wanted is not None]
            sweeps = {wanted.key: wanted for _, wanted in asking}  # results that want the same share it
            states = dict(zip(sweeps, swept(unit, list(sweeps.values()), map_spans, last=False), strict=True))
            for each, wanted in asking:
                each.tell(states[wanted.key])
        return [each.fill for each in proceedings]


def _decides_by_group(job: TensorJob) -> bool:
    return any(isinstance(result.declared.rule, Elementwise) for result in job.results)


def _discarded(job: TensorJob, result: Result) -> Destination:
    codes, *scales = within_rows(result.encode).ranges(job.reading.shape, 0, job.reading.num_elems)
    return Destination(
        lambda piece: np.empty(codes.stop if result.rule else result.width * (piece.stop - piece.start), np.uint8),
        np.empty(sum(each.stop for each in scales), np.uint8),
    )
