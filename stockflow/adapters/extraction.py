"""Extraction of a LoRA adapter from the difference of two checkpoints, streamed."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from stockflow.adapters import sketch
from stockflow.adapters.card import extraction_card
from stockflow.adapters.examiners import FactoredChange, SketchExaminer, TunedTensor, WholeExaminer
from stockflow.adapters.experts import (
    StackedTarget,
    inner_targets,
    put_together,
    stacked_specs,
    stacked_targets,
)
from stockflow.adapters.findings import Extraction, extraction_of, extraction_on_record
from stockflow.adapters.peft import AdapterDescription, factor_keys, key_of_bias, key_of_whole, task_of
from stockflow.adapters.pieces import AdapterPieces, Held
from stockflow.adapters.publishing import FINISHED, AdapterPlan, admit, claimed, publish
from stockflow.adapters.record import factor_row, is_whole, rank_of, read_record, whole_row
from stockflow.adapters.targets import FactorTarget, KeptWhole, Pair, kept_whole, module_of, paired
from stockflow.checkpoints.adapters.ground import stores_turned
from stockflow.checkpoints.decodes.joined import as_bytes
from stockflow.checkpoints.files.header import TensorSpec, width_of
from stockflow.checkpoints.opening import Checkpoint, link_notes, open_checkpoints
from stockflow.engine.survey import Look, SurveySpec
from stockflow.errors import PlanError
from stockflow.events import Done, Note, OnEvent, Stage, ignore
from stockflow.insight.surveys import Following, Survey, SurveyOptions
from stockflow.kernels.floats import FORMATS
from stockflow.output.receipts import TensorFacts
from stockflow.output.target import check_apart
from stockflow.planning.job import Reading
from stockflow.planning.operands import operand_of
from stockflow.planning.plan import CheckpointRef
from stockflow.planning.working_precision import float_bits_of
from stockflow.run.bases import with_base
from stockflow.storage import StorageConfig, Store, halves_of, open_model, open_store, pin_revision, redact
from stockflow.text.redaction import command_line


@dataclass(frozen=True)
class ExtractOptions:
    """What an extraction is to keep, and how."""

    rank: int
    """of the factors of a matrix, at most"""
    energy: float | None = None
    """share of the squared norm of a change that suffices; None: all that the rank allows"""
    dtype: str = "F32"
    """of the factors"""
    keep_whole: bool = False
    """whether changed tensors that do not decompose are written whole"""
    embeddings: bool = False
    """whether embeddings are changed by factors"""
    overwrite: bool = False
    """whether an adapter at the output is replaced"""


@dataclass
class _Looking:
    """Two checkpoints that are looked at."""

    pair: Pair
    spec: SurveySpec
    survey: Survey
    on_event: OnEvent
    num_read: int = 0
    """bytes that no piece tells of yet"""

    def changed_others(self) -> list[str]:
        """Return the names of changed tensors that are not targets."""
        stacked = {target.name for target in stacked_targets(self.pair)}
        others = [name for name in self.pair.others if name not in stacked]
        alike = [name for name in others if _are_alike(self.pair, name)]
        differing = {name for name, whole in self.wholes(alike, keeps=False) if whole.differs}
        changed = differing | (set(others) - set(alike))
        return [name for name in others if name in changed]

    def wholes(self, names: Sequence[str], *, keeps: bool) -> Iterator[tuple[str, TunedTensor]]:
        """Yield tensors as they were tuned."""
        looks = [_whole_look(self.pair, name, keeps=keeps) for name in names]
        return ((names[number], row) for number, row in self.surveyed(looks))

    def surveyed(self, looks: Sequence[Look]) -> Iterator[tuple[int, Any]]:
        """Yield what looks say, in any order."""
        if not looks:
            return
        following = Following(self.spec, looks, self.on_event)
        for found in following.rows(self.survey(self.spec, looks, following)):
            self.num_read += following.take()
            yield found
        self.num_read += following.take()


@dataclass
class _Extracting:
    """An extraction on its way."""

    looking: _Looking
    options: ExtractOptions
    pieces: AdapterPieces

    @property
    def pair(self) -> Pair:
        """What is compared."""
        return self.looking.pair

    def keep_whole(self, kept: KeptWhole) -> None:
        """Write tensors whole."""
        names = [name for module in kept.modules for name in self.pair.parameters[module]]
        for name, whole in self.looking.wholes(self._left([*names, *kept.biases]), keeps=True):
            spec = self.pair.tuned.specs[name]
            has_factors = module_of(name) in self.ranks
            key = key_of_bias(module_of(name), has_factors=has_factors) if name in kept.biases else key_of_whole(name)
            keys = key, *map(key_of_whole, self.pair.heads_beside(name))
            self._add(whole_row(spec), *((spec._replace(name=each), whole.values) for each in keys))

    def keep_factors(self, targets: Sequence[FactorTarget]) -> None:
        """Write the factors of what changed."""
        left = [target for target in targets if target.name not in self.pieces.rows]
        for number, change in self.looking.surveyed([_sketched(self.pair, each, self.options) for each in left]):
            self._add_factors(left[number], change)

    def keep_experts(self, targets: Sequence[StackedTarget]) -> None:
        """Write the factors of tensors of all experts of a layer, of which any changed."""
        left = [target for target in targets if target.name not in self.pieces.rows]
        places = [(target, expert) for target in left for expert in range(target.num_experts)]
        looks = [_sketched_expert(self.pair, *place, self.options) for place in places]
        found: dict[StackedTarget, dict[int, FactoredChange]] = {}
        for number, change in self.looking.surveyed(looks):
            target, expert = places[number]
            changes = found.setdefault(target, {})
            changes[expert] = change
            if len(changes) == target.num_experts:
                self._add_experts(target, [changes[each] for each in sorted(changes)])
                found[target] = {}

    def finish(self) -> None:
        """Write what waits, and name factors by what is wrapped by what, which is known when all that changed is."""
        self.pieces.flush()
        for target, is_inner in inner_targets(self.stacked).items():
            specs = stacked_specs(target, self.options.rank, self.options.dtype, is_inner=is_inner)
            for part, spec in zip("ab", specs, strict=True):
                self.pieces.rename(f"{target.name} {part}", spec.name)

    def _left(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.pieces.rows]

    def _add(self, row: TensorFacts, *held: Held) -> None:
        self.pieces.num_read, self.looking.num_read = self.pieces.num_read + self.looking.num_read, 0
        self.pieces.add(row, *held)

    def _add_experts(self, target: StackedTarget, changes: Sequence[FactoredChange]) -> None:
        rank, dtype, shape = self.options.rank, self.options.dtype, (target.num_experts, *target.shape)
        if not any(change.rank for change in changes):
            self._add(factor_row(TensorSpec(target.name, dtype, shape), 0, 1.0, 0.0))
            return
        made = put_together(target, changes, rank, dtype)
        specs = stacked_specs(target, rank, dtype, is_inner=False)
        held = [spec._replace(name=f"{target.name} {part}") for part, spec in zip("ab", specs, strict=True)]
        row = factor_row(TensorSpec(target.name, dtype, shape), rank, made.energy, math.sqrt(made.squares))
        self._add(row, (held[0], made.a), (held[1], made.b))

    def _add_factors(self, target: FactorTarget, change: FactoredChange) -> None:
        dtype = self.options.dtype
        spec, norm = TensorSpec(target.name, dtype, target.shape), math.sqrt(change.squares)
        row = factor_row(spec, change.rank, change.kept, norm)
        rows, columns = target.shape[::-1] if target.is_turned else target.shape
        keys = factor_keys(target.module, is_embedding=target.is_embedding)
        shapes = (change.rank, columns), (rows, change.rank)
        specs = [TensorSpec(key, dtype, shape) for key, shape in zip(keys, shapes, strict=True)]
        self._add(row, *(zip(specs, (change.right, change.left), strict=True) if change.rank else ()))

    @property
    def stacked(self) -> Sequence[StackedTarget]:
        """Tensors of all experts of a layer that changed."""
        return [each for each in stacked_targets(self.pair) if rank_of(self.pieces.rows.get(each.name))]

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of every module that has factors."""
        found = {target.module: rank_of(self.pieces.rows.get(target.name)) for target in self.pair.targets}
        return {module: rank for module, rank in found.items() if rank}


def extract(
    locations: tuple[str, str],
    output: str,
    config: StorageConfig,
    options: ExtractOptions,
    resources: SurveyOptions,
    survey: Survey,
    on_event: OnEvent = ignore,
) -> Extraction:
    """Extract an adapter and publish it.

    Args:
        locations: of the base and of the tuned model.
        output: where the adapter goes.
        config: how to reach all of them.
        options: what is kept.
        resources: what may be used.
        survey: where tensors are looked at.
        on_event: told how it goes.

    Raises:
        UserError: the two are not alike, what changed cannot be held, or the memory is too small.
        StorageError: storage failed after retries.
    """
    began = time.time()
    stores, checkpoints = _opened(locations, config, on_event)
    store = open_store(output, config, writable=True)
    check_apart(store.url, stores)
    pair = paired(*checkpoints, takes_embeddings=options.embeddings)
    plan = _plan(stores, checkpoints, options)
    found = admit(store, plan, _most_bytes(pair, options), overwrite=options.overwrite)
    if found.finished and not options.overwrite:
        on_event(Note(FINISHED))
        return extraction_on_record(read_record(store, found.finished), options.dtype)
    spec = SurveySpec(plan.checkpoints, config, resources.memory_bytes, resources.num_threads, resources.device)
    looking = _Looking(pair, spec, survey, on_event)
    kept = kept_whole(pair, looking.changed_others(), keep=options.keep_whole)
    with claimed(store, plan, found, began, on_event) as (pieces, looking.on_event):
        extracting = _Extracting(looking, options, pieces)
        extracting.keep_factors([target for target in pair.targets if target.module not in kept.modules])
        extracting.keep_experts([target for target in stacked_targets(pair) if target.module not in kept.modules])
        _check_any(extracting)
        extracting.keep_whole(kept)
        extracting.finish()
        return _published(store, plan, extracting, kept)


def _plan(stores: Sequence[Store], checkpoints: Sequence[Checkpoint], options: ExtractOptions) -> AdapterPlan:
    settings = {name: value for name, value in asdict(options).items() if name != "overwrite"}
    given = (["--" + name.replace("_", "-"), str(value)] for name, value in settings.items() if value)
    flags = [each for words in given for each in words if each != "True"]
    return AdapterPlan(
        checkpoints=tuple(CheckpointRef(each.url, each.files) for each in checkpoints),
        pins=tuple(store.pin for store in stores),
        settings={"method": "extract", **settings},
        made_by=command_line("stockflow", "extract", *(each.url for each in checkpoints), "OUTPUT", *flags),
    )


def _opened(
    locations: tuple[str, str], config: StorageConfig, on_event: OnEvent
) -> tuple[list[Store], list[Checkpoint]]:
    on_event(Stage("opening checkpoints", unit="files"))
    stores = [open_model(pin_revision(location), config) for location in locations]
    if len(halves_of(stores[0].url)) > 1:
        raise PlanError(
            f"the base {redact(stores[0].url)} is a model with an adapter, which no adapter_config.json can name; "
            "merge the two first"
        )
    complete = partial(with_base, storage=config)
    checkpoints = open_checkpoints(stores, lambda file: on_event(Done(file)), with_base=complete)
    for store, checkpoint in zip(stores, checkpoints, strict=True):
        for note in link_notes(store, checkpoint.files):
            on_event(Note(note))
    return stores, checkpoints


def _most_bytes(pair: Pair, options: ExtractOptions) -> int:
    """Return the size of the factors if all matrices changed by at least the rank."""
    per_number = width_of(options.dtype)
    return sum(min(options.rank, *target.shape) * sum(target.shape) * per_number for target in pair.targets)


def _are_alike(pair: Pair, name: str) -> bool:
    """Return whether a tensor is of numbers in both models, or of one dtype."""
    base, tuned = pair.base.specs[name].dtype, pair.tuned.specs[name].dtype
    return base == tuned or (base in FORMATS and tuned in FORMATS)


def _whole_look(pair: Pair, name: str, *, keeps: bool) -> Look:
    base, tuned = pair.base.specs[name], pair.tuned.specs[name]
    operands = operand_of(0, pair.base, name), operand_of(1, pair.tuned, name)
    kept_bytes = tuned.num_bytes if keeps else 0
    if base.dtype in FORMATS and tuned.dtype in FORMATS:
        reading = Reading(name, base.shape, operands, float_bits=float_bits_of((base.dtype, tuned.dtype)))
        return Look(reading, WholeExaminer(tuned.dtype, keeps), kept_bytes=kept_bytes)
    carried = tuple(each._replace(decode=as_bytes(each.decode)) for each in operands)
    reading = Reading(name, (base.num_bytes,), carried)
    return Look(reading, WholeExaminer(reading.dtypes[1], keeps=False))


def _sketched(pair: Pair, target: FactorTarget, options: ExtractOptions) -> Look:
    operands = operand_of(0, pair.base, target.name), operand_of(1, pair.tuned, target.name)
    bits = float_bits_of([each.specs[target.name].dtype for each in (pair.base, pair.tuned)])
    reading = Reading(target.name, target.shape, operands, float_bits=bits, whole_rows=True)
    tuned_dtype = pair.tuned.specs[target.name].dtype
    examiner = SketchExaminer(options.rank, options.energy, options.dtype, tuned_dtype, target.is_turned)
    return Look(reading, examiner, kept_bytes=sketch.held_bytes(options.rank, target.shape))


def _sketched_expert(pair: Pair, target: StackedTarget, expert: int, options: ExtractOptions) -> Look:
    operands = target.operand(0, pair.base, expert), target.operand(1, pair.tuned, expert)
    dtypes = [each.specs[target.name].dtype for each in (pair.base, pair.tuned)]
    name, bits = f"{target.name}[{expert}]", float_bits_of(dtypes)
    reading = Reading(name, target.shape, operands, float_bits=bits, whole_rows=True)
    examiner = SketchExaminer(options.rank, options.energy, options.dtype, dtypes[1], target.is_turned)
    factors = width_of(options.dtype) * options.rank * sum(target.shape) * target.num_experts
    return Look(reading, examiner, kept_bytes=sketch.held_bytes(options.rank, target.shape) + 2 * factors)


def _check_any(extracting: _Extracting) -> None:
    if not (extracting.ranks or extracting.stacked):
        base, tuned = (redact(each.url) for each in (extracting.pair.base, extracting.pair.tuned))
        raise PlanError(
            f"no matrix that factors hold differs between {base} and {tuned}, and PEFT loads no adapter without; "
            "`stockflow diff` compares the two"
        )


def _published(store: Store, plan: AdapterPlan, extracting: _Extracting, kept: KeptWhole) -> Extraction:
    pair, pieces = extracting.pair, extracting.pieces
    wholes = [name for name, row in pieces.rows.items() if is_whole(row)]
    described = AdapterDescription(
        base=pair.base.url,
        ranks=extracting.ranks,
        candidates={module_of(name) for name in pair.base.specs},
        saved=[*kept.modules, *(module_of(head) for name in wholes for head in pair.heads_beside(name))],
        parameters=[target.name for target in extracting.stacked],
        own_rank=extracting.options.rank if extracting.stacked else None,
        has_biases=bool(kept.biases),
        is_turned=stores_turned(pair.base.config),
        task=task_of(pair.base.config),
    )
    order = {name: number for number, name in enumerate(pair.base.specs)}
    pieces.rows = dict(sorted(pieces.rows.items(), key=lambda item: order[item[0]]))
    made = extraction_of(store.url, plan, pieces, extracting.options.dtype, len(pair.base.specs))
    manifest = publish(
        store, plan, pieces, described.encode(), extraction_card(made), made.summary, extracting.looking.on_event
    )
    return replace(made, files=manifest.files)
