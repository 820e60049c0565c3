"""A survey: tensors are looked at and nothing is written. What is learned of each comes back as a row.

It reads as a merge reads: through the same schedule, within the same budget, on the same devices. What is looked
at is the ``Examiner``'s affair.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from stockflow.ahead import map_ahead
from stockflow.engine.devices import Device, open_device
from stockflow.engine.inputs import OnRead, Sources
from stockflow.engine.merging import Arithmetic, MapSpans
from stockflow.engine.units import Unit
from stockflow.engine.worker import GROWTH_BYTES, current_memory_bytes, runs
from stockflow.planning.budget import BASELINE_BYTES, LOOKAHEAD_BYTES, SPANS_AHEAD, Workspace, client_bytes, divide
from stockflow.planning.plan import CheckpointRef, TensorJob
from stockflow.planning.reads import Step, schedule
from stockflow.storage import StorageConfig

T = TypeVar("T")
R = TypeVar("R")


class Examiner(Protocol):
    """What is learned of a tensor. It is sent to other processes, so it can be pickled."""

    @property
    def num_sweeps(self) -> int:
        """How often it goes over the elements of a unit: 1, or 2."""

    def span_bytes(self, job: TensorJob) -> int:
        """Return what one thread needs beside the sources of a span."""

    def examine(self, unit: Unit, arithmetic: Arithmetic, map_spans: MapSpans) -> Any:
        """Return what one unit says. Sweeps over it ``num_sweeps`` times, the last time with ``last``."""

    def conclude(self, job: TensorJob, parts: Sequence[Any]) -> Any:
        """Return the row of a tensor from what its units said, in order."""


@dataclass(frozen=True)
class SurveySpec:
    """What every process of a survey is told."""

    checkpoints: tuple[CheckpointRef, ...]
    storage: StorageConfig
    examiner: Examiner
    memory_bytes: int
    num_threads: int
    device: Device = "auto"


class Surveyor:
    """One process that looks at tensors within its memory budget."""

    def __init__(self, spec: SurveySpec) -> None:
        """Open the inputs and choose the device.

        Raises:
            PlanError: a CUDA device is asked for and there is none.
        """
        self._spec = spec
        self._device = open_device(spec.device)
        self._sources = Sources(spec.checkpoints, spec.storage, self._device)
        self._pool = ThreadPoolExecutor(spec.num_threads, thread_name_prefix="compute")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def survey(self, jobs: Sequence[TensorJob], on_read: OnRead) -> Iterator[Any]:
        """Yield the examiner's row of each tensor, in order; none of them is empty.

        Raises:
            UserError: an input changed, or the budget is too small.
            StorageError: reading failed after retries.
        """
        self._sources.check(jobs)
        self._device.prepare(jobs)
        workspace = self._workspace(jobs)
        steps = list(schedule(jobs, workspace))
        if self._spec.examiner.num_sweeps == 1:
            steps = [read_once(step) for step in steps]
            workspace = _reading_ahead(workspace)
        parts: list[Any] = []
        with self._sources.reading(steps, workspace, on_read) as reading:
            for units in reading:
                for unit, part in zip(units, self._examine(units), strict=True):
                    parts.append(part)
                    if unit.stop == unit.job.num_elems:
                        yield self._spec.examiner.conclude(unit.job, parts)
                        parts = []
        self._sources.check(jobs)

    def _workspace(self, jobs: Sequence[TensorJob]) -> Workspace:
        spec = self._spec
        examining = spec.num_threads * max(map(spec.examiner.span_bytes, jobs))
        return divide(
            jobs,
            spec.memory_bytes,
            num_threads=spec.num_threads,
            baseline_bytes=self._baseline_bytes + client_bytes(self._sources.urls, "", 0) + examining,
            direct=self._sources.is_direct,
        )

    @cached_property
    def _baseline_bytes(self) -> int:
        return max(BASELINE_BYTES[self._device.kind], current_memory_bytes() + GROWTH_BYTES[self._device.kind])

    def _examine(self, units: Sequence[Unit]) -> Iterable[Any]:
        """Examine the units of a step: side by side if there are enough, else span by span."""
        examiner = self._spec.examiner
        if len(units) < 2 * self._spec.num_threads:
            return [examiner.examine(unit, self._device, self._map_spans) for unit in units]

        def examine(run: range) -> list[Any]:
            return [examiner.examine(units[index], self._device, map) for index in run]

        return [part for together in self._pool.map(examine, runs(units)) for part in together]

    def _map_spans(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        return map_ahead(self._pool, SPANS_AHEAD * self._spec.num_threads, function, items)


def read_once(step: Step) -> Step:
    """Return a step whose loads go by a single time."""
    return replace(step, num_sweeps=1, held=False)


def _reading_ahead(workspace: Workspace) -> Workspace:
    """Nothing is held, so slabs beyond those being read ahead would only be fresh memory."""
    enough = max(-(-LOOKAHEAD_BYTES // workspace.slab_bytes), 2)
    return replace(workspace, num_slabs=min(workspace.num_slabs, enough))
