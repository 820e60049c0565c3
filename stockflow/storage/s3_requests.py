"""Single requests to S3 that botocore makes beside a store's client: what the client cannot ask, or asks twice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from stockflow.storage.base import HalfWritten
from stockflow.storage.faults import Failure, scrub
from stockflow.storage.s3 import Bucket, client_settings, encryption, session, trust

LISTING_TIMEOUT_S = 60.0
"""of one request for open uploads"""


def put_new_object(bucket: Bucket, key: str, payload: bytes, timeout_s: float) -> str:
    """Write a small object unless there is one, by exactly one request of botocore; return its ETag."""
    arguments = _payer(bucket) | encryption(bucket.options)
    client = _single_requests(bucket, timeout_s)
    reply = client.put_object(Bucket=bucket.name, Key=key, Body=payload, IfNoneMatch="*", **arguments)
    return str(reply.get("ETag", ""))


class S3RequestError(OSError):
    """A request that is made by botocore, beside the client of a store, failed."""

    def __init__(self, failure: Failure) -> None:
        """Keep what botocore said of it."""
        super().__init__(str(failure))
        self.failure = failure


def list_pages(bucket: Bucket, prefix: str, delimiter: str, at_most: int | None = None) -> list[Mapping[str, Any]]:
    """Return the pages of a listing, at least ``at_most`` objects of it. By botocore, which takes keys as they are.

    Raises:
        S3RequestError: the request failed.
    """
    pages: list[Mapping[str, Any]] = []
    more: dict[str, str] = {}
    with _request_errors():
        client = _single_requests(bucket, LISTING_TIMEOUT_S)
        while True:
            page = client.list_objects_v2(
                Bucket=bucket.name, Prefix=prefix, Delimiter=delimiter, **_payer(bucket), **more
            )
            pages.append(page)
            is_enough = at_most is not None and sum(each["KeyCount"] for each in pages) >= at_most
            if is_enough or not page.get("IsTruncated"):
                return pages
            more = {"ContinuationToken": page["NextContinuationToken"]}


def open_uploads(bucket: Bucket, root: str) -> list[HalfWritten]:
    """Return the open multipart uploads of keys below ``root``, keys relative to it. By botocore: obstore lists none.

    Raises:
        S3RequestError: the request failed.
    """
    top = f"{root}/" if root else ""
    found: list[HalfWritten] = []
    more: dict[str, str] = {}
    with _request_errors():
        client = _single_requests(bucket, LISTING_TIMEOUT_S)
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
        S3RequestError: the request failed.
    """
    with _request_errors():
        client = _single_requests(bucket, LISTING_TIMEOUT_S)
        with suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=bucket.name, Key=key, UploadId=upload, **_payer(bucket))


def checksums_of(bucket: Bucket, key: str) -> Mapping[str, str]:
    """Return the checksums that S3 keeps of a whole object, by name; those of its parts together are left out.

    Raises:
        S3RequestError: the request failed.
    """
    with _request_errors():
        client = _single_requests(bucket, LISTING_TIMEOUT_S)
        reply = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED", **_payer(bucket))
    told = {name.removeprefix("Checksum"): str(value) for name, value in reply.items() if name.startswith("Checksum")}
    is_of_parts = told.pop("Type", "") == "COMPOSITE" or any("-" in value for value in told.values())
    return {} if is_of_parts else told


@contextmanager
def _request_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise S3RequestError(failure_of_answer(error.response, str(error))) from None
    except BotoCoreError as error:
        raise S3RequestError(Failure(detail=scrub(str(error)), code=type(error).__name__)) from None


def failure_of_answer(answer: Mapping[str, Any], otherwise: str, step: str = "") -> Failure:
    """Return what an error's parsed answer says, ``otherwise`` where it has no words of its own."""
    told = answer.get("Error", {})
    code = str(told.get("Code", ""))
    about = answer.get("ResponseMetadata", {})
    return Failure(
        detail=scrub(str(told.get("Message", otherwise) or "")),
        status=about.get("HTTPStatusCode"),
        code="" if code.isdigit() else code,  # the answer to a HEAD has no body, and botocore puts the status here
        attempts=about.get("RetryAttempts", 0) + 1,
        step=step,
    )


def _single_requests(bucket: Bucket, timeout_s: float) -> Any:
    """Return a botocore client that makes each request once."""
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(**client_settings(bucket, 1, timeout_s))
    if bucket.options.anonymous:
        settings = settings.merge(Config(signature_version=UNSIGNED))
    return session().create_client(
        "s3", region_name=bucket.region, endpoint_url=bucket.endpoint, config=settings, **trust(bucket)
    )


def _payer(bucket: Bucket) -> dict[str, str]:
    return {"RequestPayer": "requester"} if bucket.options.requester_pays else {}
