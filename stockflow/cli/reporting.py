"""``stockflow report``."""

import json
from typing import Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import AsJson, OutputArgument, Progress, ProgressName, Quiet, StorageRecipe, with_progress
from stockflow.cli.printing import say, tell
from stockflow.errors import EXIT_FINDINGS


def report(
    output: OutputArgument,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the report as one web page that needs nothing else: a file or a URL."),
    ] = None,
    recipe: StorageRecipe = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a finished merge did to the models and how it ran, from its records alone; no weight is read.

    Ratios and cosines by kind and layer, cosines between the models, tensors worth a look, time, throughput, memory,
    retries.
    Exit 4 if a record is damaged: the report is made without it where that is possible.
    """
    from stockflow import api
    from stockflow.progress.display import DELAY_S
    from stockflow.storage import redact

    with exit_codes():
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            found = api.report(output, recipe=recipe, on_event=on_event)
            if html is not None:
                found.save(html)
        if as_json:
            print(json.dumps(found.facts(), indent=1))
        elif html is None and not quiet:
            say(found)
        elif not quiet:
            say(f"report: {redact(html or '')}")
        if found.findings:
            for finding in found.findings:
                tell(f"stockflow: {finding}")
            raise typer.Exit(EXIT_FINDINGS)
