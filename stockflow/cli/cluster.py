"""Merges in a cluster: ``stockflow submit``, and ``stockflow status`` of one that runs elsewhere."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockflow.cli.exits import exit_codes, say, tell
from stockflow.cli.options import Logging, OutputArgument, Serving, StorageRecipe, check_order, options
from stockflow.errors import EXIT_INTERRUPTED, NotFoundError
from stockflow.settings import MergeSettings, as_words

if TYPE_CHECKING:
    from stockflow.progress.status import Status
    from stockflow.run.executors.ray.jobs import Jobs
    from stockflow.run.submission import Submission
    from stockflow.storage import Store

WATCH_S = 10.0
"""as often as a run reports"""
BEGIN_S = 120.0
"""How long --watch waits for a merge that has not claimed its output: a job is queued, starts and plans before."""


class Terminated(BaseException):
    """SIGTERM; no Exception, so that no library takes it for one of its own."""


@options(MergeSettings, Logging, Serving, without=("executor",))
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
    **settings: Any,
) -> None:
    """Merge as RECIPE says in a Ray cluster, as a job, and publish the result at OUTPUT.

    The cluster has this version of stockflow in its image, for GPUs with the extra torch; nothing is installed. It
    reads and writes with credentials of its own; none are sent. The job goes on when this command ends: the same
    command again follows it, or resumes what it left. Ctrl-C asks whether to stop the job. A token comes from
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, as everywhere in Ray.
    """
    from stockflow.run import submission

    with _interruption_is_no_abort():
        request = _request(recipe, output, settings)
        from stockflow.run.executors.ray import RayOptions
        from stockflow.run.executors.ray.jobs import Jobs, may_be_a_tunnel
        from stockflow.text.redaction import redact

        RayOptions(gpus_per_worker=settings["gpus_per_worker"], labels=settings["labels"])
        if request.paths:
            where = "if this address is a tunnel, " if may_be_a_tunnel(address) else ""
            paths = ", ".join(map(redact, request.paths))
            _note(f"{where}every node of the cluster must see {paths}, as they are here")
        jobs = Jobs(address)
        submitted = submission.submit(jobs, request)
        tell(f"{'submitted' if submitted.is_new else 'at work already:'} job {submitted.job_id} at {jobs.address}")
        if not follow:
            _say_how_to_go_on(jobs, submitted.job_id, request.output)
            return
        code = _follow(jobs, submitted.job_id, request)
    if code:
        raise typer.Exit(code)


def _request(recipe: str, output: str, settings: dict[str, Any]) -> "Submission":
    """Return the merge that the job will be, with every setting that is said here."""
    from stockflow.run import submission
    from stockflow.run.places import check_gpus

    check_order(recipe, output)
    check_gpus(settings["device"], settings["gpus_per_worker"])
    trusted = [os.path.abspath(os.path.expanduser(folder)) for folder in settings["follow_links"]]
    words = as_words(settings | {"follow_links": trusted}, MergeSettings, Logging, Serving)
    return submission.make_request(recipe, output, words, trusted)


def _follow(jobs: "Jobs", job_id: str, request: "Submission") -> int:
    """Show what a job says until it ends, or until a signal says to leave it; return the exit code."""
    from stockflow.run import submission

    try:
        with _sigterm_raises():
            job = submission.follow(jobs, job_id, _print, _note, entrypoint=request.entrypoint)
    except Terminated:
        tell(f"left by SIGTERM; job {job_id} goes on")
        _say_how_to_go_on(jobs, job_id, request.output)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        if _wants_to_stop(job_id):
            return _stop(jobs, job_id)
        tell(f"left; job {job_id} goes on")
        _say_how_to_go_on(jobs, job_id, request.output)
        return EXIT_INTERRUPTED
    tell(submission.how_it_ended(job))
    return submission.exit_code(job)


def _wants_to_stop(job_id: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(f"\nStop job {job_id}? Otherwise it goes on", default=False, err=True)
    except (typer.Abort, KeyboardInterrupt):
        tell("")
        return False


def _stop(jobs: "Jobs", job_id: str) -> int:
    """Stop a job and see it end: its driver takes back what is half-written."""
    from stockflow.run import submission

    tell(f"stopping job {job_id}")
    jobs.stop(job_id)
    job = submission.follow(jobs, job_id, lambda text: None, _note)
    tell(submission.how_it_ended(job))
    return EXIT_INTERRUPTED if job.status == "STOPPED" else submission.exit_code(job)


@contextmanager
def _interruption_is_no_abort() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        tell("interrupted; the same command again tells whether a job is at work")
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


def _say_how_to_go_on(jobs: "Jobs", job_id: str, output: str) -> None:
    from stockflow.run import submission

    for name, command in submission.hints(jobs, job_id, output).items():
        tell(f"  {name}: {command}")


def _print(text: str) -> None:
    say(text, end="")


def _note(text: str) -> None:
    tell(f"note: {text}")


def status(
    output: OutputArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until it is over; then exit with the merge's own code, 5 if it died.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = WATCH_S,
    recipe: StorageRecipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Show how the merge into OUTPUT stands, from what lies there: done, in flight, rate, time left, dead or alive.

    Needs to list and read OUTPUT, nothing else: no cluster, no inputs. The numbers of a running merge are up to ten
    seconds old; those of shards are counted now.
    """
    from stockflow.progress.status import exit_code, read_status, status_line, status_lines
    from stockflow.storage import open_store
    from stockflow.wiring import storage_of

    with exit_codes():
        store = open_store(output, storage_of(recipe))
        found = _await_begin(store) if watch else read_status(store)
        while watch and not found.is_over:
            say(json.dumps(found.facts()) if as_json else status_line(found))
            time.sleep(interval)
            found = read_status(store)
        if as_json:
            say(json.dumps(found.facts(), indent=None if watch else 1))
        else:
            say("\n".join(status_lines(found)))
        if (watch or found.is_killed) and (code := exit_code(found)):
            raise typer.Exit(code)


def _await_begin(store: "Store") -> "Status":
    from stockflow.progress.status import read_status

    store.list_top()  # nobody waits for a bucket
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
