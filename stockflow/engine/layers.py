"""Layers decided ahead: the experts of a layer go by once for every round, before any of them is combined."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.engine.facts import Ledger
from stockflow.engine.inputs import OnRead
from stockflow.engine.pieces import Piece
from stockflow.engine.procedures import PROCEDURES
from stockflow.engine.procedures.linear import GramSweep
from stockflow.engine.procedures.proceeding import Fill, MapSpans, Proceeding, Sweep, Tools, swept
from stockflow.engine.session import Session
from stockflow.engine.units import Unit
from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram
from stockflow.planning.budget import Workspace
from stockflow.planning.experts.units import LayerUnit, layer_units
from stockflow.planning.job import TensorJob


@dataclass(frozen=True)
class _Decision:
    fill: Fill
    ledger: Ledger
    """of the unit"""
    grams: Mapping[str, Floats]
    """(1, M, M) of each member, by the name of its reading, where the method takes any"""


class Layers:
    """What was decided of a layer."""

    def __init__(self) -> None:
        """Begin with nothing decided."""
        self._decisions: dict[str, _Decision] = {}

    def decide(
        self, session: Session, jobs: Sequence[TensorJob], workspace: Workspace, on_read: OnRead, tools: Tools
    ) -> int:
        """Decide the layer that some jobs are, if they are one, and return how many bytes were read for it.

        Raises:
            NumericsError: NaN or infinity, or a geometry that a method refuses.
            InputChangedError: an input is not the planned one any more.
            StorageError: reading failed after retries.
        """
        num_read = 0
        self._decisions.clear()
        for unit in layer_units(jobs):
            deciding = _Deciding(unit, session, workspace, on_read, replace(tools, firsts=unit.firsts))
            self._decisions[unit.name] = deciding.decision()
            num_read += deciding.num_read
        return num_read

    def fill(self, job: TensorJob, ledger: Ledger) -> Fill:
        """Return what fills the result of a member, and tell its ledger what was decided."""
        found = self._decisions[job.decided_in]
        gram_1MM = found.grams.get(job.reading.name)
        ledger.take_over(found.ledger, None if gram_1MM is None else Gram(gram_1MM))
        return found.fill


class _Deciding:
    """A layer on its way to its decision."""

    def __init__(self, unit: LayerUnit, session: Session, workspace: Workspace, on_read: OnRead, tools: Tools) -> None:
        self._unit, self._session, self._workspace, self._on_read = unit, session, workspace, on_read
        self._tools = tools
        self._grams: dict[str, Floats] = {}
        self.num_read = 0

    def decision(self) -> _Decision:
        """Sweep as often as the method asks, and return what it decides."""
        job = _as_one(self._unit)
        ledger = Ledger(job, job.result, "")
        procedure = PROCEDURES[type(job.result.declared.rule)]
        proceeding = Proceeding(procedure(_Whole(job), job.result, ledger, self._tools))
        while proceeding.wanted is not None:
            proceeding.tell(self._swept(proceeding.wanted))
        return _Decision(proceeding.fill, ledger, self._grams)

    def _swept(self, sweep: Sweep) -> Any:
        """Go over all members once, and return the state of the unit."""
        total = sweep.begin()

        def look(unit: Unit, map_spans: MapSpans = map) -> Any:
            return swept(unit, [sweep], map_spans, last=True)[0]

        with self._session.stream(self._unit.members, self._workspace, self._on_read) as stream:
            for units in stream:
                if self._session.has_enough(units):
                    states = self._session.map_spans(look, units)
                else:
                    states = (look(unit, self._session.map_spans) for unit in units)
                for unit, state in zip(units, states, strict=True):
                    name = unit.work.reading.name
                    if isinstance(sweep, GramSweep):
                        self._grams[name] = np.array(state)
                    total = sweep.add(total, self._unit.firsts[name], state)
            self.num_read += stream.bytes_read
        return total


@dataclass(frozen=True)
class _Whole:
    """All elements of a layer unit, which go by member by member."""

    work: TensorJob
    start: int = 0

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.work.reading.num_elems

    def sweep(self, *, last: bool) -> Iterator[Piece]:
        """Yield nothing."""
        del last
        yield from ()


def _as_one(unit: LayerUnit) -> TensorJob:
    """Return the job of a tensor that would hold all members."""
    first, shape = unit.members[0], (unit.num_elems,)
    output = TensorSpec(unit.name, first.output.dtype, shape)
    reading = replace(first.reading, name=unit.name, shape=shape)
    return replace(first, reading=reading, results=(replace(first.result, outputs=(output,)),))
