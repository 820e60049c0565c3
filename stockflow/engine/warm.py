"""Units of two elements: whoever goes through one has compiled, or loaded, every kernel that larger ones will call.

Kernels are compiled once per machine, which takes memory that buffers would not leave; so this comes before them.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

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
        sizes = [(-(-slot.num_bytes // SLOT_BYTES) + 1) * SLOT_BYTES for slot in reading.slots(0, NUM_ELEMS)]
        memory = np.zeros(sum(sizes), np.uint8)
        offsets = tuple(accumulate(sizes[:-1], initial=0))
        yield DecodingStage().piece(reading, 0, NUM_ELEMS, slab_of(memory), memory, offsets)


def small_units(works: Iterable[Any]) -> Iterator[SmallUnit]:
    """Yield a unit for every kind of tensor that needs kernels of its own."""
    distinct: dict[Hashable, Any] = {}
    for work in works:
        if work.reading.num_elems and not work.reading.is_verbatim:  # bytes are carried over without kernels
            distinct.setdefault(work.kind, work)
    for work in distinct.values():
        yield SmallUnit(replace(work, reading=_of_two_elements(work.reading)))


def _of_two_elements(reading: Reading) -> Reading:
    operands = tuple(operand._replace(rows=None) for operand in reading.operands)
    return replace(reading, shape=(1,) * (len(reading.shape) - 1) + (NUM_ELEMS,), scope="tensor", operands=operands)
