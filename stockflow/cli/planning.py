"""``stockflow plan`` and ``stockflow calibrate``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from stockflow.cli.options import Answer, OutputArgument, RecipeArgument, Told, check_order, command, facts_of
from stockflow.errors import RecipeError
from stockflow.settings import MergeSettings, PlanSettings, as_words

if TYPE_CHECKING:
    from stockflow.forecast.constants import Calibration


@command(PlanSettings)
def plan(recipe: RecipeArgument, output: OutputArgument, told: Told, **settings: Unpack[PlanSettings]) -> Answer:
    """Show what a merge would read, write, hold, take and cost; refuse what cannot work. Nothing is written.

    Times come from what `stockflow calibrate` measures on this machine, by the formulas of docs/insight.md#the-model.
    """
    from stockflow import api
    from stockflow.text.redaction import command_line

    check_order(recipe, output)
    result = api.plan(recipe, output, on_event=told.on_event, **settings)
    words = ("stockflow", "merge", recipe, output, *as_words(settings, MergeSettings))
    return Answer(lambda: f"{result}\nnext: {command_line(*words)}", facts_of(result))


@command(delays=False, resumes=True)
def calibrate(
    told: Told,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to keep it. Default: your configuration folder.")
    ] = None,
    folder: Annotated[
        str, typer.Option(help="On the disk that merges use; up to 1 GB at a time is written there and removed.")
    ] = ".",
    url: Annotated[
        list[str] | None, typer.Option(help="Bucket or prefix to measure, too; may be repeated. Written and cleaned.")
    ] = None,
) -> Answer:
    """Measure what `stockflow plan` predicts times from: this machine, its disk, your stores. Takes about a minute.

    Nothing else should run meanwhile. Endpoint and credentials of stores come from the environment. Places measured
    earlier, of the same machine, are kept.
    """
    from stockflow.events import Stage
    from stockflow.forecast.calibrate import calibrate as measure
    from stockflow.forecast.constants import default_path
    from stockflow.storage import local_path

    path = local_path(out) if out else default_path()
    measured = measure(local_path(folder), url or [], lambda text: told.on_event(Stage(text)))
    found = _kept(measured, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_json())
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}; --out names another file") from None
    where = f"written to {path}" if out else f"written to {path}, where `stockflow plan` finds it"
    return Answer(lambda: f"{_in_words(found)}\n{where}", lambda: (found.to_json(),))


def _in_words(found: "Calibration") -> str:
    from stockflow.storage import redact

    places = (
        f"{redact(place.url)}: reads {place.read_rate / 1e9:.2f} GB/s, writes {place.write_rate / 1e9:.2f} GB/s, "
        f"a small request {place.latency_s * 1e3:.2g} ms"
        for place in found.places
    )
    return "\n".join((*places, f"note: {found.note}"))


def _kept(found: "Calibration", path: Path) -> "Calibration":
    """Add the places that an earlier calibration of the same machine measured and this one did not."""
    from stockflow.forecast.constants import parse_calibration

    try:
        earlier = parse_calibration(path.read_bytes(), str(path))
    except (OSError, RecipeError):
        return found
    same = (earlier.machine.name, earlier.machine.cores) == (found.machine.name, found.machine.cores)
    return replace(found, places=earlier.with_places(found.places).places) if same else found
