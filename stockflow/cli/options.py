"""The words that commands share: arguments, options, and what is made of them."""

import os
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockflow.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from stockflow.driver import Execute, Inputs, MergeOptions, Observer
    from stockflow.plan import ShardPlan
    from stockflow.receipts import Receipt
    from stockflow.worker import WorkerSpec


class ExecutorName(StrEnum):
    """Where shards are merged."""

    local = "local"
    ray = "ray"


class DeviceName(StrEnum):
    """What computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML recipe: a file, a URL, or - for standard input.")
]
OutputArgument = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="Folder or URL (s3://, gs://, az://) of the output.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="Bound of one worker process, such as 2GiB. Default: 80 % of what the machine allows."),
]
ShardSize = Annotated[
    str | None,
    typer.Option(help="Largest output shard, such as 5GB. Default: a 256th of the output, from 256 MB to 5 GB."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Local: compute threads (default: one per core). Ray: worker processes."),
]
Executor = Annotated[
    ExecutorName | None,
    typer.Option(help="Where to merge. Default: ray if RAY_ADDRESS is set, else local.", show_default=False),
]
GpusPerWorker = Annotated[float, typer.Option(min=0.0, help="Ray: GPUs per worker; a fraction lets several share one.")]
WorkerTimeout = Annotated[
    float | None,
    typer.Option(min=1.0, metavar="SECONDS", help="Ray: give up if no worker comes within this. Default: 900."),
]
ShardTimeout = Annotated[
    float | None,
    typer.Option(min=1.0, metavar="SECONDS", help="Ray: a shard not done within this goes to another worker."),
]
Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Ray: workers go to nodes with this label; may be repeated."),
]
Device = Annotated[DeviceName, typer.Option(help="auto takes a GPU if torch sees one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output prefix holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def is_on_ray(executor: ExecutorName | None) -> bool:
    """Return whether Ray executes: asked for by name, or by RAY_ADDRESS."""
    return executor is ExecutorName.ray or (executor is None and bool(os.environ.get("RAY_ADDRESS")))


def execute_on(
    executor: ExecutorName | None,
    workers: int | None,
    gpus_per_worker: float,
    *,
    worker_timeout: float | None = None,
    shard_timeout: float | None = None,
    label: Sequence[str] | None = None,
) -> "Execute":
    """Return what merges shards where the options say.

    Raises:
        PlanError: a label is not KEY=VALUE.
    """
    labels = _labels(label or ())
    if not is_on_ray(executor):
        return _in_this_process
    asked: dict[str, Any] = {"num_workers": workers, "gpus_per_worker": gpus_per_worker, "labels": labels}
    if worker_timeout is not None:
        asked["no_worker_timeout_s"] = worker_timeout
    return partial(_on_ray, asked | {"item_timeout_s": shard_timeout})


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise PlanError(f"--label {pair}: expected KEY=VALUE, such as pool=spot")
        labels[name] = value
    return labels


def _in_this_process(spec: "WorkerSpec", shards: "Sequence[ShardPlan]", observer: "Observer") -> "Iterator[Receipt]":
    from stockflow.execution import in_this_process

    return in_this_process(spec, shards, observer)


def _on_ray(
    asked: dict[str, Any], spec: "WorkerSpec", shards: "Sequence[ShardPlan]", observer: "Observer"
) -> "Iterator[Receipt]":
    from stockflow.execution import on_ray
    from stockflow.executors.ray import RayOptions

    return on_ray(spec, shards, observer, RayOptions(**asked))


def open_inputs(recipe: str) -> "Inputs":
    """Return the opened checkpoints of a recipe."""
    from stockflow.driver import Inputs
    from stockflow.recipe import load_recipe

    return Inputs.open(load_recipe(recipe))


def merge_options(
    memory: str | None,
    shard_size: str | None,
    workers: int | None,
    device: DeviceName,
    overwrite: bool,
    *,
    on_ray: bool = False,
) -> "MergeOptions":
    """Return the options of a merge as the driver takes them."""
    from stockflow.budget import default_memory
    from stockflow.driver import MergeOptions

    cores = len(os.sched_getaffinity(0))
    # A Ray worker has one CPU slot, so it computes on one thread and shares the node with the others.
    return MergeOptions(
        memory_bytes=size_option("--memory", memory) or default_memory(num_slots=(workers or cores) if on_ray else 1),
        num_threads=1 if on_ray else workers or cores,
        device=device.value,
        shard_size=size_option("--shard-size", shard_size),
        overwrite=overwrite,
        num_workers=workers if on_ray else None,
    )


def size_option(option: str, text: str | None) -> int | None:
    """Return a size in bytes, or None if none is given; a message about it names the option."""
    from stockflow.recipe import parse_size

    try:
        return None if text is None else parse_size(text)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None
