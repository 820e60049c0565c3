"""A merge as a job of a Ray cluster: what is sent, how it is followed, what its end means.

The merge's driver runs in the cluster and stays there, whoever watches: losing the watcher costs nothing. The recipe
travels in the job's entrypoint, where an operator can read it. Credentials do not travel: the cluster has its own.
"""

import hashlib
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from stockflow.errors import (
    EXIT_COMPUTE_LOST,
    AccessDeniedError,
    ComputeLostError,
    NotFoundError,
    OutputConflictError,
    RecipeError,
)
from stockflow.recipe import Recipe, load_recipe, resolve_location
from stockflow.recipe.document import read_yaml
from stockflow.recipe.wording import named
from stockflow.storage import StorageConfig, open_store, redact
from stockflow.version import __version__

if TYPE_CHECKING:
    from stockflow.run.executors.ray.jobs import Job, Jobs, LogStream

MAX_ENTRYPOINT_BYTES = 100_000
"""Linux hands a program no argument of 128 KiB or more, and the entrypoint is one of the shell's."""
STOP_S = 30
"""When Ray kills a driver that it has asked to end: after 3 s if not told otherwise (2.60). It ends by itself after
seven at most (``interruption``); a busy head is slow to see that."""
LOOK_S = 1.0
SILENCE_S = 60.0
"""A driver says something every five seconds; a stream without a word for so long may be a dead connection."""
LOST_S = 300.0
"""How long the head may not answer before a follower gives up."""
KILLED = (-9, 137)
HEAD_LOST = 1
"""No merge exits with it. Ray ends a process so (2.60), from native code, when the head's GCS is gone for a minute."""
EXIT_STOPPED = 143
"""what a driver that Ray stops exits with; Ray does not record it"""
_ABSOLUTE = ("/", "file://")
MAX_AROUND_CHARS = 10_000
"""what Ray says before it repeats the entrypoint; later it will not"""

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """A merge to be submitted."""

    output: str
    """a normalized path or URL"""
    entrypoint: str
    """what the shell of the job runs; holds the recipe, unless that is read from a URL"""
    paths: tuple[str, ...]
    """local folders it reads and writes: every node must see them"""

    @property
    def digest(self) -> str:
        """Tells two requests into one output apart."""
        return hashlib.sha256(self.entrypoint.encode()).hexdigest()[:16]

    @property
    def base_id(self) -> str:
        """How the ids of all jobs begin that merge into this output."""
        word = re.sub(r"[^a-z0-9]+", "-", self.output.rpartition("/")[2].lower()).strip("-")[:20].rstrip("-")
        return f"stockflow-{word or 'merge'}-{hashlib.sha256(self.output.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Submitted:
    """A job that merges what was asked for."""

    job_id: str
    is_new: bool
    """False: it was at work already"""


def make_request(recipe: str, output: str, options: Sequence[str] = (), folders: Sequence[str] = ()) -> Submission:
    """Return what to submit; nothing is contacted unless the recipe is on the web.

    Args:
        recipe: a file or ``-``, which is sent along; or a URL, which the cluster reads with its own credentials.
        output: folder or URL of the output.
        options: of ``stockflow merge``, as words.
        folders: absolute ones that the options name, and every node must see.

    Raises:
        UserError: the recipe or the output cannot be; a folder is named in a way that means another one there.
    """
    where = open_store(output, StorageConfig(), writable=True).url
    paths = [*([where] if "://" not in where else []), *folders]
    if "://" in recipe:
        words = ["stockflow", "merge", resolve_location(recipe), where, "--executor", "ray", *options]
        return Submission(where, _script(words, ""), tuple(paths))
    parsed = load_recipe(recipe)
    paths += _local_inputs(parsed)
    words = ["stockflow", "merge", "-", where, "--executor", "ray", *options]
    script = _script(words, parsed.text)
    if len(script.encode()) > MAX_ENTRYPOINT_BYTES:
        raise RecipeError(
            f"the recipe has {len(parsed.text.encode()):,} bytes, more than a job can carry "
            f"({MAX_ENTRYPOINT_BYTES:,}); put it where the cluster can read it (s3://...) and submit its URL"
        )
    return Submission(where, script, tuple(paths))


def submit(jobs: "Jobs", request: Submission) -> Submitted:
    """Submit a merge, or find that it is at work already.

    Raises:
        OutputConflictError: a job with another recipe or other options merges into this output.
        ComputeLostError: the cluster does not take it.
    """
    metadata = {"stockflow": __version__, "output": request.output, "request": request.digest}
    while True:
        ours = re.compile(re.escape(request.base_id) + r"(?:-(\d+))?")
        known = [(job, int(found[1] or 1)) for job in jobs.all() if (found := ours.fullmatch(job.id))]
        for job, _ in known:
            if not job.is_over:
                return _joined(jobs, job, request)
        number = max((number for _, number in known), default=0) + 1
        job_id = request.base_id if number == 1 else f"{request.base_id}-{number}"
        if jobs.submit(job_id, request.entrypoint, metadata, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}):
            return Submitted(job_id, is_new=True)
        # Somebody else took this id just now: it is in the list by now.


def follow(
    jobs: "Jobs",
    job_id: str,
    on_text: OnText,
    on_note: OnText,
    *,
    entrypoint: str = "",
    look_s: float = LOOK_S,
    lost_s: float = LOST_S,
) -> "Job":
    """Pass on what a job says until it is over; return how it ended.

    Args:
        jobs: the cluster's.
        job_id: which one.
        on_text: told what the job says.
        on_note: told what the follower has to say.
        entrypoint: if given, the job's log up to where Ray repeats it is left out.
        look_s: seconds between looks.
        lost_s: how long the head may not answer.

    Raises:
        AccessDeniedError: the token is no longer accepted.
        ComputeLostError: the cluster no longer knows the job, or did not answer for long.
    """
    with closing(_Log(jobs, job_id, on_text, entrypoint)) as log:
        heard, told = time.monotonic(), ""
        while True:
            log.read(look_s)
            job = _asked(jobs, job_id, heard, lost_s)
            if job is None:
                if told != "lost":
                    told = "lost"
                    on_note(f"the head does not answer; trying for up to {lost_s:.0f} s")
                time.sleep(look_s)
                continue
            heard = time.monotonic()
            if job.is_over:
                try:
                    log.finish()
                except (ComputeLostError, NotFoundError, AccessDeniedError) as error:
                    on_note(f"the job is over, and the last of what it said is missing here: {error}")
                return job
            if job.status == "PENDING" and time.monotonic() - log.began > 10 and told != job.message:
                told = job.message
                on_note(f"the job waits to be started: {job.message}")


def _asked(jobs: "Jobs", job_id: str, heard: float, lost_s: float) -> "Job | None":
    """How a job is; None if the cluster does not answer, and was heard of not long ago."""
    try:
        return jobs.job(job_id)
    except NotFoundError as error:
        raise ComputeLostError(f"{error}. Submit the same again to resume") from None
    except ComputeLostError as error:
        if time.monotonic() - heard > lost_s:
            raise ComputeLostError(
                f"{error}. It was tried for {lost_s:.0f} s; the job may go on: submit the same again to follow it"
            ) from None
        return None


def exit_code(job: "Job") -> int:
    """Return what the merge itself exited with; 5 where nobody could record it."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return EXIT_STOPPED
    if job.exit_code in (None, HEAD_LOST, *KILLED):
        return EXIT_COMPUTE_LOST
    return job.exit_code if job.exit_code > 0 else 128 - job.exit_code


def how_it_ended(job: "Job") -> str:
    """Return the end of a job in a line."""
    if job.status == "SUCCEEDED":
        return f"job {job.id}: done"
    if job.status == "STOPPED":
        return f"job {job.id} was stopped; submit the same again to resume"
    if job.exit_code is None:
        said = job.message.splitlines()[0] if job.message else "the head does not say why"
        return f"job {job.id} was lost: {said}; submit the same again to resume"
    if job.exit_code in KILLED:
        return (
            f"job {job.id}: its driver was killed (SIGKILL), most likely by the kernel for want of memory on the head; "
            "give the head more and submit the same again to resume"
        )
    if job.exit_code == HEAD_LOST:
        return (
            f"job {job.id}: its driver ended with 1, which no merge does by itself: Ray ends it so when the head's GCS "
            "is gone, or it never began; what it said is above. Submit the same again to resume"
        )
    return f"job {job.id} failed with exit code {exit_code(job)}; what it said is above"


def hints(jobs: "Jobs", job_id: str, output: str) -> Mapping[str, str]:
    """Return the commands that follow, look at and stop a job."""
    where = f"--address {jobs.address}"
    return {
        "follow": f"the same command again, or: ray job logs {where} --follow {job_id}",
        "status": f"stockflow status {shlex.quote(redact(output))} --watch",
        "stop": f"ray job stop {where} {job_id}",
    }


class _Log:
    """What a job says, each line once, though the stream breaks and begins anew."""

    def __init__(self, jobs: "Jobs", job_id: str, on_text: OnText, preamble: str = "") -> None:
        self._jobs, self._job_id, self._on_text = jobs, job_id, on_text
        self._num_seen = 0
        self._preamble, self._held = preamble, ""
        self.began = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._stream: LogStream = self._jobs.stream(self._job_id)
        self._position = 0
        self._heard = time.monotonic()

    def read(self, seconds: float) -> None:
        """Pass on what comes within some time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            part = self._stream.read(left)
            if part:
                self._heard = time.monotonic()
                self._show(part)
            elif part is None or time.monotonic() - self._heard > SILENCE_S:
                time.sleep(max(until - time.monotonic(), 0.0))
                self.close()
                self._begin()

    def finish(self) -> None:
        """Pass on what the stream still owes."""
        self._position = 0
        try:
            self._show(self._jobs.logs(self._job_id))
        finally:
            if self._held:  # it never came to that
                self._on_text(self._held)

    def close(self) -> None:
        """Read no more."""
        self._stream.close()

    def _show(self, part: str) -> None:
        new = part[max(self._num_seen - self._position, 0) :]
        self._position += len(part)
        self._num_seen = max(self._num_seen, self._position)
        if self._preamble:
            self._held += new
            _, found, new = self._held.partition(self._preamble)
            if found:
                self._preamble = self._held = ""
                new = new.removeprefix("\n")
            elif len(self._held) > len(self._preamble) + MAX_AROUND_CHARS:
                new, self._preamble, self._held = self._held, "", ""
        if new:
            self._on_text(new)


def _joined(jobs: "Jobs", job: "Job", request: Submission) -> Submitted:
    if job.metadata.get("request") == request.digest:
        return Submitted(job.id, is_new=False)
    raise OutputConflictError(
        f"job {job.id} merges into {redact(request.output)} already, with another recipe or other options; wait for "
        f"it, stop it (`{hints(jobs, job.id, request.output)['stop']}`), or take another output"
    )


def _script(words: Sequence[str], recipe: str) -> str:
    """Return what the job's shell runs: see that the image has this stockflow, and become the merge.

    Becoming it is what makes the job's exit code and the signal of a stop the merge's own.
    """
    recipe = recipe.replace("\r\n", "\n").replace("\r", "\n")  # Ray's logs, where followers look for it, have no other
    end = "RECIPE"
    while end in recipe.splitlines():
        end += "_"
    here = f" <<'{end}'\n{recipe.removesuffix(chr(10))}\n{end}\n" if recipe else ""
    wanted = f"stockflow[torch] {__version__}, for GPUs" if _on_gpus(words) else f"stockflow {__version__}"
    missing = f"stockflow: the head has no stockflow on its PATH; use an image with {wanted}"
    other = f"submitted by stockflow {__version__}, and the head has $has; use an image with {wanted}"
    return (
        f"command -v stockflow >/dev/null || {{ echo '{missing}' >&2; exit 2; }}\n"
        "has=$(stockflow --version)\n"
        f'[ "$has" = "stockflow {__version__}" ] || {{ echo "stockflow: {other}" >&2; exit 2; }}\n'
        f"exec {shlex.join(words)}{here}"
    )


def _on_gpus(words: Sequence[str]) -> bool:
    return "--gpus-per-worker" in words or ("--device", "cuda") in pairwise(words)


def _local_inputs(recipe: Recipe) -> list[str]:
    """Return the folders a recipe reads.

    Raises:
        RecipeError: one is not written as the absolute path it is: elsewhere it would be another one.
    """
    folders = [location for location in recipe.checkpoints if "://" not in location]
    written = list(_paths(read_yaml(recipe.text, "the recipe").plain()))
    absolute = {path for word, path in written if word.startswith(_ABSOLUTE)}
    if relative := [folder for folder in folders if folder not in absolute]:
        words = [next((word for word, path in written if path == folder), folder) for folder in relative]
        raise RecipeError(
            f"the recipe names {', '.join(map(named, words))} as seen from where it is read, which will be on the "
            "cluster; write absolute paths that every node has, or better addresses in object storage"
        )
    return folders


def _paths(value: object) -> Iterator[tuple[str, str]]:
    """Yield the texts of a document that may name a folder, and which one as recipes resolve them."""
    if isinstance(value, dict):
        for child in value.values():
            yield from _paths(child)
    elif isinstance(value, list):
        for child in value:
            yield from _paths(child)
    elif isinstance(value, str):
        with suppress(RecipeError):  # no location at all
            yield value, resolve_location(value)
