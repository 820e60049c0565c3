"""A survey: tensors are looked at and nothing is written. What is learned of each comes back as a row.

It reads as a merge reads: through the same session, within the same budget, on the same devices. What is looked
at is the ``Examiner``'s affair.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stockflow.checkpoints.decodes.transposed import placed_beside
from stockflow.engine.alarm import Alarm
from stockflow.engine.devices import Device
from stockflow.engine.inputs import OnRead
from stockflow.engine.procedures.proceeding import MapSpans, StageClock, Tools
from stockflow.engine.session import Session
from stockflow.engine.units import Unit
from stockflow.engine.warm import small_units
from stockflow.events import OnEvent, ignore
from stockflow.planning.budget import LOOKAHEAD_BYTES, Workspace
from stockflow.planning.job import Reading, TensorJob
from stockflow.planning.plan import CheckpointRef
from stockflow.storage import StorageConfig


class Examiner(Protocol):
    """What is learned of a tensor. It is sent to other processes, so it can be pickled."""

    @property
    def num_sweeps(self) -> int:
        """How often it goes over the elements of a unit: 1 unless it says 2."""
        return 1

    def span_bytes(self, look: "Look", num_elems: int) -> int:
        """Return what one thread needs beside the operands of a span of so many elements: 0 if the caches do."""
        del look, num_elems
        return 0

    def state_bytes(self, look: "Look", num_groups: int) -> int:
        """Return what a span of so many groups leaves behind."""

    def examine(self, look: "Look", unit: Unit, tools: Tools, map_spans: MapSpans) -> Any:
        """Return what one unit says. Sweeps over it ``num_sweeps`` times, the last time with ``last``."""

    def conclude(self, look: "Look", parts: Sequence[Any]) -> Any:
        """Return the row of a tensor from what its units said, in order."""


@dataclass(frozen=True)
class Look:
    """A reading that is looked at, and by whom."""

    reading: Reading
    examiner: Examiner
    planned: TensorJob | None = None
    """what a recipe makes of the same tensor, where there is one"""
    output_width: int = 0
    """nothing is written"""
    kept_bytes: int = 0
    """nothing is kept of rows"""
    ahead_bytes: int = 0
    """nor is anything held before it is looked at"""

    @property
    def place_beside(self) -> tuple[int, int]:
        """Its place among looks whose readings are read at once, and their number; (0, 0) if it stands alone."""
        return placed_beside(operand.decode for operand in self.reading.operands)

    @property
    def num_sweeps(self) -> int:
        """How often its elements go by."""
        return self.examiner.num_sweeps

    @property
    def kind(self) -> Hashable:
        """Equal for looks that need the same kernels."""
        dtype = self.planned.output.dtype if self.planned else None
        return self.reading.dtypes, self.reading.float_bits, dtype

    @property
    def costs(self) -> Hashable:
        """Equal for looks that take the same memory."""
        reading = self.reading
        return reading.shape, reading.scope, reading.dtypes, reading.is_plain, self.place_beside, self.kind

    def scratch_bytes(self, num_elems: int) -> int:
        """Return what one thread needs, beside the operands, for a span of so many elements."""
        return self.examiner.span_bytes(self, num_elems)

    def span_state_bytes(self, num_groups: int) -> int:
        """Return what one sweep leaves behind of a span of so many groups."""
        return self.examiner.state_bytes(self, num_groups)


@dataclass(frozen=True)
class SurveySpec:
    """What every process of a survey is told."""

    checkpoints: tuple[CheckpointRef, ...]
    storage: StorageConfig
    memory_bytes: int
    num_threads: int
    device: Device = "auto"


class Surveyor:
    """One process that looks at tensors within its memory budget."""

    def __init__(self, spec: SurveySpec, on_event: OnEvent = ignore) -> None:
        """Open the inputs and choose the device.

        Raises:
            PlanError: a CUDA device is asked for and there is none.
        """
        self._session = Session(
            spec.checkpoints,
            spec.storage,
            memory_bytes=spec.memory_bytes,
            num_threads=spec.num_threads,
            device=spec.device,
            on_event=on_event,
        )
        self._tools = Tools(self._session.device, Alarm(spec.checkpoints, "propagate"), StageClock())

    def close(self) -> None:
        """End the threads."""
        self._session.close()

    def survey(self, looks: Sequence[Look], on_read: OnRead) -> Iterator[Any]:
        """Yield the examiner's row of each tensor, in order.

        Raises:
            UserError: an input changed, or the budget is too small.
            StorageError: reading failed after retries.
        """
        self._session.sources.check(looks)
        self._session.prepare(lambda: self._load_kernels(looks))
        workspace = self._session.divide(looks)
        if all(look.num_sweeps == 1 for look in looks):
            workspace = _reading_ahead(workspace)
        parts: list[Any] = []
        with self._session.stream(looks, workspace, on_read) as stream:
            for units in stream:
                for unit, part in zip(units, self._examine_all(units), strict=True):
                    parts.append(part)
                    look = unit.work
                    if unit.stop == look.reading.num_elems:
                        assert isinstance(look, Look)
                        yield look.examiner.conclude(look, parts)
                        parts = []
        self._session.sources.check(looks)

    def _load_kernels(self, looks: Sequence[Look]) -> None:
        for unit in small_units(looks):
            self._examine(unit, map)

    def _examine_all(self, units: Sequence[Unit]) -> Iterable[Any]:
        """Examine the units of a step: side by side if there are enough, else span by span."""
        if self._session.has_enough(units):
            return self._session.side_by_side(lambda index: self._examine(units[index], map), units)
        return [self._examine(unit, self._session.map_spans) for unit in units]

    def _examine(self, unit: Unit, map_spans: MapSpans) -> Any:
        look = unit.work
        assert isinstance(look, Look)
        return look.examiner.examine(look, unit, self._tools, map_spans)


def _reading_ahead(workspace: Workspace) -> Workspace:
    """Nothing is held, so slabs beyond those being read ahead would only be fresh memory."""
    enough = max(-(-LOOKAHEAD_BYTES // workspace.slab_bytes), 2)
    return replace(workspace, num_slabs=min(workspace.num_slabs, enough))
