"""``stockflow audit``: what the wrong formula did or would have done, and which formula made a merge that exists."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stockflow.checkpoints.naming import kind_of, layer_of
from stockflow.checkpoints.opening import Checkpoint, link_notes, open_checkpoints
from stockflow.engine.survey import Look, SurveySpec
from stockflow.errors import CheckpointError, InputChangedError, NotFoundError, PlanError
from stockflow.events import Done, Note, OnEvent, Stage, ignore
from stockflow.insight.examiner import EXTRAPOLATED, MERGE_NONFINITE, NONFINITE, correct_formula, look_at
from stockflow.insight.inspection import Following, Survey, SurveyOptions
from stockflow.kernels.floats import FORMATS
from stockflow.methods.ratios import RATIOS
from stockflow.output import manifest as manifest_file
from stockflow.output.keys import MANIFEST_FILE
from stockflow.output.manifest import Manifest
from stockflow.planning.job import TensorJob, stored
from stockflow.planning.make import make_plan
from stockflow.planning.plan import CheckpointRef, MergePlan
from stockflow.recipe import resolve_location
from stockflow.run.driver import Inputs, collector_paused
from stockflow.storage import StorageConfig, Store, open_store, pin_revision, redact
from stockflow.verification.files import Output
from stockflow.verification.findings import Finding
from stockflow.verification.records import check_input, read_plan

FORMAT = "stockflow-audit-1"
METHOD = "model_stock"
WORTH_IT = 0.01
"""Error relative to the size of the update from which on merging again is called worth it."""
MAX_SHOWN = 5

EMPTY_ROW: dict[str, Any] = {
    **{f"ratio_{name}": None for name in RATIOS},
    "ratio_correct": None, "mean_norm": None, "update_norm": None, "old_error": None, "old_distance": None,
    "old_roundings": None, "match": None, "candidates": [], "implied_ratio": None, "implied_weights": [],
    "residual": None, "rounding_noise": None, "error": None, "distance": None, "equal_share": None,
    "mean_roundings": None, "max_roundings": None, "flags": [],
}  # fmt: skip


@dataclass(frozen=True)
class Merge:
    """What is to be audited: how it should have been merged, and where the result is."""

    plan: MergePlan
    storage: StorageConfig
    merged_url: str | None = None
    merged: Checkpoint | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found; rows are plain, in the order of the plan."""

    merge: Merge
    rows: Sequence[dict[str, Any]]
    left_out: Mapping[str, str]
    """tensors that were not looked at, and why"""
    num_bytes_read: int
    seconds: float

    @property
    def num_tuned(self) -> int:
        """N, the number of tuned models."""
        return max(len(job.reading.operands) for job in self.merge.plan.jobs if job.result.method == METHOD) - 1

    @property
    def verdict(self) -> "Verdict":
        """Whether to merge again."""
        return judge(self)

    def facts(self) -> dict[str, Any]:
        """Return what `stockflow audit --json` prints."""
        return summary(self) | {"tensors": list(self.rows)}

    def __str__(self) -> str:
        from stockflow.insight.audit_lines import audit_lines

        return "\n".join(audit_lines(self))


@dataclass(frozen=True)
class Verdict:
    """Whether to merge again."""

    answer: str
    """``no``, ``hardly``, ``yes``, ``unrelated``, ``undecided`` (NaN or infinity in a model); without a merge to look
    at ``same`` for ``no``, and never ``unrelated``"""
    distance: float
    """of all tensors together: error relative to the size of the update"""
    share: float
    """of the parameters, in tensors that are not the correct merge"""
    stays: bool = False
    """whether the correct merge is the base: ``distance`` is then relative to the mean task vectors"""


def open_recipe(inputs: Inputs, location: str | None, on_event: OnEvent = ignore) -> Merge:
    """Return what a recipe says of a merge that may be there, at a location as recipes name them.

    Raises:
        PlanError: the checkpoints do not fit together; the merge was made of another number of models.
        UserError: there is no checkpoint at ``location``, or it is malformed.
    """
    store = None if location is None else _open(location, inputs.storage)
    merged = None if store is None else _checkpoint(store, on_event)
    on_event(Stage("planning"))
    with collector_paused():
        plan = make_plan(inputs.recipe, inputs.checkpoints)
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
    recorded = read_plan(Output(store), manifest)
    if isinstance(recorded, Finding):
        raise CheckpointError(f"{redact(store.url)}: {recorded}; `stockflow verify` says more")
    _check_method(recorded.plan)
    on_event(Stage("looking at the inputs", num_items=len(recorded.plan.checkpoints), unit="inputs"))
    changed = []
    for ref in recorded.plan.checkpoints:
        for note in link_notes(open_store(ref.url, config), ref.files):
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
    return open_store(pin_revision(resolve_location(location)), config)


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
    for job in merge.plan.jobs:
        name, merged = job.output.name, merge.merged
        if job.result.method != METHOD:
            left_out[name] = "copied" if job.is_copy else f"merged by {job.result.method}"
        elif merged is None:
            looks.append(look_at(job, None))
        elif problem := _problem(merged, job):
            left_out[name] = problem
        else:
            looks.append(look_at(job, stored(len(merge.plan.checkpoints), merged.specs[name], merged.extents[name])))
    return looks, left_out


def _problem(merged: Checkpoint, job: TensorJob) -> str | None:
    spec = merged.specs.get(job.output.name)
    if spec is None:
        return "not in the merged checkpoint"
    if spec.shape != job.output.shape:
        return f"of shape {list(spec.shape)} in the merged checkpoint, expected {list(job.output.shape)}"
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


def is_correct(row: Mapping[str, Any], *, extrapolates: bool) -> bool:
    """Return whether a tensor is what the recipe asks for, as far as its numbers tell."""
    return ("extrapolated" if extrapolates else "exact") in row["candidates"]


def judge(found: Audit) -> Verdict:
    """Return whether to merge again, from all tensors together."""
    return _judge_merge(found) if found.merge.merged else _judge_recipe(found)


def _judge_merge(found: Audit) -> Verdict:
    broken = [row for row in found.rows if MERGE_NONFINITE in row["flags"]]
    unknown = [row for row in found.rows if NONFINITE in row["flags"]]
    rows = [row for row in found.rows if row["match"] != "not_finite"]
    extrapolating = _extrapolating(found)
    wrong = [row for row in rows if not is_correct(row, extrapolates=row["name"] in extrapolating)]
    distance, stays = _relative(rows, [row["error"] for row in wrong])
    verdict = Verdict("no", distance, _num_elems([*wrong, *broken]) / max(_num_elems(found.rows), 1), stays)
    if _num_elems(row for row in rows if row["match"] == "none") > 0.5 * _num_elems(rows):
        return replace(verdict, answer="unrelated")
    # Where no tensor should have moved, any change is one too many.
    if broken or distance >= WORTH_IT or (wrong and stays):
        return replace(verdict, answer="yes")
    return replace(verdict, answer="hardly" if wrong else "undecided" if unknown else "no")


def _judge_recipe(found: Audit) -> Verdict:
    if found.num_tuned == 2:  # one formula; clamping, which is another matter, is not what the old one got wrong
        return Verdict("same", 0.0, 0.0)
    rows = [row for row in found.rows if row["match"] != "not_finite"]
    moved = [row for row in rows if row["old_error"]]
    distance, stays = _relative(rows, [row["old_error"] for row in moved])
    verdict = Verdict("same", distance, _num_elems(moved) / max(_num_elems(found.rows), 1), stays)
    if moved:
        return replace(verdict, answer="yes" if stays or distance >= WORTH_IT else "hardly")
    return verdict if len(rows) == len(found.rows) else replace(verdict, answer="undecided")


def _relative(rows: Sequence[Mapping[str, Any]], errors: Sequence[float | None]) -> tuple[float, bool]:
    """Return errors of tensors relative to the update of all; where none moves, to their mean task vectors."""
    update, mean = (math.hypot(*(row[column] or 0.0 for row in rows)) for column in ("update_norm", "mean_norm"))
    size = update or mean
    return (math.hypot(*(error or 0.0 for error in errors)) / size if size else 0.0), not update


def _num_elems(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(row["num_elems"] for row in rows)


def _extrapolating(found: Audit) -> frozenset[str]:
    """The tensors whose recipe asks to extrapolate."""
    jobs = found.merge.plan.jobs
    return frozenset(job.output.name for job in jobs if correct_formula(job) == EXTRAPOLATED)


def shares(found: Audit) -> dict[str, dict[str, float]]:
    """Return how many tensors and parameters carry each label."""
    labels: dict[str, dict[str, float]] = {}
    for row in found.rows:
        counts = labels.setdefault(str(row["match"]), {"tensors": 0, "num_elems": 0})
        counts["tensors"] += 1
        counts["num_elems"] += row["num_elems"]
    return dict(sorted(labels.items(), key=lambda item: -item[1]["num_elems"]))


def summary(found: Audit) -> dict[str, Any]:
    """Return what goes before the rows."""
    decided = judge(found)
    return {
        "format": FORMAT,
        "base": redact(found.merge.plan.checkpoints[0].url),
        "models": [redact(ref.url) for ref in found.merge.plan.checkpoints[1:]],
        "merged": redact(found.merge.merged_url) if found.merge.merged_url else None,
        "verdict": decided.answer,
        "distance": decided.distance,
        "distance_is_of": "mean task vectors" if decided.stays else "update",
        "share_of_parameters": decided.share,
        "labels": shares(found) if found.merge.merged else {},
        "left_out": dict(found.left_out),
        "notes": list(found.merge.notes),
        "bytes_read": found.num_bytes_read,
        "seconds": found.seconds,
    }


def json_parts(found: Audit) -> Iterator[str]:
    """Yield audit.json, piece by piece: the summary, and one line per tensor."""
    head = json.dumps(summary(found), indent=1, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n "tensors": ['
    separator = "\n"
    for row in found.rows:
        yield f"{separator}  {json.dumps(row, ensure_ascii=False)}"
        separator = ",\n"
    yield "\n ]\n}\n"
