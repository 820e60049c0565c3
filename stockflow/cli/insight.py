"""``stockflow inspect`` and ``stockflow audit``."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    ExecutorName,
    FollowLinks,
    GpusPerWorker,
    Memory,
    Progress,
    ProgressName,
    Quiet,
    RecipeArgument,
    StorageRecipe,
    Workers,
    size_option,
    with_progress,
)
from stockflow.cli.printing import say

if TYPE_CHECKING:
    from stockflow.insight.inspection import SurveyOptions
    from stockflow.storage import StorageConfig, Store

Out = Annotated[
    str | None,
    typer.Option("--out", metavar="DIR", help="Folder or URL that gets every tensor's row, as Parquet and as JSON."),
]


def inspect(
    recipe: RecipeArgument,
    out: Out = None,
    memory: Memory = None,
    workers: Workers = None,
    executor: Executor = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    device: Device = DeviceName.auto,
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show the geometry of RECIPE's models: cosines, norms, angles and ratios of every tensor. Nothing is merged.

    Reads every input once. The ratio t of Model Stock is given as the paper has it, and as other tools compute it.
    """
    from stockflow import api
    from stockflow.events import Stage
    from stockflow.insight import inspection as inspecting
    from stockflow.insight.inspection_lines import inspection_lines
    from stockflow.interruption import interruptible
    from stockflow.progress.display import DELAY_S
    from stockflow.storage import redact

    with exit_codes():
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event, interruptible():
            survey = api.survey_on(executor.value if executor else None, workers, gpus_per_worker)
            inputs = api.open_inputs(recipe, on_event, follow_links or ())
            folder = open_out(out, inputs.storage)
            options = _options(memory, workers, executor, device)
            found = inspecting.inspect(inputs, options, survey, on_event)
            if folder is not None:
                from stockflow.output.tables import INSPECTION_SCHEMA, encode_rows

                on_event(Stage("publishing"))
                table = encode_rows(found.rows(), INSPECTION_SCHEMA)
                publish(folder, "inspect", table, inspecting.json_parts(found))
        if as_json:
            sys.stdout.writelines(inspecting.json_parts(found))
        elif not quiet:
            say("\n".join(inspection_lines(found)))
            if out is not None:
                say(f"rows of every tensor: {redact(out)}/inspect.parquet and inspect.json")
            say(f"next: stockflow plan {redact(recipe)} OUTPUT says what the merge would take")


def audit(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|OUTPUT", help="Recipe of a merge; or an output of stockflow, which says itself what it is."
        ),
    ],
    merged: Annotated[
        str | None, typer.Argument(metavar="[MERGED]", help="Checkpoint that some tool made by the recipe.")
    ] = None,
    out: Out = None,
    recipe: StorageRecipe = None,
    memory: Memory = None,
    workers: Workers = None,
    executor: Executor = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    device: Device = DeviceName.auto,
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell which formula made a Model Stock merge, how far it is from the correct one, and whether to merge again.

    RECIPE alone: what the formula that mergekit first had would have done to these models. RECIPE MERGED: the merge
    that is there, tensor by tensor, whoever made it. OUTPUT: one of stockflow's own.
    """
    from stockflow import api
    from stockflow.events import Stage
    from stockflow.insight import audit as auditing
    from stockflow.insight.audit_lines import audit_lines
    from stockflow.interruption import interruptible
    from stockflow.progress.display import DELAY_S
    from stockflow.storage import redact

    with exit_codes():
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event, interruptible():
            survey = api.survey_on(executor.value if executor else None, workers, gpus_per_worker)
            merge = api.open_merge(subject, merged, recipe, on_event, follow_links or ())
            folder = open_out(out, merge.storage)
            found = auditing.audit(merge, _options(memory, workers, executor, device), survey, on_event)
            if folder is not None:
                from stockflow.output.tables import AUDIT_SCHEMA, encode_rows

                on_event(Stage("publishing"))
                table = encode_rows(found.rows, AUDIT_SCHEMA)
                publish(folder, "audit", table, auditing.json_parts(found))
        if as_json:
            sys.stdout.writelines(auditing.json_parts(found))
        elif not quiet:
            say("\n".join(audit_lines(found)))
            if out is not None:
                say(f"rows of every tensor: {redact(out)}/audit.parquet and audit.json")
            if merge.merged and found.verdict.answer == "yes":
                say(f"next: stockflow merge {redact(subject) if merged else 'RECIPE'} OUTPUT")


def open_out(out: str | None, config: "StorageConfig") -> "Store | None":
    """Return the place that rows go to, tried with a small object before an hour of reading is spent on them.

    Raises:
        UserError: it cannot be written to.
        StorageError: it does not answer.
    """
    if out is None:
        return None
    from stockflow.storage import open_store

    store = open_store(out, config, writable=True)
    probe = f".stockflow-{uuid4().hex}"
    store.put(probe, b"may rows be written here?\n")
    store.delete([probe])
    return store


def publish(store: "Store", name: str, table: bytes, parts: Iterable[str]) -> None:
    """Write rows as Parquet and as JSON into a folder."""
    store.put(f"{name}.parquet", table)
    with store.create(f"{name}.json") as sink:
        for part in parts:
            sink.write(part.encode())


def _options(
    memory: str | None, workers: int | None, executor: ExecutorName | None, device: DeviceName
) -> "SurveyOptions":
    from stockflow import api

    return api.survey_options(
        size_option("--memory", memory), workers, executor.value if executor else None, device.value
    )
