"""Examiners of a tensor of two checkpoints: the sketch of its change, and the whole of it as it was tuned."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from stockflow.adapters import sketch
from stockflow.checkpoints.files.header import width_of
from stockflow.engine.arithmetic import Weighted
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import MapSpans, Tools, swept
from stockflow.engine.survey import Examiner, Look
from stockflow.engine.units import Unit
from stockflow.errors import NumericsError
from stockflow.insight.steps import as_stored
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.kernels.floats import first_nonfinite
from stockflow.kernels.once import rounded
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.storage import redact

_CHANGE = np.array([[-1.0, 1.0]])
_NOTHING: Bytes = np.empty(0, np.uint8)


class FactoredChange(NamedTuple):
    """What is written of a matrix that changed."""

    rank: int
    """0: it did not change"""
    kept: float
    """share of the squared norm of the change"""
    squares: float
    """squared norm of the change"""
    left: Bytes
    """``[rows, rank]``"""
    right: Bytes
    """``[rank, columns]``"""


class TunedTensor(NamedTuple):
    """A tensor as it was tuned."""

    differs: bool
    values: Bytes


@dataclass(frozen=True)
class SketchExaminer(Examiner):
    """Finds the low-rank approximation of a change."""

    rank: int
    energy: float | None
    """share of the squared norm that suffices; None: all that the rank allows"""
    dtype: str
    """of the factors"""
    tuned_dtype: str
    """of the tuned matrix: what equals it once rounded to that did not change"""
    is_turned: bool = False
    """whether factors are those of the transposed matrix"""
    num_sweeps = 2

    def span_bytes(self, look: Look, num_elems: int) -> int:
        """Return what the change of a span takes in float32 and float64, and all that is made of a small matrix."""
        is_small = look.reading.num_elems <= SPAN_ELEMS
        return 12 * num_elems + (sketch.held_bytes(self.rank, _matrix(look)) if is_small else 0)

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return what the products of a span take."""
        del num_groups
        shape = _matrix(look)
        return 8 * sum(shape) * sketch.num_columns(self.rank, shape)

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> FactoredChange:
        """Return what is written of a matrix.

        Raises:
            NumericsError: a model holds NaN or infinity.
        """
        shape = _matrix(look)
        num_sketched = sketch.num_columns(self.rank, shape)
        images_RK, products_CK = (np.zeros((size, 2 * num_sketched)) for size in shape)
        both = Products(images_RK, products_CK)
        signs_CK = sketch.signs(look.reading.name, shape[1], num_sketched)
        (first,) = swept(unit, [ProductSweep(signs_CK, both.half(0), self.tuned_dtype, tools)], map_spans, last=False)
        squares = first.squares
        sweeps = (
            [ProductSweep(sketch.basis(first.products_CK), both.half(1), self.tuned_dtype, tools)] if squares else []
        )
        swept(unit, sweeps, map_spans, last=True)
        if not squares:
            return FactoredChange(0, 1.0, 0.0, _NOTHING, _NOTHING)
        return self._change(look.reading.name, both, squares)

    def conclude(self, look: Look, parts: Sequence[FactoredChange]) -> FactoredChange:
        """Return what the only unit said."""
        del look
        (found,) = parts
        return found

    def _change(self, name: str, both: "Products", squares: float) -> FactoredChange:
        for half in (both.half(0), both.half(1)):
            half.normalize()
        found = sketch.approximation(both.images_RK, both.products_CK, squares, self.rank)
        rank = found.num_needed(self.energy, self.rank)
        left_RL, right_LC = found.factors(rank)
        if self.is_turned:
            left_RL, right_LC = right_LC.T, left_RL.T
        (left, left_fits), (right, right_fits) = (rounded(factor, self.dtype) for factor in (left_RL, right_LC))
        if not (left_fits and right_fits):
            raise NumericsError(f"the change of {name!r} is beyond {self.dtype}; choose another --dtype")
        return FactoredChange(rank, found.kept(rank), squares, left, right)


def _matrix(look: Look) -> tuple[int, int]:
    rows, columns = look.reading.shape
    return rows, columns


@dataclass
class Products:
    """Images of columns under a change, and their products with its rows."""

    images_RK: Floats
    products_CK: Floats
    squares: float = 0.0
    """of the change"""

    def half(self, number: int) -> "Products":
        """Return the first or the last half of the columns, in the same memory."""
        num_columns = self.images_RK.shape[1] // 2
        columns = slice(number * num_columns, (number + 1) * num_columns)
        return Products(self.images_RK[:, columns], self.products_CK[:, columns])

    def normalize(self) -> None:
        """Give the images a norm of 1."""
        norm = float(np.linalg.norm(self.images_RK)) or 1.0
        self.images_RK /= norm
        self.products_CK /= norm


@dataclass(frozen=True, eq=False)
class ProductSweep:
    """``D X`` and ``D' D X`` of the change ``D`` of a matrix, a run of whole rows at a time."""

    columns_CK: Floats
    products: Products
    """zeros, which are filled"""
    dtype: str
    """in which runs are compared: equal ones have no products"""
    tools: Tools

    @property
    def key(self) -> Hashable:
        """Its own: nobody else asks for it."""
        return id(self)

    def begin(self) -> Products:
        """Return zeros."""
        return self.products

    def look(self, span: LoadedPiece) -> tuple[Floats, Floats, float] | None:
        """Return the products of a span, and its squared norm; None if it did not change."""
        if np.array_equal(*_both(span, self.dtype, self.tools)):
            return None
        change_E = np.empty(span.stop - span.start, np.float32)
        self.tools.arithmetic.combine(span, Weighted(_CHANGE, False, "F32", 64), change_E.view(np.uint8))
        change_RC = change_E.astype(np.float64).reshape(-1, len(self.columns_CK))
        squares = float(np.einsum("ij,ij->", change_RC, change_RC))
        if not np.isfinite(squares):
            _refuse_nonfinite(span, self.tools)
        images_RK = change_RC @ self.columns_CK
        return images_RK, change_RC.T @ images_RK, squares

    def add(self, state: Products, start: int, said: tuple[Floats, Floats, float] | None) -> Products:
        """Add the products of the span from element ``start`` on."""
        if said is None:
            return state
        images_RK, products_CK, squares = said
        first = start // len(self.columns_CK)
        state.images_RK[first : first + len(images_RK)] = images_RK
        state.products_CK += products_CK
        state.squares += squares
        return state


def _refuse_nonfinite(span: LoadedPiece, tools: Tools) -> NoReturn:
    name = span.reading.name
    for number, dtype in enumerate(span.dtypes):
        index = first_nonfinite(span.operand(number), dtype)
        if index is not None:
            url = redact(tools.alarm.checkpoints[number].url)
            at = f"{span.start + index:,}"
            raise NumericsError(f"tensor {name!r} of {url} has NaN or infinity at flat index {at}; mend the checkpoint")
    raise NumericsError(f"the change of {name!r} is beyond float32; an adapter cannot hold it")


def _both(span: LoadedPiece, dtype: str, tools: Tools) -> tuple[Bytes, Bytes]:
    """Return base and tuned model in a dtype."""
    return as_stored(span, 0, dtype, tools), as_stored(span, 1, dtype, tools)


@dataclass(frozen=True)
class WholeExaminer(Examiner):
    """Tells whether a tensor changed, and what it became."""

    dtype: str
    """of the tuned tensor, in which both are compared; ``U8`` where bytes are"""
    keeps: bool
    """whether what it became is wanted"""

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return the size of a span in both models."""
        del num_groups
        return 2 * min(look.reading.num_elems, SPAN_ELEMS) * width_of(self.dtype)

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> TunedTensor:
        """Return the tensor as it was tuned."""
        num_kept = look.reading.num_elems if self.keeps else 0
        found: list[TunedTensor] = swept(unit, [WholeSweep(self.dtype, num_kept, tools)], map_spans, last=True)
        return found[0]

    def conclude(self, look: Look, parts: Sequence[TunedTensor]) -> TunedTensor:
        """Return what the only unit said."""
        del look
        (found,) = parts
        return found


@dataclass(frozen=True, eq=False)
class WholeSweep:
    """What a tensor became, span by span."""

    dtype: str
    num_kept: int
    tools: Tools

    @property
    def key(self) -> Hashable:
        """Its own: nobody else asks for it."""
        return id(self)

    def begin(self) -> TunedTensor:
        """Return room for what is kept."""
        return TunedTensor(False, np.empty(self.num_kept * width_of(self.dtype), np.uint8))

    def look(self, span: LoadedPiece) -> tuple[bool, Bytes]:
        """Return whether a span changed, and what it became."""
        base, tuned = _both(span, self.dtype, self.tools)
        return not np.array_equal(base, tuned), tuned.copy() if self.num_kept else _NOTHING

    def add(self, state: TunedTensor, start: int, said: tuple[bool, Bytes]) -> TunedTensor:
        """Put a span where it belongs."""
        differs, tuned = said
        first = start * width_of(self.dtype)
        state.values[first : first + len(tuned)] = tuned
        return state._replace(differs=state.differs or differs)
