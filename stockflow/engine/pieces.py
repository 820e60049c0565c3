"""Pieces: runs of elements of one reading, in memory as kernels take them, or about to be."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from stockflow.kernels.arrays import Bytes, Floats, Unsigned, Values
from stockflow.kernels.floats import FORMATS, Slab
from stockflow.planning.job import Reading


class Piece(Protocol):
    """A run of elements, in memory or about to be."""

    @property
    def reading(self) -> Reading:
        """What it belongs to."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""

    def narrow(self, start: int, stop: int) -> "Piece":
        """Return what lies between two elements of the reading."""

    def loaded(self) -> "LoadedPiece":
        """Return it as kernels take it, in memory, for the thread that asks."""

    def added_up(self, weights_N: Floats) -> "LoadedPiece":
        """Return it as two operands: the first, and what the known changes of the others take from it, weighted."""


@dataclass(frozen=True, slots=True)
class LoadedPiece:
    """A run of elements in memory, every operand in plain numbers (or bytes, where they are carried over)."""

    reading: Reading
    start: int
    stop: int
    slab: Slab
    buffer: Bytes
    """the slab's memory"""
    offsets: tuple[int, ...]
    """per operand, anchor first, where in the slab its elements begin"""
    dtypes: tuple[str, ...]
    """per operand: as it is stored, or the working precision it was decoded to"""
    widths: tuple[int, ...]
    """per operand, bytes of an element"""
    stored: "Piece | None" = None
    """what it was decoded from"""

    def narrow(self, start: int, stop: int) -> "LoadedPiece":
        """Return what lies between two elements of the reading."""
        pairs = zip(self.offsets, self.widths, strict=True)
        offsets = tuple([offset + width * (start - self.start) for offset, width in pairs])
        return LoadedPiece(self.reading, start, stop, self.slab, self.buffer, offsets, self.dtypes, self.widths)

    def loaded(self) -> "LoadedPiece":
        """Return itself."""
        return self

    def added_up(self, weights_N: Floats) -> "LoadedPiece":
        """Refuse: no change of numbers as they are stored is known before a look at them."""
        raise NotImplementedError(f"{self.reading.name!r} is plain, and none of its changes is known")

    def operand(self, index: int) -> Bytes:
        """Return the bytes of one operand."""
        first, width = self.offsets[index], self.widths[index]
        return self.buffer[first : first + width * (self.stop - self.start)]

    def numbers(self, index: int) -> Values:
        """Return one operand that was decoded, in working precision."""
        return self.operand(index).view(f"f{self.widths[index]}")

    def only(self, index: int) -> "LoadedPiece":
        """Return it with one operand alone."""
        offset, dtype, width = self.offsets[index], self.dtypes[index], self.widths[index]
        return replace(self, offsets=(offset,), dtypes=(dtype,), widths=(width,))

    @property
    def firsts_M(self) -> Unsigned:
        """Per operand, where it begins in the slab, counted in its own elements."""
        pairs = zip(self.offsets, self.widths, strict=True)
        return np.array([offset // width for offset, width in pairs], np.uint64)

    @property
    def formats_M(self) -> Unsigned:
        """The operands' formats as kernels know them."""
        return np.array([FORMATS[dtype] for dtype in self.dtypes], np.uint64)
