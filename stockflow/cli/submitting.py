"""``stockflow submit``: a merge as a job of a Ray cluster."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from stockflow.cli.exits import exit_codes
from stockflow.cli.options import (
    Device,
    DeviceName,
    FollowLinks,
    GpusPerWorker,
    Label,
    LogFormat,
    LogFormatName,
    LogLevel,
    LogLevelName,
    Memory,
    MetricsPort,
    OutputArgument,
    Overwrite,
    ShardSize,
    ShardTimeout,
    Workers,
    WorkerTimeout,
    labels_option,
    size_option,
)
from stockflow.cli.printing import say, tell
from stockflow.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from stockflow.run.executors.ray.jobs import Jobs
    from stockflow.run.submission import Request


class Terminated(BaseException):
    """SIGTERM; no Exception, so that no library takes it for one of its own."""


def submit(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="YAML recipe: a file or -, which is sent along; or a URL, which the cluster reads.",
        ),
    ],
    output: OutputArgument,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster's head, http://HOST:8265."
        ),
    ],
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show what the merge says until it ends; exit as it does.")
    ] = True,
    memory: Memory = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    label: Label = None,
    worker_timeout: WorkerTimeout = None,
    shard_timeout: ShardTimeout = None,
    device: Device = DeviceName.auto,
    overwrite: Overwrite = False,
    follow_links: FollowLinks = None,
    log_format: LogFormat = LogFormatName.text,
    log_level: LogLevel = LogLevelName.info,
    metrics_port: MetricsPort = None,
) -> None:
    """Merge as RECIPE says in a Ray cluster, as a job, and publish the result at OUTPUT.

    The cluster has this version of stockflow in its image, for GPUs with the extra torch; nothing is installed. It
    reads and writes with credentials of its own; none are sent. The job goes on when this command ends: the same
    command again follows it, or resumes what it left. Ctrl-C asks whether to stop the job. A token comes from
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, as everywhere in Ray.
    """
    from stockflow.run import submission
    from stockflow.run.places import check_gpus
    from stockflow.text.redaction import redact

    with exit_codes(), _interruption_is_no_abort():
        size_option("--memory", memory), size_option("--shard-size", shard_size)
        labels = labels_option(label or ())
        check_gpus(device.value, gpus_per_worker)
        trusted = [os.path.abspath(os.path.expanduser(folder)) for folder in follow_links or ()]
        options = [
            *_option("--memory", memory),
            *_option("--shard-size", shard_size),
            *_option("--workers", workers),
            *_option("--gpus-per-worker", f"{gpus_per_worker:g}" if gpus_per_worker else None),
            *(word for name, value in labels.items() for word in ("--label", f"{name}={value}")),
            *_option("--worker-timeout", worker_timeout),
            *_option("--shard-timeout", shard_timeout),
            *_option("--device", device.value if device is not DeviceName.auto else None),
            *(word for folder in trusted for word in ("--follow-links", folder)),
            *(["--overwrite"] if overwrite else []),
            *_option("--log-format", log_format.value if log_format is not LogFormatName.text else None),
            *_option("--log-level", log_level.value if log_level is not LogLevelName.info else None),
            *_option("--metrics-port", metrics_port),
        ]
        request = submission.make_request(recipe, output, options, trusted)
        from stockflow.run.executors.ray import RayOptions
        from stockflow.run.executors.ray.jobs import Jobs, may_be_a_tunnel

        RayOptions(gpus_per_worker=gpus_per_worker, labels=labels)
        if request.paths:
            where = "if this address is a tunnel, " if may_be_a_tunnel(address) else ""
            paths = ", ".join(map(redact, request.paths))
            _note(f"{where}every node of the cluster must see {paths}, as they are here")
        jobs = Jobs(address)
        submitted = submission.submit(jobs, request)
        _say(f"{'submitted' if submitted.is_new else 'at work already:'} job {submitted.job_id} at {jobs.address}")
        if not follow:
            _say_how_to_go_on(jobs, submitted.job_id, request.output)
            return
        code = _follow(jobs, submitted.job_id, request)
    if code:
        raise typer.Exit(code)


def _follow(jobs: "Jobs", job_id: str, request: "Request") -> int:
    """Show what a job says until it ends, or until a signal says to leave it; return the exit code."""
    from stockflow.run import submission

    try:
        with _sigterm_raises():
            job = submission.follow(jobs, job_id, _print, _note, entrypoint=request.entrypoint)
    except Terminated:
        _say(f"left by SIGTERM; job {job_id} goes on")
        _say_how_to_go_on(jobs, job_id, request.output)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        if _wants_to_stop(job_id):
            return _stop(jobs, job_id)
        _say(f"left; job {job_id} goes on")
        _say_how_to_go_on(jobs, job_id, request.output)
        return EXIT_INTERRUPTED
    _say(submission.how_it_ended(job))
    return submission.exit_code(job)


def _wants_to_stop(job_id: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(f"\nStop job {job_id}? Otherwise it goes on", default=False, err=True)
    except (typer.Abort, KeyboardInterrupt):
        _say("")
        return False


def _stop(jobs: "Jobs", job_id: str) -> int:
    """Stop a job and see it end: its driver takes back what is half-written."""
    from stockflow.run import submission

    _say(f"stopping job {job_id}")
    jobs.stop(job_id)
    job = submission.follow(jobs, job_id, lambda text: None, _note)
    _say(submission.how_it_ended(job))
    return EXIT_INTERRUPTED if job.status == "STOPPED" else submission.exit_code(job)


@contextmanager
def _interruption_is_no_abort() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; the same command again tells whether a job is at work")
        raise typer.Exit(EXIT_INTERRUPTED) from None


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def leave(number: int, _: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def _say_how_to_go_on(jobs: "Jobs", job_id: str, output: str) -> None:
    from stockflow.run import submission

    for name, command in submission.hints(jobs, job_id, output).items():
        _say(f"  {name}: {command}")


def _print(text: str) -> None:
    say(text, end="", flush=True)


def _note(text: str) -> None:
    _say(f"note: {text}")


def _say(text: str) -> None:
    tell(text)
