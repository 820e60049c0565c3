"""The prefetcher: carries out the read schedule ahead of the computation, within a fixed number of slabs."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from stockflow.engine.buffers import Pool
from stockflow.interruption import stop_requested
from stockflow.kernels.arrays import Bytes
from stockflow.kernels.floats import Slab, slab_of
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.reads import Load, Request, Step, split_request
from stockflow.storage import Store

InMemory = Callable[[Request], Iterable[Bytes]]
"""Returns what a request is for, piece by piece, if it is in memory; else nothing."""


def nowhere(request: Request) -> Iterable[Bytes]:
    """Say that nothing is in memory."""
    del request
    return ()


class LoadedSlab:
    """A load whose bytes have arrived."""

    def __init__(self, load: Load, buffer: Bytes) -> None:
        """Pair a load with the buffer that holds its bytes."""
        self.load = load
        self.buffer = buffer
        self.slab: Slab = slab_of(buffer)


class Prefetcher:
    """Yields loaded slabs in schedule order while later ones are being read.

    At most ``num_slabs`` of them are in use; one is read into again once it was released.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        *,
        checkpoints: Sequence[CheckpointRef],
        stores: Sequence[Store],
        pool: Pool,
        num_slabs: int,
        num_readers: int,
        on_read: Callable[[int, float], None],
        in_memory: InMemory = nowhere,
    ) -> None:
        """Prepare; reading starts when the context is entered.

        Args:
            steps: the schedule; every load is read ``num_reads`` times, step by step, but for direct steps.
            checkpoints: the inputs with their stamps.
            stores: one open store per checkpoint.
            pool: where slabs come from and go back to at the end.
            num_slabs: how many to use.
            num_readers: requests in flight.
            on_read: called with bytes and seconds of each finished request, from reader threads.
            in_memory: what need not be read.
        """
        self._steps = steps
        self._checkpoints = checkpoints
        self._stores = stores
        self._buffers = pool
        self._num_slabs = num_slabs
        self._on_read = on_read
        self._in_memory = in_memory
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="read")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._free: SimpleQueue[Bytes | None] = SimpleQueue()
        self._loading: SimpleQueue[tuple[Load, Bytes, list[Future[None]]] | BaseException] = SimpleQueue()
        self._closing = threading.Event()
        self._taken: list[Bytes] = []
        self.wait_s = 0.0
        """seconds the consumer waited for bytes"""

    def __enter__(self) -> "Prefetcher":
        """Start reading."""
        self._feeder.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading; requests in flight are awaited unless the process ends, queued ones dropped."""
        self._closing.set()
        self._free.put(None)
        self._feeder.join()
        self._pool.shutdown(wait=not stop_requested(), cancel_futures=True)
        if not stop_requested():
            for buffer in self._taken:
                self._buffers.give(buffer)

    def next(self) -> LoadedSlab:
        """Return the next load once all its bytes are there.

        Raises:
            StockflowError: whatever reading it raised.
        """
        started = time.perf_counter()
        entry = self._loading.get()
        if isinstance(entry, BaseException):
            raise entry
        load, buffer, requests = entry
        for request in requests:
            request.result()
        self.wait_s += time.perf_counter() - started
        return LoadedSlab(load, buffer)

    def release(self, loaded: LoadedSlab) -> None:
        """Give a slab back for further reading."""
        self._free.put(loaded.buffer)

    def _feed(self) -> None:
        try:
            for load in _in_reading_order(self._steps):
                buffer = self._acquire()
                if buffer is None or self._closing.is_set():
                    return
                requests = [
                    self._pool.submit(self._read, request, buffer)
                    for whole in load.requests
                    if not self._is_copied(whole, buffer)
                    for request in split_request(whole)
                ]
                self._loading.put((load, buffer, requests))
        except BaseException as error:  # the consumer raises it: a thread has no caller
            self._loading.put(error)

    def _is_copied(self, request: Request, buffer: Bytes) -> bool:
        """Fill in what is in memory; return whether that was all."""
        place = request.offset
        for part in self._in_memory(request):
            buffer[place : place + len(part)] = part
            place += len(part)
        return place > request.offset

    def _acquire(self) -> Bytes | None:
        if self._free.empty() and len(self._taken) < self._num_slabs:
            self._taken.append(self._buffers.take())
            return self._taken[-1]
        return self._free.get()

    def _read(self, request: Request, buffer: Bytes) -> None:
        started = time.perf_counter()
        num_bytes = request.stop - request.start
        target = buffer.data[request.offset : request.offset + num_bytes]
        stamp = self._checkpoints[request.checkpoint].files[request.file]
        self._stores[request.checkpoint].read_into(request.file, request.start, target, stamp)
        self._on_read(num_bytes, time.perf_counter() - started)


def _in_reading_order(steps: Iterable[Step]) -> Iterator[Load]:
    for step in steps:
        for _ in range(0 if step.direct else step.num_reads):
            yield from step.loads
