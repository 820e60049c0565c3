"""Single requests to S3 that botocore makes beside a store's client: what the client cannot ask, or asks twice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from stockflow.storage.base import HalfWritten
from stockflow.storage.client import Cursor, Pages
from stockflow.storage.faults import Failure, RequestError, WrongAnswerError, scrub
from stockflow.storage.s3 import Bucket, encryption, single_requests
from stockflow.storage.throttles import asked_wait_s

P = TypeVar("P")
LISTING_TIMEOUT_S = 60.0
"""of one request for open uploads"""
_HTML = "a page of HTML came, as of a proxy or a sign-in, and no answer of S3"


def put_new_object(bucket: Bucket, key: str, payload: bytes, timeout_s: float) -> str:
    """Write a small object unless there is one, by exactly one request of botocore; return its ETag."""
    arguments = _payer(bucket) | encryption(bucket.options)
    client = single_requests(bucket, timeout_s)
    reply = client.put_object(Bucket=bucket.name, Key=key, Body=payload, IfNoneMatch="*", **arguments)
    if not reply.get("ETag"):
        raise WrongAnswerError("the answer has no ETag")
    return str(reply["ETag"])


def list_pages(
    bucket: Bucket, folder: str, delimiter: str, timeout_s: float, read: Callable[[Mapping[str, Any]], P]
) -> Pages[P]:
    """Return the pages of a listing of ``folder`` (empty: the bucket), each as ``read`` takes it.

    By botocore: obstore checks no page, and gives none where one key has no path. A page raises RequestError where its
    request failed; what is no listing, as a page of a gateway, is none of an empty folder.
    """
    asked = {"Prefix": f"{folder}/" if folder else "", "Delimiter": delimiter, **_payer(bucket)}

    @_request_errors()
    def ask(cursor: Cursor) -> tuple[P, Cursor | None]:
        page = single_requests(bucket, timeout_s).list_objects_v2(Bucket=bucket.name, **asked, **cursor)
        after = _after(page, cursor, {"ContinuationToken": "NextContinuationToken"})
        return read(page), after

    return Pages(ask)


def open_uploads(bucket: Bucket, root: str) -> Pages[Sequence[HalfWritten]]:
    """Return the open multipart uploads of keys below ``root``, keys relative to it. By botocore: obstore lists none.

    A page raises RequestError where its request failed.
    """
    top = f"{root}/" if root else ""

    @_request_errors()
    def ask(cursor: Cursor) -> tuple[Sequence[HalfWritten], Cursor | None]:
        client = single_requests(bucket, LISTING_TIMEOUT_S)
        page = client.list_multipart_uploads(Bucket=bucket.name, Prefix=top, **_payer(bucket), **cursor)
        # Not every store filters by prefix.
        below = (upload for upload in page.get("Uploads", ()) if upload["Key"].startswith(top))
        found = [HalfWritten(each["Key"].removeprefix(top), each["UploadId"], is_abandoned=False) for each in below]
        return found, _after(page, cursor, {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"})

    return Pages(ask)


def _after(page: Mapping[str, Any], cursor: Cursor, names: Mapping[str, str]) -> Cursor | None:
    """Return the cursor of the page after this one, made of what the page tells by other names; None: there is none."""
    if not page.keys() & {"IsTruncated", "Name", "Bucket"}:
        raise RequestError(Failure("the answer is no listing"))
    if not page.get("IsTruncated"):
        return None
    after = {asked: page[told] for asked, told in names.items() if told in page}
    if not after or after == cursor:
        raise RequestError(Failure("the listing is not complete, and does not say where it goes on"))
    return after


def abort_upload(bucket: Bucket, key: str, upload: str) -> None:
    """Abort a multipart upload that may be gone already.

    Raises:
        RequestError: the request failed.
    """
    with _request_errors():
        client = single_requests(bucket, LISTING_TIMEOUT_S)
        with suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=bucket.name, Key=key, UploadId=upload, **_payer(bucket))


def checksums_of(bucket: Bucket, key: str) -> Mapping[str, str]:
    """Return the checksums that S3 keeps of a whole object, by name; those of its parts together are left out.

    Raises:
        RequestError: the request failed.
    """
    with _request_errors():
        client = single_requests(bucket, LISTING_TIMEOUT_S)
        reply = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED", **_payer(bucket))
    told = {name.removeprefix("Checksum"): str(value) for name, value in reply.items() if name.startswith("Checksum")}
    is_of_parts = told.pop("Type", "") == "COMPOSITE" or any("-" in value for value in told.values())
    return {} if is_of_parts else told


def asks_to_wait_s(bucket: Bucket, key: str, timeout_s: float) -> float | None:
    """Return how long a store that throttles asks to be left alone; None: it does not say, or throttles no more."""
    try:
        with _request_errors():
            single_requests(bucket, timeout_s).head_object(Bucket=bucket.name, Key=key, **_payer(bucket))
    except RequestError as error:
        return error.failure.wait_s
    return None


@contextmanager
def _request_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise RequestError(failure_of_answer(error.response, str(error))) from None
    except (BotoCoreError, ResponseParserError) as error:
        raise RequestError(Failure(detail=scrub(str(error)), code=type(error).__name__)) from None


def failure_of_answer(answer: Mapping[str, Any], otherwise: str) -> Failure:
    """Return what an error's parsed answer says, ``otherwise`` where it has no words of its own."""
    told = answer.get("Error", {})
    code = str(told.get("Code", ""))
    about = answer.get("ResponseMetadata", {})
    headers = about.get("HTTPHeaders", {})
    if "html" in headers.get("content-type", "") and about.get("HTTPStatusCode") == 500:
        # botocore calls whatever is no answer of S3 a 500, whatever its status was.
        return Failure(_HTML, attempts=about.get("RetryAttempts", 0) + 1)
    return Failure(
        detail=scrub(str(told.get("Message", otherwise) or "")),
        status=about.get("HTTPStatusCode"),
        code="" if code.isdigit() else code,  # the answer to a HEAD has no body, and botocore puts the status here
        attempts=about.get("RetryAttempts", 0) + 1,
        wait_s=asked_wait_s(headers),
    )


def _payer(bucket: Bucket) -> dict[str, str]:
    return {"RequestPayer": "requester"} if bucket.options.requester_pays else {}
