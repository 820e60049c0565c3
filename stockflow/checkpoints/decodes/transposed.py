"""Projections of experts stored beside each other: column by column, or row by row by turns. Values of the plan."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from stockflow.checkpoints.decodes.around import Around
from stockflow.checkpoints.decodes.stored import ByteRange, Decode, RunByRun
from stockflow.checkpoints.files.header import DTYPES


@dataclass(frozen=True, slots=True)
class Transposed(RunByRun):
    """Plain numbers of a matrix that is stored column by column, beside others of its shape: projections of experts.

    Of the extent, which begins with the first of them, each row has a column of all: one behind the other, or their
    elements by turns. Sources: Llama 4 and Qwen3-VL-MoE; gpt-oss, by turns.
    """

    dtype: str
    number: int = 0
    """of this one"""
    num_beside: int = 1
    """with this one"""
    by_turns: bool = False
    is_plain: ClassVar = False

    def __post_init__(self) -> None:
        """Hold the fields against each other.

        Raises:
            ValueError: no matrix is stored so.
        """
        if not _is_place(self.number, self.num_beside, self.by_turns) or DTYPES[self.dtype].kind != "float":
            raise ValueError(f"no matrix of {self.dtype} is number {self.number!r} of {self.num_beside!r}")

    @property
    def width(self) -> int:
        """Of a number."""
        return DTYPES[self.dtype].bits // 8

    @property
    def bytes_per_elem(self) -> float:
        """The width: what is read at once is shared."""
        return self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The width."""
        return (self.width,)

    @property
    def words(self) -> str:
        """What its users call it."""
        return f"{self.dtype}, transposed"

    def scratch_elems(self, shape: tuple[int, ...], num_elems: int) -> int:
        """Return the elements of whole rows."""
        return num_elems + 2 * shape[-1]

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return all bytes of this one and those beside it, of which any row needs some everywhere."""
        return (ByteRange(0, self.num_beside * math.prod(shape) * self.width if start < stop else 0),)

    def places(self, num_rows: int, first: int, last: int) -> slice:
        """Return where within a row of the extent the rows ``first`` to ``last`` of the matrix have their elements."""
        if self.by_turns:
            return slice(self.number + self.num_beside * first, self.number + self.num_beside * last, self.num_beside)
        return slice(self.number * num_rows + first, self.number * num_rows + last)


@dataclass(frozen=True, slots=True)
class ByRows(Around):
    """A matrix that is a part of a larger one, of which only the whole can be decoded: rows by turns, or half of them.

    The extents are those of the whole, which has ``num_beside`` matrices of one shape: their rows by turns, as in the
    codes of gpt-oss, or one behind the other, where blocks of codes reach from one into the next.
    """

    inner: Decode
    """of the whole"""
    number: int = 0
    """of this one"""
    num_beside: int = 2
    """with this one"""
    by_turns: bool = True

    def __post_init__(self) -> None:
        """Hold the fields against each other.

        Raises:
            ValueError: no matrix is stored so.
        """
        if not _is_place(self.number, self.num_beside, self.by_turns) or isinstance(self.inner, ByRows | Transposed):
            raise ValueError(f"no matrix is number {self.number!r} of {self.num_beside!r} rows of {self.inner!r}"[:300])

    def run_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what a run of the whole takes."""
        return self.inner.run_bytes(self.whole_shape(shape))

    def scratch_elems(self, shape: tuple[int, ...], num_elems: int) -> int:
        """Return the elements of rows of all."""
        return 2 * self.num_beside * (num_elems + 2 * shape[-1]) if self.by_turns else 0

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return what holds the rows of the run, with those of the others between them."""
        return self.inner.ranges(self.whole_shape(shape), *self.run(shape, start, stop))

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the whole."""
        return self.num_beside * shape[0], shape[1]

    def run(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
        """Return which elements of the whole hold a run: with by turns, whole rows of all."""
        if not self.by_turns:
            first = self.number * math.prod(shape)
            return first + start, first + stop
        row_elems, first = self.num_beside * shape[1], start // shape[1]
        return first * row_elems, row_elems * (-(-stop // shape[1]) if stop > start else first)


def _is_place(number: object, num_beside: object, by_turns: object) -> bool:
    """Return whether a matrix may say so of those that it is stored beside."""
    return type(number) is type(num_beside) is int and isinstance(by_turns, bool) and 0 <= number < num_beside


def placed_beside(decodes: Iterable[Decode]) -> tuple[int, int]:
    """Return the place among what is read and written at once that decodes give, and how many these are."""
    found = {(each.number, each.num_beside) for each in map(_outermost, decodes) if is_beside(each)}
    return max(found, key=lambda place: place[1], default=(0, 0))


def within_rows(decode: Decode) -> Decode:
    """Return how a matrix would be stored without those whose rows are among its own."""
    return decode.inner if isinstance(decode, ByRows) and decode.by_turns else decode


def is_beside(decode: Decode) -> TypeGuard[Transposed | ByRows]:
    """Return whether a matrix has its elements among those of others."""
    return isinstance(decode, Transposed) or (isinstance(decode, ByRows) and decode.by_turns)


def _outermost(decode: Decode) -> Decode:
    """Return a decode without what is added to it, as far as it says how others lie beside it."""
    while not is_beside(decode) and hasattr(decode, "inner"):
        decode = decode.inner
    return decode
