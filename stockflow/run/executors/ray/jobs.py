"""Jobs of a cluster that is reached over HTTP: submit one, see how it stands, read what it says, stop it.

Ray's own client does the talking; here it gets what it lacks (2.60): time limits, an address that no environment
variable overrides, a log stream that may break, and errors that say what to do.
"""

import asyncio
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from stockflow.errors import AccessDeniedError, ComputeLostError, NotFoundError, PlanError, StockflowError
from stockflow.run.executors.ray.cluster import brief, token_refused
from stockflow.text.redaction import redact, without_secrets

TIMEOUT_S = (10.0, 60.0)
"""to connect; to answer"""
OLDEST_RAY = (2, 52)
"""pyproject.toml's"""
OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's client takes these rather than the address it is given."""

_REASONS = {
    "refused": "connection refused",
    "no route|unreachable": "there is no route to it",
    "not known|resolve|name resolution": "there is no host of this name",
    "timed out": "it did not answer in time",
    "certificate": "its TLS certificate is not trusted here (REQUESTS_CA_BUNDLE)",
    "ssl": "it does not speak TLS; expected http://",
}
"""What a client says of a connection that failed, in our words."""

T = TypeVar("T")
Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


@dataclass(frozen=True, slots=True)
class Job:
    """What the cluster knows of a job."""

    id: str
    status: Status
    exit_code: int | None
    """of its driver; None: it has not ended, was stopped, or was lost with its machine"""
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class _Client(JobSubmissionClient):
    """Gives up on a head that does not answer; Ray's waits for ever."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **({"timeout": TIMEOUT_S} | options))

    def ray_version(self) -> str:
        """Return the cluster's; Ray's own client keeps it in later versions only."""
        return str(self._do_request("GET", "/api/version").json().get("ray_version"))


class Jobs:
    """The job API of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            PlanError: the address is none, or the cluster's Ray is too old.
            AccessDeniedError: the cluster wants another token.
            ComputeLostError: nothing answers there, or it is not the job API of Ray.
        """
        self._url = job_api_url(address)
        self.address = redact(self._url)
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        with _without(OVERRIDING):
            self._client = self._ask(lambda: _Client(self._url))
        self.ray_version = self._ask(self._client.ray_version)
        _check_ray_version(self.ray_version, self.address)

    def all(self) -> list[Job]:
        """Return every job that was submitted to the cluster and is still known to it."""
        return [_job(found) for found in self._ask(self._client.list_jobs) if found.submission_id]

    def job(self, job_id: str) -> Job:
        """Return how a job stands.

        Raises:
            NotFoundError: the cluster does not know it.
        """
        return _job(self._ask(lambda: self._client.get_job_info(job_id), job_id))

    def submit(self, job_id: str, entrypoint: str, metadata: Mapping[str, str], environment: Mapping[str, str]) -> bool:
        """Submit a job; return False if there is one of this id already.

        Everything given is readable to whoever may list the jobs.
        """
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    metadata=dict(metadata),
                    runtime_env={"env_vars": dict(environment)},
                )
            )
        except _RefusedError as error:
            if "already exists" in error.answer:
                return False
            raise
        return True

    def logs(self, job_id: str) -> str:
        """Return all that a job has said."""
        return self._ask(lambda: self._client.get_job_logs(job_id), job_id)

    def stop(self, job_id: str) -> None:
        """Ask a job to end."""
        self._ask(lambda: self._client.stop_job(job_id), job_id)

    def stream(self, job_id: str) -> "LogStream":
        """Return what a job says, from the beginning, as it comes."""
        return LogStream(self._client, job_id)

    def _ask(self, question: Callable[[], T], job_id: str = "") -> T:
        """Ask the head something and make its refusals ours."""
        # What requests raises is an OSError, and a ValueError too where no JSON came; Ray's own are RuntimeErrors.
        try:
            return question()
        except StockflowError:
            raise
        except AuthenticationError:
            raise AccessDeniedError(token_refused(self.address)) from None
        except (ValueError, KeyError, TypeError):
            raise self._no_job_api() from None
        except OSError as error:
            raise ComputeLostError(
                f"no Ray head answers at {self.address}: {_reason(error)}. Expected the address of its dashboard, "
                "http://HOST:8265; check that the head is up and that this machine may reach it (a tunnel, "
                "`kubectl port-forward`)"
            ) from None
        except RuntimeError as error:
            text = without_secrets(str(error))
            if job_id and "does not exist" in text:
                raise NotFoundError(
                    f"the cluster at {self.address} does not know a job {job_id}: its head was started anew, or the "
                    "job was deleted"
                ) from None
            if "404" in text[:60]:
                raise self._no_job_api() from None
            raise _RefusedError(f"the cluster at {self.address} refused: {brief(RuntimeError(text))}", text) from None

    def _no_job_api(self) -> ComputeLostError:
        return ComputeLostError(
            f"what answers at {self.address} is not the job API of Ray; expected the address of the dashboard of a "
            "head, http://HOST:8265"
        )


class _RefusedError(ComputeLostError):
    """The head answered, and not with what was asked for."""

    def __init__(self, message: str, answer: str = "") -> None:
        super().__init__(message)
        self.answer = answer


class LogStream:
    """What a job says, read by a thread of its own: nobody waits where the network hangs."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        """Begin to read."""
        self._parts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reading: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._is_closed = False
        threading.Thread(target=self._run, args=(client, job_id), name="job log", daemon=True).start()

    def read(self, timeout_s: float) -> str | None:
        """Return what came within some time, nothing if nothing did, and None once no more will."""
        try:
            return self._parts.get(timeout=timeout_s)
        except queue.Empty:
            return ""

    def close(self) -> None:
        """Give up the connection, and let the thread end; waits for neither."""
        self._is_closed = True
        if self._reading:
            loop, task = self._reading
            with suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(task.cancel)

    def _run(self, client: JobSubmissionClient, job_id: str) -> None:
        async def read() -> None:
            task = asyncio.current_task()
            assert task
            self._reading = asyncio.get_running_loop(), task
            if self._is_closed:  # asked after the other was set: one of the two threads sees what the other did
                return
            async for part in client.tail_job_logs(job_id):
                self._parts.put(part)

        try:
            # A stream that broke is begun again by whoever reads it.
            with suppress(Exception, asyncio.CancelledError):
                asyncio.run(read())
        finally:
            self._parts.put(None)


def job_api_url(address: str) -> str:
    """Return the URL of the job API at an address; HOST:PORT alone is http.

    Raises:
        PlanError: it is none.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_url &= parts.hostname not in ("http", "https")  # of http:/HOST
    except ValueError:
        is_url = False
    if not is_url or parts.query or parts.fragment:
        raise PlanError(
            f"--address {redact(address)}: expected where the dashboard of the cluster's head listens, http://HOST:8265"
        )
    return url


def may_be_a_tunnel(address: str) -> bool:
    """Return whether an address is on this machine; what answers there may be a cluster anywhere."""
    host = urlsplit(job_api_url(address)).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_ray_version(version: str, where: str) -> None:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST_RAY:
        raise PlanError(
            f"the cluster at {where} runs Ray {version}; stockflow needs {'.'.join(map(str, OLDEST_RAY))} or newer "
            f"(here: {ray.__version__}). Use an image with a newer one"
        )


def _job(found: Any) -> Job:
    return Job(
        id=found.submission_id,
        status=found.status.value,
        exit_code=found.driver_exit_code,
        message=without_secrets(found.message or ""),
        metadata=found.metadata or {},
    )


def _reason(error: BaseException) -> str:
    """Return why nothing answered; Ray says only that nothing did, and keeps the cause as the context."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    said = " ".join(without_secrets(str(cause)) for cause in causes)
    for pattern, reason in _REASONS.items():
        if re.search(pattern, said, re.IGNORECASE):
            return reason
    return brief(RuntimeError(said))


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
