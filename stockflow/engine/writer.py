"""The ordered writer: hashes and writes finished bytes while the next ones are computed."""

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from stockflow.engine.buffers import Pool
from stockflow.kernels.arrays import Bytes
from stockflow.storage import Sink


class OrderedWriter:
    """Writes buffers in the order they are emitted; buffers are reused, so at most a few exist."""

    def __init__(self, sink: Sink, *, pool: Pool, num_buffers: int) -> None:
        """Write to ``sink`` from a thread of our own, with ``num_buffers`` buffers of ``pool``."""
        self._sink = sink
        self._buffers = pool
        self._num_buffers = num_buffers
        self._taken: list[Bytes] = []
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: list[Future[None]] = []
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.hash_s = 0.0
        self.write_s = 0.0
        self.wait_s = 0.0
        """seconds the producer waited for a free buffer"""

    def __enter__(self) -> "OrderedWriter":
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is not written yet; ``finish`` is what writes everything."""
        self._pool.shutdown(cancel_futures=True)
        for buffer in self._taken:
            self._buffers.give(buffer)

    def write_header(self, payload: bytes) -> None:
        """Write the first bytes of the file, before any buffer is emitted."""
        self._append(memoryview(payload))

    def buffer(self) -> Bytes:
        """Return a buffer to fill, waiting for one if need be."""
        started = time.perf_counter()
        self._raise_failures()
        if self._free.empty() and len(self._taken) < self._num_buffers:
            self._taken.append(self._buffers.take())
            return self._taken[-1]
        buffer = self._free.get()
        self._raise_failures()
        self.wait_s += time.perf_counter() - started
        return buffer

    def emit(self, buffer: Bytes, num_bytes: int) -> None:
        """Hand over the first ``num_bytes`` of a buffer; it is written after all earlier ones."""
        self._pending.append(self._pool.submit(self._write_buffer, buffer, num_bytes))

    def finish(self) -> tuple[int, str]:
        """Wait until everything is written; return size in bytes and sha256 in hex."""
        for future in self._pending:
            future.result()
        return self.num_bytes, self._digest.hexdigest()

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def _write_buffer(self, buffer: Bytes, num_bytes: int) -> None:
        try:
            self._append(buffer.data[:num_bytes])
        finally:
            self._free.put(buffer)

    def _append(self, payload: memoryview) -> None:
        started = time.perf_counter()
        self._digest.update(payload)
        hashed = time.perf_counter()
        self._sink.write(payload)
        self.hash_s += hashed - started
        self.write_s += time.perf_counter() - hashed
        self.num_bytes += payload.nbytes
