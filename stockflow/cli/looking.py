"""Commands that look at models and outputs: inspect, audit, diff, report, verify; and clean, which also removes."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Unpack
from uuid import uuid4

import typer

from stockflow.cli.options import (
    Answer,
    Logging,
    OutputArgument,
    RecipeArgument,
    StorageRecipe,
    Told,
    command,
    facts_of,
)
from stockflow.errors import EXIT_DIFFERENT, EXIT_FINDINGS, RecipeError
from stockflow.settings import DiffSettings, ReadSettings, SurveySettings

if TYPE_CHECKING:
    from stockflow.storage import StorageConfig, Store

Out = Annotated[
    str | None,
    typer.Option("--out", metavar="DIR", help="Folder or URL that gets every tensor's row, as Parquet and as JSON."),
]


@command(SurveySettings, resumes=True)
def inspect(recipe: RecipeArgument, told: Told, out: Out = None, **settings: Unpack[SurveySettings]) -> Answer:
    """Show the geometry of RECIPE's models: cosines, norms, angles and ratios of every tensor. Nothing is merged.

    Reads every input once. The ratio t of Model Stock is given as the paper has it, and as other tools compute it.
    """
    from stockflow import wiring
    from stockflow.insight import surveys
    from stockflow.insight.inspection import json_parts
    from stockflow.settings import resolved
    from stockflow.text.redaction import command_line

    chosen = resolved(SurveySettings, settings)
    survey = wiring.survey_on(chosen)
    inputs = wiring.open_inputs(recipe, told.on_event, chosen.follow_links)
    folder = open_out(out, inputs.storage)
    found = surveys.inspect(inputs, wiring.survey_options(chosen), survey, told.on_event)
    if folder is not None:
        from stockflow.output.survey_tables import INSPECTION_SCHEMA, encode_rows

        _publish(folder, "inspect", encode_rows(found.rows(), INSPECTION_SCHEMA), json_parts(found), told)
    next_one = f"next: {command_line('stockflow', 'plan', recipe)} OUTPUT  # says what the merge would take"
    return Answer(
        lambda: "\n".join((str(found), *_where_rows_are(out, "inspect"), next_one)), lambda: json_parts(found)
    )


@command(SurveySettings, resumes=True)
def audit(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|OUTPUT", help="Recipe of a merge; or an output of stockflow, which says itself what it is."
        ),
    ],
    told: Told,
    merged: Annotated[
        str | None, typer.Argument(metavar="[MERGED]", help="Checkpoint that some tool made by the recipe.")
    ] = None,
    out: Out = None,
    recipe: StorageRecipe = None,
    **settings: Unpack[SurveySettings],
) -> Answer:
    """Tell which formula made a Model Stock merge, how far it is from the correct one, and whether to merge again.

    RECIPE alone: what the formula that mergekit first had would have done to these models. RECIPE MERGED: the merge
    that is there, tensor by tensor, whoever made it. OUTPUT: one of stockflow's own.
    """
    from stockflow import wiring
    from stockflow.insight import audit as auditing
    from stockflow.insight.verdict import json_parts
    from stockflow.settings import resolved
    from stockflow.text.redaction import command_line

    chosen = resolved(SurveySettings, settings)
    survey = wiring.survey_on(chosen)
    merge = wiring.open_merge(subject, merged, recipe, told.on_event, chosen.follow_links)
    folder = open_out(out, merge.storage)
    found = auditing.audit(merge, wiring.survey_options(chosen), survey, told.on_event)
    if folder is not None:
        from stockflow.output.survey_tables import AUDIT_SCHEMA, encode_rows

        _publish(folder, "audit", encode_rows(found.rows, AUDIT_SCHEMA), json_parts(found), told)
    again = merge.merged and found.verdict.answer == "yes"
    words = f"next: {command_line('stockflow', 'merge', subject if merged else 'RECIPE')} OUTPUT"
    return Answer(
        lambda: "\n".join((str(found), *_where_rows_are(out, "audit"), *([words] if again else []))),
        lambda: json_parts(found),
    )


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


def _publish(store: "Store", name: str, table: bytes, parts: Iterable[str], told: Told) -> None:
    from stockflow.events import Stage

    told.on_event(Stage("publishing"))
    publish(store, name, table, parts)


def publish(store: "Store", name: str, table: bytes, parts: Iterable[str]) -> None:
    """Write rows as Parquet and as JSON into a folder."""
    store.put(f"{name}.parquet", table)
    with store.create(f"{name}.json") as sink:
        for part in parts:
            sink.write(part.encode())


def _where_rows_are(out: str | None, name: str) -> Iterable[str]:
    from stockflow.storage import redact

    if out is not None:
        yield f"rows of every tensor: {redact(out)}/{name}.parquet and {name}.json"


@command(DiffSettings)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint: a folder, a URL, or org/name on the hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one; distances are relative to A.")],
    told: Told,
    recipe: StorageRecipe = None,
    **settings: Unpack[DiffSettings],
) -> Answer:
    """Compare two checkpoints tensor by tensor, streamed from anywhere. Exit 0 when they are equal, 1 when not.

    Equal means: the same names, shapes, dtypes and bits. For each tensor: relative distance, cosine, largest
    change, elements that differ, and how many roundings of the dtype they are apart. Order and files do not matter.
    """
    from stockflow import api

    found = api.diff(a, b, recipe=recipe, on_event=told.on_event, **settings)
    return Answer(lambda: found, facts_of(found), 0 if found.is_equal else EXIT_DIFFERENT)


@command()
def report(
    output: OutputArgument,
    told: Told,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the report as one web page that needs nothing else: a file or a URL."),
    ] = None,
    recipe: StorageRecipe = None,
) -> Answer:
    """Show what a finished merge did to the models and how it ran, from its records alone; no weight is read.

    Ratios and cosines by kind and layer, cosines between the models, tensors worth a look, time, throughput, memory,
    retries.
    Exit 4 if a record is damaged: the report is made without it where that is possible.
    """
    from stockflow import api
    from stockflow.storage import redact

    found = api.report(output, recipe=recipe, on_event=told.on_event)
    if html is not None:
        found.save(html)
    findings = [f"stockflow: {finding}" for finding in found.findings]
    words = (lambda: found) if html is None else (lambda: f"report: {redact(html)}")
    return Answer(words, facts_of(found), EXIT_FINDINGS if findings else 0, asides=findings)


@command(ReadSettings, Logging)
def verify(
    output: OutputArgument,
    told: Told,
    inputs: Annotated[bool, typer.Option("--inputs", help="Compare the inputs' stamps too.")] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Merge this share of the tensors, such as 5% or 0.05, again from the inputs: statistics must agree "
            "within 1e-7, and what the recorded coefficients give must be the published bytes.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which tensors a sample takes. Default: others each time; it is printed.")
    ] = None,
    recipe: StorageRecipe = None,
    **settings: Unpack[ReadSettings],
) -> Answer:
    """Read every published file again and hold it against the manifest. Exit 4 with one line per finding.

    The output may be anyone's. --inputs and --sample also read the inputs that it names: use them where you
    trust those places. --seed and --memory go with --sample.
    """
    from stockflow import api
    from stockflow.verification.sample import parse_share

    if sample is None and (seed is not None or settings["memory"] is not None):
        raise RecipeError("--seed and --memory go with --sample: nothing is computed without it")
    try:
        share = None if sample is None else parse_share(sample)
    except RecipeError as error:
        raise RecipeError(f"--sample: {error}") from None
    result = api.verify(
        output, inputs=inputs, sample=share, seed=seed, recipe=recipe, on_event=told.on_event, **settings
    )
    has_findings = bool(result.findings)
    return Answer(lambda: result, facts_of(result), EXIT_FINDINGS if has_findings else 0, insists=has_findings)


@command()
def clean(
    output: OutputArgument,
    told: Told,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False,
    recipe: StorageRecipe = None,
) -> Answer:
    """Show what killed runs left at OUTPUT: open uploads, temporary files, stale records. --yes removes it.

    Nothing is touched while a run is at work, or was seen less than 15 minutes ago. What is published stays,
    and so do finished shards of an unfinished merge, which the same merge run again goes on with.
    """
    from stockflow.events import Stage
    from stockflow.output.clean import find_leftovers, leftover_facts, leftover_lines, remove
    from stockflow.storage import open_store
    from stockflow.wiring import storage_of

    config = storage_of(recipe)
    told.on_event(Stage("looking for what is left over"))
    store = open_store(output, config, writable=True)
    leftovers = find_leftovers(store)
    if yes:
        told.on_event(Stage("removing it"))
        remove(store, leftovers)
    return Answer(
        lambda: "\n".join(leftover_lines(leftovers, is_removed=yes)),
        lambda: (json.dumps(leftover_facts(leftovers, is_removed=yes), indent=1), "\n"),
    )
