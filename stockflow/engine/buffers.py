"""Reusable memory: buffers that are given back and taken again, because fresh pages cost more than what fills them."""

import mmap
import threading
from collections.abc import Callable, Sequence

import numpy as np

from stockflow.kernels.arrays import Bytes
from stockflow.kernels.floats import Slab, slab_of
from stockflow.planning.reads import ALIGNMENT

Allocate = Callable[[int], Bytes]


def allocate(num_bytes: int) -> Bytes:
    """Return zeroed memory of its own, page-aligned, on huge pages where the system has them; freed when dropped."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:num_bytes]


def aligned(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where runs of these sizes begin, one behind the other, each on a boundary; in bytes."""
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(-(-(offsets[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return tuple(offsets)


class Pool:
    """Buffers of one size. Not for several threads at once."""

    def __init__(self, allocate: Allocate) -> None:
        """Start empty."""
        self._allocate = allocate
        self._num_bytes = 0
        self._free: list[Bytes] = []

    def fit(self, num_bytes: int, count: int) -> None:
        """From now on hand out buffers of ``num_bytes``; keep at most ``count`` that nobody has."""
        if num_bytes != self._num_bytes:
            self._free.clear()
        self._num_bytes = num_bytes
        del self._free[count:]

    def take(self) -> Bytes:
        """Return a buffer; its content is undefined."""
        return self._free.pop() if self._free else self._allocate(self._num_bytes)

    def give(self, buffer: Bytes) -> None:
        """Return a buffer that nobody uses any more."""
        if buffer.nbytes == self._num_bytes:
            self._free.append(buffer)


class Scratch:
    """A buffer per thread, as large as was needed so far; reused because it is in that thread's caches."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._threads = threading.local()

    def of_this_thread(self, num_bytes: int) -> tuple[Bytes, Slab]:
        """Return at least ``num_bytes``; what they held before is gone."""
        buffer, slab = getattr(self._threads, "buffer", (np.empty(0, np.uint8), None))
        if slab is None or buffer.nbytes < num_bytes:
            buffer = allocate(num_bytes)
            slab = slab_of(buffer)
            self._threads.buffer = buffer, slab
        return buffer, slab
