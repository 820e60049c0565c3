"""Surveys: what looks at tensors of checkpoints without merging them, and the one that takes their Grams."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stockflow.checkpoints.opening import Checkpoint
from stockflow.engine.noise import Seen, cosine_floor, facts_of, has_codes
from stockflow.engine.noise import look as look_at_noise
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.procedures.linear import GramSweep
from stockflow.engine.procedures.proceeding import MapSpans, Tools, swept
from stockflow.engine.survey import Examiner, Look, SurveySpec
from stockflow.engine.units import Unit
from stockflow.errors import RecipeError
from stockflow.events import Done, Event, Moved, OnEvent, Stage
from stockflow.insight.inspection import Inspection, Subject
from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import FLOAT_BYTES
from stockflow.methods.ratios import packed
from stockflow.planning.experts.projections import seen_one_by_one
from stockflow.planning.job import Reading, TensorJob
from stockflow.planning.operands import operand_of
from stockflow.planning.plan import CheckpointRef, MergePlan
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.recipe import Recipe
from stockflow.run.inputs import Inputs, collector_paused

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

    def take(self) -> int:
        """Return the bytes that were counted since this was asked for, and count from 0."""
        with self._lock:
            taken, self.num_read = self.num_read, 0
        return taken

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


class GramExaminer(Examiner):
    """Takes the Gram of whole tensors."""

    def state_bytes(self, look: Look, num_groups: int) -> int:
        """Return the size of the products."""
        return num_groups * len(look.reading.operands) ** 2 * FLOAT_BYTES

    def examine(self, look: Look, unit: Unit, tools: Tools, map_spans: MapSpans) -> "Found":
        """Return the Gram of a tensor as one packed row, and how it stands above the noise of its codes."""
        bits = look.planned.result.working_bits if look.planned else 64
        sweeps: list[Any] = [GramSweep(unit, tools, refuses=False, float_bits=bits)]
        sweeps += [NoiseSweep()] if has_codes(look.reading) else []
        total_GMM, *seen = swept(unit, sweeps, map_spans, last=True)
        facts = facts_of(*seen) if seen else {}
        return Found(packed(Gram(total_GMM))[0], facts | {"cosine_floor": cosine_floor(facts, look.reading)})

    def conclude(self, look: Look, parts: Sequence["Found"]) -> "Found":
        """Return what the only unit says."""
        del look
        (found,) = parts
        return found


class Found(NamedTuple):
    """What is found of a tensor."""

    row_Q: Floats
    noise: Mapping[str, float | None]
    """facts of the error of codes"""


class NoiseSweep:
    """What the begins of spans say of changes beside the error of codes."""

    key = "noise"

    def begin(self) -> list[Seen]:
        """Return nothing."""
        return []

    def look(self, span: LoadedPiece) -> list[Seen]:
        """Return what a span says."""
        return look_at_noise(span)

    def add(self, state: list[Seen], start: int, said: list[Seen]) -> list[Seen]:
        """Add it."""
        del start
        return state + said


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
    noise: list[Mapping[str, float | None]] = [{}] * len(subjects)
    for number, found in following.rows(survey(spec, looks, following)) if looks else ():
        packed_TQ[numbers[number]], noise[numbers[number]] = found
    return Inspection(checkpoints, subjects, packed_TQ, noise, following.num_read, time.perf_counter() - started)


def find_subjects(inputs: Inputs) -> tuple[list[Subject], tuple[CheckpointRef, ...]]:
    """Return the tensors of a recipe with what is to be read of each, and the checkpoints, base first."""
    recipe = inputs.recipe
    if recipe.base_model is None:
        raise RecipeError(
            "statistics are taken of the changes against a base, and this recipe names none; add `base_model: ...`, "
            f"the model the others were tuned from{_elsewhere(recipe)}"
        )
    if len(recipe.checkpoints) < 2:
        raise RecipeError("this recipe lists no model besides its base; there is nothing to compare")
    with collector_paused():
        plan = inputs.plan()
        if plan.is_stacked:
            _check_slices(plan)
        checkpoints = seen_one_by_one(recipe, inputs.merged).checkpoints
        subjects = [Subject(job, _look_at(checkpoints, job)) for job in plan.jobs]
    return subjects, tuple(plan.models)


def _elsewhere(recipe: Recipe) -> str:
    """What to mind where a base would change the merge, too."""
    method = recipe.method_for(None)
    return "" if method.base == "required" else f", to a copy of the recipe: a base changes what `{method.name}` does"


def _check_slices(plan: MergePlan) -> None:
    for job in plan.jobs:
        if not job.is_copy and len(job.reading.operands) < len(plan.models):
            raise RecipeError(
                f"statistics are taken of the base and all models together, and the slice of {job.output.name!r} takes "
                f"{len(job.reading.operands)} of {len(plan.models)}; list whole models to compare them"
            )


def _look_at(checkpoints: Sequence[Checkpoint], planned: TensorJob) -> Look | None:
    """The base's tensor and those of all other models, whatever the method reads of them."""
    if planned.is_copy or not planned.reading.num_elems:
        return None
    own = {operand.checkpoint: operand for operand in planned.reading.operands}
    if any(operand.rows for operand in planned.reading.operands):  # rows by token
        is_whole = list(own) == list(range(len(checkpoints)))
        return Look(replace(planned.reading, scope="tensor"), GramExaminer(), planned) if is_whole else None
    name, shape, bits = planned.output.name, planned.reading.shape, planned.reading.float_bits
    others = [(number, each) for number, each in enumerate(checkpoints) if number not in own]
    if any(name not in each.specs or each.specs[name].shape != shape for _, each in others):
        return None
    own |= {number: operand_of(number, each, name) for number, each in others}
    operands = tuple(own[number] for number in range(len(checkpoints)))
    return Look(Reading(name, shape, operands, float_bits=bits), GramExaminer(), planned)
