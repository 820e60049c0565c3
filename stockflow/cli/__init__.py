"""The command line: wiring, printing, exit codes. A command is a function in a module of this folder, listed below."""

import gc
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from stockflow.cli.cluster import status, submit
from stockflow.cli.exits import exit_codes, prepare_streams, say, tell
from stockflow.cli.extracting import extract
from stockflow.cli.looking import audit, clean, diff, inspect, report, verify
from stockflow.cli.mergekit import mergekit_yaml
from stockflow.cli.merging import demo, merge
from stockflow.cli.planning import calibrate, plan
from stockflow.cli.recipes import lint, schema
from stockflow.errors import EXIT_USER
from stockflow.version import __version__

app = typer.Typer(
    help="Exact, streaming merges of checkpoints too large for one machine.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 1 diff: they differ; 2 change recipe, inputs or budget; 3 storage failed, run again; 4 "
    "verify found something; 5 compute was lost; 70 our bug; 130/143 interrupted. A merge that is run again resumes.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        with exit_codes():
            say(f"stockflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _first_sentence(command: Callable[..., None]) -> str:
    return re.split(r"(?<=[.])\s", (command.__doc__ or "").strip(), maxsplit=1)[0]


for command in (
    merge, plan, lint, submit, status, inspect, audit, verify, report, diff, extract, calibrate, clean, demo, schema,
    mergekit_yaml,
):  # fmt: skip
    # Of all that explains a command the first sentence, whole: typer would cut it to a line.
    app.command(command.__name__.replace("_", "-"), short_help=_first_sentence(command))(command)


def main() -> None:
    """Run the command line."""
    # Importing makes some hundred thousand objects that stay; walking them again and again took a fifth of the start.
    gc.set_threshold(200_000, 20, 20)
    prepare_streams()
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # matrices are multiplied on threads of ours; idle ones of numpy spin
    try:
        app()
    except OSError as error:  # of --help; commands have told theirs
        tell(f"stockflow: cannot write to standard output: {error.strerror or error}")
        sys.exit(EXIT_USER)
