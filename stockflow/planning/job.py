"""What is read together, and what is made of it: operands, readings, results, jobs. Pure values of the plan."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from stockflow.checkpoints.decodes.joined import as_bytes, is_uncoded, is_verbatim, kernels_of
from stockflow.checkpoints.decodes.low_rank import LowRank, is_known_change
from stockflow.checkpoints.decodes.stored import (
    BlockScaled,
    Decode,
    GroupScaled,
    plain,
    row_elems,
    verbatim,
)
from stockflow.checkpoints.decodes.transposed import Transposed, placed_beside, within_rows
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import projection_of
from stockflow.methods import METHODS
from stockflow.methods.gram import Gram
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import FLOAT_BYTES, Coefficients, Copy, Elementwise, Linear, Method, Scope
from stockflow.planning.once import once
from stockflow.planning.operands import ExtentRanges, Operand
from stockflow.planning.spans import BLOCK_ELEMS, SPAN_ELEMS
from stockflow.planning.working_precision import FloatBits, float_bits_of, working_bits_of

COPY = "copy"
COPY_EQUAL = "copy_equal"
COPIES = {
    COPY: Method(COPY, Copy(), source="the donor's bytes", base="ignored"),
    COPY_EQUAL: Method(COPY_EQUAL, Copy(must_agree=True), source="the donor's bytes, if all hold them", base="ignored"),
}
"""What a plan may say beside the methods of a recipe."""
WEIGHTED = "weighted"


def _as_given(_: Gram, parameters: Parameters) -> Coefficients:
    return Coefficients(np.array([parameters.each("weight")]), parameters.flag("anchored"))


_BESIDE = {**COPIES, WEIGHTED: Method(WEIGHTED, Linear(_as_given, None), source="the given weights", base="ignored")}
NO_PARAMETERS = Parameters()


@dataclass(frozen=True)
class Reading:
    """Elements of one shape that are read together, one operand per source. What is done with them is not said."""

    name: str
    """what messages call it"""
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    """the anchor (base or first model) first"""
    scope: Scope = "tensor"
    float_bits: FloatBits = 32
    """width of what operands are decoded to that kernels cannot take as they are"""
    whole_rows: bool = False
    """whether rows of the last dimension are wanted whole"""
    band: int = 1
    """elements of which no load parts any: those whose codes have scales together"""

    @once
    def num_elems(self) -> int:
        """Elements to go through; bytes where they are carried over."""
        return math.prod(self.shape)

    @once
    def group_elems(self) -> int:
        """Elements that share one decision."""
        if self.scope == "row" and len(self.shape) > 1:
            return self.shape[-1]
        if self.scope == "leading" and len(self.shape) > 2:
            return math.prod(self.shape[1:])
        return self.num_elems

    @once
    def together(self) -> int:
        """Elements that no span parts: a row of the last dimension where these are wanted whole, and short enough."""
        are_whole = self.whole_rows or (not self.is_plain and any(each.decode.whole_rows for each in self.operands))
        return min(max(self.shape[-1], 1), SPAN_ELEMS) if are_whole and self.shape else 1

    @property
    def num_groups(self) -> int:
        """How many decisions it takes; 0 if it is empty."""
        return self.num_elems // self.group_elems if self.num_elems else 0

    @once
    def row_elems(self) -> int:
        """Elements of a row of the first dimension."""
        return row_elems(self.shape)

    @once
    def is_plain(self) -> bool:
        """Whether kernels can take all operands as they are stored."""
        return all(operand.rows is None and operand.decode.is_plain for operand in self.operands)

    @once
    def num_beside(self) -> int:
        """How many readings share bytes so closely that they are read at once; 0 where any run can be read alone."""
        return 0 if self.is_plain else placed_beside(operand.decode for operand in self.operands)[1]

    @property
    def is_verbatim(self) -> bool:
        """Whether bytes are looked at or carried over, instead of numbers."""
        return is_verbatim(self.operands[0].decode)

    @once
    def dtypes(self) -> tuple[str, ...]:
        """Element type of each operand, as its header says."""
        return tuple([operand.decode.dtype for operand in self.operands])

    @once
    def widths(self) -> tuple[int, ...]:
        """Bytes per element of each operand of a plain reading."""
        return tuple([operand.decode.width for operand in self.operands])

    @once
    def num_slots(self) -> int:
        """Extents of all operands."""
        return len(self.operands) if self.is_plain else sum(len(operand.extents) for operand in self.operands)

    @once
    def bytes_per_elem(self) -> float:
        """Stored bytes per element, all operands together."""
        if self.is_plain:
            return sum(self.widths)
        return sum(operand.decode.bytes_per_elem for operand in self.operands)

    @once
    def num_bytes(self) -> int:
        """Stored bytes of all operands, each read once."""
        if self.is_plain:
            return self.num_elems * sum(self.widths)
        if self.num_beside:
            return math.ceil(self.num_elems * self.bytes_per_elem)
        return sum(slot.num_bytes for slot in self.slots(0, self.num_elems))

    @once
    def run_bytes(self) -> int:
        """Stored bytes that every run takes beside ``bytes_per_elem`` for each element."""
        return 0 if self.is_plain else sum(each.decode.run_bytes(self._own_shape(each)) for each in self.operands)

    def scratch_elems(self, num_elems: int) -> int:
        """Return how many numbers are held, beside the elements, while a run of so many is decoded."""
        if self.is_plain:
            return 0
        return max(each.decode.scratch_elems(self._own_shape(each), num_elems) for each in self.operands)

    def _own_shape(self, operand: Operand) -> tuple[int, ...]:
        return self.shape if operand.rows is None else (operand.rows.num_source_rows, *self.shape[1:])

    @property
    def files(self) -> set[tuple[int, str]]:
        """Checkpoint and file of everything it reads."""
        return {(operand.checkpoint, extent.file) for operand in self.operands for extent in operand.extents}

    def slots(self, start: int, stop: int) -> Iterator[ExtentRanges]:
        """Yield what the extents of all operands contribute to elements ``start`` to ``stop``, in order."""
        for operand in self.operands:
            yield from operand.slots(self.shape, start, stop)


@dataclass(frozen=True, slots=True)
class Result:
    """What is made of a reading: one logical tensor, by which method."""

    outputs: tuple[TensorSpec, ...]
    """as it is stored, one after the other in one file; mostly one"""
    encode: Decode
    """as it is stored: plain numbers, or codes"""
    method: str
    parameters: Parameters
    float_bits: FloatBits = 32
    """width that holds every operand and the output; magnitudes of task vectors are ranked in it"""
    working_bits: FloatBits = 32
    """width of the working precision, finer than the output; results of F64 are computed in pairs of float64"""
    rule: str = ""
    """how scales are chosen, if it is written in codes (``kernels.coding``)"""

    @property
    def dtype(self) -> str:
        """What numbers are rounded to; those that become codes are so from F32."""
        return "F32" if self.rule else self.outputs[0].dtype

    @property
    def width(self) -> int:
        """Bytes of a number as it is rounded."""
        return 4 if self.rule else self.encode.width

    def band_elems(self, shape: tuple[int, ...]) -> int:
        """Return how many elements must be known before their codes are: one if there are none."""
        encode = within_rows(self.encode)
        return encode.band_elems(shape) if isinstance(encode, BlockScaled | GroupScaled) else 1

    def num_code_bytes(self, shape: tuple[int, ...], start: int, stop: int) -> int:
        """Return how many bytes elements ``start`` to ``stop`` become, their scales apart."""
        if isinstance(self.encode, Transposed):
            return self.encode.width * (stop - start)
        codes = within_rows(self.encode).ranges(shape, start, stop)[0]
        return codes.stop - codes.start

    @property
    def num_scale_bytes(self) -> int:
        """Return the size of what follows the codes of the whole tensor."""
        return sum([output.num_bytes for output in self.outputs[1:]])

    @property
    def declared(self) -> Method:
        """Its method."""
        return _BESIDE.get(self.method) or METHODS[self.method]

    @property
    def num_bytes(self) -> int:
        """Size of all outputs."""
        return sum([output.num_bytes for output in self.outputs])


@dataclass(frozen=True)
class TensorJob:
    """A reading, and the results that are computed from the same loaded spans: mostly one."""

    reading: Reading
    results: tuple[Result, ...]
    wholes: tuple[TensorSpec, ...] = ()
    """what its outputs are the next runs of, as those of jobs beside it; nothing where they are tensors themselves"""

    @property
    def whole(self) -> TensorSpec | None:
        """What its first output is the next run of."""
        return self.wholes[0] if self.wholes else None

    @property
    def stored_name(self) -> str:
        """Name of what holds its output in a file, which rules and filters look at."""
        return self.whole.name if self.whole else self.output.name

    @property
    def result(self) -> Result:
        """The first result, which is the only one of what a plan holds today."""
        return self.results[0]

    @property
    def output(self) -> TensorSpec:
        """The first tensor it writes, whose name it bears."""
        return self.results[0].outputs[0]

    @property
    def method(self) -> str:
        """Name of the method of its first result."""
        return self.results[0].method

    @once
    def decided_in(self) -> str:
        """Name of the experts of its layer that it is decided with; none where it is decided by itself."""
        if self.reading.scope != "layer":
            return ""
        part = projection_of(self.reading.name)
        return f"{part.stem}.{'down_proj' if part.role == 'down' else 'gate_up_proj'}" if part else self.reading.name

    @once
    def is_copy(self) -> bool:
        """Whether bytes are carried over instead of computed."""
        return self.method in COPIES

    @once
    def output_width(self) -> int:
        """Bytes that become of an element, rounded up, scales included."""
        return sum([math.ceil(result.encode.bytes_per_elem) for result in self.results])

    @once
    def place_beside(self) -> tuple[int, int]:
        """Its place among jobs that are read and written at once, and their number; (0, 0) if it stands alone."""
        if self.reading.is_plain and self.results[0].encode.is_plain:  # as nearly all are
            return 0, 0
        return placed_beside([*(each.decode for each in self.reading.operands), self.results[0].encode])

    @once
    def adds_known_changes(self) -> bool:
        """Whether it adds up, by weights, what factors of low rank make of its first operand."""
        (result, *others), reading = self.results, self.reading
        if reading.is_plain or others or reading.num_groups != 1 or self.decided_in:
            return False
        if not isinstance(result.declared.rule, Linear):
            return False
        return all(is_known_change(each.decode) for each in reading.operands[1:])

    @once
    def has_known_changes(self) -> bool:
        """Whether it asks for products of changes, and they follow from factors without a look at the elements."""
        rule, given = self.result.declared.rule, self.result.parameters
        if not isinstance(rule, Linear) or not rule.needs_gram:
            return False
        return rule.products_for(given) == "changes" and self.adds_known_changes

    @property
    def num_statistic_passes(self) -> int:
        """How often the operands go by before they are combined."""
        if self.has_known_changes:
            return 0
        return max(
            [result.declared.rule.num_statistic_passes(result.float_bits, result.parameters) for result in self.results]
        )

    @property
    def num_sweeps(self) -> int:
        """The statistics passes and the last one, which combines; that one alone where it is decided with others."""
        return 1 if self.decided_in else self.num_statistic_passes + 1

    @property
    def kind(self) -> Hashable:
        """Equal for jobs that need the same kernels."""
        decodes = frozenset(kernels_of(operand.decode) for operand in self.reading.operands)
        made = tuple((result.method, id(result.parameters), result.encode, result.rule) for result in self.results)
        return made, decodes, tuple(result.working_bits for result in self.results)

    @once
    def costs(self) -> Hashable:
        """Equal for jobs that take the same memory."""
        reading = self.reading
        made = [(result.method, result.outputs[0].dtype) for result in self.results]
        stored_as: Hashable = reading.dtypes
        if not reading.is_plain:  # codes are one object for each way of storing, which is quicker told than compared
            decodes = [each.decode for each in reading.operands]
            stored_as = tuple([id(each) if isinstance(each, BlockScaled | GroupScaled) else each for each in decodes])
        beside = self.place_beside, self._scale_bytes
        return reading.shape, reading.scope, stored_as, reading.is_plain, reading.band, *beside, *made

    def scratch_bytes(self, num_elems: int) -> int:
        """Return what one thread needs, beside the operands, for a span of so many elements."""
        sources = len(self.reading.operands)
        most = min(num_elems, max(BLOCK_ELEMS, self.reading.together))
        return max([result.declared.rule.scratch_bytes(sources, most, result.working_bits) for result in self.results])

    def span_state_bytes(self, num_groups: int) -> int:
        """Return what one statistics pass leaves behind of a span of so many groups."""
        sources = len(self.reading.operands)
        return sum([result.declared.rule.span_state_bytes(sources, num_groups) for result in self.results])

    @property
    def ahead_bytes(self) -> int:
        """What is held of factors, as they are stored and in float64, before anything is merged."""
        factors = (each.decode for each in self.reading.operands if isinstance(each.decode, LowRank))
        widths = ((each, FLOAT_BYTES + max(each.widths[-2:])) for each in factors if self.has_known_changes)
        return sum(each.rank * sum(each.matrix) * width for each, width in widths)

    @property
    def kept_bytes(self) -> int:
        """What is kept of the rows of a unit until it is decided."""
        reading, pairs = self.reading, [(result.declared.rule, result.parameters) for result in self.results]
        sizes = reading.num_elems * (len(reading.operands) - 1), -(-reading.num_elems // reading.together)
        kept = [rule.kept_bytes(given, *sizes) for rule, given in pairs if isinstance(rule, Elementwise)]
        return self._scale_bytes + sum(kept)

    @property
    def _scale_bytes(self) -> int:
        """What is kept of scales until all codes before them are written."""
        return sum([each.num_bytes for each in (self.wholes or self.results[0].outputs)[1:]])


def merging(
    output: TensorSpec, operands: tuple[Operand, ...], method: str, parameters: Parameters, scope: Scope
) -> TensorJob:
    """Return the job that computes one tensor of plain numbers."""
    dtypes = {operand.decode.dtype for operand in operands}
    working = working_bits_of(output.dtype, dtypes)
    declared = METHODS.get(method)
    whole_rows = declared is not None and isinstance(declared.rule, Elementwise) and declared.rule.whole_rows
    reading = Reading(output.name, output.shape, operands, scope, working, whole_rows)
    # what is in codes would be rounded by float32
    is_exact = reading.is_plain or all(is_uncoded(operand.decode) for operand in operands)
    ranked = float_bits_of((output.dtype, *dtypes)) if is_exact else working
    return TensorJob(reading, (Result((output,), plain(output.dtype), method, parameters, ranked, working),))


def adding(
    output: TensorSpec, operands: tuple[Operand, ...], weights: tuple[float, ...], *, anchored: bool
) -> TensorJob:
    """Return the job that adds plain numbers up by given weights: to the first, of task vectors, if ``anchored``."""
    return merging(output, operands, WEIGHTED, Parameters({"anchored": anchored}, {"weight": weights}), "tensor")


def copying(output: TensorSpec, operands: tuple[Operand, ...], method: str) -> TensorJob:
    """Return the job that carries a tensor's bytes over."""
    carried = tuple(operand._replace(decode=as_bytes(operand.decode)) for operand in operands)
    reading = Reading(output.name, (output.num_bytes,), carried)
    return TensorJob(reading, (Result((output,), verbatim(output.dtype), method, NO_PARAMETERS),))
