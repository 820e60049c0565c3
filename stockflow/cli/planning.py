"""``stockflow plan`` and ``stockflow calibrate``."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    FollowLinks,
    Memory,
    OutputArgument,
    Overwrite,
    Progress,
    ProgressName,
    Quiet,
    RecipeArgument,
    ShardSize,
    Workers,
    size_option,
    with_progress,
)
from stockflow.cli.printing import say
from stockflow.errors import RecipeError

if TYPE_CHECKING:
    from stockflow.forecast.constants import Calibration


CalibrationFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Constants of the model. Default: what `stockflow calibrate` wrote, else built in."
    ),
]
ReadRate = Annotated[
    str | None,
    typer.Option(help="Of one worker from the inputs' store or disk, such as 10Gbit/s. Default: calibrated."),
]
WriteRate = Annotated[
    str | None, typer.Option(help="Network of one worker to the output's store, such as 1GB/s. Default: calibrated.")
]
Latency = Annotated[str | None, typer.Option(help="One small request to a store, such as 30ms. Default: calibrated.")]
RequestRate = Annotated[
    float | None, typer.Option(min=1e-3, help="Requests per second the store takes. Default: no limit.")
]
MachinePrice = Annotated[
    float | None,
    typer.Option(min=0.0, help="What one machine costs per hour, in any currency. Default: no cost is told."),
]


def plan(
    recipe: RecipeArgument,
    output: OutputArgument,
    memory: Memory = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    executor: Executor = None,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    read_rate: ReadRate = None,
    write_rate: WriteRate = None,
    latency: Latency = None,
    request_rate: RequestRate = None,
    calibration: CalibrationFile = None,
    machine_price: MachinePrice = None,
    follow_links: FollowLinks = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would read, write, hold, take and cost; refuse what cannot work. Nothing is written.

    Times come from what `stockflow calibrate` measures on this machine, by the formulas of docs/insight.md#the-model.
    """
    from stockflow import api
    from stockflow.progress.display import DELAY_S
    from stockflow.storage import redact

    with exit_codes():
        with with_progress(progress, quiet=quiet, delay_s=DELAY_S) as on_event:
            result = api.plan(
                recipe,
                output,
                memory=size_option("--memory", memory),
                shard_size=size_option("--shard-size", shard_size),
                workers=workers,
                executor=executor.value if executor else None,
                device=device.value,
                overwrite=overwrite,
                read_rate=api.rate("--read-rate", read_rate),
                write_rate=api.rate("--write-rate", write_rate),
                latency=api.seconds("--latency", latency),
                request_rate=request_rate,
                calibration=calibration,
                machine_price=machine_price,
                follow_links=follow_links or (),
                on_event=on_event,
            )
        if as_json:
            print(json.dumps(result.facts(), indent=1))
        elif not quiet:
            say(result)
            given = _given(memory, shard_size, workers, executor, device, follow_links)
            say(f"next: stockflow merge {redact(recipe)} {redact(output)}{given}{' --overwrite' * overwrite}")


def _given(
    memory: Memory, shard_size: ShardSize, workers: Workers, executor: Executor, device: Device, links: FollowLinks
) -> str:
    """Return the options that a merge must be told, too."""
    options = {
        "--memory": memory,
        "--shard-size": shard_size,
        "--workers": workers,
        "--executor": executor and executor.value,
        "--device": device.value if device is not DeviceName.auto else None,
    }
    given = [f" {name} {value}" for name, value in options.items() if value is not None]
    return "".join((*given, *(f" --follow-links {shlex.quote(folder)}" for folder in links or ())))


def calibrate(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to keep it. Default: your configuration folder.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="On the disk that merges use; up to 1 GB at a time is written there and removed.")
    ] = Path(),
    url: Annotated[
        list[str] | None, typer.Option(help="Bucket or prefix to measure, too; may be repeated. Written and cleaned.")
    ] = None,
    progress: Progress = ProgressName.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what `stockflow plan` predicts times from: this machine, its disk, your stores. Takes about a minute.

    Nothing else should run meanwhile. Endpoint and credentials of stores come from the environment. Places measured
    earlier, of the same machine, are kept.
    """
    from stockflow.events import Stage
    from stockflow.forecast.calibrate import calibrate as measure
    from stockflow.forecast.constants import default_path
    from stockflow.storage import redact

    with exit_codes():
        with with_progress(progress, quiet=quiet) as on_event:
            found = measure(folder.absolute(), url or [], lambda text: on_event(Stage(text)))
        path = out or default_path()
        found = _kept(found, path)
        _keep(found, path)
        if as_json:
            print(found.to_json(), end="")
        elif not quiet:
            for place in found.places:
                say(
                    f"{redact(place.url)}: reads {place.read_rate / 1e9:.2f} GB/s, writes "
                    f"{place.write_rate / 1e9:.2f} GB/s, a small request {place.latency_s * 1e3:.2g} ms"
                )
            say(f"note: {found.note}")
            say(f"written to {path}, where `stockflow plan` finds it" if not out else f"written to {path}")


def _keep(found: "Calibration", path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_json())
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}; --out names another file") from None


def _kept(found: "Calibration", path: Path) -> "Calibration":
    """Add the places that an earlier calibration of the same machine measured and this one did not."""
    from stockflow.forecast.constants import parse_calibration

    try:
        earlier = parse_calibration(path.read_bytes(), str(path))
    except (OSError, RecipeError):
        return found
    same = (earlier.machine.name, earlier.machine.cores) == (found.machine.name, found.machine.cores)
    if not same:
        return found
    return replace(found, places=earlier.with_places(found.places).places)
