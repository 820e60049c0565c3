"""Decodes of adapters: a tensor of a base with what an adapter adds to it, or puts in its place. Values of the plan.

Each is around the decode of the base's tensor, whose extents come first.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from stockflow.checkpoints.decodes.around import Around
from stockflow.checkpoints.decodes.joined import is_uncoded
from stockflow.checkpoints.decodes.stored import ByteRange, Decode
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed
from stockflow.checkpoints.files.header import DTYPES

Shape = tuple[int, ...]
NOTHING = ByteRange(0, 0)


class Matrices(NamedTuple):
    """A tensor as its adapter sees it: equal matrices one after the other, mostly one."""

    number: int
    rows: int
    columns: int


class _Adapted(Around):
    """What all decodes of adapters have of the one within them."""

    __slots__ = ()

    @property
    def words(self) -> str:
        """What its users call it."""
        return f"{self.inner.words} with an adapter"


@dataclass(frozen=True, slots=True)
class Anchored(_Adapted):
    """Another decode of the bytes that the first operand of a reading is made of: none of them is read again."""

    inner: Decode

    @property
    def bytes_per_elem(self) -> float:
        """Nothing."""
        return 0.0

    @property
    def words(self) -> str:
        """What its users call it."""
        return self.inner.words

    def run_bytes(self, shape: Shape) -> int:
        """Return nothing."""
        del shape
        return 0

    def ranges(self, shape: Shape, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return no bytes of each extent."""
        del shape, start, stop
        return (NOTHING,) * len(self.widths)


@dataclass(frozen=True, slots=True)
class LowRank(_Adapted):
    """``W + scale * B A``: then the extents of A and B.

    ``A`` is ``[rank, columns]`` and ``B`` ``[rows, rank]``; where the base stores its weight as ``[in, out]``, as
    embeddings do, ``A`` is ``[rank, rows]`` and ``B`` ``[columns, rank]``. For all experts of a layer at once PEFT has
    ``A`` as ``[experts, rank, ...]`` and ``B`` as ``[..., rank, experts]``. Source: Hu et al. 2021, "LoRA",
    arXiv:2106.09685.
    """

    inner: Decode
    rank: int
    scale: float
    dtypes: tuple[str, str]
    """of A and B"""
    matrix: tuple[int, int]
    """rows and columns of each matrix"""
    is_transposed: bool = False
    num_experts: int = 1
    """for which A and B hold factors; the tensor has as many matrices, unless it is of one of them"""
    expert: int | None = None
    """the one whose matrix the tensor is"""
    first_row: int = 0
    """row of B that is the first of the tensor"""

    def __post_init__(self) -> None:
        """Hold the fields against each other.

        Raises:
            ValueError: they make no product.
        """
        sizes = (self.rank, *self.matrix, self.num_experts)
        expert = 0 if self.expert is None else self.expert
        are_right = all(type(each) is int and each > 0 for each in sizes) and len(self.matrix) == len(self.dtypes) == 2
        are_places = all(type(each) is int and each >= 0 for each in (expert, self.first_row))
        if not (are_right and are_places and expert < self.num_experts and math.isfinite(self.scale)):
            raise ValueError(f"no product has rank, sizes and experts of {sizes!r}, and the scale {self.scale!r}")
        _check_floats(*self.dtypes)

    @property
    def bytes_per_elem(self) -> float:
        """Of the extents within, and the share of factors that go along with rows or experts."""
        rows, columns = self.matrix
        width_a, width_b = self.widths[-2:]
        own = 0.0 if self.is_transposed else self.num_experts * self.rank * width_b / columns
        if self._is_stacked:
            own = self.rank * width_a / (columns if self.is_transposed else rows)
        return self.inner.bytes_per_elem + own

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the extents within, of A and of B."""
        return (*self.inner.widths, *_widths(*self.dtypes))

    def run_bytes(self, shape: Shape) -> int:
        """Return the bytes of a matrix of A and a row of B, or of all of B."""
        width_a, width_b = self.widths[-2:]
        per_b = self.num_experts * self.rank * width_b
        of_b = self.num_b_rows if self.is_transposed or self._is_stacked else 2
        own = self.rank * self.num_a_columns * width_a * (2 if self._is_stacked else 1) + of_b * per_b
        return own + self.inner.run_bytes(shape)

    def scratch_elems(self, shape: Shape, num_elems: int) -> int:
        """Return the numbers of both factors of a run, and copies where they are turned."""
        rows, columns = self.matrix
        within = min(rows, num_elems // columns + 2)
        own = self.rank * (self.num_a_columns + within + columns)
        own += self.num_b_rows * self.num_experts * self.rank if self.is_transposed or self._is_stacked else 0
        return own + self.inner.scratch_elems(shape, num_elems)

    def ranges(self, shape: Shape, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges within, the matrices of A and the rows of B that a run touches."""
        inner = self.inner.ranges(shape, start, stop)
        if start == stop:
            return (*inner, NOTHING, NOTHING)
        _, rows, columns = self.matrices(shape)
        first, last = self.experts_within(shape, start, stop)
        width_a, width_b = self.widths[-2:]
        per_a = self.rank * (rows if self.is_transposed else columns) * width_a
        top, bottom = self.rows_of_b(shape, start, stop)
        per_b = self.num_experts * self.rank * width_b
        return (*inner, ByteRange(first * per_a, last * per_a), ByteRange(top * per_b, bottom * per_b))

    def matrices(self, shape: Shape) -> Matrices:
        """Return the matrices of a tensor of this shape."""
        if self._is_stacked:
            return Matrices(*shape)
        return Matrices(1, shape[0], math.prod(shape[1:]))

    def experts_within(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        """Return the first expert of A that a run of elements needs, and one past the last."""
        if self.expert is not None:
            return self.expert, self.expert + 1
        _, rows, columns = self.matrices(shape)
        return start // (rows * columns), -(-stop // (rows * columns))

    def rows_of_b(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        """Return the first row of B that a run of elements needs, and one past the last."""
        _, rows, columns = self.matrices(shape)
        if self.is_transposed:
            return 0, columns
        if self._is_stacked:
            return 0, rows
        return self.first_row + start // columns, self.first_row - (-stop // columns)

    @property
    def num_a_columns(self) -> int:
        """Columns of A."""
        return self.matrix[0] if self.is_transposed else self.matrix[1]

    @property
    def num_b_rows(self) -> int:
        """Rows of B that the tensor needs."""
        return self.matrix[1] if self.is_transposed else self.matrix[0]

    @property
    def _is_stacked(self) -> bool:
        return self.num_experts > 1 and self.expert is None


@dataclass(frozen=True, slots=True)
class Lengths(_Adapted):
    """Rows of another decode, each scaled to a length of its own: then the extent of those lengths.

    Source: Liu et al. 2024, "DoRA", arXiv:2402.09353.
    """

    inner: Decode
    length_dtype: str
    whole_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse lengths that are no plain numbers."""
        _check_floats(self.length_dtype)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the extents within and of a length."""
        return (*self.inner.widths, *_widths(self.length_dtype))

    @property
    def bytes_per_elem(self) -> float:
        """Of the extents within; at worst, a row has one element."""
        return self.inner.bytes_per_elem + self.widths[-1]

    def ranges(self, shape: Shape, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges within, and the lengths of the rows."""
        columns, width = math.prod(shape[1:]), self.widths[-1]
        own = ByteRange(start // columns * width, -(-stop // columns) * width) if start < stop else NOTHING
        return (*self.inner.ranges(shape, start, stop), own)


@dataclass(frozen=True, slots=True)
class Added(_Adapted):
    """Another decode plus a multiple of a tensor of the same shape: then the extent of that."""

    inner: Decode
    added_dtype: str
    scale: float

    def __post_init__(self) -> None:
        """Refuse what is no plain number."""
        _check_floats(self.added_dtype)
        if not math.isfinite(self.scale):
            raise ValueError(f"no tensor is added {self.scale!r} times")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the extents within and of what is added."""
        return (*self.inner.widths, *_widths(self.added_dtype))

    @property
    def bytes_per_elem(self) -> float:
        """Of both."""
        return self.inner.bytes_per_elem + self.widths[-1]

    def ranges(self, shape: Shape, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges within, and the same run of what is added."""
        width = self.widths[-1]
        return (*self.inner.ranges(shape, start, stop), ByteRange(start * width, stop * width))


@dataclass(frozen=True, slots=True)
class ReplacedRows(_Adapted):
    """Another decode, some of whose rows are others: then the extent of those rows, one after the other."""

    inner: Decode
    row_dtype: str
    indices: tuple[int, ...]
    """of the rows, in the order in which they are stored"""

    def __post_init__(self) -> None:
        """Refuse what are no rows."""
        _check_floats(self.row_dtype)
        if not all(type(index) is int and index >= 0 for index in self.indices):
            raise ValueError(f"no rows are {self.indices!r}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the extents within and of an element of the rows."""
        return (*self.inner.widths, *_widths(self.row_dtype))

    def run_bytes(self, shape: Shape) -> int:
        """Return the bytes of all rows, and of what the decode within needs."""
        return self._row_bytes(shape) + self.inner.run_bytes(shape)

    def ranges(self, shape: Shape, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges within, and all rows."""
        return (
            *self.inner.ranges(shape, start, stop),
            ByteRange(0, self._row_bytes(shape)) if stop > start else NOTHING,
        )

    def _row_bytes(self, shape: Shape) -> int:
        return len(self.indices) * math.prod(shape[1:]) * self.widths[-1]


def part_of_decode(decode: Decode, shape: Shape, start: int, part: Shape) -> tuple[Decode, tuple[int, ...]]:
    """Return how a matrix is stored that is a part of a tensor, and where in each extent it begins.

    Args:
        decode: of a tensor of all experts.
        shape: of that tensor.
        start: its element that is the first of the part.
        part: shape of the part.
    """
    num_elems = math.prod(part)
    if not isinstance(decode, LowRank):
        return decode, tuple(each.start for each in decode.ranges(shape, start, start + num_elems))
    _, rows, columns = shape
    expert, within = divmod(start, rows * columns)
    inner, offsets = part_of_decode(decode.inner, shape, start, part)
    own = replace(decode, inner=inner, matrix=(part[0], part[1]), expert=expert, first_row=within // columns)
    return own, (*offsets, 0, 0)


def on_anchor(decode: Decode, anchor: Decode) -> Decode | None:
    """Return a decode with the anchor's in the place of the innermost, None if that is another."""
    if decode == anchor:
        return Anchored(anchor)
    if not isinstance(decode, LowRank | Lengths | Added | ReplacedRows):
        return None
    inner = on_anchor(decode.inner, anchor)
    return None if inner is None else replace(decode, inner=inner)


def reads_anchor(decode: Decode) -> bool:
    """Return whether the innermost decode is the anchor's."""
    while isinstance(decode, _Adapted):
        if isinstance(decode, Anchored):
            return True
        decode = decode.inner
    return False


def is_known_change(decode: Decode) -> bool:
    """Return whether a decode differs from the anchor's by nothing, or by a product that its factors alone tell."""
    is_product = isinstance(decode, LowRank) and isinstance(decode.inner, Anchored) and decode.num_experts == 1
    return is_product or isinstance(decode, Anchored)


def is_adapted(decode: Decode) -> bool:
    """Return whether a decode is one of an adapter."""
    return isinstance(decode, _Adapted)


def codes_within(decode: Decode) -> Decode | None:
    """Return how the codes of the innermost decode are stored, None if it is one of plain numbers."""
    while isinstance(decode, _Adapted | ByRows):
        decode = decode.inner
    return None if is_uncoded(decode) or isinstance(decode, Transposed) else decode


def _widths(*dtypes: str) -> tuple[int, ...]:
    return tuple(DTYPES[dtype].bits // 8 for dtype in dtypes)


def _check_floats(*dtypes: str) -> None:
    for dtype in dtypes:
        if DTYPES[dtype].kind != "float":
            raise ValueError(f"no adapter is stored as {dtype}")
