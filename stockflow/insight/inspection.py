"""``stockflow inspect``: the statistics of a merge without the merge. One read of the inputs, nothing written to them.

A tensor's row is its Gram: |w_0|^2 and the products of its task vectors, in float64, added in the order in which a
merge adds them. Cosines, norms, angles and ratios follow from it; sums of Grams are the Grams of several tensors
together, which is how layers, kinds and whole models are compared.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stockflow.checkpoints.naming import kind_of, layer_of
from stockflow.engine.procedures.linear import GramSweep
from stockflow.engine.procedures.proceeding import MapSpans, Tools, swept
from stockflow.engine.survey import Look, SurveySpec
from stockflow.engine.units import Unit
from stockflow.errors import RecipeError
from stockflow.events import Done, Event, Moved, OnEvent, Stage
from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import FLOAT_BYTES
from stockflow.methods.ratios import RATIOS, Geometry, finite, packed, pairs, unpacked
from stockflow.planning.job import Reading, TensorJob, stored
from stockflow.planning.make import make_plan
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.run.driver import Inputs, collector_paused
from stockflow.storage import redact

FORMAT = "stockflow-inspection-1"
ROWS_AT_ONCE = 2048
"""Tensors whose rows are plain Python values at a time: with 16 models one has 300 numbers."""

Survey = Callable[[SurveySpec, Sequence[Look], OnEvent], Iterator[tuple[int, Any]]]
"""Looks at tensors somewhere; tells what it reads, and yields their numbers and rows, in any order."""


@dataclass(frozen=True)
class SurveyOptions:
    """What a survey may use."""

    memory_bytes: int
    num_threads: int
    device: Any = "auto"


class Following:
    """Tells of a survey what is read and which tensors are done, and counts the bytes; from several threads."""

    def __init__(self, spec: SurveySpec, looks: Sequence[Look], on_event: OnEvent) -> None:
        """Tell that reading begins."""
        self.num_read = 0
        self._looks = looks
        self._on_event = on_event
        self._lock = threading.Lock()
        num_bytes = bytes_to_read(spec, looks)
        on_event(Stage("reading the inputs", total_bytes=num_bytes, num_items=len(looks), unit="tensors"))

    def __call__(self, event: Event) -> None:
        """Count bytes, and pass it on."""
        if isinstance(event, Moved):
            with self._lock:
                self.num_read += event.num_read
        self._on_event(event)

    def rows(self, found: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Yield numbers and rows as they come."""
        for number, row in found:
            self._on_event(Done(self._looks[number].reading.name))
            yield number, row


def bytes_to_read(spec: SurveySpec, looks: Sequence[Look]) -> int:
    """Return what a survey will read: on the first sweep everything, on a second one large tensors of local files.

    Those from elsewhere are held meanwhile where the memory allows it, which only the worker knows.
    """
    is_local = not any("://" in ref.url for ref in spec.checkpoints)

    def num_reads(look: Look) -> int:
        return look.num_sweeps if is_local and look.reading.num_elems > SPAN_ELEMS else 1

    return sum(num_reads(look) * look.reading.num_bytes for look in looks)


class GramExaminer:
    """Takes the Gram of whole tensors."""

    @property
    def num_sweeps(self) -> int:
        """Once."""
        return 1

    def span_bytes(self, look: Look, num_elems: int) -> int:
        """Return 0: a Gram is taken in the caches."""
        del look, num_elems
        return 0

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return the size of the products."""
        return num_groups * len(look.reading.operands) ** 2 * FLOAT_BYTES

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> Floats:
        """Return the Gram of a tensor as one packed row."""
        bits = look.planned.result.working_bits if look.planned else 64
        (total_GMM,) = swept(unit, [GramSweep(unit, tools, refuses=False, float_bits=bits)], map_spans, last=True)
        row_Q: Floats = packed(Gram(total_GMM))[0]
        return row_Q

    def conclude(self, look: Look, parts: Sequence[Floats]) -> Floats:
        """Return the row of the only unit."""
        del look
        (row_Q,) = parts
        return row_Q


@dataclass(frozen=True)
class Subject:
    """A tensor, and how the recipe merges it."""

    planned: TensorJob
    look: Look | None
    """what is read of it; None where there is nothing to compare"""

    @property
    def name(self) -> str:
        """Its name."""
        return self.planned.output.name

    @cached_property
    def kind(self) -> str:
        """See ``naming``."""
        return kind_of(self.name)

    @cached_property
    def layer(self) -> int | None:
        """See ``naming``."""
        return layer_of(self.name)


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    checkpoints: tuple[CheckpointRef, ...]
    """base first"""
    subjects: Sequence[Subject]
    packed_TQ: Floats
    """a Gram per tensor; NaN where there is nothing to compare"""
    num_bytes_read: int
    seconds: float

    @property
    def num_tuned(self) -> int:
        """N, the number of tuned models."""
        return len(self.checkpoints) - 1

    @cached_property
    def compared(self) -> list[int]:
        """Numbers of the tensors that have finite statistics."""
        finite_T = np.asarray(np.isfinite(self.packed_TQ).all(axis=1))
        return np.flatnonzero(finite_T).tolist()

    def geometry(self, numbers: Sequence[int]) -> Geometry:
        """Return the geometry of some tensors, each a group."""
        return Geometry(unpacked(self.packed_TQ[list(numbers)], self.num_tuned))

    def pooled(self, numbers: Sequence[int]) -> Geometry:
        """Return the geometry of some tensors taken together, as if they were one."""
        return Geometry(unpacked(self.packed_TQ[list(numbers)].sum(axis=0, keepdims=True), self.num_tuned))

    @cached_property
    def ratios(self) -> Mapping[str, Floats]:
        """Every reading of the ratio, per tensor; NaN where there is none."""
        found = {name: np.full(len(self.subjects), np.nan) for name in RATIOS}
        for numbers in _portions(self.compared):
            geometry = self.geometry(numbers)
            for name in RATIOS:
                found[name][numbers] = geometry.ratio(name)
        return found

    @cached_property
    def flagged(self) -> Mapping[str, list[int]]:
        """Numbers of the tensors that carry each flag."""
        flagged: dict[str, list[int]] = {}
        for numbers in _portions(self.compared):
            for name, flags_G in self.geometry(numbers).flags().items():
                flagged.setdefault(name, []).extend(np.array(numbers)[flags_G].tolist())
        read = [number for number, subject in enumerate(self.subjects) if subject.look]
        flagged["nonfinite"] = sorted(set(read) - set(self.compared))
        flagged["copied"] = sorted(set(range(len(self.subjects))) - set(read))
        return flagged

    def groups(self, key: Callable[[Subject], Any]) -> dict[Any, list[int]]:
        """Return the numbers of the tensors that have statistics, by what ``key`` says of them."""
        found: dict[Any, list[int]] = {}
        for number in self.compared:
            found.setdefault(key(self.subjects[number]), []).append(number)
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row of plain values per tensor, in the order of the checkpoint."""
        flags_of: dict[int, list[str]] = {}
        for name, numbers in sorted(self.flagged.items()):
            for number in numbers:
                flags_of.setdefault(number, []).append(name)
        compared = set(self.compared)
        for numbers in _portions(range(len(self.subjects))):
            found = dict(zip(*self._statistics([n for n in numbers if n in compared]), strict=True))
            for number in numbers:
                yield {
                    **_identity(self.subjects[number]),
                    **found.get(number, NO_STATISTICS),
                    "flags": flags_of.get(number, []),
                }

    def facts(self) -> dict[str, Any]:
        """Return what `stockflow inspect --json` prints."""
        return summary(self) | {"tensors": list(self.rows())}

    def __str__(self) -> str:
        from stockflow.insight.inspection_lines import inspection_lines

        return "\n".join(inspection_lines(self))

    def _statistics(self, numbers: Sequence[int]) -> tuple[Sequence[int], list[dict[str, Any]]]:
        if not numbers:
            return [], []
        geometry = self.geometry(numbers)
        columns: dict[str, list[Any]] = {
            "base_norm": geometry.gram.base_norm_G.tolist(),
            "delta_norms": geometry.gram.delta_norms_GN.tolist(),
            "cosines": geometry.cosines_GP.tolist(),
            "angles": geometry.angles_GP.tolist(),
            "mean_cosine": [finite(value) for value in geometry.mean_cosine_G],
            **{f"ratio_{name}": [finite(value) for value in self.ratios[name][list(numbers)]] for name in RATIOS},
        }
        return numbers, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


NO_STATISTICS: dict[str, Any] = {
    "base_norm": None, "delta_norms": [], "cosines": [], "angles": [], "mean_cosine": None,
    **{f"ratio_{name}": None for name in RATIOS},
}  # fmt: skip


def _identity(subject: Subject) -> dict[str, Any]:
    spec = subject.planned.output
    return {
        "name": subject.name,
        "kind": subject.kind,
        "layer": subject.layer,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "num_elems": spec.num_elems,
        "method": subject.planned.result.method,
    }


def _portions(numbers: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        yield list(numbers[start : start + ROWS_AT_ONCE])


def inspect(inputs: Inputs, options: SurveyOptions, survey: Survey, on_event: OnEvent) -> Inspection:
    """Take the statistics of a recipe's checkpoints.

    Raises:
        RecipeError: the recipe names no base.
        PlanError: the checkpoints do not fit together.
        UserError: an input changed, or the budget is too small.
        StorageError: reading failed after retries.
    """
    started = time.perf_counter()
    on_event(Stage("planning"))
    subjects, checkpoints = find_subjects(inputs)
    numbers = [number for number, subject in enumerate(subjects) if subject.look]
    looks = [subject.look for subject in subjects if subject.look]
    num_tuned = len(checkpoints) - 1
    packed_TQ = np.full((len(subjects), 1 + num_tuned * (num_tuned + 1) // 2), np.nan)
    spec = SurveySpec(checkpoints, inputs.storage, options.memory_bytes, options.num_threads, options.device)
    following = Following(spec, looks, on_event)
    for number, row_Q in following.rows(survey(spec, looks, following)) if looks else ():
        packed_TQ[numbers[number]] = row_Q
    return Inspection(checkpoints, subjects, packed_TQ, following.num_read, time.perf_counter() - started)


def find_subjects(inputs: Inputs) -> tuple[list[Subject], tuple[CheckpointRef, ...]]:
    """Return the tensors of a recipe with what is to be read of each, and the checkpoints, base first."""
    recipe = inputs.recipe
    if recipe.base_model is None:
        raise RecipeError(
            "statistics are taken of the changes against a base, and this recipe names none; "
            "add `base_model: ...`, the model the others were tuned from"
        )
    if len(recipe.checkpoints) < 2:
        raise RecipeError("this recipe lists no model besides its base; there is nothing to compare")
    with collector_paused():
        plan = make_plan(recipe, inputs.checkpoints)
        subjects = [Subject(job, _look_at(inputs, job)) for job in plan.jobs]
    return subjects, plan.checkpoints


def _look_at(inputs: Inputs, planned: TensorJob) -> Look | None:
    """The base's tensor and those of all other models, whatever the method reads of them."""
    name = planned.output.name
    shape = inputs.checkpoints[0].specs[name].shape
    if planned.is_copy or not planned.reading.num_elems:
        return None
    checkpoints = inputs.checkpoints
    if any(name not in each.specs or each.specs[name].shape != shape for each in checkpoints):
        return None
    operands = tuple(stored(number, each.specs[name], each.extents[name]) for number, each in enumerate(checkpoints))
    bits = planned.reading.float_bits
    return Look(Reading(name, shape, operands, float_bits=bits), GramExaminer(), planned)


def summary(inspection: Inspection) -> dict[str, Any]:
    """Return what goes before the rows: models, pairs, and the tensors pooled by kind, by layer and as a whole."""
    layers = sorted(inspection.groups(lambda subject: subject.layer).items(), key=lambda item: (item[0] is None, item))
    kinds = inspection.groups(lambda subject: subject.kind)
    return {
        "format": FORMAT,
        "base": redact(inspection.checkpoints[0].url),
        "models": [redact(ref.url) for ref in inspection.checkpoints[1:]],
        "pairs": [list(pair) for pair in pairs(inspection.num_tuned)],
        "num_tensors": len(inspection.subjects),
        "bytes_read": inspection.num_bytes_read,
        "seconds": inspection.seconds,
        "flags": {name: len(numbers) for name, numbers in sorted(inspection.flagged.items())},
        "all": pooled_facts(inspection, inspection.compared),
        "kinds": {kind: pooled_facts(inspection, numbers) for kind, numbers in kinds.items()},
        "layers": [{"layer": layer, **pooled_facts(inspection, numbers)} for layer, numbers in layers],
    }


def pooled_facts(inspection: Inspection, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the statistics of some tensors together, and the spread of their ratios."""
    if not numbers:
        return {"tensors": 0, "num_elems": 0}
    pooled = inspection.pooled(numbers)
    facts: dict[str, Any] = {
        "tensors": len(numbers),
        "num_elems": sum(inspection.subjects[number].planned.output.num_elems for number in numbers),
        "base_norm": float(pooled.gram.base_norm_G[0]),
        "delta_norms": pooled.gram.delta_norms_GN[0].tolist(),
        "cosines": pooled.cosines_GP[0].tolist(),
        "mean_cosine": finite(pooled.mean_cosine_G[0]),
    }
    for name in RATIOS:
        found = inspection.ratios[name][list(numbers)]
        found = found[np.isfinite(found)]
        spread = np.quantile(found, [0.0, 0.5, 1.0]).tolist() if len(found) else [None] * 3
        facts[f"ratio_{name}"] = dict(zip(("min", "median", "max"), spread, strict=True))
    return facts


def json_parts(inspection: Inspection) -> Iterator[str]:
    """Yield inspect.json, piece by piece: the summary, and one line per tensor."""
    head = json.dumps(summary(inspection), indent=1, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n "tensors": ['
    separator = "\n"
    for row in inspection.rows():
        yield f"{separator}  {json.dumps(row, ensure_ascii=False)}"
        separator = ",\n"
    yield "\n ]\n}\n"
