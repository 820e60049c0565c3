"""An upload in parts, request by request: each is repeated here, as botocore repeats no 429 and no nonsense."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from stockflow.storage.faults import Failure, RequestError, WrongAnswerError
from stockflow.storage.retry import RetryLoop, RetryPolicy

Call = Callable[..., Mapping[str, Any]]
"""Makes one request of S3 by botocore's name and arguments."""


class PartsUpload:
    """Takes bytes in order and sends them in parts, one after another; one that is small enough in one request."""

    def __init__(
        self,
        call: Call,
        key: str,
        part_bytes: int,
        policy: RetryPolicy,
        errors: tuple[type[Exception], ...],
        failure: Callable[[Exception], Failure],
    ) -> None:
        """Send nothing yet.

        Args:
            call: makes requests, without repeating them.
            key: of the object.
            part_bytes: size of all parts but the last.
            policy: how requests are repeated.
            errors: what a failed request raises.
            failure: what one of those says.
        """
        self._call, self._key, self._part_bytes = call, key, part_bytes
        self._loop, self._errors, self._failure = RetryLoop(policy), errors, failure
        self._unsent = bytearray()
        self._upload = ""
        self._parts: list[dict[str, object]] = []

    def write(self, payload: memoryview | bytes, /) -> None:
        """Append bytes; every part that is full is sent."""
        view = memoryview(payload).cast("B")
        while view.nbytes:
            room = self._part_bytes - len(self._unsent)
            self._unsent += view[:room]
            view = view[room:]
            if len(self._unsent) == self._part_bytes:
                self._send_part()

    def finish(self) -> None:
        """Send what is left, and let the object appear."""
        if not self._upload:
            self._answered("put_object", "ETag", "", Key=self._key, Body=bytes(self._unsent))
            return
        if self._unsent:
            self._send_part()
        parts = {"Parts": self._parts}
        self._answered(
            "complete_multipart_upload", "ETag", "completing the upload", **self._of_upload, MultipartUpload=parts
        )

    def abort(self) -> None:
        """Leave nothing of it."""
        if self._upload:
            self._call("abort_multipart_upload", **self._of_upload)

    @property
    def _of_upload(self) -> dict[str, str]:
        return {"Key": self._key, "UploadId": self._upload}

    def _send_part(self) -> None:
        if not self._upload:
            self._upload = self._answered("create_multipart_upload", "UploadId", "starting the upload", Key=self._key)
        number = len(self._parts) + 1
        sent = {"PartNumber": number, "Body": bytes(self._unsent)}
        etag = self._answered("upload_part", "ETag", f"part {number}", **self._of_upload, **sent)
        self._parts.append({"PartNumber": number, "ETag": etag})
        self._unsent.clear()

    def _answered(self, method: str, field: str, step: str, **arguments: object) -> str:
        """Make a request until it is answered as it should be, and return one field of the answer."""

        def judge(error: Exception, attempts: int, is_last: bool) -> Exception | None:
            found = Failure(str(error)) if isinstance(error, WrongAnswerError) else self._failure(error)
            is_over = is_last or not found.is_transient
            return RequestError(replace(found, attempts=attempts, step=step)) if is_over else None

        catch = (*self._errors, WrongAnswerError)
        return self._loop.run(
            partial(self._field, method, field, arguments),
            catch=catch,
            judge=judge,
            asked=lambda error: None if isinstance(error, WrongAnswerError) else self._failure(error).wait_s,
            where=self._key,
        )

    def _field(self, method: str, field: str, arguments: Mapping[str, object]) -> str:
        answer = self._call(method, **arguments)
        if not answer.get(field):
            raise WrongAnswerError(f"the answer has no {field}")
        return str(answer[field])
