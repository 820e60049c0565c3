"""The read schedule: which bytes are read together, in which order, how often. Pure.

A *unit* is a run of elements that is decided as one: a tensor, a chunk of whole rows, an expert. A *load* is
what fills one slab: a chunk of one unit, or many small units side by side, so that neighbours in a file are
read by one request. A *step* is a load of whole units, or one unit over several loads. The loads of a *direct* step
fill no slab: threads read what they compute next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stockflow.planning.budget import OPTIMAL_READ_BYTES, PIECE_OVERHEAD, Workspace
from stockflow.planning.plan import TensorJob
from stockflow.planning.spans import SPAN_ELEMS, chunk_step

ALIGNMENT = 64


class Piece(NamedTuple):
    """A run of elements of one tensor: whole spans of it."""

    job: TensorJob
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

    pieces: tuple[Piece, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        """The ranges to read; ranges that touch in a file are one request."""
        return self._layout[0]

    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per piece and source, where its bytes start in the slab."""
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


def schedule(jobs: Sequence[TensorJob], workspace: Workspace) -> Iterator[Step]:
    """Yield the steps that merge ``jobs`` in order within ``workspace``."""
    small: list[Piece] = []
    filled = 0
    for job in jobs:
        for unit in _units(job, workspace.chunk_elems(job) if job.num_elems else 0):
            if len(unit) > 1 or (workspace.direct and unit[-1].stop - unit[0].start > SPAN_ELEMS):
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
    step = chunk_step(job.group_elems, chunk_elems)
    stretch = job.group_elems if job.group_elems > SPAN_ELEMS else job.num_elems
    for first in range(0, job.num_elems, stretch):
        for start in range(first, first + stretch, step):
            yield Piece(job, start, min(start + step, first + stretch))


def _packed(pieces: Sequence[Piece]) -> Step:
    # All rounds of a unit inside one load run over memory, so it is read once.
    return Step((Load(tuple(pieces)),), num_sweeps=1, held=True)


def _large(unit: Sequence[Piece], workspace: Workspace) -> Step:
    num_sweeps = unit[0].job.num_statistic_passes + 1
    held = not workspace.direct and num_sweeps > 1 and len(unit) <= workspace.num_slabs
    return Step(tuple(Load((piece,)) for piece in unit), num_sweeps, held, workspace.direct)


def _lay_out(pieces: Sequence[Piece]) -> tuple[tuple[Request, ...], tuple[tuple[int, ...], ...]]:
    """Requests and offsets of a load: ranges in file order, every source on a boundary of its elements."""
    wanted = []
    for index, (job, first, last) in enumerate(pieces):
        if first == last:
            continue
        for number, (source, width) in enumerate(zip(job.sources, job.source_widths, strict=True)):
            file, start = source.extent
            wanted.append((source.checkpoint, file, start + width * first, start + width * last, width, index, number))
    requests: list[Request] = []
    offsets = [[0] * len(piece.job.sources) for piece in pieces]
    for checkpoint, file, start, stop, width, index, number in sorted(wanted):
        previous = requests[-1] if requests else None
        if previous and _continues(previous, checkpoint, file, start, width):
            requests[-1] = previous._replace(stop=max(stop, previous.stop))
        else:
            end = previous.offset + previous.stop - previous.start if previous else 0
            requests.append(Request(checkpoint, file, start, stop, -(-end // ALIGNMENT) * ALIGNMENT))
        offsets[index][number] = requests[-1].offset + start - requests[-1].start
    return tuple(requests), tuple(map(tuple, offsets))


def _continues(previous: Request, checkpoint: int, file: str, start: int, width: int) -> bool:
    """Whether a range can be read together with the previous one and still begin on a boundary of its elements."""
    touches = (previous.checkpoint, previous.file) == (checkpoint, file) and start <= previous.stop
    return touches and (previous.offset + start - previous.start) % width == 0


def split_request(request: Request) -> Iterator[Request]:
    """Yield a range in portions of the size that object storage serves best."""
    for start in range(request.start, request.stop, OPTIMAL_READ_BYTES):
        stop = min(start + OPTIMAL_READ_BYTES, request.stop)
        yield Request(request.checkpoint, request.file, start, stop, request.offset + start - request.start)
