"""The Python API: what the command line does, as functions with typed results. The command line calls these.

Settings are declared in ``settings``, for both. Errors are StockflowError and its kinds.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Unpack

from stockflow.checkpoints.samples import sampled_specs
from stockflow.events import Moved, OnEvent, Stage, ignore
from stockflow.forecast.amounts import survey
from stockflow.forecast.constants import load_calibration
from stockflow.forecast.seconds import Conditions, forecast
from stockflow.planning.budget import default_memory
from stockflow.planning.make import few_shards_note
from stockflow.recipe import RecipeLike, resolve_location
from stockflow.results import MergeResult, PlanResult
from stockflow.run import driver
from stockflow.run.driver import MergeOptions
from stockflow.run.inputs import Inputs, collector_paused
from stockflow.settings import (
    DiffSettings,
    ExtractSettings,
    Location,
    MergeSettings,
    PlanSettings,
    ReadSettings,
    SurveySettings,
    explains,
    resolved,
)
from stockflow.storage import open_store
from stockflow.wiring import (
    execute_on,
    is_on_ray,
    merge_adapter,
    open_inputs,
    open_merge,
    options_of,
    plan_adapter,
    read_recipe,
    sample_options,
    storage_of,
    survey_on,
    survey_options,
)

if TYPE_CHECKING:
    from stockflow.adapters.combination import CombinationPlan
    from stockflow.adapters.combining import CombinedAdapter
    from stockflow.adapters.findings import Extraction
    from stockflow.adapters.record import AdapterRecord
    from stockflow.forecast.constants import Calibration
    from stockflow.insight.difference import CheckpointDifference
    from stockflow.insight.inspection import Inspection
    from stockflow.insight.verdict import Audit
    from stockflow.reports.report import Report
    from stockflow.verification.verify import Verification


@explains(PlanSettings)
def plan(
    recipe: RecipeLike, output: Location, *, on_event: OnEvent = ignore, **settings: Unpack[PlanSettings]
) -> "PlanResult | CombinationPlan":
    """Return what a merge would read, write, hold, take and cost; refuse what cannot work. Nothing is written.

    Of a recipe whose output is an adapter: its rank, targets and bytes.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        output: folder or URL of the output.
        on_event: told how it goes, from several threads.
        **settings: see ``PlanSettings``.

    Raises:
        UserError: the recipe, the inputs or the budget must change.
        StorageError: reading failed after retries.
    """
    chosen, recipe = resolved(PlanSettings, settings), read_recipe(recipe, on_event)
    if recipe.stockflow.output == "adapter":
        return plan_adapter(recipe, output, chosen, on_event)[0]
    constants = load_calibration(chosen.calibration)
    options, conditions = _conditions(chosen, constants[0] if chosen.calibration else None)
    inputs = open_inputs(
        recipe, on_event, chosen.follow_links, chosen.random_seed, reads_twice=chosen.verify_inputs, is_told=True
    )
    return _planned(inputs, os.fspath(output), options, conditions, constants, on_event)


def _conditions(chosen: SimpleNamespace, elsewhere: "Calibration | None") -> tuple[MergeOptions, Conditions]:
    """Return how a merge would be run, here or on the machine that a calibration was made on."""
    on_ray = is_on_ray(chosen.executor)
    cores = elsewhere.machine.cores if elsewhere else len(os.sched_getaffinity(0))
    options = options_of(chosen, cores if chosen.workers is None and not on_ray else chosen.workers)
    return options, Conditions(
        num_workers=(chosen.workers or cores) if on_ray else 1,
        num_threads=options.num_threads,
        cores=float(options.num_threads if on_ray else cores),
        read_rate=chosen.read_rate,
        write_rate=chosen.write_rate,
        latency_s=chosen.latency,
        request_rate=chosen.request_rate,
        memory_bytes=default_memory(),
        on_ray=on_ray,
        machine_cores=cores,
        machine_price=chosen.machine_price,
    )


@collector_paused()
def _planned(
    inputs: Inputs,
    output: str,
    options: MergeOptions,
    conditions: Conditions,
    constants: "tuple[Calibration, str]",
    on_event: OnEvent,
) -> PlanResult:
    on_event(Stage("planning"))
    merge_plan, workspace = driver.plan_merge(inputs, output, options)
    least_bytes = driver.least_memory_of(inputs, output, merge_plan, options)
    on_event(Stage("looking at the output"))
    notes = (
        *driver.side_file_notes(inputs),
        *driver.output_notes(inputs, output, merge_plan, overwrite=options.overwrite),
        *few_shards_note(merge_plan, options.num_workers),
    )
    url = driver.output_url(inputs, output)
    work = survey(merge_plan, workspace, len(sampled_specs(inputs.merged)), reads_twice=inputs.reads_twice)
    found = forecast(merge_plan, work, constants, url, conditions)
    return PlanResult(merge_plan, workspace, notes, url, work, least_bytes, found)


@explains(MergeSettings)
def merge(
    recipe: RecipeLike, output: Location, *, on_event: OnEvent = ignore, **settings: Unpack[MergeSettings]
) -> "MergeResult | CombinedAdapter":
    """Merge checkpoints as the recipe says and publish the result; the same call again resumes.

    A recipe whose output is an adapter merges adapters into one, without a look at their base.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        output: folder or URL of the output.
        on_event: told how it goes, from several threads.
        **settings: see ``MergeSettings``.

    Raises:
        UserError: the recipe, the inputs, the output or the budget must change.
        StorageError: storage failed after retries; the same call again resumes.
        ComputeLostError: workers were lost for good.
    """
    chosen, recipe = resolved(MergeSettings, settings), read_recipe(recipe, on_event)
    if recipe.stockflow.output == "adapter":
        return merge_adapter(recipe, output, chosen, on_event)
    options, (execute, ready) = options_of(chosen, chosen.workers), execute_on(chosen)
    inputs = open_inputs(
        recipe, on_event, chosen.follow_links, chosen.random_seed, reads_twice=chosen.verify_inputs, is_told=True
    )
    result = driver.merge(inputs, os.fspath(output), options, execute, on_event, ready)
    return MergeResult(result, inputs.storage)


@explains(SurveySettings)
def inspect(recipe: RecipeLike, *, on_event: OnEvent = ignore, **settings: Unpack[SurveySettings]) -> "Inspection":
    """Return the geometry of a recipe's models: cosines, norms, angles and ratios of every tensor. Nothing is merged.

    Args:
        recipe: a file, a URL, its YAML as a text of several lines, or what the YAML says as a mapping.
        on_event: told how it goes, from several threads.
        **settings: see ``SurveySettings``.

    Raises:
        UserError: the recipe names no base, the inputs do not fit together, or the memory is too small.
        StorageError: reading failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.insight import surveys

    chosen = resolved(SurveySettings, settings)
    options, survey = survey_options(chosen), survey_on(chosen)
    return surveys.inspect(open_inputs(recipe, on_event, chosen.follow_links), options, survey, on_event)


@explains(SurveySettings)
def audit(
    subject: RecipeLike,
    merged: Location | None = None,
    *,
    recipe: RecipeLike | None = None,
    on_event: OnEvent = ignore,
    **settings: Unpack[SurveySettings],
) -> "Audit":
    """Tell which formula made a Model Stock merge, and how far it is from the correct one.

    Args:
        subject: recipe of the merge; alone: what the formula that mergekit first had would have done. Or the location
            of an output of stockflow, which says itself what it is.
        merged: checkpoint that some tool made by the recipe.
        recipe: of an output, its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.
        **settings: see ``SurveySettings``.

    Raises:
        UserError: the merge is not by Model Stock, or recipe, inputs or memory must change.
        StorageError: reading failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.insight import audit as auditing

    chosen = resolved(SurveySettings, settings)
    options, survey = survey_options(chosen), survey_on(chosen)
    merge = open_merge(subject, merged, recipe, on_event, chosen.follow_links)
    return auditing.audit(merge, options, survey, on_event)


@explains(DiffSettings)
def diff(
    a: Location,
    b: Location,
    *,
    recipe: RecipeLike | None = None,
    on_event: OnEvent = ignore,
    **settings: Unpack[DiffSettings],
) -> "CheckpointDifference":
    """Compare two checkpoints tensor by tensor, streamed from anywhere.

    Args:
        a: the one that distances are relative to.
        b: the other one.
        recipe: its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.
        **settings: see ``DiffSettings``.

    Raises:
        UserError: a checkpoint is missing, forbidden or malformed, or the memory is too small.
        StorageError: reading failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.insight.comparison import compare_checkpoints

    chosen = resolved(DiffSettings, settings)
    return compare_checkpoints(
        resolve_location(os.fspath(a)),
        resolve_location(os.fspath(b)),
        storage_of(recipe, chosen.follow_links),
        survey_options(chosen),
        survey_on(chosen),
        on_event=on_event,
    )


@explains(ExtractSettings)
def extract(
    base: Location,
    tuned: Location,
    output: Location,
    *,
    recipe: RecipeLike | None = None,
    on_event: OnEvent = ignore,
    **settings: Unpack[ExtractSettings],
) -> "Extraction":
    """Extract a LoRA adapter from the difference of two checkpoints, streamed, and publish it as PEFT writes them.

    Args:
        base: the checkpoint that the other one was tuned from.
        tuned: the other one.
        output: folder or URL of the adapter.
        recipe: its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.
        **settings: see ``ExtractSettings``.

    Raises:
        UserError: the two are not alike, what changed cannot be held, the output is taken, or the memory is too small.
        StorageError: storage failed after retries.
        ComputeLostError: workers were lost for good.
    """
    from stockflow.adapters.extraction import extract as extract_adapter
    from stockflow.wiring import extract_options

    chosen = resolved(ExtractSettings, settings)
    return extract_adapter(
        (resolve_location(os.fspath(base)), resolve_location(os.fspath(tuned))),
        os.fspath(output),
        storage_of(recipe, chosen.follow_links),
        extract_options(chosen),
        survey_options(chosen),
        survey_on(chosen),
        on_event,
    )


@explains(ReadSettings)
def verify(
    output: Location,
    *,
    inputs: bool = False,
    sample: float | str | None = None,
    seed: int | None = None,
    recipe: RecipeLike | None = None,
    on_event: OnEvent = ignore,
    **settings: Unpack[ReadSettings],
) -> "Verification":
    """Read every published file again and hold it against the manifest.

    Args:
        output: folder or URL of the output.
        inputs: whether to compare the inputs' stamps too.
        sample: merge this share of the tensors, such as ``0.05`` or ``5%``, again from the inputs.
        seed: which tensors a sample takes; others each time if None.
        recipe: its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.
        **settings: see ``ReadSettings``; memory goes with a sample.

    Raises:
        UserError: there is no finished output, or a sample cannot be merged again here.
        StorageError: reading failed after retries.
    """
    from stockflow.verification.verify import verify as verify_output

    chosen = resolved(ReadSettings, settings)
    config = storage_of(recipe, chosen.follow_links)
    options = sample_options(sample, seed, chosen.memory)
    return verify_output(os.fspath(output), config, inputs=inputs, sample=options, on_event=on_event)


def report(
    output: Location, *, recipe: RecipeLike | None = None, on_event: OnEvent = ignore
) -> "Report | AdapterRecord":
    """Return what a finished merge did to the models and how it ran, from its records alone; no weight is read.

    Of an adapter that was made here: what it was made of, and what it keeps of each tensor.

    Args:
        output: folder or URL of the output.
        recipe: its storage options apply (endpoints, anonymous access).
        on_event: told how it goes, from several threads.

    Raises:
        NotFoundError: there is no finished output.
        DamagedOutputError: its manifest or its table of tensors is not what was published.
        StorageError: reading failed after retries.
    """
    from stockflow.adapters.record import find_record
    from stockflow.reports.report import report as report_on

    config = storage_of(recipe)
    on_event(Stage("reading records"))
    if record := find_record(open_store(os.fspath(output), config)):
        return record
    return report_on(os.fspath(output), config, lambda num_bytes: on_event(Moved(num_bytes)))
