"""Reading without a detour: the thread that computes a span reads it, into scratch that stays in its caches.

For local files only. What is read again comes from the page cache, which costs less than fresh memory to hold it in:
copying five BF16 sources took 1.2 ns per element, first touching as much memory 2 to 10 ns on virtual machines.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from stockflow.engine.buffers import allocate
from stockflow.engine.units import LoadedPiece
from stockflow.kernels.arrays import Bytes
from stockflow.kernels.floats import Slab, slab_of
from stockflow.planning.budget import LOOKAHEAD_BYTES
from stockflow.planning.plan import CheckpointRef, TensorJob
from stockflow.planning.reads import ALIGNMENT, Load, Step
from stockflow.storage import LocalStore, PinnedFile


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


class DirectReader:
    """Reads the sources of spans into the scratch of the calling thread; files stay open until the context ends."""

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        stores: Sequence[LocalStore],
        scratch: Scratch,
        on_read: Callable[[int, float], None],
    ) -> None:
        """Prepare.

        Args:
            checkpoints: the inputs with their stamps.
            stores: one open store per checkpoint.
            scratch: where bytes go.
            on_read: called with the bytes and seconds of each span, from several threads.
        """
        self._checkpoints = checkpoints
        self._stores = stores
        self._scratch = scratch
        self._on_read = on_read
        self._opened = ExitStack()
        self._files: dict[tuple[int, str], PinnedFile] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> "DirectReader":
        """Begin with no file open."""
        _allow_many_files()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._opened.close()

    def read(self, job: TensorJob, start: int, stop: int) -> LoadedPiece:
        """Return elements of a tensor, valid until this thread reads again.

        Raises:
            InputChangedError: a file is no longer the planned one.
            StorageError: it cannot be read.
        """
        started = time.perf_counter()
        sizes = [width * (stop - start) for width in job.source_widths]
        offsets = _aligned(sizes)
        buffer, slab = self._scratch.of_this_thread(offsets[-1] + sizes[-1])
        for source, width, size, offset in zip(job.sources, job.source_widths, sizes, offsets, strict=True):
            file = self._file(source.checkpoint, source.extent.file)
            file.read_into(source.extent.start + width * start, buffer.data[offset : offset + size])
        self._on_read(sum(sizes), time.perf_counter() - started)
        return LoadedPiece(job, start, stop, slab, buffer, offsets)

    def read_soon(self, load: Load) -> None:
        """Let the disk begin with what will be read later."""
        for request in load.requests:
            self._file(request.checkpoint, request.file).read_soon(request.start, request.stop - request.start)

    def _file(self, checkpoint: int, key: str) -> PinnedFile:
        found = self._files.get((checkpoint, key))
        if found is None:
            with self._opening:
                found = self._files.get((checkpoint, key))
                if found is None:
                    stamp = self._checkpoints[checkpoint].files[key]
                    found = self._opened.enter_context(self._stores[checkpoint].open_pinned(key, stamp))
                    self._files[checkpoint, key] = found
        return found


def _allow_many_files() -> None:
    """Let this process open as many files as it may: a base and five models of 191 shards each are 1,146."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _aligned(sizes: Sequence[int]) -> tuple[int, ...]:
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(-(-(offsets[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return tuple(offsets)


@dataclass(frozen=True, slots=True)
class UnreadPiece:
    """A run of elements that is read when a thread comes to it."""

    job: TensorJob
    start: int
    stop: int
    reader: DirectReader

    def narrow(self, start: int, stop: int) -> "UnreadPiece":
        """Return what lies between two elements of the tensor."""
        return UnreadPiece(self.job, start, stop, self.reader)

    def loaded(self) -> LoadedPiece:
        """Read it into this thread's scratch."""
        return self.reader.read(self.job, self.start, self.stop)


class Lookahead:
    """Keeps the disk some way ahead of the first sweep over what direct steps will read."""

    def __init__(self, steps: Sequence[Step], reader: DirectReader) -> None:
        """Begin before the first step."""
        self._loads = (load for step in steps if step.direct for load in step.loads)
        self._reader = reader
        self._ahead = 0

    def passed(self, load: Load) -> None:
        """Take note that a load is begun, and announce later ones."""
        self._ahead -= _num_bytes(load)
        while self._ahead < LOOKAHEAD_BYTES and (later := next(self._loads, None)):
            self._ahead += _num_bytes(later)
            self._reader.read_soon(later)


def _num_bytes(load: Load) -> int:
    return sum(piece.job.bytes_per_elem * (piece.stop - piece.start) for piece in load.pieces)


class DirectUnit:
    """A unit whose spans are read by the threads that compute them, on every sweep."""

    def __init__(self, step: Step, reader: DirectReader, lookahead: Lookahead) -> None:
        """Take the loads of ``step`` as the pieces of a sweep."""
        pieces = [load.pieces[0] for load in step.loads]
        self.job = pieces[0].job
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self._step = step
        self._reader = reader
        self._lookahead: Lookahead | None = lookahead

    def sweep(self, *, last: bool) -> Iterator[UnreadPiece]:
        """Yield the pieces; those of the first sweep are announced to the disk."""
        lookahead, self._lookahead = self._lookahead, None
        for load in self._step.loads:
            if lookahead:
                lookahead.passed(load)
            (piece,) = load.pieces
            yield UnreadPiece(piece.job, piece.start, piece.stop, self._reader)
