"""The stage: what is stored otherwise becomes plain numbers, in scratch of the computing thread.

It fills float32 (float64 where the reading asks for it) and hands on a piece whose operands are all plain, so that no
kernel and no method knows of codes, scales and maps of rows. The scratch stays in the thread's caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stockflow.checkpoints.decodes.joined import Joined, is_uncoded
from stockflow.checkpoints.decodes.low_rank import LowRank
from stockflow.checkpoints.decodes.stored import BlockScaled, Decode, GroupScaled, Plain, RowRuns, matrix_of
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed, within_rows
from stockflow.checkpoints.files.header import DTYPES
from stockflow.engine.adapter_stage import adapter_decoders
from stockflow.engine.buffers import Scratch, aligned
from stockflow.engine.decoding import Memory, StoredRun, fill, numbers
from stockflow.engine.pieces import LoadedPiece, Piece
from stockflow.kernels import codecs, coding
from stockflow.kernels.arrays import Bytes, Floats, Values
from stockflow.kernels.floats import FORMATS, Slab, slab_of
from stockflow.kernels.turning import turn
from stockflow.planning.job import Reading
from stockflow.planning.operands import Operand, runs_of


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A run of elements in memory as they are stored; decoded when a thread comes to it."""

    reading: Reading
    start: int
    stop: int
    first: int
    """first element that is in memory"""
    memory: Memory
    offsets: tuple[int, ...]
    """per slot, where in the memory its bytes begin, counted from element ``first``"""
    stage: "DecodingStage"

    def on(self, anchor_E: Values) -> "StoredPiece":
        """Return it with the numbers that anchored operands begin with."""
        return replace(self, memory=replace(self.memory, anchor_E=anchor_E))

    def narrow(self, start: int, stop: int) -> "StoredPiece":
        """Return what lies between two elements of the reading."""
        return replace(self, start=start, stop=stop)

    def loaded(self) -> LoadedPiece:
        """Decode it into this thread's scratch."""
        return self.stage.decoded(self)

    def added_up(self, weights_N: Floats) -> LoadedPiece:
        """Decode the first operand, and add up what is known of the others, in this thread's scratch."""
        return self.stage.added_up(self, weights_N)


def _placed(piece: StoredPiece) -> list[tuple[Operand, list[int]]]:
    """Return the operands of a piece, and where in its memory the slots of each begin."""
    slots = iter(piece.offsets)
    return [(operand, [next(slots) for _ in operand.extents]) for operand in piece.reading.operands]


class DecodingStage:
    """Decodes pieces; a scratch per thread."""

    def __init__(self) -> None:
        """Begin with no scratch."""
        self._scratch = Scratch()

    def piece(
        self, reading: Reading, start: int, stop: int, slab: Slab, buffer: Bytes, offsets: tuple[int, ...]
    ) -> Piece:
        """Return elements that are in memory as a piece: at once if kernels can take them, else to be decoded."""
        if reading.is_plain:
            return LoadedPiece(reading, start, stop, slab, buffer, offsets, reading.dtypes, reading.widths)
        return StoredPiece(reading, start, stop, start, Memory(slab, buffer), offsets, self)

    def decoded(self, piece: StoredPiece) -> LoadedPiece:
        """Return a piece with all operands in working precision, valid until this thread decodes again.

        Operands that only lie in several runs of bytes keep their dtypes.
        """
        if all(operand.rows is None and is_uncoded(operand.decode) for operand in piece.reading.operands):
            return self._gathered(piece)
        operands = piece.reading.operands
        span, rows_ME = self._of_numbers(piece, len(operands))
        anchored = piece.on(rows_ME[0])
        for (operand, offsets), row_E in zip(_placed(piece), rows_ME, strict=True):
            _decode_operand(operand, anchored, offsets, row_E)
        for row_E, operand in zip(rows_ME, operands, strict=True):
            if operand.rows is not None and operand.rows.fills:
                _fill_rows(operand.rows, piece, row_E, rows_ME)
        return span

    def added_up(self, piece: StoredPiece, weights_N: Floats) -> LoadedPiece:
        """Return the first operand of a piece and the weighted sum of what the others, by their factors, take from it.

        Valid until this thread decodes again.
        """
        span, (anchor_E, change_E) = self._of_numbers(piece, 2)
        (anchor, offsets), *others = _placed(piece)
        _decode_operand(anchor, piece, offsets, anchor_E)
        change_E[:] = 0.0
        for (operand, offsets), weight in zip(others, weights_N, strict=True):
            if isinstance(operand.decode, LowRank):
                weighted = replace(operand.decode, scale=-float(weight) * operand.decode.scale)
                _decode_operand(operand._replace(decode=weighted), piece.on(change_E), offsets, change_E)
        return span

    def _of_numbers(self, piece: StoredPiece, num_rows: int) -> tuple[LoadedPiece, Values]:
        """Return a piece of so many operands in working precision, to be filled, and their rows."""
        width, num_elems = piece.reading.float_bits // 8, piece.stop - piece.start
        buffer, slab = self._scratch.of_this_thread(num_rows * num_elems * width)
        starts = tuple(number * num_elems * width for number in range(num_rows))
        dtypes, widths = (f"F{8 * width}",) * num_rows, (width,) * num_rows
        span = LoadedPiece(piece.reading, piece.start, piece.stop, slab, buffer, starts, dtypes, widths, piece)
        return span, buffer[: num_rows * num_elems * width].view(f"f{width}").reshape(num_rows, num_elems)

    def _gathered(self, piece: StoredPiece) -> LoadedPiece:
        reading = piece.reading
        sizes = [width * (piece.stop - piece.start) for width in reading.widths]
        starts = aligned(sizes)
        buffer, slab = self._scratch.of_this_thread(starts[-1] + sizes[-1])
        for (operand, offsets), start, size in zip(_placed(piece), starts, sizes, strict=True):
            _gather(operand, piece, offsets, buffer[start : start + size])
        return LoadedPiece(reading, piece.start, piece.stop, slab, buffer, starts, reading.dtypes, reading.widths)


def _gather(operand: Operand, piece: StoredPiece, offsets: list[int], out: Bytes) -> None:
    """Put what the slots of an operand hold of a piece one behind the other."""
    runs = runs_of(operand.decode, piece.reading.shape, piece.start, piece.stop)
    at = 0
    for place, (first, last, _) in zip(_places_of(operand, piece, offsets), runs, strict=True):
        out[at : at + last - first] = piece.memory.buffer[place : place + last - first]
        at += last - first


def _places_of(operand: Operand, piece: StoredPiece, offsets: Sequence[int]) -> list[int]:
    """Return where the slots of an operand begin for a piece, of which more may be in memory."""
    shape, firsts = piece.reading.shape, (piece.first, piece.start)
    held, wanted = (runs_of(operand.decode, shape, first, piece.stop) for first in firsts)
    return [offset + to[0] - frm[0] for offset, frm, to in zip(offsets, held, wanted, strict=True)]


def scales_of(span: LoadedPiece, number: int) -> tuple[int, Values]:
    """Return the scales of an operand that a decoded span touches: the number of the first, and their values.

    They are in memory as long as the span is.
    """
    piece = span.stored
    assert isinstance(piece, StoredPiece)
    reading, operand = span.reading, span.reading.operands[number]
    skipped = sum(len(each.extents) for each in reading.operands[:number])
    offsets = piece.offsets[skipped : skipped + len(operand.extents)]
    decode, (_, place, *_) = within_rows(operand.decode), _places_of(operand, piece, offsets)
    assert isinstance(decode, BlockScaled | GroupScaled)
    first, last, width = runs_of(operand.decode, reading.shape, span.start, span.stop)[1]
    count = (last - first) // width
    scales_S = _scales(decode.scale_dtype, piece.memory, place, count, np.dtype(np.float32))
    if not isinstance(operand.decode, ByRows):
        return first // width, scales_S
    own = decode.ranges(reading.shape, span.start, span.stop)[1]
    rows_RMS = scales_S.reshape(-1, operand.decode.num_beside, decode.grid(reading.shape)[1])
    skipped = own.start // width % rows_RMS.shape[2]
    count = (own.stop - own.start) // width
    return own.start // width, rows_RMS[:, operand.decode.number].reshape(-1)[skipped : skipped + count]


def geometry_of(decode: Decode, shape: tuple[int, ...]) -> coding.BlockGrid:
    """Return where the blocks of a tensor lie."""
    if isinstance(decode, GroupScaled):
        return coding.BlockGrid(*map(np.uint64, (1, decode.num_columns, 1, decode.group)))
    assert isinstance(decode, BlockScaled)
    return coding.BlockGrid(*map(np.uint64, (*matrix_of(shape), *decode.block)))


def _decode_operand(operand: Operand, piece: StoredPiece, offsets: list[int], out_E: Values) -> None:
    """Fill ``out_E`` with the elements of a piece; ``offsets`` say where in its memory the operand's slots begin."""
    shape = piece.reading.shape
    if operand.rows is None:
        places = _places_of(operand, piece, offsets)
        _decode_run(operand.decode, StoredRun(shape, piece.start, piece.stop, piece.memory, places), out_E)
        return
    out_E[:] = 0.0
    for start, stop, to, places in _runs(operand, piece, offsets):
        own = (operand.rows.num_source_rows, *shape[1:])
        at = to - piece.start
        _decode_run(operand.decode, StoredRun(own, start, stop, piece.memory, places), out_E[at : at + stop - start])


def _fill_rows(rows: RowRuns, piece: StoredPiece, out_E: Values, rows_ME: Values) -> None:
    """Put the means of other operands, which hold their own rows by now, where an operand has none."""
    for start, stop, of in rows.fills_within(piece.start, piece.stop, piece.reading.row_elems):
        into_E = out_E[start - piece.start : stop - piece.start]
        into_E[:] = rows_ME[of[0], start - piece.start : stop - piece.start]
        for number in of[1:]:
            into_E += rows_ME[number, start - piece.start : stop - piece.start]
        if len(of) > 1:
            into_E /= len(of)


def _runs(operand: Operand, piece: StoredPiece, offsets: list[int]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yield runs of elements of an operand's own tensor that lie in a piece: start, stop, to, places of their slots."""
    rows, shape = operand.rows, piece.reading.shape
    assert rows is not None
    own, per_row = (rows.num_source_rows, *shape[1:]), piece.reading.row_elems
    places = list(offsets)
    for run in rows.within(piece.first, piece.stop, per_row):
        skipped = max(piece.start - run.to, 0)
        held = operand.decode.ranges(own, run.start, run.stop)
        if run.to + run.stop - run.start > piece.start:
            wanted = operand.decode.ranges(own, run.start + skipped, run.stop)
            found = [place + to.start - frm.start for place, frm, to in zip(places, held, wanted, strict=True)]
            yield run.start + skipped, run.stop, run.to + skipped, found
        places = [place + each.stop - each.start for place, each in zip(places, held, strict=True)]


def _decode_run(decode: Decode, run: StoredRun, out_E: Values) -> None:
    _DECODERS[type(decode)](decode, run, out_E)


def _widen(decode: Plain, run: StoredRun, out_E: Values) -> None:
    fill(decode.dtype, run.memory, run.places[0], out_E)


def _join(decode: Joined, run: StoredRun, out_E: Values) -> None:
    at = 0
    for number, first, last in decode.within(run.start, run.stop):
        fill(decode.dtype, run.memory, run.places[number], out_E[at : at + last - first])
        at += last - first


def _scale_blocks(decode: BlockScaled, run: StoredRun, out_E: Values) -> None:
    shape, start, stop, memory, (codes_at, scales_at) = run
    first, last, width = runs_of(decode, shape, start, stop)[1]
    scales_S = _scales(decode.scale_dtype, memory, scales_at, (last - first) // width, out_E.dtype)
    codecs.scale_blocks(
        memory.buffer,
        np.uint64(codes_at),
        codecs.numbers_of_codes(decode.dtype, out_E.dtype.char),
        scales_S.reshape(-1, decode.grid(shape)[1]),
        np.uint64(start),
        _pair(matrix_of(shape)),
        _pair(decode.block),
        out_E,
    )


def _scale_groups(decode: GroupScaled, run: StoredRun, out_E: Values) -> None:
    shape, start, stop, memory, (codes_at, scales_at, *whole_at) = run
    first, last, width = runs_of(decode, shape, start, stop)[1]
    scales_S = _scales(decode.scale_dtype, memory, scales_at, (last - first) // width, out_E.dtype)
    for place in whole_at:
        whole = _scales("F32", memory, place, 1, out_E.dtype)
        with np.errstate(all="ignore"):  # what is not finite is refused where it is merged
            scales_S = scales_S * whole if decode.whole == "multiplies" else scales_S / whole
    codecs.scale_groups(
        memory.buffer,
        np.uint64(codes_at),
        codecs.numbers_of_nibbles(decode.codes, out_E.dtype.char),
        scales_S,
        np.uint64(start),
        np.uint64(decode.num_columns),
        np.uint64(decode.row_bytes),
        np.uint64(decode.group),
        out_E,
    )


def _scales(dtype: str, memory: Memory, place: int, count: int, working: np.dtype[Any]) -> Values:
    """Return scales in working precision, whatever they are stored in."""
    codes = memory.buffer[place : place + count]
    if dtype == "F8_E8M0":
        return codecs.powers_of_two(codes, working.char)
    if DTYPES[dtype].kind == "packed":
        return codecs.numbers_of_codes(dtype, working.char)[codes]
    return numbers(dtype, memory, place, count, working)


def _pair(sizes: tuple[int, int]) -> tuple[np.uint64, np.uint64]:
    return np.uint64(sizes[0]), np.uint64(sizes[1])


def _transpose(decode: Transposed, run: StoredRun, out_E: Values) -> None:
    (rows, columns), start, stop, memory, (place,) = run
    first, last = start // columns, -(-stop // columns)
    num_bytes = decode.num_beside * rows * columns * decode.width
    stored_CR = memory.buffer[place : place + num_bytes].view(f"u{decode.width}").reshape(columns, -1)
    turned_RC = np.empty((last - first, columns), stored_CR.dtype)
    turn(stored_CR[:, decode.places(rows, first, last)], turned_RC)
    wanted = turned_RC.reshape(-1)[start - first * columns : stop - first * columns]
    codecs.widen_run(slab_of(wanted.view(np.uint8)), np.uint64(0), FORMATS[decode.dtype], out_E)


def _take_rows(decode: ByRows, run: StoredRun, out_E: Values) -> None:
    first, last = decode.run(run.shape, run.start, run.stop)
    whole = run._replace(shape=decode.whole_shape(run.shape), start=first, stop=last)
    if not decode.by_turns:
        _decode_run(decode.inner, whole, out_E)
        return
    all_E, columns = np.empty(last - first, out_E.dtype), run.shape[1]
    _decode_run(decode.inner, whole, all_E)
    own_RC = all_E.reshape(-1, decode.num_beside, columns)[:, decode.number]
    skipped = run.start % columns
    out_E[:] = own_RC.reshape(-1)[skipped : skipped + len(out_E)]


_DECODERS: dict[type, Callable[..., Any]] = {
    Plain: _widen, Joined: _join, BlockScaled: _scale_blocks, GroupScaled: _scale_groups, Transposed: _transpose,
    ByRows: _take_rows,
    **adapter_decoders(_decode_run),
}  # fmt: skip
"""What every decode is to this stage."""
