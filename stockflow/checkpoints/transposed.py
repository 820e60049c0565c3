"""Transposed projections of experts: how they are stored beside each other, column by column. Values of the plan."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from stockflow.checkpoints.decodes import ByteRange, Decode, RunByRun
from stockflow.checkpoints.header import DTYPES


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
        are_right = type(self.number) is type(self.num_beside) is int and isinstance(self.by_turns, bool)
        if not are_right or not 0 <= self.number < self.num_beside or DTYPES[self.dtype].kind != "float":
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


def placed_beside(decodes: Iterable[Decode]) -> tuple[int, int]:
    """Return the place among what is read and written at once that decodes give, and how many these are."""
    found = {(each.number, each.num_beside) for each in decodes if isinstance(each, Transposed)}
    return max(found, key=lambda place: place[1], default=(0, 0))
