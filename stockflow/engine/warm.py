"""Units of two elements: whoever goes through one has compiled, or loaded, every kernel that larger ones will call.

Kernels are compiled once per machine, which takes memory that buffers would not leave; so this comes before them.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from stockflow.checkpoints.decodes.transposed import ByRows
from stockflow.engine.pieces import Piece
from stockflow.engine.stage import DecodingStage
from stockflow.kernels.floats import slab_of
from stockflow.planning.job import Reading
from stockflow.planning.work import Work

NUM_ELEMS = 2
"""Of one, all may be kept, or none: nothing is then counted."""
SLOT_BYTES = 128
"""Multiples of which slots take: on each, elements of every width may begin."""


@dataclass(frozen=True)
class SmallUnit:
    """A unit whose operands are all zero."""

    work: Work
    start: int = 0
    stop: int = NUM_ELEMS

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield the only piece."""
        del last
        reading = self.work.reading
        sizes = [(-(-slot.num_bytes // SLOT_BYTES) + 1) * SLOT_BYTES for slot in reading.slots(0, self.stop)]
        memory = np.zeros(sum(sizes), np.uint8)
        offsets = tuple(accumulate(sizes[:-1], initial=0))
        yield DecodingStage().piece(reading, 0, self.stop, slab_of(memory), memory, offsets)


def small_units(works: Iterable[Any]) -> Iterator[SmallUnit]:
    """Yield a unit for every kind of tensor that needs kernels of its own."""
    distinct: dict[Hashable, Any] = {}
    for work in works:
        if work.reading.num_elems and not work.reading.is_verbatim:  # bytes are carried over without kernels
            distinct.setdefault(work.kind, work)
    for work in distinct.values():
        reading = _of_few_elements(work.reading)
        yield SmallUnit(replace(work, reading=reading), stop=reading.num_elems)


def _of_few_elements(reading: Reading) -> Reading:
    """Return a reading of two elements; of a row, where rows of several tensors are stored by turns."""
    operands = tuple(operand._replace(rows=None) for operand in reading.operands)
    are_rows = any(isinstance(operand.decode, ByRows) for operand in operands)
    shape = (1,) * (len(reading.shape) - 1) + (reading.shape[-1] if are_rows else NUM_ELEMS,)
    return replace(reading, shape=shape, scope="tensor", operands=operands)
