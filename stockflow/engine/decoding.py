"""What decoders of a stage share: memory that holds stored bytes, and plain numbers of it in working precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockflow.checkpoints.decodes import Decode, Plain
from stockflow.kernels import codecs
from stockflow.kernels.arrays import Bytes, Values
from stockflow.kernels.floats import FORMATS, Slab

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """A slab and the bytes it is a view of."""

    slab: Slab
    buffer: Bytes


DecodeRun = Callable[[Decode, Shape, int, int, Memory, list[int], Values], None]
"""Fills an array with elements from one to another of a tensor of a shape, whose extents begin in memory at places."""


def numbers(dtype: str, memory: Memory, place: int, count: int, working: np.dtype[Any]) -> Values:
    """Return plain numbers in working precision."""
    found_E: Values = np.empty(count, working)
    fill(dtype, memory, place, found_E)
    return found_E


def fill(dtype: str, memory: Memory, place: int, out_E: Values) -> None:
    """Fill an array with plain numbers from a place on."""
    codecs.widen_run(memory.slab, np.uint64(place // Plain(dtype).width), FORMATS[dtype], out_E)
