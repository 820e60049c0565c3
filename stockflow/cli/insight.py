"""``stockflow inspect`` and ``stockflow audit``."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    GpusPerWorker,
    Memory,
    Progress,
    ProgressName,
    Quiet,
    RecipeArgument,
    Workers,
    followed,
    is_on_ray,
    merge_options,
    open_inputs,
)

if TYPE_CHECKING:
    from stockflow.cli.options import ExecutorName
    from stockflow.events import OnEvent
    from stockflow.insight.inspection import Survey, SurveyOptions
    from stockflow.plan import TensorJob
    from stockflow.storage import StorageConfig
    from stockflow.survey import SurveySpec

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
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show the geometry of RECIPE's models: cosines, norms, angles and ratios of every tensor. Nothing is merged.

    Reads every input once. The ratio t of Model Stock is given as the paper has it, and as other tools compute it.
    """
    from stockflow.insight import inspection as inspecting
    from stockflow.insight.inspection_lines import inspection_lines
    from stockflow.interruption import interruptible
    from stockflow.reporting import DELAY_S

    with exit_codes():
        with interruptible(), followed(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            survey, on_read = survey_on(executor, workers, gpus_per_worker, on_event), _reading(on_event)
            inputs = open_inputs(recipe)
            options = survey_options(memory, workers, executor, device)
            found = inspecting.inspect(inputs, options, survey, on_read)
        if out is not None:
            from stockflow.tables import INSPECTION_SCHEMA, encode_rows

            table = encode_rows(found.rows(), INSPECTION_SCHEMA)
            publish(out, inputs.recipe.storage, "inspect", table, inspecting.json_parts(found))
        if as_json:
            sys.stdout.writelines(inspecting.json_parts(found))
        elif not quiet:
            print("\n".join(inspection_lines(found)))
            if out is not None:
                print(f"rows of every tensor: {out}/inspect.parquet and inspect.json")


def audit(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|OUTPUT", help="Recipe of a merge; or an output of stockflow, which says itself what it is."
        ),
    ],
    merged: Annotated[
        str | None, typer.Argument(metavar="[MERGED]", help="Checkpoint that some tool made by the recipe.")
    ] = None,
    out: Out = None,
    memory: Memory = None,
    workers: Workers = None,
    executor: Executor = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    device: Device = DeviceName.auto,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell which formula made a Model Stock merge, how far it is from the correct one, and whether to merge again.

    RECIPE alone: what the formula that mergekit first had would have done to these models. RECIPE MERGED: the merge
    that is there, tensor by tensor, whoever made it. OUTPUT: one of stockflow's own.
    """
    from stockflow.insight import audit as auditing
    from stockflow.insight.audit_lines import audit_lines
    from stockflow.interruption import interruptible
    from stockflow.reporting import DELAY_S
    from stockflow.storage import StorageConfig

    with exit_codes():
        with interruptible(), followed(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            survey, on_read = survey_on(executor, workers, gpus_per_worker, on_event), _reading(on_event)
            if merged is None and _is_output(recipe):
                merge = auditing.open_output(recipe, StorageConfig())
            else:
                merge = auditing.open_recipe(open_inputs(recipe), merged)
            found = auditing.audit(merge, survey_options(memory, workers, executor, device), survey, on_read)
        if out is not None:
            from stockflow.tables import AUDIT_SCHEMA, encode_rows

            table = encode_rows(found.rows, AUDIT_SCHEMA)
            publish(out, merge.storage, "audit", table, auditing.json_parts(found))
        if as_json:
            sys.stdout.writelines(auditing.json_parts(found))
        elif not quiet:
            print("\n".join(audit_lines(found)))
            if out is not None:
                print(f"rows of every tensor: {out}/audit.parquet and audit.json")


def _is_output(location: str) -> bool:
    """Whether a location is a folder rather than a recipe."""
    return os.path.isdir(location) or ("://" in location and not location.endswith((".yaml", ".yml", ".json")))


def publish(out: str, config: "StorageConfig", name: str, table: bytes, parts: Iterable[str]) -> None:
    """Write rows as Parquet and as JSON into a folder."""
    from stockflow.storage import open_store

    store = open_store(out, config, writable=True)
    store.put(f"{name}.parquet", table)
    with store.create(f"{name}.json") as sink:
        for part in parts:
            sink.write(part.encode())


def survey_options(
    memory: str | None, workers: int | None, executor: "ExecutorName | None", device: DeviceName
) -> "SurveyOptions":
    """Return what a survey may use."""
    from stockflow.insight.inspection import SurveyOptions

    options = merge_options(memory, None, workers, device, False, on_ray=is_on_ray(executor))
    return SurveyOptions(options.memory_bytes, options.num_threads, options.device)


def _reading(on_event: "OnEvent") -> Callable[[int], None]:
    """Tell of bytes that were read."""
    from stockflow.events import Moved, Stage

    on_event(Stage("reading the inputs"))
    return lambda num_bytes: on_event(Moved(num_bytes))


def survey_on(
    executor: "ExecutorName | None", workers: int | None, gpus_per_worker: float, on_event: "OnEvent"
) -> "Survey":
    """Return what looks at tensors where the options say."""
    if not is_on_ray(executor):
        return _in_this_process
    from stockflow.events import Note

    return partial(_on_ray, workers, gpus_per_worker, lambda text: on_event(Note(text)))


def _in_this_process(
    spec: "SurveySpec", jobs: "Sequence[TensorJob]", on_read: Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    from stockflow.execution import survey_in_this_process

    return survey_in_this_process(spec, jobs, on_read)


def _on_ray(
    workers: int | None,
    gpus_per_worker: float,
    on_note: Callable[[str], None],
    spec: "SurveySpec",
    jobs: "Sequence[TensorJob]",
    on_read: Callable[[int], None],
) -> Iterator[tuple[int, Any]]:
    from stockflow.execution import survey_on_ray
    from stockflow.executors.ray import RayOptions

    options = RayOptions(num_workers=workers, gpus_per_worker=gpus_per_worker)
    return survey_on_ray(spec, jobs, on_read, on_note, options)
