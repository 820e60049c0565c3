"""The read schedule: which bytes are read together, in which order, how often. Pure.

A *unit* is a run of elements that is decided as one: a tensor, a chunk of whole rows, an expert. A *load* is
what fills one slab: a chunk of one unit, or many small units side by side, so that neighbours in a file are
read by one request. A *step* is a load of whole units, or one unit over several loads. The loads of a *direct* step
fill no slab: threads read what they compute next.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stockflow.planning.budget import PIECE_OVERHEAD, Workspace, overhead_bytes
from stockflow.planning.job import Reading
from stockflow.planning.operands import ExtentRanges, runs_of
from stockflow.planning.spans import SPAN_ELEMS, chunk_step
from stockflow.planning.work import Work
from stockflow.storage.parts import RANGE_BYTES

ALIGNMENT = 64
"""Of requests in a slab: a multiple of every width."""
MAX_GAP_BYTES = PIECE_OVERHEAD
"""Between ranges that are read by one request: a slab has room for as much beside each range, and a request to object
storage costs what a megabyte does. Tensors that are not read, such as the shapes of packed codes, lie there."""


class LoadPiece(NamedTuple):
    """A run of elements of one tensor: whole spans of it."""

    work: Work
    start: int
    stop: int


class Request(NamedTuple):
    """One range to read into a slab, or that a direct step is about to read."""

    checkpoint: int
    file: str
    start: int
    stop: int
    offset: int
    """where in the slab the bytes go"""


@dataclass(frozen=True)
class Load:
    """What fills one slab."""

    pieces: tuple[LoadPiece, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        """The ranges to read; ranges that touch in a file, or nearly so, are one request."""
        return self._layout[0]

    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per piece and slot, where its bytes start in the slab."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[tuple[Request, ...], tuple[tuple[int, ...], ...]]:
        return _lay_out(self.pieces)


@dataclass(frozen=True, slots=True)
class Step:
    """Loads that are merged together."""

    loads: tuple[Load, ...]
    num_sweeps: int
    """how often the loads go by: statistics passes, then the combine"""
    held: bool
    """whether the loads stay in memory between sweeps; otherwise they are read again"""
    direct: bool = False
    """whether the threads that compute read the loads, span by span"""

    @property
    def num_reads(self) -> int:
        """How often each load is read."""
        return 1 if self.held else self.num_sweeps


def schedule(works: Sequence[Work], workspace: Workspace) -> Iterator[Step]:
    """Yield the steps that go through ``works`` in order within ``workspace``."""
    packing = _Packing(workspace.slab_bytes)
    for work in works:
        for unit in _units(work, workspace.chunk_elems(work) if work.reading.num_elems else 0):
            is_large = workspace.direct and unit[-1].stop - unit[0].start > SPAN_ELEMS and not work.place_beside[1]
            if len(unit) > 1 or is_large:
                yield from packing.flushed()
                yield _large(unit, workspace)
            else:
                yield from packing.flushed_for(unit[0])
    yield from packing.flushed()


class _Packing:
    """Small units on their way into one load."""

    def __init__(self, slab_bytes: int) -> None:
        self._slab_bytes = slab_bytes
        self._pieces: list[LoadPiece] = []
        self._filled = 0
        self._num_expected = 0
        """pieces that share the bytes of the last but for their place, so that these are counted already"""

    def flushed(self) -> Iterator[Step]:
        """Yield a step of what is there, if anything is."""
        if self._pieces:
            yield _packed(self._pieces)
        self._pieces, self._filled, self._num_expected = [], 0, 0

    def flushed_for(self, piece: LoadPiece) -> Iterator[Step]:
        """Add a piece; yield a step of what was there if both do not fit."""
        number, num_beside = piece.work.place_beside
        size = 0 if number and self._num_expected else _slab_bytes(piece)
        if self._pieces and self._filled + size > self._slab_bytes:
            yield from self.flushed()
        self._num_expected = max(self._num_expected - 1, 0) if number else max(num_beside - 1, 0)
        self._pieces.append(piece)
        self._filled += size


def _slab_bytes(piece: LoadPiece) -> int:
    """What a piece takes in a slab, with those beside it."""
    reading = piece.work.reading
    size = math.ceil((piece.stop - piece.start) * reading.bytes_per_elem) + overhead_bytes(reading)
    return size * max(piece.work.place_beside[1], 1)


def _units(work: Work, chunk_elems: int) -> Iterator[list[LoadPiece]]:
    """The units of a tensor, each as the chunks it is read in; an empty tensor is one empty unit."""
    reading = work.reading
    if reading.num_elems == 0:
        yield [LoadPiece(work, 0, 0)]
        return
    chunks = _chunks(work, chunk_elems)
    if reading.group_elems == reading.num_elems:
        yield list(chunks)
    elif reading.group_elems <= SPAN_ELEMS:
        yield from ([chunk] for chunk in chunks)
    else:
        unit: list[LoadPiece] = []
        for chunk in chunks:
            unit.append(chunk)
            if chunk.stop % reading.group_elems == 0:
                yield unit
                unit = []


def _chunks(work: Work, chunk_elems: int) -> Iterator[LoadPiece]:
    """Consecutive spans, as many as fit a slab, never beyond the end of a group larger than a span."""
    reading = work.reading
    step = chunk_step(reading.group_elems, chunk_elems, reading.together, reading.band)
    stretch = reading.group_elems if reading.group_elems > SPAN_ELEMS else reading.num_elems
    for first in range(0, reading.num_elems, stretch):
        for start in range(first, first + stretch, step):
            yield LoadPiece(work, start, min(start + step, first + stretch))


def _packed(pieces: Sequence[LoadPiece]) -> Step:
    # All rounds of a unit inside one load run over memory, so it is read once.
    return Step((Load(tuple(pieces)),), num_sweeps=1, held=True)


def _large(unit: Sequence[LoadPiece], workspace: Workspace) -> Step:
    num_sweeps = unit[0].work.num_sweeps
    held = not workspace.direct and num_sweeps > 1 and len(unit) <= workspace.num_slabs
    return Step(tuple(Load((piece,)) for piece in unit), num_sweeps, held, workspace.direct)


_Range = tuple[int, int, int, int, int]
"""Begin and end in a file, the boundary it must begin on, and whose it is: the numbers of a piece and of its slot."""


def _lay_out(pieces: Sequence[LoadPiece]) -> tuple[tuple[Request, ...], tuple[tuple[int, ...], ...]]:
    """Requests and offsets of a load: ranges in file order, every slot on a boundary of its elements."""
    whole: dict[tuple[int, str], list[_Range]] = defaultdict(list)
    scattered = []
    for index, (work, first, last) in enumerate(pieces):
        reading = work.reading
        if first == last:
            continue
        if reading.is_plain:  # as nearly all are: what follows says the same of them, with more ado
            for number, (checkpoint, _, ((file, start),), decode, _) in enumerate(reading.operands):
                width = decode.width
                whole[checkpoint, file].append((start + width * first, start + width * last, width, index, number))
            continue
        if all(operand.rows is None for operand in reading.operands):
            for number, (checkpoint, file, start, stop, width) in enumerate(_runs(reading, first, last)):
                if start < stop:
                    whole[checkpoint, file].append((start, stop, width, index, number))
            continue
        for number, slot in enumerate(reading.slots(first, last)):
            if len(slot.ranges) == 1 and slot.num_bytes:
                whole[slot.checkpoint, slot.file].append((*slot.ranges[0], slot.width, index, number))
            elif slot.num_bytes:
                scattered.append((slot, index, number))
    requests: list[Request] = []
    offsets = [[0] * work.reading.num_slots for work, _, _ in pieces]
    for (checkpoint, file), ranges in sorted(whole.items()):
        for start, stop, run in _together(ranges):
            offset = _next_boundary(requests)
            requests.append(Request(checkpoint, file, start, stop, offset))
            for own, _, _, index, number in run:
                offsets[index][number] = offset + own - start
    for slot, index, number in scattered:
        offsets[index][number] = _next_boundary(requests)
        requests += gathered(slot, offsets[index][number])
    return tuple(requests), tuple(map(tuple, offsets))


def _together(ranges: list[_Range]) -> Iterator[tuple[int, int, list[_Range]]]:
    """Yield begin, end and members of the runs of a file that are read by one request.

    Ranges lie next to each other, or nearly so, and each begins on a boundary of its elements.
    """
    ranges.sort()
    (begin, end, *_), *_ = ranges
    run: list[_Range] = []
    for each in ranges:
        start, stop, width, _, _ = each
        if start > end + MAX_GAP_BYTES or (start - begin) % width:
            yield begin, end, run
            begin, end, run = start, stop, []
        if stop > end:
            end = stop
        run.append(each)
    yield begin, end, run


def _runs(reading: Reading, first: int, last: int) -> Iterator[tuple[int, str, int, int, int]]:
    """Yield checkpoint, file, ends and boundary of what every extent contributes to elements of a reading."""
    for checkpoint, _, extents, decode, _ in reading.operands:
        for (file, at), (start, stop, width) in zip(extents, runs_of(decode, reading.shape, first, last), strict=True):
            yield checkpoint, file, at + start, at + stop, width


def gathered(slot: ExtentRanges, offset: int) -> Iterator[Request]:
    """The requests of ranges that lie side by side in the slab; those that do so in the file too are one."""
    pending: Request | None = None
    for start, stop in slot.ranges:
        if pending and start == pending.stop:
            pending = pending._replace(stop=stop)
        else:
            if pending:
                yield pending
            pending = Request(slot.checkpoint, slot.file, start, stop, offset)
        offset += stop - start
    if pending:
        yield pending


def _next_boundary(requests: Sequence[Request]) -> int:
    end = requests[-1].offset + requests[-1].stop - requests[-1].start if requests else 0
    return -(-end // ALIGNMENT) * ALIGNMENT


def split_request(request: Request) -> Iterator[Request]:
    """Yield a range in portions of the size that object storage serves best."""
    for start in range(request.start, request.stop, RANGE_BYTES):
        stop = min(start + RANGE_BYTES, request.stop)
        yield Request(request.checkpoint, request.file, start, stop, request.offset + start - request.start)
