"""Joined numbers: those of a tensor that lies in several runs of bytes, one after the other. Values of the plan.

As a checkpoint has them whose tensors are sharded along their first dimension.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from stockflow.checkpoints.decodes.stored import ByteRange, Decode, Plain, RunByRun, Verbatim, plain, verbatim
from stockflow.checkpoints.files.header import DTYPES

_NO_BYTES = ByteRange(0, 0)


@dataclass(frozen=True, slots=True)
class Joined(RunByRun):
    """Numbers as kernels take them, or their bytes that are carried over, in extents that follow each other."""

    dtype: str
    ends: tuple[int, ...]
    """per extent, one past the last element of the tensor that it holds"""
    is_verbatim: bool = False
    """whether bytes are wanted, of which an element of the reading is one"""
    is_plain: ClassVar = False

    def __post_init__(self) -> None:
        """Hold the fields against each other.

        Raises:
            ValueError: there are no extents, or they do not follow each other.
        """
        are_sizes = bool(self.ends) and all(type(end) is int for end in self.ends)
        if self.dtype not in DTYPES or not are_sizes or any(one > two for one, two in pairwise((0, *self.ends))):
            raise ValueError(f"no {self.dtype!r} lie in runs that end at {self.ends!r}"[:200])

    @property
    def width(self) -> int:
        """Bytes of an element of the reading."""
        return 1 if self.is_verbatim else plain(self.dtype).width

    @property
    def bytes_per_elem(self) -> float:
        """The width."""
        return self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The width, of every extent."""
        return (self.width,) * len(self.ends)

    @property
    def words(self) -> str:
        """Its dtype."""
        return self.dtype

    def ranges(self, shape: tuple[int, ...], start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return what of each extent falls within the run; nothing of most of them."""
        del shape
        ranges = [_NO_BYTES] * len(self.ends)
        for number, first, last in self.within(start, stop):
            ranges[number] = ByteRange(self.width * first, self.width * last)
        return tuple(ranges)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the extents that hold a part of a run of elements, and which of their own elements these are."""
        scale = plain(self.dtype).width if self.is_verbatim else 1
        for number in range(bisect_right(self.ends, start // scale), len(self.ends)):
            begin = scale * self.ends[number - 1] if number else 0
            if begin >= stop:
                return
            first, last = max(start, begin), min(stop, scale * self.ends[number])
            if first < last:
                yield number, first - begin, last - begin


def is_uncoded(decode: Decode) -> bool:
    """Return whether the bytes are what kernels take, if perhaps not in one run."""
    return isinstance(decode, Plain | Verbatim | Joined)


def is_verbatim(decode: Decode) -> bool:
    """Return whether bytes are carried over: an element of the reading is one."""
    return isinstance(decode, Verbatim) or (isinstance(decode, Joined) and decode.is_verbatim)


def as_bytes(decode: Decode) -> Decode:
    """Return how the bytes of plain numbers are carried over."""
    return replace(decode, is_verbatim=True) if isinstance(decode, Joined) else verbatim(decode.dtype)


def kernels_of(decode: Decode) -> Decode:
    """Return a decode that needs the same kernels, the same for all that do."""
    return plain(decode.dtype) if isinstance(decode, Joined) else decode
