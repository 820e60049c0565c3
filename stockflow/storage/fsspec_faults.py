"""What fsspec and the libraries below it say when a request fails; and an object that appears whole or not at all."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from stockflow.storage.base import Sink
from stockflow.storage.faults import Failure, scrub
from stockflow.storage.s3_requests import failure_of_answer
from stockflow.storage.throttles import asked_wait_s

ERRORS: tuple[type[Exception], ...] = (
    *(OSError, asyncio.TimeoutError, aiohttp.ClientError),
    *(BotoCoreError, ClientError, ResponseParserError),
)


@contextmanager
def open_uncommitted(filesystem: Any, path: str, part_bytes: int) -> Iterator[Sink]:
    """Write one object that appears when the block ends without error."""
    # Leaving a plain `with fs.open(path, "wb")` by an exception publishes the part already written.
    # autocommit=False holds the object back until commit().
    file = filesystem.open(path, "wb", block_size=part_bytes, autocommit=False)
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        file.closed = True  # or the garbage collector would close it, and upload what is left
        with suppress(*ERRORS):
            file.discard()
        raise


def failure_of(error: Exception) -> Failure:
    """Return what an exception of fsspec, aiohttp or botocore says; s3fs keeps the answer in its cause."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, aiohttp.ClientError):
        return failure_of(error.__cause__)  # fsspec's http calls whatever went wrong "not found"
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return failure_of_answer(response, str(error))
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    code = type(error).__name__
    headers = getattr(response, "headers", None) or getattr(error, "headers", None) or {}
    wait_s = asked_wait_s(headers)
    return Failure(detail=scrub(str(error)), status=status or _status_of(error), code=code, wait_s=wait_s)


def _status_of(error: Exception) -> int | None:
    """Return the HTTP status an exception stands for, None where the request may simply be repeated."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return 404
    if isinstance(error, PermissionError):
        return 403
    if isinstance(error, FileExistsError):
        return 412
    if isinstance(error, BotoCoreError) and not isinstance(error, BotoConnectionError | HTTPClientError):
        return 401 if "redential" in type(error).__name__ or "Token" in type(error).__name__ else 400
    return None
