"""The sources of tensors, as a process reads them: stores, slabs and scratch, and units in the order of a schedule."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from stockflow.engine.buffers import Pool, Scratch
from stockflow.engine.devices import OpenDevice
from stockflow.engine.in_place import DirectReader, DirectUnit, Lookahead
from stockflow.engine.prefetch import InMemory, Prefetcher
from stockflow.engine.stage import DecodingStage
from stockflow.engine.units import LargeUnit, PackedUnit, Unit
from stockflow.planning.budget import Workspace
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.reads import Step
from stockflow.planning.work import Work
from stockflow.storage import ReadsInPlace, StorageConfig, check_stamp, open_model

NUM_LOCAL_READERS = 2
NUM_OBJECT_READERS = 16

OnRead = Callable[[int], None]
"""Told how many bytes were read, from several threads."""


class Sources:
    """The inputs, opened for reading; clients and buffers live as long as it does."""

    def __init__(self, checkpoints: Sequence[CheckpointRef], config: StorageConfig, device: OpenDevice) -> None:
        """Open the stores.

        Args:
            checkpoints: the inputs with their stamps.
            config: how to reach them.
            device: what will compute; memory is what it likes to read from.
        """
        self._checkpoints = checkpoints
        self._stores = [open_model(checkpoint.url, config) for checkpoint in checkpoints]
        self._local_stores = [store for store in self._stores if isinstance(store, ReadsInPlace)]
        self._slabs = Pool(device.allocate)
        self._scratch = Scratch()
        self._stage = DecodingStage()
        self.is_direct = device.kind == "cpu" and len(self._local_stores) == len(self._stores)
        """whether threads may read what they compute"""

    @property
    def urls(self) -> list[str]:
        """Where the inputs are."""
        return [store.url for store in self._stores]

    @property
    def num_retries(self) -> int:
        """Reads that were repeated since the stores were opened."""
        return sum(store.num_retries for store in self._stores)

    def check(self, works: Iterable[Work]) -> None:
        """Compare stamps where the store cannot pin a read to one.

        Raises:
            InputChangedError: a file is no longer the planned one.
        """
        used = {place for work in works for place in work.reading.files}
        for checkpoint, file in sorted(used):
            store, expected = self._stores[checkpoint], self._checkpoints[checkpoint].files[file]
            if store.pin == "stat":
                check_stamp(store, file, expected)

    @contextmanager
    def reading(
        self, steps: Sequence[Step], workspace: Workspace, on_read: OnRead, in_memory: InMemory
    ) -> Iterator["Stream"]:
        """Read what a schedule says, ahead of the computation, while the block lasts."""
        self._slabs.fit(workspace.slab_bytes, workspace.num_slabs)
        counter = _Counter(on_read)
        with ExitStack() as stack:
            prefetcher = stack.enter_context(
                Prefetcher(
                    steps,
                    checkpoints=self._checkpoints,
                    stores=self._stores,
                    pool=self._slabs,
                    num_slabs=workspace.num_slabs,
                    num_readers=NUM_LOCAL_READERS if workspace.direct else NUM_OBJECT_READERS,
                    on_read=counter.add,
                    in_memory=in_memory,
                )
            )
            reader = stack.enter_context(
                DirectReader(self._checkpoints, self._local_stores, self._scratch, self._stage, counter.add)
            )
            yield Stream(steps, prefetcher, reader, self._stage, counter)


class Stream:
    """Units in the order of a schedule, and what reading them took."""

    def __init__(
        self,
        steps: Sequence[Step],
        prefetcher: Prefetcher,
        reader: DirectReader,
        stage: DecodingStage,
        counter: "_Counter",
    ) -> None:
        """Begin before the first step."""
        self._steps = steps
        self._prefetcher = prefetcher
        self._reader = reader
        self._stage = stage
        self._counter = counter

    def __iter__(self) -> Iterator[Sequence[Unit]]:
        """Yield the units of each step; what they hold is valid until the next step is asked for.

        Several units share a load and are whole; a single one may have many pieces.
        """
        lookahead = Lookahead(self._steps, self._reader)
        for step in self._steps:
            if step.direct:
                yield [DirectUnit(step, self._reader, lookahead)]
            elif len(step.loads) > 1:
                yield [LargeUnit(step, self._prefetcher, self._stage)]
            else:
                loaded = self._prefetcher.next()
                yield [PackedUnit(loaded, index, self._stage) for index in range(len(loaded.load.pieces))]
                self._prefetcher.release(loaded)

    @property
    def bytes_read(self) -> int:
        """Bytes that came in so far."""
        return self._counter.num_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of requests, over all threads, and those the consumer waited."""
        return {"read": self._counter.seconds, "wait_read": self._prefetcher.wait_s}


class _Counter:
    """Adds up what several threads read."""

    def __init__(self, on_read: OnRead) -> None:
        self._on_read = on_read
        self._lock = threading.Lock()
        self.num_bytes, self.seconds = 0, 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self.seconds += seconds
        self._on_read(num_bytes)
