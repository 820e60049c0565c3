"""Arranging: results that are stored column by column, or row by row by turns, put in that order before they go out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from stockflow.checkpoints.decodes.transposed import Transposed, is_beside
from stockflow.engine.buffers import Scratch
from stockflow.engine.procedures.proceeding import MapSpans
from stockflow.engine.units import Unit
from stockflow.kernels.arrays import Bytes
from stockflow.kernels.turning import turn
from stockflow.planning.job import TensorJob

STRIPE_BYTES = 2**20
"""Of what one thread puts in order at a time."""


def arrange(
    units: Sequence[Unit], places: Sequence[tuple[int, int]], buffer: Bytes, scratch: Scratch, map_spans: MapSpans
) -> None:
    """Put the results of whole tensors in the order in which they are stored.

    Args:
        units: one after the other; those that are stored beside each other follow each other.
        places: where in the buffer the bytes of each begin and end, row by row.
        buffer: holds them.
        scratch: of this thread.
        map_spans: how work is spread over threads.
    """
    for unit, (start, stop) in zip(units, places, strict=True):
        assert isinstance(unit.work, TensorJob)
        encode = unit.work.result.encode
        if is_beside(encode) and encode.number + 1 == encode.num_beside:
            stored = buffer[stop - encode.num_beside * (stop - start) : stop]
            if isinstance(encode, Transposed):
                _turn(encode, unit.work.output.shape, stored, scratch, map_spans)
            else:
                stored[:] = by_turns(stored.reshape(encode.num_beside, unit.work.reading.shape[0], -1))


def by_turns(matrices_MRB: Bytes) -> Bytes:
    """Return rows of matrices of one shape, by turns one of each."""
    return matrices_MRB.transpose(1, 0, 2).reshape(-1)


def prepare(jobs: Iterable[TensorJob]) -> None:
    """Compile, or load, the kernels that put the results of these in order."""
    for encode in {job.result.encode for job in jobs}:
        if isinstance(encode, Transposed):
            _turn(encode, (1, 1), np.zeros(encode.num_beside * encode.width, np.uint8), Scratch(), map)


def _turn(encode: Transposed, shape: tuple[int, ...], stored: Bytes, scratch: Scratch, map_spans: MapSpans) -> None:
    """Turn matrices of one shape, one after the other, into rows that have a column of each."""
    buffer, _ = scratch.of_this_thread(stored.nbytes)
    buffer[: stored.nbytes] = stored
    dtype, (rows, columns) = f"u{encode.width}", shape
    matrices_MRC = buffer[: stored.nbytes].view(dtype).reshape(encode.num_beside, rows, columns)
    stored_CN = stored.view(dtype).reshape(columns, encode.num_beside * rows)
    places = [replace(encode, number=number).places(rows, 0, rows) for number in range(encode.num_beside)]
    step = max(STRIPE_BYTES // (rows * encode.width), 1)

    def turn_stripe(first: int) -> None:
        for place, matrix_RC in zip(places, matrices_MRC, strict=True):
            turn(matrix_RC[:, first : first + step], stored_CN[first : first + step, place])

    for _ in map_spans(turn_stripe, range(0, columns, step)):
        pass
