"""Single requests to S3 that botocore makes beside a store's client: what the client cannot ask, or asks twice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from stockflow.storage.base import HalfWritten
from stockflow.storage.faults import Failure, RequestError, WrongAnswerError, scrub
from stockflow.storage.s3 import Bucket, encryption, single_requests
from stockflow.storage.throttles import asked_wait_s

LISTING_TIMEOUT_S = 60.0
"""of one request for open uploads"""


def put_new_object(bucket: Bucket, key: str, payload: bytes, timeout_s: float) -> str:
    """Write a small object unless there is one, by exactly one request of botocore; return its ETag."""
    arguments = _payer(bucket) | encryption(bucket.options)
    client = single_requests(bucket, timeout_s)
    reply = client.put_object(Bucket=bucket.name, Key=key, Body=payload, IfNoneMatch="*", **arguments)
    if not reply.get("ETag"):
        raise WrongAnswerError("the answer has no ETag")
    return str(reply["ETag"])


def list_pages(
    bucket: Bucket, folder: str, delimiter: str, timeout_s: float, at_most: int | None = None
) -> list[Mapping[str, Any]]:
    """Return the pages of a listing of ``folder`` (empty: the bucket), at least ``at_most`` objects of it.

    By botocore, which takes keys as they are; what is no listing, as a page of a gateway, is none of an empty folder.

    Raises:
        RequestError: the request failed.
    """
    pages: list[Mapping[str, Any]] = []
    asked: dict[str, str] = {"Prefix": f"{folder}/" if folder else "", "Delimiter": delimiter, **_payer(bucket)}
    with _request_errors():
        client = single_requests(bucket, timeout_s)
        while True:
            page = client.list_objects_v2(Bucket=bucket.name, **asked)
            if "IsTruncated" not in page:
                raise RequestError(Failure("the answer is no listing"))
            pages.append(page)
            is_enough = at_most is not None and sum(len(each.get("Contents", ())) for each in pages) >= at_most
            if is_enough or not page["IsTruncated"]:
                return pages
            asked["ContinuationToken"] = page["NextContinuationToken"]


def open_uploads(bucket: Bucket, root: str) -> list[HalfWritten]:
    """Return the open multipart uploads of keys below ``root``, keys relative to it. By botocore: obstore lists none.

    Raises:
        RequestError: the request failed.
    """
    top = f"{root}/" if root else ""
    found: list[HalfWritten] = []
    more: dict[str, str] = {}
    with _request_errors():
        client = single_requests(bucket, LISTING_TIMEOUT_S)
        while True:
            page = client.list_multipart_uploads(Bucket=bucket.name, Prefix=top, **_payer(bucket), **more)
            for upload in page.get("Uploads", ()):
                # Not every store filters by prefix.
                if upload["Key"].startswith(top):
                    found.append(HalfWritten(upload["Key"].removeprefix(top), upload["UploadId"], is_abandoned=False))
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


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
    return Failure(
        detail=scrub(str(told.get("Message", otherwise) or "")),
        status=about.get("HTTPStatusCode"),
        code="" if code.isdigit() else code,  # the answer to a HEAD has no body, and botocore puts the status here
        attempts=about.get("RetryAttempts", 0) + 1,
        wait_s=asked_wait_s(about.get("HTTPHeaders", {})),
    )


def _payer(bucket: Bucket) -> dict[str, str]:
    return {"RequestPayer": "requester"} if bucket.options.requester_pays else {}
