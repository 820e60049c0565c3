"""Decodes: how a logical tensor is stored, and which bytes hold which of its elements. Pure values of the plan.

A *slot* is what one extent contributes to a run of elements. Kernels know plain floating-point numbers only: what is
stored otherwise is turned into such by a stage of the engine (``engine.stage``), which looks at nothing but these.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal, NamedTuple, Protocol

from stockflow.checkpoints.files.header import DTYPES


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

    @property
    def words(self) -> str:
        """What its users call it."""

    @property
    def whole_rows(self) -> bool:
        """Whether rows of the first dimension can only be decoded whole."""

    def __hash__(self) -> int:
        """Return the same for equal ones."""

    def run_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that every run needs beside ``bytes_per_elem`` for each element, at most."""

    def scratch_elems(self, shape: tuple[int, ...], num_elems: int) -> int:
        """Return how many numbers are held, beside the elements, while a run of so many is decoded."""

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return, per extent, the bytes that elements ``start`` to ``stop`` of a tensor of ``shape`` need."""


class RunByRun:
    """What holds of decodes whose extents go along with the elements."""

    __slots__ = ()
    whole_rows = False

    def run_bytes(self, shape: tuple[int, ...]) -> int:
        """Return nothing."""
        del shape
        return 0

    def scratch_elems(self, shape: tuple[int, ...], num_elems: int) -> int:
        """Return nothing that counts."""
        del shape, num_elems
        return 0


@dataclass(frozen=True, slots=True)
class Plain(RunByRun):
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

    @property
    def words(self) -> str:
        """Its dtype."""
        return self.dtype

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the run itself."""
        del shape
        return (ByteRange(self.width * start, self.width * stop),)


@dataclass(frozen=True, slots=True)
class Verbatim(RunByRun):
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

    @property
    def words(self) -> str:
        """Its dtype."""
        return self.dtype

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the run itself."""
        del shape
        return (ByteRange(start, stop),)


@dataclass(frozen=True, slots=True)
class BlockScaled(RunByRun):
    """Codes of one byte in blocks of a matrix, each block with a scale that multiplies them: FP8 of every grid.

    The first extent holds the codes, row by row, the second the scales, a grid of ``ceil(rows / block rows)`` by
    ``ceil(columns / block columns)`` for each of the matrices that lie one behind the other.
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

    def num_code_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the size of the codes of a tensor."""
        return math.prod(shape)

    def band_elems(self, shape: tuple[int, ...]) -> int:
        """Return how many elements the blocks of a row of scales are of."""
        rows, columns = matrix_of(shape)
        return min(self.block[0], rows) * columns

    def scale_rows(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
        """Return the first row of scales that a run of elements needs, and one past the last."""
        if start == stop:
            return 0, 0
        return self._scale_row(shape, start), self._scale_row(shape, stop - 1) + 1

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns of scales a matrix has."""
        rows, columns = matrix_of(shape)
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    def _scale_row(self, shape: tuple[int, ...], element: int) -> int:
        rows, columns = matrix_of(shape)
        matrix, row = divmod(element // columns, rows)
        return matrix * -(-rows // self.block[0]) + row // self.block[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is at least one."""
        return self.block

    @property
    def words(self) -> str:
        """What its users call it."""
        return f"FP8 ({self.dtype.removeprefix('F8_')}) with scales of {self.scale_dtype.removeprefix('F8_')}"

    @property
    def _scale_width(self) -> int:
        return DTYPES[self.scale_dtype].bits // 8


Codes = Literal["I4", "F4"]
"""Integers from -8, stored with 8 added; or floats with one bit of fraction (E2M1)."""
Whole = Literal["", "multiplies", "divides"]


@dataclass(frozen=True, slots=True)
class GroupScaled(RunByRun):
    """Codes of four bits, two in a byte and the lower first, each ``group`` columns of a row with a scale.

    INT4, MXFP4, NVFP4. The first extent holds the codes, rows filled up to whole containers, the second the scales,
    ``ceil(columns / group)`` to a row, the third, if there is one, a scale of the whole tensor.
    """

    dtype: str
    """of the container: I32 holds eight codes"""
    codes: Codes
    scale_dtype: str
    group: int
    num_columns: int
    whole: Whole = ""
    """what the scale of the whole tensor does to the others"""
    is_plain: ClassVar = False
    width: ClassVar = 1

    @property
    def bytes_per_elem(self) -> float:
        """Of codes and scales, the filling of rows with them."""
        return (self.row_bytes + self.scales_per_row * self._scale_width) / self.num_columns

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a byte of codes and of scales."""
        return (1, self._scale_width, 4)[: 3 if self.whole else 2]

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of a row."""
        per_container = DTYPES[self.dtype].bits // 4
        return -(-self.num_columns // per_container) * per_container // 2

    @property
    def scales_per_row(self) -> int:
        """Groups of a row, the last of which may be short."""
        return -(-self.num_columns // self.group)

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the bytes of codes and the scales that a run touches."""
        del shape
        (first, scale), (last, last_scale) = self.place(start), self.place(stop - 1) if stop > start else (-1, -1)
        width = self._scale_width
        found = [ByteRange(first, last + 1), ByteRange(scale * width, (last_scale + 1) * width)]
        if stop <= start:
            found = [ByteRange(0, 0)] * 2
        return (*found, ByteRange(0, 4)) if self.whole else tuple(found)

    def num_code_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the size of the codes of a tensor."""
        return math.prod(shape[:-1]) * self.row_bytes

    def band_elems(self, shape: tuple[int, ...]) -> int:
        """Return how many elements a row is of."""
        del shape
        return self.num_columns

    def place(self, element: int) -> tuple[int, int]:
        """Return which byte holds the code of an element, and the number of its scale."""
        row, column = divmod(element, self.num_columns)
        return row * self.row_bytes + column // 2, row * self.scales_per_row + column // self.group

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns of scales a matrix has."""
        return matrix_of(shape)[0], self.scales_per_row

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is at least one."""
        return self.group, self.num_columns

    @property
    def words(self) -> str:
        """What its users call it."""
        if self.whole:
            return "NVFP4"
        return f"INT4 in groups of {self.group}" if self.codes == "I4" else "MXFP4"

    @property
    def _scale_width(self) -> int:
        return DTYPES[self.scale_dtype].bits // 8


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of each matrix of a tensor; a vector is one row."""
    return (shape[-2] if len(shape) > 1 else 1), shape[-1]


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
