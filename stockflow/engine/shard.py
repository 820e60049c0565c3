"""Merging a shard: its tensors, streamed through a session into a sink, in order."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby

import numpy as np

from stockflow.checkpoints.decodes.stored import BlockScaled, GroupScaled
from stockflow.checkpoints.decodes.transposed import ByRows, within_rows
from stockflow.engine import arranging, rank_space
from stockflow.engine.alarm import Alarm
from stockflow.engine.buffers import Pool, Scratch
from stockflow.engine.facts import GramSum, Ledger
from stockflow.engine.layers import Layers
from stockflow.engine.merging import UnitMerger
from stockflow.engine.pieces import Piece
from stockflow.engine.procedures.proceeding import StageClock, Tools, known_nowhere
from stockflow.engine.session import Session
from stockflow.engine.units import Unit
from stockflow.engine.ways import NO_SCALES, Destination
from stockflow.engine.writer import OrderedWriter
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.output.receipts import TensorFacts
from stockflow.planning.budget import NUM_OUT_BUFFERS, Workspace
from stockflow.planning.experts.units import segments
from stockflow.planning.factors import FactorRanges, batches
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import CheckpointRef, OnNonfinite, ShardPlan, merged_among
from stockflow.storage import Sink

OnBytes = Callable[[int, int], None]
"""Told of bytes read and bytes written, from several threads."""


def _nothing_known(job: TensorJob) -> Floats:
    """Return zeros, for tensors that only have their kernels loaded."""
    return np.zeros((len(job.reading.operands),) * 2)


class ShardMerger:
    """Merges shards of one plan; output buffers live as long as it does."""

    def __init__(self, session: Session, checkpoints: Sequence[CheckpointRef], on_nonfinite: OnNonfinite) -> None:
        """Take the session to read through, and the inputs to be named in messages."""
        self.session = session
        self.outs = Pool(session.device.allocate)
        self.ordering = Scratch()
        self.num_models = len(merged_among(checkpoints))
        self._alarm = Alarm(checkpoints, on_nonfinite)

    def prepare(self, jobs: Sequence[TensorJob]) -> None:
        """Compile, or load, every kernel that these tensors will call."""
        self.session.prepare(lambda: self._prepare(jobs))

    def _prepare(self, jobs: Sequence[TensorJob]) -> None:
        if any(job.has_known_changes for job in jobs):
            rank_space.compile_kernels()
        UnitMerger(self.tools(StageClock(), _nothing_known), Layers()).prepare(jobs)
        arranging.prepare(jobs)

    def tools(self, clock: StageClock, known: Callable[[TensorJob], Floats] = known_nowhere) -> Tools:
        """Return what procedures share that count their seconds on a clock; ``known`` are products without a sweep."""
        return Tools(self.session.device, self._alarm, clock, known)

    def merge(self, shard: ShardPlan, workspace: Workspace, sink: Sink, on_bytes: OnBytes) -> "ShardRun":
        """Read, merge and write a shard, and return what was learned and what it took.

        Raises:
            UserError: the inputs changed or hold NaN.
            StorageError: reading or writing failed after retries.
        """
        run = ShardRun(self, shard, workspace, on_bytes)
        run.execute(sink)
        return run


class ShardRun:
    """The state of one shard while it is merged, and what is known of it afterwards."""

    def __init__(self, owner: ShardMerger, shard: ShardPlan, workspace: Workspace, on_bytes: OnBytes) -> None:
        """Begin with nothing merged."""
        self._session, self._outs = owner.session, owner.outs
        self._shard, self._workspace, self._on_bytes = shard, workspace, on_bytes
        self._clock = StageClock()
        self._grams: Mapping[str, Floats] = {}
        self._tools = owner.tools(self._clock, lambda job: self._grams[job.reading.name])
        self._layers = Layers()
        self._merger = UnitMerger(self._tools, self._layers)
        self._ordering = owner.ordering
        self._ledgers: dict[str, Ledger] = {}
        self._scales: dict[str, Bytes] = {}
        self._last_of_wholes = _last_of_wholes(shard.jobs)
        self.facts: list[TensorFacts] = []
        self.gram = GramSum(owner.num_models)
        self.seconds: dict[str, float] = {}
        self.bytes_read = 0
        self._reading = Counter({"read": 0.0, "wait_read": 0.0})
        self.size, self.sha256 = 0, ""

    def execute(self, sink: Sink) -> None:
        """Read, merge and write everything."""
        self._outs.fit(self._workspace.out_bytes, NUM_OUT_BUFFERS)
        with ExitStack() as stack:
            writer = stack.enter_context(OrderedWriter(sink, pool=self._outs, num_buffers=NUM_OUT_BUFFERS))
            writer.write_header(self._shard.header)
            for jobs in segments(self._shard.jobs):
                for batch, ranges in batches(jobs, self._workspace.factor_bytes):
                    self._merge_batch(batch, ranges, writer)
            self.size, self.sha256 = writer.finish()
        self.seconds = {
            **self._clock.seconds,
            **self._reading,
            "hash": writer.hash_s,
            "write": writer.write_s,
            "wait_write": writer.wait_s,
        }

    def _merge_batch(self, jobs: Sequence[TensorJob], ranges: FactorRanges, writer: OrderedWriter) -> None:
        """Merge what follows each other, and is decided as one if it is a layer's; factors of these ranges are held."""
        known = rank_space.known_grams(self._session, jobs, self._workspace, self._count_read, ranges)
        self._grams = known.by_tensor
        self.bytes_read += known.bytes_read
        self.bytes_read += self._layers.decide(self._session, jobs, self._workspace, self._count_read, self._tools)
        with self._session.stream(jobs, self._workspace, self._count_read, known.held.parts) as stream:
            for units in stream:
                if len(units) > 1 or units[0].work.place_beside[1]:
                    for part in self._parted(units):
                        self._merge_packed(part, writer)
                        self._emit_scales_of_whole(part[-1], writer)
                else:
                    self._merge_large(units[0], writer)
                    self._emit_scales_of_whole(units[0], writer)
        self.bytes_read += stream.bytes_read
        self._reading.update(stream.seconds)

    def _parted(self, units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
        """Yield units that share a load, up to each behind which scales of several tensors are written."""
        start = 0
        for number, unit in enumerate(units, 1):
            if number == len(units) or (_ends_tensor(unit) and unit.work.reading.name in self._last_of_wholes):
                yield units[start:number]
                start = number

    def _merge_packed(self, units: Sequence[Unit], writer: OrderedWriter) -> None:
        """Merge the units that share a load: side by side if there are enough, else span by span."""
        buffer = writer.buffer()
        ends = [0]
        for unit in units:
            ends.append(ends[-1] + self._num_code_bytes(unit, unit.start, unit.stop))
            ends.append(ends[-1] + (len(self._scales_of(unit)) if _ends_alone(unit) else 0))
        codes = [buffer[start:stop] for start, stop in zip(ends[0::2], ends[1::2], strict=False)]
        ledgers = [self._ledger_of(unit) for unit in units]
        distinct = len({unit.work.reading.name for unit in units}) == len(units)
        side_by_side = distinct and self._session.has_enough(units)

        def merge(index: int) -> None:
            def out(_: Piece) -> Bytes:
                return codes[index]

            map_spans = map if side_by_side else self._session.map_spans
            target = Destination(out, self._scales_of(units[index]))
            self._merger.merge(units[index], [target], [ledgers[index]], map_spans)

        if side_by_side:
            self._session.side_by_side(merge, units)
        else:
            for index in range(len(units)):
                merge(index)
        for unit, start, stop in zip(units, ends[1::2], ends[2::2], strict=True):
            if stop > start:
                buffer[start:stop] = self._scales_of(unit)
            self._close_at_end(unit)
        places = list(zip(ends[0::2], ends[1::2], strict=False))
        arranging.arrange(units, places, buffer, self._ordering, self._session.map_spans)
        self._emit(writer, buffer, ends[-1])

    def _merge_large(self, unit: Unit, writer: OrderedWriter) -> None:
        """Merge a unit that may fill several output buffers, its spans side by side."""
        filled: list[tuple[Bytes, int]] = []

        def out(piece: Piece) -> Bytes:
            self._emit_all(writer, filled)
            buffer = writer.buffer()
            num_bytes = self._num_code_bytes(unit, piece.start, piece.stop)
            filled.append((buffer, num_bytes))
            return buffer[:num_bytes]

        target = Destination(out, self._scales_of(unit))
        self._merger.merge(unit, [target], [self._ledger_of(unit)], self._session.map_spans)
        self._emit_all(writer, filled)
        if _ends_alone(unit):
            self._emit_scales(self._scales_of(unit), writer)
        self._close_at_end(unit)

    def _emit_scales_of_whole(self, unit: Unit, writer: OrderedWriter) -> None:
        """Write the scales of a tensor of all experts, if this ends it: of one that has rows by turns, by turns."""
        jobs = self._last_of_wholes.get(unit.work.reading.name, ()) if _ends_tensor(unit) else ()
        beside: list[Bytes] = []
        for job in jobs:
            encode = job.result.encode
            beside.append(self._scales.pop(job.reading.name))
            if len(beside) == (encode.num_beside if isinstance(encode, ByRows) else 1):
                self._emit_scales(
                    arranging.by_turns(np.stack(beside).reshape(len(beside), _num_bands(job), -1)), writer
                )
                beside = []

    def _emit_scales(self, scales: Bytes, writer: OrderedWriter) -> None:
        step = self._workspace.out_bytes
        for start in range(0, len(scales), step):
            part, buffer = scales[start : start + step], writer.buffer()
            buffer[: len(part)] = part
            self._emit(writer, buffer, len(part))

    def _emit_all(self, writer: OrderedWriter, filled: list[tuple[Bytes, int]]) -> None:
        while filled:
            self._emit(writer, *filled.pop(0))

    def _emit(self, writer: OrderedWriter, buffer: Bytes, num_bytes: int) -> None:
        writer.emit(buffer, num_bytes)
        self._on_bytes(0, num_bytes)

    def _count_read(self, num_bytes: int) -> None:
        self._on_bytes(num_bytes, 0)

    def _ledger_of(self, unit: Unit) -> Ledger:
        job = unit.work
        assert isinstance(job, TensorJob)
        if job.reading.name not in self._ledgers:
            self._ledgers[job.reading.name] = Ledger(job, job.result, self._shard.file)
        return self._ledgers[job.reading.name]

    def _scales_of(self, unit: Unit) -> Bytes:
        """Return the memory of the scales of a tensor that is written in codes; kept until its last unit is done."""
        job = unit.work
        assert isinstance(job, TensorJob)
        num_bytes = job.result.num_scale_bytes
        if not num_bytes:
            return NO_SCALES
        if job.reading.name not in self._scales:
            self._scales[job.reading.name] = np.empty(num_bytes, np.uint8)
        return self._scales[job.reading.name]

    def _num_code_bytes(self, unit: Unit, start: int, stop: int) -> int:
        job = unit.work
        assert isinstance(job, TensorJob)
        return job.result.num_code_bytes(job.reading.shape, start, stop)

    def _close_at_end(self, unit: Unit) -> None:
        if _ends_tensor(unit):
            if _ends_alone(unit):
                self._scales.pop(unit.work.reading.name, None)
            ledger = self._ledgers.pop(unit.work.reading.name)
            self.facts += [ledger.close(), *ledger.of_scales()]
            self.gram.add(ledger)


def _ends_alone(unit: Unit) -> bool:
    """Return whether a unit ends a tensor whose scales, if it has any, follow its codes."""
    job = unit.work
    assert isinstance(job, TensorJob)
    return _ends_tensor(unit) and len(job.wholes) < 2


def _num_bands(job: TensorJob) -> int:
    encode = within_rows(job.result.encode)
    assert isinstance(encode, BlockScaled | GroupScaled)
    return encode.grid(job.reading.shape)[0]


def _last_of_wholes(jobs: Iterable[TensorJob]) -> dict[str, Sequence[TensorJob]]:
    """Return the jobs that write codes and scales of one tensor of all experts, by name of the last."""
    runs = ([*run] for wholes, run in groupby(jobs, key=lambda job: job.wholes) if len(wholes) > 1)
    return {run[-1].reading.name: run for run in runs}


def _ends_tensor(unit: Unit) -> bool:
    return unit.stop == unit.work.reading.num_elems
