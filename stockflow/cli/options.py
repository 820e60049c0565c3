"""The words that commands share: arguments, options, and what is made of them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.errors import EXIT_BUG, PlanError, RecipeError, UserError

if TYPE_CHECKING:
    from stockflow.events import OnEvent
    from stockflow.run.driver import MergeOptions


class ExecutorName(StrEnum):
    """Where shards are merged."""

    local = "local"
    ray = "ray"


class ProgressName(StrEnum):
    """How progress is shown."""

    auto = "auto"
    plain = "plain"
    rich = "rich"
    lanes = "lanes"
    json = "json"
    none = "none"


class LogFormatName(StrEnum):
    """How lines on standard error are written."""

    text = "text"
    json = "json"


class LogLevelName(StrEnum):
    """What is said at least."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


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
    typer.Option(
        help="Bound of one worker process, such as 2GiB. Default: 80 % of what the machine allows. Ray: of what the "
        "driver's machine allows, divided by its cores or by --workers, if fewer; say it where nodes are others."
    ),
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
Device = Annotated[DeviceName, typer.Option(help="auto takes a GPU if torch is installed and sees one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output prefix holds.")]
StorageRecipe = Annotated[
    str | None, typer.Option("--recipe", help="Recipe whose storage options apply (endpoints, anonymous access).")
]
FollowLinks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR",
        help="Folder that links of weights may lead into; may be repeated. Otherwise links are followed inside a "
        "checkpoint's folder and in the hub's cache.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Progress = Annotated[
    ProgressName,
    typer.Option(
        help="On standard error. auto: rich on a terminal, else plain lines; lanes: rich with a line per worker; "
        "json: one object per line, for programs."
    ),
]
LogFormat = Annotated[
    LogFormatName,
    typer.Option(
        help="json: everything on standard error is one JSON object per line, with time, level, message and the ids of "
        "run, plan, shard and worker."
    ),
]
LogLevel = Annotated[
    LogLevelName, typer.Option(help="Least level of lines: debug tells of each shard, warning of what goes wrong.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        metavar="PORT",
        help="Serve Prometheus metrics at /metrics while it runs; 0 takes a port that is free and says which.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@contextmanager
def with_progress(
    progress: ProgressName,
    *,
    quiet: bool,
    delay_s: float = 0.0,
    log_format: LogFormatName = LogFormatName.text,
    log_level: LogLevelName = LogLevelName.info,
) -> "Iterator[OnEvent]":
    """Provide who is told of events and shows them; what takes less than ``delay_s`` shows nothing.

    With ``--progress json`` and ``--log-format json`` standard error has nothing but JSON, the message of an error in
    its last object.

    Raises:
        UserError: progress and logs are asked for in two forms.
    """
    from stockflow.errors import StockflowError
    from stockflow.progress.display import reporting

    is_logged = log_format is LogFormatName.json
    if is_logged and progress in (ProgressName.rich, ProgressName.lanes, ProgressName.json):
        raise UserError(f"--log-format json and --progress {progress.value} exclude each other: leave one of them out")
    style = ProgressName.none if quiet else progress
    level = LogLevelName.error if quiet else log_level
    try:
        with reporting(style.value, delay_s=delay_s, log_format=log_format.value, level=level.value) as on_event:
            yield on_event
    except StockflowError as error:
        if is_logged or style is ProgressName.json:
            raise typer.Exit(error.exit_code) from None
        raise
    except Exception as error:
        if is_logged and not isinstance(error, typer.Exit | typer.Abort | BrokenPipeError):
            raise typer.Exit(EXIT_BUG) from None  # the traceback is in the last line
        raise


@contextmanager
def with_metrics(port: int | None, on_event: "OnEvent") -> "Iterator[OnEvent]":
    """Provide who is told of events, counts them for whoever scrapes ``port``, and passes them on.

    Raises:
        UserError: the port cannot be had.
    """
    if port is None:
        yield on_event
        return
    from stockflow.events import Note, all_of
    from stockflow.progress.metrics import Metrics, served

    metrics = Metrics()
    with served(metrics, port) as bound:
        if not port:
            on_event(Note(f"metrics at http://{os.uname().nodename}:{bound}/metrics"))
        yield all_of(metrics, on_event)


def is_on_ray(executor: ExecutorName | None) -> bool:
    """Return whether Ray executes: asked for by name, or by RAY_ADDRESS."""
    from stockflow import api

    return api.is_on_ray(executor.value if executor else None)


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
    from stockflow import api

    sizes = size_option("--memory", memory), size_option("--shard-size", shard_size)
    return api.merge_options(*sizes, workers, device.value, overwrite, on_ray=on_ray)


def labels_option(pairs: Sequence[str]) -> dict[str, str]:
    """Return labels by name.

    Raises:
        PlanError: one is not KEY=VALUE.
    """
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise PlanError(f"--label {pair}: expected KEY=VALUE, such as pool=spot")
        labels[name] = value
    return labels


def size_option(option: str, text: str | None) -> int | None:
    """Return a size in bytes, or None if none is given; a message about it names the option."""
    from stockflow import api

    return api.num_bytes(option, text)


def share_option(option: str, text: str | None) -> float | None:
    """Return a share of the tensors, or None if none is given; a message about it names the option."""
    from stockflow.verification.sample import parse_share

    try:
        return None if text is None else parse_share(text)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None
