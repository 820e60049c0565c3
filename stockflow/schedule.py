"""The read schedule: which bytes are read together, in which order, how often. Pure.

A *unit* is a run of elements that is decided as one: a tensor, a chunk of whole rows, an expert. A *load* is
what fills one slab: a chunk of one unit, or many small units side by side, so that neighbours in a file are
read by one request. A *step* is a load of whole units, or one unit over several loads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stockflow.budget import OPTIMAL_READ_BYTES, PIECE_OVERHEAD, Workspace
from stockflow.plan import TensorJob
from stockflow.spans import SPAN_ELEMS, span_bounds

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one tensor: whole spans of it."""

    job: TensorJob
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Request:
    """One range to read into a slab."""

    checkpoint: int
    file: str
    start: int
    stop: int
    offset: int
    """where in the slab the bytes go"""


@dataclass(frozen=True, slots=True)
class Load:
    """What fills one slab."""

    pieces: tuple[Piece, ...]
    requests: tuple[Request, ...]
    offsets: tuple[tuple[int, ...], ...]
    """per piece and source, where its bytes start in the slab"""


@dataclass(frozen=True, slots=True)
class Step:
    """Loads that are merged together."""

    loads: tuple[Load, ...]
    num_sweeps: int
    """how often the loads go by: statistics passes, then the combine"""
    held: bool
    """whether the loads stay in memory between sweeps; otherwise they are read again"""

    @property
    def num_reads(self) -> int:
        """How often each load is read."""
        return 1 if self.held else self.num_sweeps


def schedule(jobs: Sequence[TensorJob], workspace: Workspace) -> Iterator[Step]:
    """Yield the steps that merge ``jobs`` in order within ``workspace``."""
    small: list[Piece] = []
    filled = 0
    for job in jobs:
        for unit in _units(job, workspace.chunk_elems(job) if job.num_elems else 0):
            if len(unit) > 1:
                if small:
                    yield _packed(small)
                    small, filled = [], 0
                yield _large(unit, workspace)
                continue
            size = (unit[0].stop - unit[0].start) * job.bytes_per_elem + PIECE_OVERHEAD * len(job.sources)
            if small and filled + size > workspace.slab_bytes:
                yield _packed(small)
                small, filled = [], 0
            small.append(unit[0])
            filled += size
    if small:
        yield _packed(small)


def _units(job: TensorJob, chunk_elems: int) -> Iterator[list[Piece]]:
    """The units of a tensor, each as the chunks it is read in; an empty tensor is one empty unit."""
    if job.num_elems == 0:
        yield [Piece(job, 0, 0)]
        return
    chunks = _chunks(job, chunk_elems)
    if job.group_elems == job.num_elems:
        yield list(chunks)
    elif job.group_elems <= SPAN_ELEMS:
        yield from ([chunk] for chunk in chunks)
    else:
        unit: list[Piece] = []
        for chunk in chunks:
            unit.append(chunk)
            if chunk.stop % job.group_elems == 0:
                yield unit
                unit = []


def _chunks(job: TensorJob, chunk_elems: int) -> Iterator[Piece]:
    """Consecutive spans, as many as fit a slab, never beyond the end of a group larger than a span."""
    start = stop = 0
    large_groups = job.group_elems > SPAN_ELEMS
    for span_start, span_stop in span_bounds(job.num_elems, job.group_elems):
        crosses = large_groups and span_start % job.group_elems == 0 and span_start > start
        if crosses or span_stop - start > chunk_elems:
            yield Piece(job, start, stop)
            start = span_start
        stop = span_stop
    yield Piece(job, start, stop)


def _packed(pieces: Sequence[Piece]) -> Step:
    # All rounds of a unit inside one load run over memory, so it is read once.
    return Step((_load(pieces),), num_sweeps=1, held=True)


def _large(unit: Sequence[Piece], workspace: Workspace) -> Step:
    num_sweeps = unit[0].job.num_statistic_passes + 1
    held = num_sweeps > 1 and len(unit) <= workspace.num_slabs
    return Step(tuple(_load([piece]) for piece in unit), num_sweeps, held)


def _load(pieces: Sequence[Piece]) -> Load:
    """Lay the ranges of all pieces out in a slab; ranges that touch in a file become one request."""
    wanted = [
        (source.checkpoint, source.extent.file, source.extent.start + width * piece.start,
         width * (piece.stop - piece.start), index, number)
        for index, piece in enumerate(pieces)
        for number, source in enumerate(piece.job.sources)
        for width in (piece.job.source_width(source),)
    ]  # fmt: skip
    requests: list[Request] = []
    offsets = [[0] * len(piece.job.sources) for piece in pieces]
    end_of_slab = 0
    for checkpoint, file, start, size, index, number in sorted(wanted):
        last = requests[-1] if requests else None
        if last and (last.checkpoint, last.file) == (checkpoint, file) and start <= last.stop:
            requests[-1] = Request(checkpoint, file, last.start, max(start + size, last.stop), last.offset)
        else:
            requests.append(Request(checkpoint, file, start, start + size, _aligned_like(end_of_slab, start)))
        last = requests[-1]
        offsets[index][number] = last.offset + start - last.start
        end_of_slab = last.offset + last.stop - last.start
    return Load(
        tuple(pieces),
        tuple(request for request in requests if request.stop > request.start),
        tuple(tuple(row) for row in offsets),
    )


def _aligned_like(offset: int, file_start: int) -> int:
    """The first place from ``offset`` on that is aligned in the slab as ``file_start`` is in the file."""
    return offset + (file_start - offset) % ALIGNMENT


def split_request(request: Request) -> Iterator[Request]:
    """Yield a range in portions of the size that object storage serves best."""
    for start in range(request.start, request.stop, OPTIMAL_READ_BYTES):
        stop = min(start + OPTIMAL_READ_BYTES, request.stop)
        yield Request(request.checkpoint, request.file, start, stop, request.offset + start - request.start)
