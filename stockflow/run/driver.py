"""The driver: from a recipe and an output location to a published manifest, resuming what an earlier run left."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

from stockflow.checkpoints.copies import MAX_COMPARED_BYTES
from stockflow.checkpoints.samples import Samples, take_samples
from stockflow.errors import PlanError
from stockflow.events import Event, Note, OnEvent, Stage, Workers, all_of, ignore
from stockflow.output.keys import plan_key
from stockflow.output.manifest import Manifest
from stockflow.output.numerics import agreed_numerics
from stockflow.output.ownership import admit, look, overwriting_notes, store_warnings, take
from stockflow.output.receipts import Receipt, condensed
from stockflow.output.shards import present_files, valid_receipts
from stockflow.output.target import check_apart, check_room, check_target, check_unshared
from stockflow.planning import file as plan_file
from stockflow.planning.budget import BASELINE_BYTES, Workspace, client_bytes, divide, least_memory, planned_bytes
from stockflow.planning.make import LEAST_GOOD_SHARD_BYTES, few_shards_note
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.planning.views import under_names_of
from stockflow.run import shard_events
from stockflow.run.inputs import Inputs, collector_paused
from stockflow.run.presence import at_work
from stockflow.storage import (
    ReadsInPlace,
    Store,
    open_store,
    redact,
)
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, objections

if TYPE_CHECKING:
    from stockflow.engine.devices import Device
    from stockflow.engine.worker import WorkerSpec

NUM_OTHERS_SHOWN = 5
Outcome = Literal["merged", "already_finished"]


Execute = Callable[["WorkerSpec", Sequence[ShardPlan], OnEvent], Iterator[Receipt]]
"""Merges shards somewhere and yields their receipts; tells of bytes, who is at which shard, and what is tried again."""
Ready = Callable[[int], AbstractContextManager[None]]
"""Sees that so many shards could be merged there, before an output is claimed for it, and keeps it so."""


@dataclass(frozen=True)
class MergeOptions:
    """What may change from run to run without changing a byte of the output."""

    memory_bytes: int
    num_threads: int
    device: "Device" = "auto"
    shard_size: int | None = None
    overwrite: bool = False
    strict: bool = False
    """whether what is otherwise warned of is refused"""
    accepted: tuple[str, ...] = ()
    """codes of refusals that are accepted, beside those of the recipe"""
    num_workers: int | None = None
    """processes that share the shards, if a number was asked for; None: one, or as many as there is room for"""
    holds_plan: bool = True
    """whether the process that merges keeps the plan of all tensors, too; a Ray worker sees one shard at a time"""


@dataclass(frozen=True)
class Merged:
    """What a finished merge was."""

    outcome: Outcome
    plan: MergePlan
    manifest: Manifest
    output_url: str
    num_resumed: int
    seconds: float


@collector_paused()
def plan_merge(inputs: Inputs, output: str, options: MergeOptions) -> tuple[MergePlan, Workspace]:
    """Return the plan, and how a worker would divide its memory; nothing is written.

    Raises:
        PlanError: the output overlaps an input, or the inputs do not fit together.
        BudgetError: the memory is too small.
    """
    where = output_url(inputs, output)
    check_apart(where, inputs.stores)
    inputs.compare_heads(MAX_COMPARED_BYTES)
    plan = inputs.plan(
        shard_size=options.shard_size,
        strict=options.strict,
        accepted=options.accepted,
        samples=_samples(inputs),
    )
    workspace = divide(
        plan.jobs,
        options.memory_bytes,
        num_threads=options.num_threads,
        baseline_bytes=_baseline_bytes(inputs, where, plan, options),
        direct=_is_direct(inputs, options),
    )
    return plan, workspace


def _samples(inputs: Inputs) -> Samples:
    """Return samples of the models that are merged, found under the names that they are read by."""
    donor = inputs.merged[inputs.recipe.donor]
    seen = [under_names_of(donor, each) for each in inputs.merged]
    return take_samples(inputs.stores[: len(seen)], seen)


def output_url(inputs: Inputs, output: str) -> str:
    """Return the URL of an output as stores know it: absolute, normalized.

    Raises:
        RecipeError: nothing can be written there.
    """
    return open_store(output, inputs.storage, writable=True).url


def least_memory_of(inputs: Inputs, output: str, plan: MergePlan, options: MergeOptions) -> int:
    """Return the least memory a worker must be given for this plan."""
    return least_memory(
        plan.jobs,
        num_threads=options.num_threads,
        baseline_bytes=_baseline_bytes(inputs, output_url(inputs, output), plan, options),
        direct=_is_direct(inputs, options),
    )


def _baseline_bytes(inputs: Inputs, output: str, plan: MergePlan, options: MergeOptions) -> int:
    largest_shard = max(shard.num_bytes for shard in plan.shards)
    clients = client_bytes((store.url for store in inputs.stores), output, largest_shard)
    planned = planned_bytes(plan.jobs) if options.holds_plan else 0
    return BASELINE_BYTES["cuda" if options.device == "cuda" else "cpu"] + planned + clients


def _is_direct(inputs: Inputs, options: MergeOptions) -> bool:
    return options.device != "cuda" and all(isinstance(store, ReadsInPlace) for store in inputs.stores)


def output_notes(inputs: Inputs, output: str, plan: MergePlan, *, overwrite: bool) -> Iterator[str]:
    """Yield what a merge would find at its output; nothing is written.

    Raises:
        PlanError: see ``check_target`` and ``check_room``.
    """
    store = open_store(output, inputs.storage, writable=True)
    check_target(store, plan)
    found = look(store, plan)
    if not found.finished:
        check_room(store, plan)
    if found.finished:
        yield "this plan's output is there already, finished: a merge would do nothing"
    elif found.is_ours:
        yield "an earlier run of this plan began here: a merge would resume it"
    elif found.conflict:
        check_unshared(store, inputs.stores)
        yield f"{found.conflict}: a merge would {'replace it' if overwrite else 'refuse, unless --overwrite is given'}"
        yield from overwriting_notes(store, plan, is_done=False) if overwrite else ()


def side_file_notes(inputs: Inputs) -> Iterator[str]:
    """Yield the names of those files of the model that gives the side files which are of no known kind, and stay.

    They are said, and only counted in the records: who publishes a merge need not publish what else lies there.
    """
    donor = inputs.checkpoints[inputs.recipe.side_files_donor]
    others = donor.other_files
    if others:
        names = some(others, NUM_OTHERS_SHOWN)
        yield f"not copied from {redact(donor.url)}, as nobody here knows whether a loader needs it: {names}"


def merge(
    inputs: Inputs,
    output: str,
    options: MergeOptions,
    execute: Execute,
    on_event: OnEvent = ignore,
    ready: Ready = lambda _: nullcontext(),
) -> Merged:
    """Merge, or finish what an earlier run of the same plan began.

    Raises:
        OutputConflictError: the prefix belongs to another plan or to foreign files.
        UserError: see ``plan_merge`` and ``Worker.merge``.
        StorageError: storage failed; running again resumes.
    """
    started = time.perf_counter()
    inputs.compare_heads(None, on_event)
    on_event(Stage("planning"))
    plan, _ = plan_merge(inputs, output, options)
    store = open_store(output, inputs.storage, writable=True)
    check_target(store, plan)
    found = admit(store, plan, overwrite=options.overwrite)
    if found.finished and not options.overwrite and _has_all_shards(store, plan, found.finished):
        if options.strict:
            late = [remark for remark in found.finished.remarks if remark not in plan.remarks]
            _check_proved(late, plan, inputs, options, f"{redact(store.url)} is published, and --strict refuses what")
        return Merged("already_finished", plan, found.finished, store.url, len(plan.shards), 0.0)
    if found.conflict:
        check_unshared(store, inputs.stores)
    check_room(store, plan)
    files = {shard.file for shard in plan.shards}
    with ready(len(files)), at_work(store, plan, files, on_event) as (run, tell, is_exclusive):
        taken = take(store, plan, run, found, is_exclusive=is_exclusive)
        weak = store_warnings(store, inputs.stores, plan, is_exclusive=is_exclusive)
        for remark in plan.remarks:
            tell(Note(f"{remark} [{remark.code}]", "note" if remark.severity == "note" else "warning"))
        for note in chain(taken, side_file_notes(inputs), few_shards_note(plan, options.num_workers), weak):
            tell(Note(note))
        inputs.forget_tensors()
        store.put(plan_key(plan.plan_id), plan_file.encode(plan))
        tell(Stage("looking for finished shards"))
        spec = _worker_spec(inputs, plan, store.url, options, run)
        receipts, num_resumed = _merge_shards(store, plan, execute, spec, tell)
        tell(Stage("publishing"))
        from stockflow.output.publish import commit, proved_by

        if options.strict:
            kept = "all shards are merged and kept, but not published, as --strict refuses what"
            _check_proved(proved_by(plan, receipts), plan, inputs, options, kept)
        manifest = commit(store, inputs.stores, inputs.recipe, plan, receipts)
    return Merged("merged", plan, manifest, store.url, num_resumed, time.perf_counter() - started)


def _check_proved(
    remarks: Sequence[Remark], plan: MergePlan, inputs: Inputs, options: MergeOptions, refused: str
) -> None:
    """Refuse what only came up when all was read, if it is not accepted."""
    accepted = {*inputs.recipe.stockflow.accept, *options.accepted}
    if against := objections(remarks, accepted, strict=True):
        then = "with these codes accepted, or without --strict, the same command goes on from here"
        raise PlanError(
            "\n  ".join((f"{refused} came up when all was read; {then}:", *against)), (*plan.remarks, *remarks)
        )


def _has_all_shards(store: Store, plan: MergePlan, manifest: Manifest) -> bool:
    """Return whether the shards of a finished output are still there, by their sizes."""
    files = [shard.file for shard in plan.shards]
    present = present_files(store, files)
    return all(file in present and present[file].size == manifest.files[file].size for file in files)


def _merge_shards(
    store: Store, plan: MergePlan, execute: Execute, spec: "WorkerSpec", tell: OnEvent
) -> tuple[list[Receipt], int]:
    """Merge what no earlier run has; return the receipts in the order of the plan, and how many of them were there."""
    shards = {shard.file: shard for shard in plan.shards}
    receipts = valid_receipts(store, plan)
    _drop_other_numerics(store, plan, receipts, tell)
    tell(shard_events.merging(plan, receipts))
    resumed = set(receipts)
    tell_executed = all_of(tell, partial(_note_idle_workers, plan, tell))
    while remaining := [shard for shard in plan.shards if shard.file not in receipts]:
        for receipt in map(condensed, execute(spec, remaining, tell_executed)):
            receipts[receipt.file] = receipt
            tell(shard_events.done(shards[receipt.file], receipt))
        others = _drop_other_numerics(store, plan, receipts, tell)
        for file in sorted(others):
            tell(shard_events.dropped(shards[file]))
        resumed -= others
    return [receipts[shard.file] for shard in plan.shards], len(resumed)


def _note_idle_workers(plan: MergePlan, tell: OnEvent, event: Event) -> None:
    """Say that shards are few for the workers that a cluster holds, if a merge is long enough for that to matter.

    Where a number was asked for, that was said before.
    """
    if isinstance(event, Workers) and plan.num_output_bytes >= LEAST_GOOD_SHARD_BYTES * event.num_workers:
        for note in few_shards_note(plan, event.num_workers):
            tell(Note(note))


def _drop_other_numerics(store: Store, plan: MergePlan, receipts: dict[str, Receipt], tell: OnEvent) -> set[str]:
    """Forget shards of another numerics class than the one the workers agreed on; return their names."""
    agreed = agreed_numerics(store, plan.plan_id)
    others = {file for file, receipt in receipts.items() if agreed not in (None, receipt.numerics_class)}
    if others:
        found = ", ".join(sorted({receipts[file].numerics_class for file in others}))
        text = (
            f"{len(others)} shards were merged on machines of class {found}; they are merged again as {agreed}, "
            "so that all fit together bit for bit"
        )
        tell(Note(text))
    for file in others:
        del receipts[file]
    return others


def _worker_spec(inputs: Inputs, plan: MergePlan, output_url: str, options: MergeOptions, run: str) -> "WorkerSpec":
    from stockflow.engine.worker import WorkerSpec

    return WorkerSpec(
        plan_id=plan.plan_id,
        checkpoints=plan.checkpoints,
        output_url=output_url,
        storage=inputs.storage,
        on_nonfinite=plan.on_nonfinite,
        memory_bytes=options.memory_bytes,
        num_threads=options.num_threads,
        device=options.device,
        run=run,
        replaces_numerics=options.overwrite,
    )
