"""``stockflow verify`` and ``stockflow clean``."""

import json
from typing import Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    FollowLinks,
    LogFormat,
    LogFormatName,
    LogLevel,
    LogLevelName,
    Memory,
    OutputArgument,
    Progress,
    ProgressName,
    Quiet,
    StorageRecipe,
    share_option,
    size_option,
    with_progress,
)
from stockflow.cli.printing import say
from stockflow.errors import EXIT_FINDINGS, RecipeError


def verify(
    output: OutputArgument,
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
    memory: Memory = None,
    recipe: StorageRecipe = None,
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    log_format: LogFormat = LogFormatName.text,
    log_level: LogLevel = LogLevelName.info,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read every published file again and hold it against the manifest. Exit 4 with one line per finding.

    The output may be anyone's. --inputs and --sample also read the inputs that it names: use them where you
    trust those places. --seed and --memory go with --sample.
    """
    from stockflow import api
    from stockflow.progress.display import DELAY_S

    with exit_codes():
        if sample is None and (seed is not None or memory is not None):
            raise RecipeError("--seed and --memory go with --sample: nothing is computed without it")
        with with_progress(
            progress, quiet=quiet, delay_s=DELAY_S, log_format=log_format, log_level=log_level
        ) as on_event:
            result = api.verify(
                output,
                inputs=inputs,
                sample=share_option("--sample", sample),
                seed=seed,
                memory=size_option("--memory", memory),
                recipe=recipe,
                follow_links=follow_links or (),
                on_event=on_event,
            )
        if as_json:
            print(json.dumps(result.facts(), indent=1))
        elif result.findings or not quiet:
            say(result)
        if result.findings:
            raise typer.Exit(EXIT_FINDINGS)


def clean(
    output: OutputArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False,
    recipe: StorageRecipe = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what killed runs left at OUTPUT: open uploads, temporary files, stale records. --yes removes it.

    Nothing is touched while a run is at work, or was seen less than 15 minutes ago. What is published stays,
    and so do finished shards of an unfinished merge, which the same merge run again goes on with.
    """
    from stockflow.events import Stage
    from stockflow.output.clean import find_leftovers, leftover_facts, leftover_lines, remove
    from stockflow.progress.display import DELAY_S
    from stockflow.recipe import load_recipe
    from stockflow.storage import StorageConfig, open_store

    with exit_codes():
        config = load_recipe(recipe).storage if recipe else StorageConfig()
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            on_event(Stage("looking for what is left over"))
            store = open_store(output, config, writable=True)
            leftovers = find_leftovers(store)
            if yes:
                on_event(Stage("removing it"))
                remove(store, leftovers)
        if as_json:
            print(json.dumps(leftover_facts(leftovers, is_removed=yes), indent=1))
        elif not quiet:
            say("\n".join(leftover_lines(leftovers, is_removed=yes)))
