"""What a failed request means: something the user must mend, worth another attempt, or final."""

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from stockflow.errors import AccessDeniedError, NotFoundError, RecipeError, StockflowError, StorageError
from stockflow.text.redaction import without_secrets

Operation = Literal["stat", "read", "list", "write", "create", "delete", "list uploads below", "abort the upload of"]

_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "XAmzContentSHA256Mismatch"})
_CREDENTIAL_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"})
_CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_KEY_CODES = frozenset({"SignatureDoesNotMatch", "InvalidAccessKeyId"})
_REGION_CODES = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_LOST_CODES = frozenset({"NoSuchUpload", "InvalidPart"})
"""what a store says of an upload that is not, or not as it was made, there any more: no object is missing"""
_ARCHIVED = "InvalidObjectState"
_NAME_CODES = frozenset({"InvalidBucketName", "KeyTooLongError", "ParamValidationError"})
_MAX_DETAIL = 240
"""characters of a server's own words in a message"""

_ACTIONS: dict[str, dict[Operation, str]] = {
    "s3": {
        "stat": "s3:GetObject",
        "read": "s3:GetObject",
        "list": "s3:ListBucket",
        "write": "s3:PutObject",
        "create": "s3:PutObject",
        "delete": "s3:DeleteObject",
        "list uploads below": "s3:ListBucketMultipartUploads",
        "abort the upload of": "s3:AbortMultipartUpload",
    },
    "gs": {
        "stat": "storage.objects.get",
        "read": "storage.objects.get",
        "list": "storage.objects.list",
        "write": "storage.objects.create",
        "create": "storage.objects.create",
        "delete": "storage.objects.delete",
    },
}


class WrongAnswerError(Exception):
    """An answer came whole and is not what was asked for; asking again may help."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request, as far as the client library told: no traceback, no secret."""

    detail: str
    status: int | None = None
    """of HTTP; None when there was no answer"""
    code: str = ""
    """the store's own word, such as ``NoSuchBucket``"""
    attempts: int | None = None
    """requests the client library made before it gave up, where it repeats them itself and tells"""
    step: str = ""
    """which request of an upload failed, in words, where the library tells"""
    is_unsigned: bool = False
    """whether no credentials were sent, as the recipe says"""
    wait_s: float | None = None
    """how long a throttle asks to be left alone"""

    @property
    def is_untrusted(self) -> bool:
        """Whether the server's certificate was refused."""
        return self.status is None and any(words in self.detail.lower() for words in ("certificate", "doesn't match"))

    @property
    def may_be_endpoint(self) -> bool:
        """Whether it may be no object of ours that failed, but who was asked."""
        is_elsewhere = self.status in (301, 302, 307, 308, 401, 403) or self.code == "NoSuchBucket"
        return not self.is_untrusted and self.code not in _CLOCK_CODES and (self.status is None or is_elsewhere)

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed a moment later."""
        if self.status is None:
            return not self.is_untrusted
        return self.status in _TRANSIENT_STATUSES or self.code in _TRANSIENT_CODES

    @property
    def is_of_lost_upload(self) -> bool:
        """Whether an upload cannot go on, and another may arrive."""
        return self.code in _LOST_CODES

    @property
    def is_throttle(self) -> bool:
        """Whether the store has too much to do."""
        return self.status in (429, 503)

    def __str__(self) -> str:
        """Return status, code and detail in one line."""
        status = f"HTTP {self.status}" if self.status is not None else ""
        asks = f"(it asks to wait {self.wait_s:,.0f} s)" if self.wait_s else ""
        return " ".join(word for word in (status, self.code, self.detail, asks) if word)


class RequestError(OSError):
    """A request failed, of which it is known what that means."""

    def __init__(self, failure: Failure) -> None:
        """Keep what was said of it."""
        super().__init__(str(failure))
        self.failure = failure


def user_error(failure: Failure, operation: Operation, where: str) -> StockflowError | None:
    """Return what the user must mend, or None where the failure is the store's."""
    if failure.code == _ARCHIVED:
        return AccessDeniedError(_archived(operation, where))
    # Credentials first: S3 answers ExpiredToken with 400.
    if failure.status in (401, 403) or failure.code in _CREDENTIAL_CODES | _CLOCK_CODES:
        return AccessDeniedError(_denied(failure, operation, where))
    if failure.code == "NoSuchBucket":
        return NotFoundError(f"cannot {operation} {where}: the bucket does not exist; check its name and the endpoint")
    if failure.is_of_lost_upload:
        return None
    if failure.status == 404 and operation == "list":
        return NotFoundError(f"cannot list {where}: no such place ({failure}); check its name and the endpoint")
    if failure.status == 404:
        return NotFoundError(f"cannot {operation} {where}: no such object")
    if failure.status in (301, 307) or failure.code in _REGION_CODES:
        return RecipeError(
            f"cannot {operation} {where}: the bucket is in another region than the one asked ({failure}); "
            f"set `region` for it under stockflow.storage"
        )
    if failure.code in _NAME_CODES:
        return RecipeError(f"cannot {operation} {where}: the bucket or key has no valid name ({failure})")
    if failure.is_untrusted:
        return RecipeError(
            f"cannot {operation} {where}: the server's certificate is not trusted ({failure}); "
            f"set `ca_bundle` under stockflow.storage, or AWS_CA_BUNDLE"
        )
    return None


def storage_error(
    failure: Failure, operation: Operation, where: str, attempts: int, *, endpoint: str = ""
) -> StorageError:
    """Return the error for a store that keeps failing."""
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    step = f" ({failure.step})" if failure.step else ""
    asked = f"; the endpoint is {endpoint}" if endpoint and failure.status is None else ""
    return StorageError(f"cannot {operation} {where}{step} after {times}: {failure}{asked}; run again")


def scrub(text: str) -> str:
    """Return what a client or a server said in one short line, without secrets."""
    line = " ".join(without_secrets(text).split())
    return line if len(line) <= _MAX_DETAIL else line[: _MAX_DETAIL - 3] + "..."


def _archived(operation: Operation, where: str) -> str:
    bucket, _, key = where.partition("://")[2].partition("/")
    command = shlex.join(["aws", "s3api", "restore-object", "--bucket", bucket, "--key", key])
    return (
        f"cannot {operation} {where}: it is archived (Glacier). Restore it, and whatever else is of the model, "
        f"which takes minutes to days: `{command} --restore-request Days=7`; then run again"
    )


def _denied(failure: Failure, operation: Operation, where: str) -> str:
    scheme = where.split("://", 1)[0]
    action = _ACTIONS.get(scheme, {}).get(operation)
    if failure.code in _CREDENTIAL_CODES:
        remedy = "the credentials have expired: sign in again"
    elif failure.code in _CLOCK_CODES:
        remedy = (
            f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, too far from the store's: set it "
            "right (`timedatectl`, NTP)"
        )
    elif failure.code in _KEY_CODES:
        remedy = "the access key or its secret is not one that this endpoint knows: check both, and the endpoint"
    elif failure.is_unsigned:
        remedy = "the request was sent unsigned, as `anonymous: true` says, and it is not public: remove that line"
    elif failure.status == 401 or action is None:
        remedy = "check the credentials, or set `anonymous: true` for public objects"
    else:
        remedy = f"the credentials need {action} on it"
    if scheme == "s3" and operation == "stat" and failure.status == 403:
        remedy += " (S3 also answers so for an absent object where s3:ListBucket is not allowed)"
    return f"cannot {operation} {where}: access denied ({failure}); {remedy}"
