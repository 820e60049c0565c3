"""Functions of task vectors, element by element, after as many sweeps of statistics as the method asks for."""

import time
from collections.abc import Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockflow.engine.facts import Ledger
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.proceeding import Fill, Steps, Tools
from stockflow.engine.units import Unit
from stockflow.kernels import doubled, elementwise
from stockflow.kernels.arrays import Bytes
from stockflow.kernels.floats import FORMATS, results_in
from stockflow.methods.protocol import Block, Elementwise, Rounds, Statistic, UnitContext, Update
from stockflow.planning.job import Result
from stockflow.planning.spans import BLOCK_ELEMS
from stockflow.planning.working_precision import FloatBits


@dataclass(frozen=True, eq=False)
class StatisticSweep:
    """A method's statistic over the blocks of a unit."""

    statistic: Statistic
    tools: Tools

    @property
    def key(self) -> Hashable:
        """Its own: nobody else asks for it."""
        return id(self)

    def begin(self) -> Any:
        """Return the empty state."""
        return self.statistic.zero()

    def look(self, span: LoadedPiece) -> Any:
        """Return the state of a span by itself."""
        started = time.perf_counter()
        state = self.statistic.zero()
        for part in parts_of(span):
            state = self.statistic.update(state, block_of(part, self.tools, self.statistic.float_bits))
        self.tools.clock.add("statistics", started)
        return state

    def add(self, state: Any, start: int, said: Any) -> Any:
        """Combine it with those before."""
        del start
        return self.statistic.combine(state, said)


def decide(unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Steps | Fill:
    """Ask for the method's statistics and return what adds its change to the base."""
    rule, reading = result.declared.rule, unit.work.reading
    assert isinstance(rule, Elementwise)
    num_elems = unit.stop - unit.start
    name, num_tuned = result.outputs[0].name, len(reading.operands) - 1
    context = UnitContext(name, num_tuned, num_elems, result.float_bits, result.working_bits)
    decided = rule.decide(context, result.parameters)
    if isinstance(decided, Generator):
        return _after_rounds(decided, unit, result, ledger, tools)
    return _filler(decided, num_elems, result, ledger, tools)


def _after_rounds(rounds: Rounds, unit: Unit, result: Result, ledger: Ledger, tools: Tools) -> Steps:
    found: Any = None
    while True:
        try:
            statistic = rounds.send(found)
        except StopIteration as stop:
            return _filler(stop.value, unit.stop - unit.start, result, ledger, tools)
        found = statistic.finish((yield StatisticSweep(statistic, tools)))


def _filler(decided: Update, num_elems: int, result: Result, ledger: Ledger, tools: Tools) -> Fill:
    ledger.record_means(decided.facts, num_elems)
    dtype, width = result.dtype, result.width
    is_doubled = dtype == "F64"

    def added(block: Block, target: Bytes) -> bool:
        change, results = decided.change(block), results_in(target, dtype)
        if is_doubled:
            return doubled.add_update(block.base_E, change, results)
        return elementwise.add_update(block.base_E, change, results, FORMATS[dtype])

    def fill(span: LoadedPiece, target: Bytes) -> None:
        started = time.perf_counter()
        is_finite = True
        for part in parts_of(span):
            block = block_of(part, tools, decided.float_bits or result.working_bits, with_lows=is_doubled)
            is_finite &= added(block, target[width * (part.start - span.start) : width * (part.stop - span.start)])
        if not is_finite:
            tools.alarm.refuse_nonfinite(span, f"the merged tensor, rounded to {dtype},")
        tools.clock.add("combine", started)

    return Fill(fill)


def parts_of(span: LoadedPiece) -> Iterator[LoadedPiece]:
    """Yield a span block by block, in whole rows where these are wanted."""
    together = span.reading.together
    step = max(BLOCK_ELEMS // together, 1) * together
    for start in range(span.start, span.stop, step):
        yield span.narrow(start, min(start + step, span.stop))


def block_of(span: LoadedPiece, tools: Tools, float_bits: FloatBits, *, with_lows: bool = False) -> Block:
    """Return the operands of a block in a precision, as base and task vectors, in this thread's scratch."""
    reading, num_elems = span.reading, span.stop - span.start
    num_operands = len(reading.operands)
    num_rows = num_operands + (num_operands - 1 if with_lows else 0)
    num_bytes = num_rows * num_elems * float_bits // 8
    if getattr(tools.threads, "rows", np.empty(0, np.uint8)).nbytes < num_bytes:
        tools.threads.rows = np.empty(num_bytes, np.uint8)
    rows = tools.threads.rows[:num_bytes].view(f"f{float_bits // 8}").reshape(num_rows, num_elems)
    base_E, deltas_NE, lows_NE = rows[0], rows[1:num_operands], rows[num_operands:]
    if with_lows:
        doubled.load_task_vectors(span.slab, span.firsts_M, span.formats_M, base_E, deltas_NE, lows_NE)
    else:
        elementwise.load_task_vectors(span.slab, span.firsts_M, span.formats_M, base_E, deltas_NE)
    lows = lows_NE if with_lows else None
    start = tools.firsts.get(reading.name, 0) + span.start
    return Block(reading.name, start, reading.shape, base_E, deltas_NE, lows, reading.together)
