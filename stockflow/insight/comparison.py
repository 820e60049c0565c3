"""Two checkpoints compared tensor by tensor, streamed from wherever they are within a bound of memory.

A tensor is compared by numbers where both sides are of BF16, F16, F32 or F64, in the wider format where they differ;
everything else by bits. Each byte of both is read once, by the same session as in a merge.
"""

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stockflow.checkpoints.decodes.joined import as_bytes
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.opening import Checkpoint, link_notes, open_checkpoints
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import MapSpans, Tools, swept
from stockflow.engine.survey import Examiner, Look, SurveySpec
from stockflow.engine.units import Unit
from stockflow.events import Done, Note, OnEvent, Stage, ignore
from stockflow.insight.difference import CheckpointDifference, TensorDifference, Unmatched
from stockflow.insight.surveys import Survey, SurveyOptions
from stockflow.kernels import comparison
from stockflow.kernels.arrays import Floats, Unsigned, Values
from stockflow.kernels.comparison import NUM_COUNTS, NUM_SUMS
from stockflow.kernels.floats import EXPONENTS, FORMATS, TILE, WIDTHS
from stockflow.planning.job import Reading
from stockflow.planning.operands import operand_of
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.working_precision import float_bits_of
from stockflow.storage import StorageConfig, open_model, pin_revision


@dataclass
class Differing:
    """What was found of one tensor so far, or of a run of its elements."""

    sums: Floats = field(default_factory=lambda: np.zeros(NUM_SUMS))
    counts: dict[int, int] = field(default_factory=dict)
    """by the places of ``kernels.comparison``; ``FIRST`` and ``LARGEST_AT`` only where there is one"""

    def add(self, start: int, num_elems: int, sums: Floats, counts: Unsigned) -> None:
        """Add what was found of the elements from ``start`` on, in order."""
        for place, value in enumerate(counts.tolist()):
            if place in (comparison.FIRST, comparison.LARGEST_AT):
                continue
            is_most = place == comparison.MOST_ROUNDINGS
            before = self.counts.get(place, 0)
            self.counts[place] = max(before, value) if is_most else before + value
        if counts[comparison.FIRST] < num_elems:
            self.counts.setdefault(comparison.FIRST, start + int(counts[comparison.FIRST]))
        if sums[comparison.LARGEST] > self.sums[comparison.LARGEST]:
            self.counts[comparison.LARGEST_AT] = start + int(counts[comparison.LARGEST_AT])
        largest = max(self.sums[comparison.LARGEST], sums[comparison.LARGEST])
        self.sums += sums
        self.sums[comparison.LARGEST] = largest


def compare_checkpoints(
    location_a: str,
    location_b: str,
    config: StorageConfig,
    options: SurveyOptions,
    survey: Survey,
    *,
    on_event: OnEvent = ignore,
) -> CheckpointDifference:
    """Compare two checkpoints.

    Args:
        location_a: of the one that distances are relative to.
        location_b: of the other one.
        config: how to reach them.
        options: what may be used.
        survey: where tensors are looked at.
        on_event: told how it goes.

    Raises:
        UserError: one is missing, forbidden, malformed or changes meanwhile; or the memory is too small.
        StorageError: reading failed after retries.
    """
    started = time.perf_counter()
    a, b = _opened((location_a, location_b), config, on_event)
    pairs, unmatched = _matched(a, b)
    looks = [_look(a, b, *pair) for pair in pairs]
    num_bytes = sum(look.reading.num_bytes for look in looks)
    on_event(Stage("comparing", total_bytes=num_bytes, num_items=len(looks), unit="tensors"))
    refs = tuple(CheckpointRef(each.url, each.files) for each in (a, b))
    spec = SurveySpec(refs, config, options.memory_bytes, options.num_threads, options.device)
    found: dict[int, Differing] = {}
    for number, row in survey(spec, looks, on_event) if looks else ():
        found[number] = row
        on_event(Done(looks[number].reading.name))
    return CheckpointDifference(
        url_a=a.url,
        url_b=b.url,
        only_in_a=tuple(name for name in a.specs if name not in b.specs),
        only_in_b=tuple(name for name in b.specs if name not in a.specs),
        unmatched=tuple(unmatched),
        tensors=tuple(
            _difference(*pair, found[number], in_codes=pair[0].name in a.stored or pair[0].name in b.stored)
            for number, pair in enumerate(pairs)
        ),
        num_bytes=num_bytes,
        seconds=time.perf_counter() - started,
    )


def _opened(locations: Sequence[str], config: StorageConfig, on_event: OnEvent) -> Sequence[Checkpoint]:
    on_event(Stage("opening checkpoints", unit="files"))
    stores = [open_model(pin_revision(location), config) for location in locations]
    checkpoints = open_checkpoints(stores, lambda file: on_event(Done(file)))
    for store, checkpoint in zip(stores, checkpoints, strict=True):
        for note in link_notes(store, checkpoint.files):
            on_event(Note(note))
    return checkpoints


def _matched(a: Checkpoint, b: Checkpoint) -> tuple[list[tuple[TensorSpec, TensorSpec]], list[Unmatched]]:
    pairs, unmatched = [], []
    for name, spec in a.specs.items():
        other = b.specs.get(name)
        if other is None:
            continue
        by_numbers = spec.dtype in FORMATS and other.dtype in FORMATS
        if spec.shape == other.shape and (by_numbers or spec.dtype == other.dtype):
            pairs.append((spec, other))
        else:
            unmatched.append(Unmatched(name, spec.dtype, other.dtype, spec.shape, other.shape))
    return pairs, unmatched


def _look(a: Checkpoint, b: Checkpoint, spec_a: TensorSpec, spec_b: TensorSpec) -> Look:
    name = spec_a.name
    operands = operand_of(0, a, name), operand_of(1, b, name)
    if spec_a.dtype in FORMATS:
        bits = float_bits_of((spec_a.dtype, spec_b.dtype))
        return Look(Reading(name, spec_a.shape, operands, float_bits=bits), DifferenceExaminer())
    carried = tuple(each._replace(decode=as_bytes(each.decode)) for each in operands)
    return Look(Reading(name, (spec_a.num_bytes,), carried), DifferenceExaminer())


def compared_in(dtype_a: str, dtype_b: str) -> str:
    """Return the format that holds the numbers of both exactly."""
    if dtype_a == dtype_b:
        return dtype_a
    return "F64" if "F64" in (dtype_a, dtype_b) else "F32"


class DifferenceExaminer(Examiner):
    """Holds two operands against each other."""

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return the size of sums and counts."""
        del look, num_groups
        return 8 * (NUM_SUMS + NUM_COUNTS)

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> Differing:
        """Return what differs in a unit."""
        del look
        found: list[Differing] = swept(unit, [DifferenceSweep(tools)], map_spans, last=True)
        return found[0]

    def conclude(self, look: Look, parts: Sequence[Differing]) -> Differing:
        """Return what differs in the only unit."""
        del look
        (found,) = parts
        return found


@dataclass(frozen=True, eq=False)
class DifferenceSweep:
    """What differs, span by span, in their order."""

    tools: Tools

    @property
    def key(self) -> Hashable:
        """Its own: nobody else asks for it."""
        return id(self)

    def begin(self) -> Differing:
        """Return that nothing differs."""
        return Differing()

    def look(self, span: LoadedPiece) -> tuple[int, Floats, Unsigned]:
        """Return how many elements a span has, and what is to be said of them."""
        num_elems = span.stop - span.start
        sums, counts = np.zeros(NUM_SUMS), np.zeros(NUM_COUNTS, np.uint64)
        if span.reading.is_verbatim:
            _compare_bits(span, counts)
            return num_elems, sums, counts
        dtype = compared_in(*span.dtypes)
        comparison.compare(
            span.slab,
            span.firsts_M,
            span.formats_M,
            np.uint64(num_elems),
            WIDTHS[dtype] == 2,
            np.uint64(EXPONENTS[dtype]),
            *self._tiles(span.reading.float_bits),
            sums,
            counts,
        )
        return num_elems, sums, counts

    def add(self, state: Differing, start: int, said: tuple[int, Floats, Unsigned]) -> Differing:
        """Add what a span says."""
        state.add(start, *said)
        return state

    def _tiles(self, float_bits: int) -> tuple[Values, Values]:
        """Two tiles of working precision, as numbers and as patterns, of this thread."""
        threads = self.tools.threads
        wide_2T = getattr(threads, f"wide_{float_bits}", None)
        if wide_2T is None:
            wide_2T = np.zeros((2, TILE), f"f{float_bits // 8}")
            setattr(threads, f"wide_{float_bits}", wide_2T)
        return wide_2T, wide_2T.view(f"u{float_bits // 8}")


def _compare_bits(span: LoadedPiece, counts: Unsigned) -> None:
    """Fill ``counts`` with what differs between elements whose meaning is not looked at."""
    width = unit_bytes(span.reading.dtypes[0])
    a, b = (span.operand(index).view(f"u{width}") for index in range(2))
    differs = a != b
    counts[comparison.DIFFERING] = np.count_nonzero(differs)
    counts[comparison.SAME] = differs.size - int(counts[comparison.DIFFERING])
    counts[comparison.FIRST] = differs.argmax() * width if counts[comparison.DIFFERING] else span.stop - span.start


def unit_bytes(dtype: str) -> int:
    """Return the size of what is counted as one: an element, or a byte where elements are smaller than one."""
    bits = DTYPES[dtype].bits
    return bits // 8 if bits % 8 == 0 else 1


def _difference(a: TensorSpec, b: TensorSpec, found: Differing, *, in_codes: bool) -> TensorDifference:
    """Return what differs; numbers that codes stand for are those of no format, so that nothing lies between them."""
    counts, by_numbers = found.counts, a.dtype in FORMATS
    width = 1 if by_numbers else unit_bytes(a.dtype)
    first = counts.get(comparison.FIRST)
    by_bits = TensorDifference(
        name=a.name,
        shape=a.shape,
        dtype_a=a.dtype,
        dtype_b=b.dtype,
        num_elems=a.num_elems if by_numbers else a.num_bytes // width,
        num_differing=counts.get(comparison.DIFFERING, 0),
        first_differing=None if first is None else first // width,
    )
    if not by_numbers:
        return by_bits
    squares_a, squares_b, squares_change, largest = map(float, found.sums)
    return replace(
        by_bits,
        norm_a=math.sqrt(squares_a),
        norm_b=math.sqrt(squares_b),
        distance=math.sqrt(squares_change),
        largest_change=largest,
        largest_at=counts.get(comparison.LARGEST_AT),
        most_roundings=None if in_codes else counts.get(comparison.MOST_ROUNDINGS, 0),
        roundings=tuple(counts.get(place, 0) for place in range(comparison.SAME, comparison.NONFINITE) if not in_codes),
        num_nonfinite=counts.get(comparison.NONFINITE, 0),
    )
