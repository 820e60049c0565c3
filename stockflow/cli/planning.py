"""``stockflow plan`` and ``stockflow calibrate``."""

import json
import os
import re
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    AsJson,
    Device,
    DeviceName,
    Executor,
    Memory,
    OutputArgument,
    Overwrite,
    Quiet,
    RecipeArgument,
    ShardSize,
    Workers,
    is_on_ray,
    merge_options,
    open_inputs,
    size_option,
)
from stockflow.errors import RecipeError

if TYPE_CHECKING:
    from stockflow.calibration import Calibration
    from stockflow.prediction import Conditions


class TransferName(StrEnum):
    """Where the machines are, seen from the inputs."""

    same_region = "same-region"
    other_region = "other-region"
    internet = "internet"


CalibrationFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Constants of the model. Default: what `stockflow calibrate` wrote, else built in."
    ),
]
ReadRate = Annotated[
    str | None, typer.Option(help="Network of one worker to the inputs' store, such as 10Gbit/s. Default: calibrated.")
]
WriteRate = Annotated[
    str | None, typer.Option(help="Network of one worker to the output's store, such as 1GB/s. Default: calibrated.")
]
Latency = Annotated[str | None, typer.Option(help="One small request to a store, such as 30ms. Default: calibrated.")]
RequestRate = Annotated[
    float | None, typer.Option(min=1e-3, help="Requests per second the store takes. Default: no limit.")
]
PriceFile = Annotated[
    str | None, typer.Option("--prices", metavar="FILE", help="Table of prices. Default: examples that come with us.")
]
Machine = Annotated[str | None, typer.Option(help="Kind of machine in the table of prices. Default: costs nothing.")]
Transfer = Annotated[TransferName, typer.Option(help="Where the machines are, seen from the inputs.")]


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
    prices: PriceFile = None,
    machine: Machine = None,
    transfer: Transfer = TransferName.same_region,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would read, write, hold, take and cost; refuse what cannot work. Nothing is written.

    Times come from constants that `stockflow calibrate` measures on this machine; docs/planning.md explains the model.
    """
    from stockflow import driver
    from stockflow.calibration import load_calibration
    from stockflow.describe import plan_lines, project
    from stockflow.forecast import cold_share, forecast, forecast_facts, forecast_lines
    from stockflow.prices import load_prices
    from stockflow.workload import survey

    with exit_codes():
        on_ray = is_on_ray(executor)
        constants, table = load_calibration(calibration), load_prices(prices)
        options = merge_options(memory, shard_size, workers, device, overwrite, on_ray=on_ray)
        conditions = _conditions(options.num_threads, workers, on_ray, read_rate, write_rate, latency, request_rate)
        opened = open_inputs(recipe)
        merge_plan, workspace = driver.plan_merge(opened, output, options)
        least = driver.least_memory_of(opened, output, merge_plan, options)
        notes = list(driver.output_notes(opened, output, merge_plan, overwrite=overwrite))
        with driver.collector_paused():
            work = survey(merge_plan, workspace, options.num_threads)
            found = forecast(
                merge_plan,
                work,
                driver.output_url(opened, output),
                conditions.cold(cold_share(merge_plan, opened.stores)),
                direct=workspace.direct,
                calibration=constants,
                prices=table,
                machine=machine,
                transfer=transfer.value,
                memory_bytes=options.memory_bytes,
            )
            if as_json:
                facts = project(merge_plan, workspace, work, least, notes) | {"forecast": forecast_facts(found)}
                print(json.dumps(facts, indent=1))
            elif not quiet:
                print("\n".join(plan_lines(merge_plan, workspace, work, least, notes)))
                print("\n".join(forecast_lines(found)))


def calibrate(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to keep it. Default: your configuration folder.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="On the disk that merges use; 1 GB is written there and removed.")
    ] = Path(),
    url: Annotated[
        list[str] | None, typer.Option(help="Bucket or prefix to measure, too; may be repeated. Written and cleaned.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what `stockflow plan` predicts times from: this machine, its disk, your stores. Takes about a minute.

    Nothing else should run meanwhile. Endpoint and credentials of stores come from the environment. Places measured
    earlier, of the same machine, are kept.
    """
    from stockflow.calibration import default_path
    from stockflow.measuring import calibrate as measure
    from stockflow.storage import redact

    with exit_codes():

        def say(text: str) -> None:
            if not quiet:
                print(text, file=sys.stderr, flush=True)

        found = measure(folder.absolute(), url or [], say)
        path = out or default_path()
        found = _kept(found, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found.to_json())
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}; --out names another file") from None
        if as_json:
            print(found.to_json(), end="")
        elif not quiet:
            for place in found.places:
                print(
                    f"{redact(place.url)}: reads {place.read_rate / 1e9:.2f} GB/s, writes "
                    f"{place.write_rate / 1e9:.2f} GB/s, a small request {place.get_s * 1e3:.2g} ms"
                )
            print(f"written to {path}, where `stockflow plan` finds it" if not out else f"written to {path}")


def _kept(found: "Calibration", path: Path) -> "Calibration":
    """Add the places that an earlier calibration of the same machine measured and this one did not."""
    from stockflow.calibration import parse_calibration

    try:
        earlier = parse_calibration(path.read_bytes(), str(path))
    except (OSError, RecipeError):
        return found
    same = (earlier.machine.name, earlier.machine.cores) == (found.machine.name, found.machine.cores)
    return earlier.with_places(found.places).with_machine(found) if same else found


def _conditions(
    num_threads: int,
    workers: int | None,
    on_ray: bool,
    read_rate: str | None,
    write_rate: str | None,
    latency: str | None,
    request_rate: float | None,
) -> "Conditions":
    from stockflow.prediction import Conditions

    cores = len(os.sched_getaffinity(0))
    return Conditions(
        num_workers=(workers or cores) if on_ray else 1,
        num_threads=num_threads,
        cores_per_worker=float(num_threads) if on_ray else float(cores),
        read_rate=_rate("--read-rate", read_rate),
        write_rate=_rate("--write-rate", write_rate),
        request_s=_seconds("--latency", latency),
        request_rate=request_rate,
        on_ray=on_ray,
    )


_BITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _rate(option: str, text: str | None) -> float | None:
    """Return bytes per second from ``10Gbit/s`` or ``1.25GB/s``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([kMGT])bit/s", text.strip())
    with suppress(RecipeError):
        found = float(match[1]) * _BITS[match[2]] / 8 if match else size_option(option, text.strip().removesuffix("/s"))
        if found and text.strip().endswith("/s"):
            return float(found)
    raise RecipeError(f"{option}: expected a rate such as 10Gbit/s or 1.25GB/s, found {text!r}")


def _seconds(option: str, text: str | None) -> float | None:
    """Return seconds from ``30ms`` or ``0.03s``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?(ms|s)", text.strip())
    if not match:
        raise RecipeError(f"{option}: expected a time such as 30ms or 0.03s, found {text!r}")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)
