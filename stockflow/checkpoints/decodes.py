"""Decodes: how a logical tensor is stored, and which bytes hold which of its elements. Pure values of the plan.

A *slot* is what one extent contributes to a run of elements. Kernels know plain floating-point numbers only: what is
stored otherwise is turned into such by a stage of the engine (``engine.stage``), which looks at nothing but these.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, NamedTuple, Protocol

from stockflow.checkpoints.header import DTYPES


class ByteRange(NamedTuple):
    """A run of bytes within an extent."""

    start: int
    stop: int


class Decode(Protocol):
    """How a logical tensor is stored."""

    @property
    def dtype(self) -> str:
        """Name of the element type that the header gives to the first extent."""

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are what kernels take."""

    @property
    def width(self) -> int:
        """Bytes of an element of the first extent."""

    @property
    def bytes_per_elem(self) -> float:
        """Bytes of all extents per element, the last run of a tensor aside."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Per extent, the boundary in bytes on which its elements must begin in memory."""

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return, per extent, the bytes that elements ``start`` to ``stop`` of a tensor of ``shape`` need."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers as kernels take them."""

    dtype: str
    is_plain: ClassVar = True
    width: int = field(init=False, compare=False)
    """bytes of an element"""

    def __post_init__(self) -> None:
        """Look the width up once: a plan asks a million times."""
        object.__setattr__(self, "width", DTYPES[self.dtype].bits // 8)

    @property
    def bytes_per_elem(self) -> float:
        """The width."""
        return self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the only extent."""
        return (self.width,)

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the run itself."""
        del shape
        return (ByteRange(self.width * start, self.width * stop),)


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Bytes that are carried over: an element of the reading is a byte, whatever ``dtype`` makes of them."""

    dtype: str
    is_plain: ClassVar = True
    width: ClassVar = 1

    @property
    def bytes_per_elem(self) -> float:
        """One."""
        return 1

    @property
    def widths(self) -> tuple[int, ...]:
        """One byte."""
        return (1,)

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the run itself."""
        del shape
        return (ByteRange(start, stop),)


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """Codes of one byte in blocks of a matrix, each block with a scale that multiplies them: block FP8.

    The first extent holds the codes, row by row, the second the scales, a grid of ``ceil(rows / block rows)`` by
    ``ceil(columns / block columns)``.
    """

    dtype: str
    """of the codes"""
    scale_dtype: str
    block: tuple[int, int]
    is_plain: ClassVar = False
    width: ClassVar = 1

    @property
    def bytes_per_elem(self) -> float:
        """A code, and its share of a scale; of a scale row that is needed in part all is read."""
        return 1 + self._scale_width / self.block[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a code and of a scale."""
        return 1, self._scale_width

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the codes themselves, and the rows of scales whose blocks they touch."""
        first, last = self.scale_rows(shape, start, stop)
        row_bytes = self.grid(shape)[1] * self._scale_width
        return ByteRange(start, stop), ByteRange(first * row_bytes, last * row_bytes)

    def scale_rows(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
        """Return the first row of scales that a run of elements needs, and one past the last."""
        if start == stop:
            return 0, 0
        band = self.block[0] * shape[1]
        return start // band, -(-stop // band)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns of scales a matrix has."""
        rows, columns = shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @property
    def _scale_width(self) -> int:
        return DTYPES[self.scale_dtype].bits // 8


@cache
def plain(dtype: str) -> Plain:
    """Return the one value for a dtype: a plan has a million operands."""
    return Plain(dtype)


@cache
def verbatim(dtype: str) -> Verbatim:
    """Return the one value for a dtype."""
    return Verbatim(dtype)


class RowRun(NamedTuple):
    """Consecutive rows: ``start`` to ``stop`` of a source are rows ``to`` and after of the reading."""

    start: int
    stop: int
    to: int


class RowFill(NamedTuple):
    """Rows of the reading that a source lacks, from ``start`` to ``stop``: the mean of the same rows of operands."""

    start: int
    stop: int
    of: tuple[int, ...]
    """operands of the reading, in the order in which they are added up; one alone is taken as it is"""


@dataclass(frozen=True, slots=True)
class RowRuns:
    """Which row of a source is which row of a reading. Rows that neither a run nor a fill names are zero.

    A row of a source may be used often, or never; of a reading each is named once at most.
    """

    num_source_rows: int
    runs: tuple[RowRun, ...]
    """in the order of ``to``"""
    fills: tuple[RowFill, ...] = ()
    """in order; the operands they name have these rows of their own"""

    def __post_init__(self) -> None:
        """Hold the runs against each other.

        Raises:
            ValueError: a run is empty, beyond the source, or begins before the one before it ends; so with fills.
        """
        end = 0
        for run in self.runs:
            if not 0 <= run.start < run.stop <= self.num_source_rows:
                raise ValueError(f"{run} is no run of the {self.num_source_rows} rows of a source")
            if run.to < end:
                raise ValueError(f"{run} begins at row {run.to}, where the run before it goes on to {end}")
            end = run.to + run.stop - run.start
        end = 0
        for fill in self.fills:
            if not end <= fill.start < fill.stop or not fill.of:
                raise ValueError(f"{fill} is no fill behind row {end}")
            end = fill.stop

    def within(self, start: int, stop: int, row_elems: int) -> Iterator[RowRun]:
        """Yield the runs of *elements* that fall within elements ``start`` to ``stop`` of the reading, in order."""
        place = max(bisect_right(self.runs, start // row_elems, key=lambda run: run.to) - 1, 0) if row_elems else 0
        for number in range(place, len(self.runs)):
            run = self.runs[number]
            first = max(run.to * row_elems, start)
            last = min((run.to + run.stop - run.start) * row_elems, stop)
            if run.to * row_elems >= stop:
                return
            if first < last:
                shift = (run.start - run.to) * row_elems
                yield RowRun(first + shift, last + shift, first)

    def fills_within(self, start: int, stop: int, row_elems: int) -> Iterator[RowFill]:
        """Yield the fills of *elements* that fall within elements ``start`` to ``stop`` of the reading, in order."""
        place = bisect_right(self.fills, start // row_elems, key=lambda fill: fill.stop) if row_elems else 0
        for number in range(place, len(self.fills)):
            fill = self.fills[number]
            if fill.start * row_elems >= stop:
                return
            yield RowFill(max(fill.start * row_elems, start), min(fill.stop * row_elems, stop), fill.of)


def row_elems(shape: tuple[int, ...]) -> int:
    """Return how many elements a row of the first dimension has."""
    return math.prod(shape[1:])
