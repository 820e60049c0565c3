"""``stockflow audit``: opens a merge, or what a recipe says of one, and looks at every tensor of it."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stockflow.checkpoints.decodes.transposed import Transposed
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.naming import kind_of, layer_of
from stockflow.checkpoints.opening import Checkpoint, link_notes, open_checkpoints
from stockflow.checkpoints.quantised import BLOCKS
from stockflow.engine.survey import Look, SurveySpec
from stockflow.errors import CheckpointError, InputChangedError, NotFoundError, PlanError
from stockflow.events import Done, Note, OnEvent, Stage, ignore
from stockflow.insight.examiner import look_at
from stockflow.insight.surveys import Following, Survey, SurveyOptions
from stockflow.insight.verdict import METHOD, Audit, Merge
from stockflow.kernels.floats import FORMATS
from stockflow.methods.ratios import RATIOS
from stockflow.output import manifest as manifest_file
from stockflow.output.keys import MANIFEST_FILE
from stockflow.output.manifest import Manifest
from stockflow.planning.job import TensorJob
from stockflow.planning.operands import Operand, stored
from stockflow.planning.plan import CheckpointRef, MergePlan, with_offsets
from stockflow.recipe import resolve_location
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, Store, open_model, pin_revision, redact
from stockflow.verification.files import Output
from stockflow.verification.findings import Finding
from stockflow.verification.records import check_input, read_plan

MAX_SHOWN = 5

EMPTY_ROW: dict[str, Any] = {
    **{f"ratio_{name}": None for name in RATIOS},
    "ratio_correct": None, "mean_norm": None, "update_norm": None, "old_error": None, "old_distance": None,
    "old_roundings": None, "match": None, "candidates": [], "implied_ratio": None, "implied_weights": [],
    "residual": None, "rounding_noise": None, "error": None, "distance": None, "equal_share": None,
    "mean_roundings": None, "max_roundings": None, "flags": [],
}  # fmt: skip


def open_recipe(inputs: Inputs, location: str | None, on_event: OnEvent = ignore) -> Merge:
    """Return what a recipe says of a merge that may be there, at a location as recipes name them.

    Raises:
        PlanError: the checkpoints do not fit together; the merge was made of another number of models.
        UserError: there is no checkpoint at ``location``, or it is malformed.
    """
    store = None if location is None else _open(location, inputs.storage)
    merged = None if store is None else _checkpoint(store, on_event)
    on_event(Stage("planning"))
    plan = inputs.plan()
    _check_method(plan)
    if store is None:
        return Merge(plan, inputs.storage)
    manifest = _manifest(store)
    if manifest is not None and len(manifest.inputs) != len(plan.checkpoints):
        raise PlanError(
            f"{redact(store.url)} was merged from {len(manifest.inputs)} checkpoints, as its manifest says, and the "
            f"recipe names {len(plan.checkpoints)}; give the recipe it was made by, or none: stockflow audit OUTPUT"
        )
    notes = []
    if manifest is not None and [redact(ref.url) for ref in plan.checkpoints] != [
        redact(ref.url) for ref in manifest.inputs
    ]:
        notes.append(f"{redact(store.url)} was merged from other places than the recipe names, as its manifest says")
    return Merge(plan, inputs.storage, store.url, merged, tuple(notes))


def open_output(output: str, config: StorageConfig, on_event: OnEvent = ignore) -> Merge:
    """Return what an output of ours says of itself.

    Raises:
        NotFoundError: it has no manifest.
        CheckpointError: manifest or plan cannot be read.
        InputChangedError: an input is not there any more as it was merged.
        PlanError: it was not made by Model Stock.
    """
    on_event(Stage("reading records"))
    store = _open(output, config)
    manifest = _manifest(store)
    if manifest is None:
        raise NotFoundError(
            f"{redact(store.url)} has no {MANIFEST_FILE}, so nothing says what it was merged from: name the recipe "
            f"too (stockflow audit RECIPE {redact(output)}); mergekit leaves one as mergekit_config.yml"
        )
    if manifest.is_adapter:
        raise PlanError(
            f"{redact(store.url)} is an adapter, and an audit tells readings of Model Stock apart; `stockflow report` "
            "shows how it was made"
        )
    recorded = read_plan(Output(store), manifest)
    if isinstance(recorded, Finding):
        raise CheckpointError(f"{redact(store.url)}: {recorded}; `stockflow verify` says more")
    _check_method(recorded.plan)
    on_event(Stage("looking at the inputs", num_items=len(recorded.plan.models), unit="inputs"))
    changed = []
    for ref in recorded.plan.models:
        for note in link_notes(open_model(ref.url, config), ref.files):
            on_event(Note(note))
        changed += [str(finding) for finding in check_input(ref, config, ref.files.keys())]
        on_event(Done(redact(ref.url)))
    if changed:
        more = f"\n  ... and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
        raise InputChangedError(
            f"the inputs are not what {redact(store.url)} was merged from; an audit needs them as they were:\n  "
            + "\n  ".join(changed[:MAX_SHOWN])
            + f"{more}\nto hold it against the inputs as they are now, name the recipe too: "
            + f"stockflow audit RECIPE {redact(output)}"
        )
    on_event(Stage("opening checkpoints", unit="files"))
    return Merge(recorded.plan, config, store.url, _checkpoint(store, on_event))


def _open(location: str, config: StorageConfig) -> Store:
    return open_model(pin_revision(resolve_location(location)), config)


def _checkpoint(store: Store, on_event: OnEvent) -> Checkpoint:
    (checkpoint,) = open_checkpoints([store], lambda file: on_event(Done(file)))
    for note in link_notes(store, checkpoint.files):
        on_event(Note(note))
    return checkpoint


def _manifest(store: Store) -> Manifest | None:
    try:
        return manifest_file.read(store)
    except NotFoundError:
        return None


def _check_method(plan: MergePlan) -> None:
    methods = sorted({job.result.method for job in plan.jobs if not job.is_copy})
    if METHOD not in methods:
        raise PlanError(
            f"an audit tells readings of Model Stock apart, and this merge is by {', '.join(methods) or 'copying'}; "
            "`stockflow inspect` shows the geometry for any method"
        )
    if any(job.decided_in for job in plan.jobs):
        raise PlanError("an audit looks at tensors one by one, and this merge decides all experts of a layer as one")


def audit(merge: Merge, options: SurveyOptions, survey: Survey, on_event: OnEvent) -> Audit:
    """Look at every tensor.

    Raises:
        PlanError: the merged checkpoint has nothing in common with the plan.
        UserError: an input changed, or the budget is too small.
        StorageError: reading failed after retries.
    """
    started = time.perf_counter()
    looks, left_out = _looks(merge)
    if not looks:
        raise PlanError(_nothing_in_common(merge, left_out))
    checkpoints = merge.plan.checkpoints
    if merge.merged is not None:
        checkpoints = (*checkpoints, CheckpointRef(merge.merged.url, merge.merged.files))
    spec = SurveySpec(checkpoints, merge.storage, options.memory_bytes, options.num_threads, options.device)
    following = Following(spec, looks, on_event)
    rows: list[dict[str, Any]] = [{}] * len(looks)
    for number, row in following.rows(survey(spec, looks, following)):
        reading = looks[number].reading
        rows[number] = {
            "name": reading.name,
            "kind": kind_of(reading.name),
            "layer": layer_of(reading.name),
            "shape": list(reading.shape),
            "num_elems": reading.num_elems,
            **EMPTY_ROW,
            **row,
        }
    return Audit(merge, rows, left_out, following.num_read, time.perf_counter() - started)


def _looks(merge: Merge) -> tuple[list[Look], dict[str, str]]:
    """What to look at, and what to leave out for which reason."""
    looks, left_out = [], {}
    for job, offset in with_offsets(merge.plan.jobs):
        name, merged = job.output.name, merge.merged
        if job.result.method != METHOD:
            left_out[name] = "copied" if job.is_copy else f"merged by {job.result.method}"
        elif merged is None:
            looks.append(look_at(job, None))
        elif problem := _problem(merged, job):
            left_out[name] = problem
        else:
            looks.append(look_at(job, _part(merged, job, offset, len(merge.plan.checkpoints))))
    return looks, left_out


def _part(merged: Checkpoint, job: TensorJob, offset: int, number: int) -> Operand:
    """Return what a merged checkpoint has of a job, so many elements into the tensor that holds it."""
    spec, (file, start) = merged.specs[job.stored_name], merged.extents[job.stored_name]
    part = TensorSpec(job.output.name, spec.dtype, job.output.shape)
    width, encode = part.num_bytes // part.num_elems, job.result.encode
    if isinstance(encode, Transposed):
        beside = Extent(file, start + width * (offset - encode.number * part.num_elems))
        return Operand(number, part.name, (beside,), replace(encode, dtype=spec.dtype))
    return stored(number, part, Extent(file, start + width * offset))


def _problem(merged: Checkpoint, job: TensorJob) -> str | None:
    name, planned = job.stored_name.removesuffix(BLOCKS), job.whole or job.output
    spec = merged.specs.get(name)
    if spec is None:
        return "not in the merged checkpoint"
    if codes := merged.stored.get(name):
        return f"{codes.decode.words} in the merged checkpoint; an audit tells readings apart by single roundings"
    if spec.shape != planned.shape:
        return f"of shape {list(spec.shape)} in the merged checkpoint, expected {list(planned.shape)}"
    if spec.dtype not in FORMATS:
        return f"{spec.dtype} in the merged checkpoint; expected BF16, F16, F32 or F64"
    return None


def _nothing_in_common(merge: Merge, left_out: Mapping[str, str]) -> str:
    where = redact(merge.merged_url or "")
    about = [(name, why) for name, why in left_out.items() if "merged checkpoint" in why]
    first = "".join(f"\n  {name!r} is {why}" for name, why in about[:MAX_SHOWN])
    theirs = list(merge.merged.specs)[:3] if merge.merged else []
    return (
        f"{where} is no merge of this recipe's models: of {len(about)} tensors none is there in the expected shape; "
        f"it has {', '.join(map(repr, theirs))}, ...{first}"
    )
