"""Operands: the inputs of a reading, which bytes of which file they are, and how rows come out of them."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from stockflow.checkpoints.decodes.stored import ByteRange, Decode, RowRuns, plain, row_elems
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.opening import Checkpoint


class ExtentRanges(NamedTuple):
    """What one extent of an operand contributes to a run of elements: ranges of its file, one after the other."""

    checkpoint: int
    file: str
    ranges: tuple[ByteRange, ...]
    """absolute in the file"""
    width: int
    """boundary in bytes on which it must begin in memory"""

    @property
    def num_bytes(self) -> int:
        """Size of all ranges."""
        return sum([stop - start for start, stop in self.ranges])


@lru_cache(2**12)
def runs_of(decode: Decode, shape: tuple[int, ...], start: int, stop: int) -> tuple[tuple[int, int, int], ...]:
    """Return, per extent, first and last byte within it of a run of elements, and the boundary it must begin on.

    Thousands of tensors are stored alike, and planning asks for each of them again and again.
    """
    return tuple((*run, width) for run, width in zip(decode.ranges(shape, start, stop), decode.widths, strict=True))


class Operand(NamedTuple):
    """One input of a reading: which bytes, and how rows come out of them."""

    checkpoint: int
    """index into the plan's checkpoints"""
    name: str
    """in its own checkpoint"""
    extents: tuple[Extent, ...]
    decode: Decode
    rows: RowRuns | None = None
    """None: row r is row r"""

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are what kernels take, row by row."""
        return self.rows is None and self.decode.is_plain

    def slots(self, shape: tuple[int, ...], start: int, stop: int) -> Iterator[ExtentRanges]:
        """Yield what each extent contributes to elements ``start`` to ``stop`` of a reading of ``shape``."""
        if self.rows is None:
            runs_in = runs_of(self.decode, shape, start, stop)
            for (file, at), (first, last, width) in zip(self.extents, runs_in, strict=True):
                yield ExtentRanges(self.checkpoint, file, (ByteRange(at + first, at + last),), width)
            return
        own = (self.rows.num_source_rows, *shape[1:])
        found = self.rows.within(start, stop, row_elems(shape))
        runs = [self.decode.ranges(own, run.start, run.stop) for run in found]
        for number, (extent, width) in enumerate(zip(self.extents, self.decode.widths, strict=True)):
            ranges = tuple(ByteRange(extent.start + run[number].start, extent.start + run[number].stop) for run in runs)
            yield ExtentRanges(self.checkpoint, extent.file, ranges, width)


def stored(checkpoint: int, spec: TensorSpec, extent: Extent) -> Operand:
    """Return a tensor of plain numbers as it lies in a file, as an operand."""
    return Operand(checkpoint, spec.name, (extent,), plain(spec.dtype))


def operand_of(number: int, checkpoint: Checkpoint, name: str) -> Operand:
    """Return a tensor of a checkpoint, which is the plan's ``number``-th, as an operand."""
    if held := checkpoint.stored.get(name):
        return Operand(number, name, tuple([checkpoint.extents[part.name] for part in held.parts]), held.decode)
    if pieces := checkpoint.joined.get(name):
        return Operand(number, name, pieces.extents, pieces.decode)
    return Operand(number, name, (checkpoint.extents[name],), plain(checkpoint.specs[name].dtype))
