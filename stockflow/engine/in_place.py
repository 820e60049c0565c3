"""Reading without a detour: the thread that computes a span reads it, into scratch that stays in its caches.

For local files only. What is read again comes from the page cache, which costs less than fresh memory to hold it in:
copying five BF16 sources took 1.2 ns per element, first touching as much memory 2 to 10 ns on virtual machines.
"""

import math
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from stockflow.engine.buffers import Scratch, aligned
from stockflow.engine.pieces import LoadedPiece, Piece
from stockflow.engine.stage import DecodingStage
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.planning.budget import LOOKAHEAD_BYTES, SLOT_ROOM
from stockflow.planning.job import Reading
from stockflow.planning.operands import ExtentRanges
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.reads import Load, Step, gathered
from stockflow.planning.work import Work
from stockflow.storage import PinnedFile, ReadsInPlace


class DirectReader:
    """Reads the sources of spans into the scratch of the calling thread; files stay open until the context ends."""

    def __init__(
        self,
        checkpoints: Sequence[CheckpointRef],
        stores: Sequence[ReadsInPlace],
        scratch: Scratch,
        stage: DecodingStage,
        on_read: Callable[[int, float], None],
    ) -> None:
        """Prepare.

        Args:
            checkpoints: the inputs with their stamps.
            stores: one open store per checkpoint.
            scratch: where bytes go.
            stage: what decodes them.
            on_read: called with the bytes and seconds of each span, from several threads.
        """
        self._checkpoints = checkpoints
        self._stores = stores
        self._scratch = scratch
        self._stage = stage
        self._on_read = on_read
        self._threads = threading.local()
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

    def read(self, reading: Reading, start: int, stop: int) -> Piece:
        """Return elements in memory, valid until this thread reads again.

        Raises:
            InputChangedError: a file is no longer the planned one.
            StorageError: it cannot be read.
        """
        if not reading.is_plain:
            return self._read_slots(reading, start, stop)
        self._threads.held = None, start, {}
        started = time.perf_counter()
        sizes = [width * (stop - start) for width in reading.widths]
        offsets = aligned(sizes)
        buffer, slab = self._scratch.of_this_thread(offsets[-1] + sizes[-1])
        for operand, width, size, offset in zip(reading.operands, reading.widths, sizes, offsets, strict=True):
            ((key, first),) = operand.extents
            self._file(operand.checkpoint, key).read_into(first + width * start, buffer.data[offset : offset + size])
        self._on_read(sum(sizes), time.perf_counter() - started)
        return LoadedPiece(reading, start, stop, slab, buffer, offsets, reading.dtypes, reading.widths)

    def _read_slots(self, reading: Reading, start: int, stop: int) -> Piece:
        started = time.perf_counter()
        slots = list(reading.slots(start, stop))
        offsets = aligned([-(-slot.num_bytes // SLOT_ROOM) * SLOT_ROOM for slot in slots])
        buffer, slab = self._scratch.of_this_thread(offsets[-1] + slots[-1].num_bytes)
        held = self._held_in(buffer, start)
        num_read = 0
        for slot, offset in zip(slots, offsets, strict=True):
            if held.get(offset) == slot:
                continue
            num_read += slot.num_bytes
            file = self._file(slot.checkpoint, slot.file)
            for request in gathered(slot, offset):
                end = request.offset + request.stop - request.start
                file.read_into(request.start, buffer.data[request.offset : end])
        self._threads.held = buffer, start, dict(zip(offsets, slots, strict=True))
        self._on_read(num_read, time.perf_counter() - started)
        return self._stage.piece(reading, start, stop, slab, buffer, offsets)

    def _held_in(self, buffer: Bytes, start: int) -> Mapping[int, ExtentRanges]:
        """Return what this thread still holds of another span, by where it lies: factors that all spans share."""
        held_in, before, held = getattr(self._threads, "held", (None, start, {}))
        self._threads.held = None, start, {}
        return held if held_in is buffer and before != start else {}

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


@dataclass(frozen=True, slots=True)
class UnreadPiece:
    """A run of elements that is read when a thread comes to it."""

    reading: Reading
    start: int
    stop: int
    reader: DirectReader

    def narrow(self, start: int, stop: int) -> "UnreadPiece":
        """Return what lies between two elements of the tensor."""
        return UnreadPiece(self.reading, start, stop, self.reader)

    def loaded(self) -> LoadedPiece:
        """Read it into this thread's scratch."""
        return self.reader.read(self.reading, self.start, self.stop).loaded()

    def added_up(self, weights_N: Floats) -> LoadedPiece:
        """Read it into this thread's scratch, and add the changes up there."""
        return self.reader.read(self.reading, self.start, self.stop).added_up(weights_N)


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
    return math.ceil(sum(piece.work.reading.bytes_per_elem * (piece.stop - piece.start) for piece in load.pieces))


class DirectUnit:
    """A unit whose spans are read by the threads that compute them, on every sweep."""

    def __init__(self, step: Step, reader: DirectReader, lookahead: Lookahead) -> None:
        """Take the loads of ``step`` as the pieces of a sweep."""
        pieces = [load.pieces[0] for load in step.loads]
        self.work: Work = pieces[0].work
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
            yield UnreadPiece(piece.work.reading, piece.start, piece.stop, self._reader)
