"""What decoders of a stage share: memory that holds stored bytes, and plain numbers of it in working precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stockflow.checkpoints.decodes.stored import Decode, Plain
from stockflow.kernels import codecs
from stockflow.kernels.arrays import Bytes, Values
from stockflow.kernels.floats import FORMATS, Slab

Shape = tuple[int, ...]
FLOATS = {"F32": "f", "F64": "d"}
"""Dtypes that numpy has, by its letter: their names take it microseconds."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A slab and the bytes it is a view of."""

    slab: Slab
    buffer: Bytes
    anchor_E: Values | None = None
    """the run of the first operand that is to be decoded, once that is done"""


class StoredRun(NamedTuple):
    """Elements of a tensor as they lie in memory."""

    shape: Shape
    start: int
    stop: int
    memory: Memory
    places: list[int]
    """where each extent begins"""

    def without(self, num_places: int) -> "StoredRun":
        """Return it without its last extents, which are not of the decode within."""
        return self._replace(places=self.places[:-num_places])


DecodeRun = Callable[[Decode, StoredRun, Values], None]
"""Fills an array with the elements of a run."""


def numbers(dtype: str, memory: Memory, place: int, count: int, working: np.dtype[Any]) -> Values:
    """Return plain numbers in working precision: those in memory themselves where they are stored in it."""
    if FLOATS.get(dtype) == working.char:
        return memory.buffer[place : place + count * working.itemsize].view(working)
    found_E: Values = np.empty(count, working)
    fill(dtype, memory, place, found_E)
    return found_E


def fill(dtype: str, memory: Memory, place: int, out_E: Values) -> None:
    """Fill an array with plain numbers from a place on."""
    codecs.widen_run(memory.slab, np.uint64(place // Plain(dtype).width), FORMATS[dtype], out_E)
