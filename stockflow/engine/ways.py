"""Ways of a result: written as it is rounded, or held until its blocks are whole and then turned into codes and scales.

What a source stores alike, and nothing changed in, keeps its scale, so that its codes come out as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from stockflow.checkpoints.decodes.stored import BlockScaled, Decode, GroupScaled
from stockflow.checkpoints.decodes.transposed import within_rows
from stockflow.checkpoints.scale_rules import RULES
from stockflow.engine.alarm import Alarm
from stockflow.engine.buffers import Scratch
from stockflow.engine.pieces import LoadedPiece, Piece
from stockflow.engine.procedures.proceeding import MapSpans
from stockflow.engine.stage import geometry_of, scales_of
from stockflow.engine.units import Unit
from stockflow.kernels import coding
from stockflow.kernels.arrays import Bytes, Singles
from stockflow.planning.budget import WAITING_BYTES
from stockflow.planning.job import Result, TensorJob
from stockflow.planning.spans import SPAN_ELEMS

NO_SCALES = np.empty(0, np.uint8)


class Destination(NamedTuple):
    """Where a result goes."""

    out: Callable[[Piece], Bytes]
    """returns where the bytes of a piece go, or its codes; called once per piece, in order"""
    scales: Bytes = NO_SCALES
    """where the scales of the whole tensor go, as they are stored"""


class Way(Protocol):
    """How results come where they go."""

    def begin(self, piece: Piece) -> Bytes:
        """Return where the numbers of a piece are put, as they are rounded."""

    def look(self, span: LoadedPiece, numbers: Bytes) -> None:
        """Take note of a span whose numbers are there; from any thread."""

    def finish(self) -> None:
        """Come to an end: no piece follows."""


class Written:
    """Plain numbers."""

    def __init__(self, target: Destination, width: int) -> None:
        """Write to ``target``."""
        self.width = width
        self._target = target

    def begin(self, piece: Piece) -> Bytes:
        """Return the place where they are written."""
        return self._target.out(piece)

    def look(self, span: LoadedPiece, numbers: Bytes) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class PartsOf:
    """The groups of a unit that has one piece, one after the other."""

    def __init__(self, way: "Written | Coder", unit: Unit) -> None:
        """Take the memory of the whole unit."""
        (piece,) = unit.sweep(last=False)
        self._way, self._first, self._memory = way, unit.start, way.begin(piece)

    def begin(self, piece: Piece) -> Bytes:
        """Return the place of a part."""
        width = self._way.width
        return self._memory[width * (piece.start - self._first) : width * (piece.stop - self._first)]

    def look(self, span: LoadedPiece, numbers: Bytes) -> None:
        """Pass it on."""
        self._way.look(span, numbers)

    def finish(self) -> None:
        """Do nothing: the unit goes on."""


def _are_alike(one: Decode, other: Decode) -> bool:
    """Return whether codes and scales of two are the same for the same numbers, whatever containers hold the codes."""
    if isinstance(one, GroupScaled) and isinstance(other, GroupScaled):
        return replace(one, dtype=other.dtype) == other
    return one == other


@dataclass
class _Waiting:
    """A piece whose results are complete as soon as the next one is asked for."""

    start: int
    stop: int
    target: Bytes
    numbers_E: Singles
    changed_KS: Bytes
    kept_KS: Singles
    first_scale: int


class Coder:
    """Turns one result of a unit into codes, piece by piece."""

    width = WAITING_BYTES

    def __init__(
        self, job: TensorJob, result: Result, target: Destination, scratch: Scratch, map_spans: MapSpans, alarm: Alarm
    ) -> None:
        """Begin with no piece.

        Args:
            job: what is merged.
            result: what is written in codes.
            target: where codes and scales go.
            scratch: where results wait.
            map_spans: how runs are spread over threads.
            alarm: what is said of numbers that have no code.
        """
        self._result, self._target = result, target
        self._map_spans, self._alarm = map_spans, alarm
        self._shape, self._encoding = job.reading.shape, within_rows(result.encode)
        self._geometry = geometry_of(self._encoding, self._shape)
        self._alike = [
            number
            for number, operand in enumerate(job.reading.operands)
            if _are_alike(within_rows(operand.decode), self._encoding) and operand.rows is None
        ]
        self._scratch = scratch
        self._waiting: _Waiting | None = None

    def begin(self, piece: Piece) -> Bytes:
        """Return where the numbers of a piece wait; those of the one before become codes."""
        self.finish()
        target = self._target.out(piece)
        num_elems = piece.stop - piece.start
        buffer, _ = self._scratch.of_this_thread(num_elems * WAITING_BYTES)
        first, last = self._scale_numbers(piece.start, piece.stop)
        self._waiting = _Waiting(
            piece.start,
            piece.stop,
            target,
            buffer[: num_elems * WAITING_BYTES].view(np.float32),
            np.zeros((len(self._alike), last - first), np.uint8),
            np.zeros((len(self._alike), last - first), np.float32),
            first,
        )
        return buffer[: num_elems * WAITING_BYTES]

    def look(self, span: LoadedPiece, numbers: Bytes) -> None:
        """Note in which blocks of a span the results are other than in a source."""
        waiting = self._waiting
        assert waiting is not None
        for place, number in enumerate(self._alike):
            first, scales_S = scales_of(span, number)
            at = first - waiting.first_scale
            waiting.kept_KS[place, at : at + len(scales_S)] = scales_S
            coding.mark_changed(
                numbers.view(np.float32),
                span.numbers(number).astype(np.float32, copy=False),
                np.uint64(span.start),
                self._geometry,
                np.uint64(waiting.first_scale),
                waiting.changed_KS[place],
            )

    def finish(self) -> None:
        """Turn the piece that waits, if there is one, into codes and scales.

        Raises:
            NumericsError: NaN or infinity where the codes have none.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        band = self._result.band_elems(self._shape)
        step = max(SPAN_ELEMS // band, 1) * band
        runs = [(start, min(start + step, waiting.stop)) for start in range(waiting.start, waiting.stop, step)]
        scales_S = np.empty(waiting.kept_KS.shape[1], np.float32)
        encode = self._encoding
        if isinstance(encode, GroupScaled) and encode.row_bytes * 2 > encode.num_columns:
            waiting.target[:] = 0  # rows are filled up

        def code(run: tuple[int, int]) -> int:
            return self._encode(waiting, scales_S, *run)

        if sum(self._map_spans(code, runs)):
            self._alarm.refuse_uncoded(self._result.outputs[0].name, encode.words)
        first, last = self._scale_bytes(waiting.start, waiting.stop)
        self._target.scales[first:last] = _stored_scales(scales_S, encode)

    def _encode(self, waiting: _Waiting, scales_S: Singles, start: int, stop: int) -> int:
        encode, ranges = self._encoding, self._encoding.ranges
        first_byte = ranges(self._shape, start, stop)[0].start - ranges(self._shape, waiting.start, stop)[0].start
        row_bytes = encode.row_bytes if isinstance(encode, GroupScaled) else self._shape[-1]
        codes = encode.codes if isinstance(encode, GroupScaled) else encode.dtype
        assert isinstance(encode, BlockScaled | GroupScaled)
        return coding.encode(
            waiting.numbers_E[start - waiting.start : stop - waiting.start],
            np.uint64(start),
            self._geometry,
            waiting.changed_KS,
            waiting.kept_KS,
            RULES.index(self._result.rule),
            coding.SCALES[encode.scale_dtype],
            coding.CODES[codes],
            coding.Coded(
                waiting.target,
                np.uint64(first_byte),
                np.uint64(row_bytes),
                scales_S,
                np.uint64(waiting.first_scale),
            ),
        )

    def _scale_bytes(self, start: int, stop: int) -> tuple[int, int]:
        found = self._encoding.ranges(self._shape, start, stop)[1]
        return found.start, found.stop

    def _scale_numbers(self, start: int, stop: int) -> tuple[int, int]:
        first, last = self._scale_bytes(start, stop)
        width = self._encoding.widths[1]
        return first // width, last // width


def _stored_scales(scales_S: Singles, encode: Decode) -> Bytes:
    """Return scales as they are stored; they are of that precision already."""
    assert isinstance(encode, BlockScaled | GroupScaled)
    if encode.scale_dtype == "F8_E8M0":
        return (np.frexp(scales_S)[1] - 1 + 127).astype(np.uint8)
    if encode.scale_dtype == "BF16":
        return (scales_S.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if encode.scale_dtype == "F16":
        return scales_S.astype(np.float16).view(np.uint8)
    return scales_S.view(np.uint8)
