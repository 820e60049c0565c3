"""``stockflow diff``."""

import json
from typing import Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    FollowLinks,
    Memory,
    Progress,
    ProgressName,
    Quiet,
    StorageRecipe,
    size_option,
    with_progress,
)
from stockflow.cli.printing import say
from stockflow.errors import EXIT_DIFFERENT


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint: a folder, a URL, or org/name on the hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one; distances are relative to A.")],
    memory: Memory = None,
    recipe: StorageRecipe = None,
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, streamed from anywhere. Exit 0 when they are equal, 1 when not.

    Equal means: the same names, shapes, dtypes and bits. For each tensor: relative distance, cosine, largest
    change, elements that differ, and how many roundings of the dtype they are apart. Order and files do not matter.
    """
    from stockflow import api
    from stockflow.progress.display import DELAY_S

    with exit_codes():
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            found = api.diff(
                a,
                b,
                memory=size_option("--memory", memory),
                recipe=recipe,
                follow_links=follow_links or (),
                on_event=on_event,
            )
        if as_json:
            print(json.dumps(found.facts(), indent=1))
        elif not quiet:
            say(found)
        if not found.is_equal:
            raise typer.Exit(EXIT_DIFFERENT)
