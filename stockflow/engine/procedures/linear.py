"""Weighted sums: one sweep for the Gram, if the method takes one, then coefficients, then the sum."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from operator import methodcaller

import numpy as np

from stockflow.engine.arithmetic import Weighted
from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Fill, Load, Steps, Tools, as_it_is
from stockflow.engine.units import Unit
from stockflow.errors import NumericsError
from stockflow.kernels.arrays import Bytes, Floats
from stockflow.methods.gram import Gram, Products
from stockflow.methods.protocol import Coefficients, Linear
from stockflow.planning.job import Result, TensorJob
from stockflow.planning.working_precision import FloatBits


@dataclass(frozen=True, eq=False)
class GramSweep:
    """Products of [w_0, d_1 .. d_N] or of the sources per group of a unit, (G, M, M), added span by span in order."""

    unit: Unit
    tools: Tools
    products: Products = "changes"
    refuses: bool = True
    """whether a product that is not finite is an error"""
    float_bits: FloatBits = 64
    """width that task vectors are rounded to"""

    @property
    def key(self) -> Hashable:
        """What is wanted."""
        return GramSweep, self.products, self.float_bits

    def begin(self) -> Floats:
        """Return zeros."""
        reading = self.unit.work.reading
        num_groups, num_operands = (self.unit.stop - self.unit.start) // reading.group_elems, len(reading.operands)
        return np.zeros((num_groups, num_operands, num_operands))

    def look(self, span: LoadedPiece) -> Floats:
        """Return the products of a span."""
        started = time.perf_counter()
        group_elems = min(span.reading.group_elems, span.stop - span.start)
        products_GMM = self.tools.arithmetic.gram(span, group_elems, products=self.products, float_bits=self.float_bits)
        if self.refuses and not np.isfinite(products_GMM).all():
            what = "models" if self.products == "sources" else "task vectors"
            self.tools.alarm.refuse_nonfinite(span, f"a product of {what}")
        self.tools.clock.add("statistics", started)
        return products_GMM

    def add(self, state: Floats, start: int, said: Floats) -> Floats:
        """Add the products of a span to those of its groups."""
        first = (start - self.unit.start) // self.unit.work.reading.group_elems
        state[first : first + len(said)] += said
        return state


def decide(unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Steps | Fill:
    """Ask for the Gram, if the method takes one, and return what adds the sources up.

    Raises:
        NumericsError: NaN or infinity, or a geometry the method refuses.
    """
    rule = result.declared.rule
    assert isinstance(rule, Linear)
    job = unit.work
    if isinstance(job, TensorJob) and job.has_known_changes:
        return _filler(_known(job, unit, result, ledger, tools), unit, result, tools, ledger)
    if rule.needs_gram:
        return _after_gram(rule, unit, result, ledger, tools)
    num_operands = len(unit.work.reading.operands)
    nothing = Gram(np.zeros((1, num_operands, num_operands)))
    return _filler(_decided(rule, unit, result, nothing, ledger), unit, result, tools)


def _after_gram(rule: Linear, unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Steps:
    products = rule.products_for(result.parameters)
    gram = Gram((yield GramSweep(unit, tools, products, float_bits=result.working_bits)))
    return _filler(_decided(rule, unit, result, gram, ledger), unit, result, tools)


def _known(job: TensorJob, unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Coefficients:
    rule, gram_MM = result.declared.rule, tools.known(job)
    assert isinstance(rule, Linear)
    if not np.isfinite(gram_MM).all() and tools.alarm.on_nonfinite == "error":
        raise NumericsError(
            f"tensor {job.reading.name!r}: an adapter has NaN or infinity, or its changes overflow; mend it, or set "
            "`stockflow: {on_nonfinite: propagate}`"
        )
    return _decided(rule, unit, result, Gram(gram_MM[np.newaxis].copy()), ledger)


def _decided(rule: Linear, unit: Unit, result: Result, gram: Gram, ledger: Ledger) -> Coefficients:
    try:
        # What is not finite is refused elsewhere, or asked for.
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            decided = rule.coefficients(gram, result.parameters)
    except NumericsError as error:
        raise NumericsError(f"tensor {unit.work.reading.name!r}: {error}") from None
    has_changes = rule.needs_gram and result.declared.has_anchor(result.parameters)
    ledger.record(decided, gram if has_changes else None)
    return decided


def _taken(decided: Coefficients) -> Coefficients:
    """Return coefficients that take one source as it is, where they come to that: codes are then what they were."""
    weights_GM = decided.weights_GM
    takes = (weights_GM == 1).sum(axis=1) + (weights_GM == 0).sum(axis=1) == weights_GM.shape[1]
    if not decided.anchored or not (takes & (weights_GM.sum(axis=1) == 1)).all():
        return decided
    return replace(decided, weights_GM=np.insert(weights_GM, 0, 0.0, axis=1), anchored=False)


def _is_sum_of_changes(decided: Coefficients) -> bool:
    return decided.anchored and len(decided.weights_GM) == 1 and bool(np.isfinite(decided.weights_GM).all())


def _filler(decided: Coefficients, unit: Unit, result: Result, tools: Tools, anchored: Ledger | None = None) -> Fill:
    """Return what adds the sources up, and tells a ledger of the anchor's norm that no sweep has seen."""
    group_elems, dtype = unit.work.reading.group_elems, result.dtype
    decided = _taken(decided) if result.rule else decided
    load: Load = as_it_is
    if isinstance(unit.work, TensorJob) and unit.work.adds_known_changes and _is_sum_of_changes(decided):
        load = methodcaller("added_up", decided.weights_GM[0])
        decided = replace(decided, weights_GM=np.array([[1.0, -1.0]]), anchored=False)

    def fill(span: LoadedPiece, target: Bytes) -> None:
        started = time.perf_counter()
        first = (span.start - unit.start) // group_elems
        weights_GM = decided.weights_GM[first : -(-(span.stop - unit.start) // group_elems)]
        weighted = Weighted(weights_GM, decided.anchored, dtype, result.working_bits)
        if anchored is not None:
            anchored.add_base(span.start, float(tools.arithmetic.gram(span.only(0), span.stop - span.start)[0, 0, 0]))
        if not tools.arithmetic.combine(span, weighted, target):
            tools.alarm.refuse_nonfinite(span, f"the merged tensor, rounded to {dtype},")
        tools.clock.add("combine", started)

    return Fill(fill, load)
