"""The prefetcher: carries out the read schedule ahead of the computation, within a fixed number of slabs."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from stockflow.budget import Workspace
from stockflow.plan import CheckpointRef
from stockflow.schedule import Load, Request, Step, split_request
from stockflow.storage import Store


class LoadedSlab:
    """A load whose bytes have arrived."""

    def __init__(self, load: Load, slab: Tensor) -> None:
        """Pair a load with the slab that holds its bytes."""
        self.load = load
        self.slab = slab

    def sources(self, index: int) -> list[Tensor]:
        """Return the bytes of each source of one piece, as views of the slab."""
        piece, offsets = self.load.pieces[index], self.load.offsets[index]
        return [
            self.slab[offset : offset + width * (piece.stop - piece.start)]
            for offset, width in zip(offsets, piece.job.source_widths, strict=True)
        ]


class Prefetcher:
    """Yields loaded slabs in schedule order while later ones are being read.

    At most ``workspace.num_slabs`` slabs exist; a slab is read into again once it was released.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        *,
        checkpoints: Sequence[CheckpointRef],
        stores: Sequence[Store],
        workspace: Workspace,
        num_readers: int,
        pin_memory: bool,
        on_read: Callable[[int], None],
    ) -> None:
        """Prepare; reading starts when the context is entered.

        Args:
            steps: the schedule; every load is read ``num_reads`` times, step by step.
            checkpoints: the inputs with their stamps.
            stores: one open store per checkpoint.
            workspace: size and number of slabs.
            num_readers: requests in flight.
            pin_memory: whether slabs are page-locked, for copies to a GPU.
            on_read: called with the bytes of each finished request, from reader threads.
        """
        self._steps = steps
        self._checkpoints = checkpoints
        self._stores = stores
        self._workspace = workspace
        self._pin_memory = pin_memory
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="read")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._free: SimpleQueue[Tensor | None] = SimpleQueue()
        self._loading: SimpleQueue[tuple[Load, Tensor, list[Future[None]]] | BaseException] = SimpleQueue()
        self._closing = threading.Event()
        self._num_allocated = 0
        self.wait_s = 0.0
        """seconds the consumer waited for bytes"""

    def __enter__(self) -> "Prefetcher":
        """Start reading."""
        self._feeder.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading; requests in flight are awaited, queued ones dropped."""
        self._closing.set()
        self._free.put(None)
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> LoadedSlab:
        """Return the next load once all its bytes are there.

        Raises:
            StockflowError: whatever reading it raised.
        """
        started = time.perf_counter()
        entry = self._loading.get()
        if isinstance(entry, BaseException):
            raise entry
        load, slab, requests = entry
        for request in requests:
            request.result()
        self.wait_s += time.perf_counter() - started
        return LoadedSlab(load, slab)

    def release(self, loaded: LoadedSlab) -> None:
        """Give a slab back for further reading."""
        self._free.put(loaded.slab)

    def _feed(self) -> None:
        try:
            for load in _in_reading_order(self._steps):
                slab = self._acquire()
                if slab is None or self._closing.is_set():
                    return
                requests = [
                    self._pool.submit(self._read, request, slab)
                    for whole in load.requests
                    for request in split_request(whole)
                ]
                self._loading.put((load, slab, requests))
        except BaseException as error:  # the consumer raises it: a thread has no caller
            self._loading.put(error)

    def _acquire(self) -> Tensor | None:
        if self._free.empty() and self._num_allocated < self._workspace.num_slabs:
            self._num_allocated += 1
            return torch.empty(self._workspace.slab_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        return self._free.get()

    def _read(self, request: Request, slab: Tensor) -> None:
        num_bytes = request.stop - request.start
        buffer = memoryview(slab.numpy().data)[request.offset : request.offset + num_bytes]
        stamp = self._checkpoints[request.checkpoint].files[request.file]
        self._stores[request.checkpoint].read_into(request.file, request.start, buffer, stamp)
        self._on_read(num_bytes)


def _in_reading_order(steps: Iterable[Step]) -> Iterator[Load]:
    for step in steps:
        for _ in range(step.num_reads):
            yield from step.loads
