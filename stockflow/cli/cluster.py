"""``stockflow status``: a merge that runs elsewhere."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import AsJson, OutputArgument, StorageRecipe
from stockflow.cli.printing import say, tell
from stockflow.errors import NotFoundError

if TYPE_CHECKING:
    from stockflow.progress.status import Status
    from stockflow.storage import Store

WATCH_S = 10.0
"""as often as a run reports"""
BEGIN_S = 120.0
"""How long --watch waits for a merge that has not claimed its output: a job is queued, starts and plans before."""


def status(
    output: OutputArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until it is over; then exit with the merge's own code, 5 if it died.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = WATCH_S,
    recipe: StorageRecipe = None,
    as_json: AsJson = False,
) -> None:
    """Show how the merge into OUTPUT stands, from what lies there: done, in flight, rate, time left, dead or alive.

    Needs to list and read OUTPUT, nothing else: no cluster, no inputs. The numbers of a running merge are up to ten
    seconds old; those of shards are counted now.
    """
    from stockflow.api import storage_of
    from stockflow.progress.status import exit_code, read_status, status_line, status_lines
    from stockflow.storage import open_store

    with exit_codes():
        store = open_store(output, storage_of(recipe))
        found = _await_begin(store) if watch else read_status(store)
        while watch and not found.is_over:
            say(json.dumps(found.facts()) if as_json else status_line(found), flush=True)
            time.sleep(interval)
            found = read_status(store)
        if as_json:
            print(json.dumps(found.facts(), indent=None if watch else 1))
        else:
            say("\n".join(status_lines(found)))
        if watch and (code := exit_code(found)):
            raise typer.Exit(code)


def _await_begin(store: "Store") -> "Status":
    from stockflow.progress.status import read_status

    deadline, said = time.monotonic() + BEGIN_S, False
    while True:
        try:
            return read_status(store)
        except NotFoundError:
            if time.monotonic() > deadline:
                raise
        if not said:
            tell(f"no merge has begun there; waiting up to {BEGIN_S:.0f} s for one")
            said = True
        time.sleep(1.0)
