"""``stockflow merge`` and ``stockflow demo``."""

import json
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from stockflow.cli.exits import say
from stockflow.cli.options import (
    Answer,
    Logging,
    OutputArgument,
    RecipeArgument,
    Serving,
    Told,
    check_order,
    command,
    facts_of,
)
from stockflow.settings import MergeSettings

if TYPE_CHECKING:
    from stockflow.recipe import RecipeLike


@command(MergeSettings, Logging, Serving, delays=False, resumes=True)
def merge(recipe: RecipeArgument, output: OutputArgument, told: Told, **settings: Unpack[MergeSettings]) -> Answer:
    """Merge checkpoints as RECIPE says and publish the result at OUTPUT.

    Running the same command again resumes: shards that are there already are kept. The output is complete
    when OUTPUT/manifest.json exists; `stockflow verify` checks every byte of it.
    """
    check_order(recipe, output)
    return merged(recipe, output, told, settings)


def merged(recipe: "RecipeLike", output: str, told: Told, settings: MergeSettings) -> Answer:
    """Merge, and return what to print."""
    from stockflow import api

    result = api.merge(recipe, output, on_event=told.on_event, **settings)
    return Answer(lambda: result, facts_of(result), is_kept=True)


@command(
    MergeSettings,
    without=(
        "follow_links",
        "strict",
        "verify_inputs",
        "allow_unmerged",
        "random_seed",
        "gpus_per_worker",
        "labels",
        "worker_timeout",
        "shard_timeout",
    ),
    defaults={"shard_size": "2MB"},
    delays=False,
    tells_itself=True,
)
def demo(
    told: Told,
    folder: Annotated[str | None, typer.Argument(help="Where to work. Default: a new temporary folder.")] = None,
    **settings: Unpack[MergeSettings],
) -> Answer:
    """Train small language models, merge them with Model Stock, verify, and compare: two minutes, no network."""
    import subprocess
    import tempfile

    from stockflow.errors import OutputConflictError
    from stockflow.extras import needs_torch
    from stockflow.settings import resolved
    from stockflow.storage import local_path
    from stockflow.text.redaction import command_line
    from stockflow.wiring import execute_on, options_of

    with needs_torch("stockflow demo"):
        from stockflow.demo.story import demo_tables, run_demo
    where = local_path(folder or tempfile.mkdtemp(prefix="stockflow-demo-"))
    if where.exists() and not (where.is_dir() and (settings["overwrite"] or not any(where.iterdir()))):
        raise OutputConflictError(f"{where} is not an empty folder; name a new one for the demo, or --overwrite")
    where.mkdir(parents=True, exist_ok=True)
    chosen = resolved(MergeSettings, settings)
    # What cannot be is refused before a minute of training.
    options_of(chosen, chosen.workers)
    execute_on(chosen)
    try:
        result = run_demo(where, settings, say if told.speaks else lambda _: None, told.on_event)
    except subprocess.CalledProcessError as error:
        raise typer.Exit(error.returncode) from None
    facts = {"losses": result.losses, "folder": str(where), "seconds": result.seconds}
    return Answer(
        lambda: (
            f"\n{demo_tables(result)}\n\n{result.seconds:.0f} s; everything is in {where}\n"
            f"next: {command_line('stockflow', 'inspect', str(where / 'model-stock.yaml'))}"
        ),
        lambda: (json.dumps(facts, indent=1), "\n"),
    )
