"""A session: the device, inputs, threads and memory of one process, through which tensors are streamed.

Whoever visits them (a merge, a Gram, an audit, a comparison) says what it does with a unit, and nothing of reading.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TypeVar

from stockflow.ahead import map_ahead
from stockflow.engine.devices import Device, open_device
from stockflow.engine.inputs import OnRead, Sources, Stream
from stockflow.engine.prefetch import InMemory, nowhere
from stockflow.engine.process import current_memory_bytes
from stockflow.engine.units import Unit
from stockflow.events import Note, OnEvent, ignore
from stockflow.planning.budget import BASELINE_BYTES, SPANS_AHEAD, Workspace, client_bytes, divide
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.reads import schedule
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.planning.work import Work
from stockflow.storage import StorageConfig
from stockflow.text.sizes import MIB

GROWTH_BYTES = {"cpu": 24 * MIB, "cuda": 96 * MIB}
"""What a process still grows once its kernels are loaded: thread stacks, small allocations, lazily loaded code."""

PATIENCE_S = 2.0
"""for kernels that are only loaded"""

T = TypeVar("T")
R = TypeVar("R")


class Session:
    """Clients, threads and buffers that live as long as it does."""

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        storage: StorageConfig,
        *,
        memory_bytes: int,
        num_threads: int,
        device: Device = "auto",
        on_event: OnEvent = ignore,
    ) -> None:
        """Open the inputs and choose the device.

        Args:
            checkpoints: the inputs with their stamps.
            storage: how to reach them.
            memory_bytes: bound of the process.
            num_threads: compute threads.
            device: where to compute.
            on_event: told of what keeps it from beginning.

        Raises:
            PlanError: a CUDA device is asked for and there is none.
        """
        self.device = open_device(device)
        self.sources = Sources(checkpoints, storage, self.device)
        self.num_threads = num_threads
        self._memory_bytes = memory_bytes
        self._on_event = on_event
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compute")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def prepare(self, load_kernels: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
        """Load, or compile, kernels before there are buffers; what takes longer than loading is said.

        Not on this thread: what a signal's handler raises here would be lost within a callback of the compiler.
        """
        loading = self._pool.submit(load_kernels)
        with suppress(TimeoutError):
            return loading.result(patience_s)
        self._on_event(Note("compiling kernels for this processor, once per machine and kind of merge: some seconds"))
        return loading.result()

    def divide(self, works: Sequence[Work], *, output_url: str = "", output_bytes: int = 0) -> Workspace:
        """Return how to spend the memory on these tensors: after the kernels are loaded, before there are buffers.

        Args:
            works: what will be streamed.
            output_url: where an output of ``output_bytes`` is written meanwhile.
            output_bytes: its size.

        Raises:
            BudgetError: not even one span of the widest tensor fits.
        """
        clients = client_bytes(self.sources.urls, output_url, output_bytes)
        return divide(
            works,
            self._memory_bytes,
            num_threads=self.num_threads,
            baseline_bytes=self._baseline_bytes + clients,
            direct=self.sources.is_direct,
        )

    @contextmanager
    def stream(
        self, works: Sequence[Work], workspace: Workspace, on_read: OnRead, in_memory: InMemory = nowhere
    ) -> Iterator[Stream]:
        """Read what these tensors need, and is not in memory yet, ahead of the computation, while the block lasts.

        Raises:
            InputChangedError: an input is not the planned one any more.
            StorageError: reading failed after retries.
        """
        with self.sources.reading(list(schedule(works, workspace)), workspace, on_read, in_memory) as stream:
            yield stream

    def has_enough(self, units: Sequence[Unit]) -> bool:
        """Return whether units are enough to give threads some each, rather than spans of one."""
        return len(units) >= 2 * self.num_threads

    def side_by_side(self, visit: Callable[[int], R], units: Sequence[Unit]) -> list[R]:
        """Visit each unit by its index, in tasks that are long enough for a thread, and return what came of it."""

        def visit_run(run: range) -> list[R]:
            return [visit(index) for index in run]

        return [each for together in self._pool.map(visit_run, runs(units)) for each in together]

    def map_spans(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Apply a function on the threads, results in order, few of them waiting."""
        return map_ahead(self._pool, SPANS_AHEAD * self.num_threads, function, items)

    @cached_property
    def _baseline_bytes(self) -> int:
        """What this process takes by itself, measured once: when kernels are loaded and before there are buffers."""
        return max(BASELINE_BYTES[self.device.kind], current_memory_bytes() + GROWTH_BYTES[self.device.kind])


def runs(units: Sequence[Unit]) -> Iterator[range]:
    """Yield the indices of consecutive units that together are long enough to be one thread's task."""
    first, num_elems = 0, 0
    for index, unit in enumerate(units):
        num_elems += unit.stop - unit.start
        if num_elems >= SPAN_ELEMS or index + 1 == len(units):
            yield range(first, index + 1)
            first, num_elems = index + 1, 0
