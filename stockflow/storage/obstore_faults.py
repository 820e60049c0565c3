"""What obstore says when a request fails: a debug output of thirty lines, of which a few words tell."""

import re

from obstore import exceptions

from stockflow.storage.faults import Failure, scrub

_REDIRECT = "redirect without LOCATION"
"""how obstore tells that the bucket is in another region"""
STARTING = "starting the upload"
_STEPS = (
    (re.compile(r"POST \S+\?uploads\b"), STARTING),
    (re.compile(r"PUT \S+\?partNumber=(\d+)"), "part {}"),
    (re.compile(r"POST \S+\?uploadId="), "completing the upload"),
)
_REASONS = re.compile(r"""(?:message|error): "([^"]+)"|kind: (Timeout|TimedOut)|(InvalidCertificate)\(\s*(\w+)""")
"""the words that tell in obstore's debug output, which goes on for thirty lines"""


def failure_of(error: Exception) -> Failure:
    """Return the HTTP status, the store's code and the telling words of an obstore error."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    repeats = re.search(r", after (\d+) retries,", text)
    return Failure(
        detail=scrub(detail_of(text)),
        status=_status_of(error) or (int(status[1]) if status else 301 if _REDIRECT in text else None),
        code=code[1] if code else "",
        attempts=int(repeats[1]) + 1 if repeats else 1,
        step=_step(text),
    )


def _status_of(error: Exception) -> int | None:
    """Return the status that an error's class stands for, whatever the server's number was."""
    by_class: dict[type[Exception], int] = {
        exceptions.AlreadyExistsError: 412,
        exceptions.PreconditionError: 412,
        exceptions.PermissionDeniedError: 403,
        exceptions.UnauthenticatedError: 401,
        exceptions.InvalidPathError: 400,
        exceptions.NotSupportedError: 501,
        FileNotFoundError: 404,
        PermissionError: 403,
    }
    return by_class.get(type(error))


def detail_of(text: str) -> str:
    """Return the words that tell in the text of an error."""
    said = re.search(r"<Message>([^<]*)</Message>", text)
    if said:
        return said[1]
    reasons = dict.fromkeys(" ".join(filter(None, groups)) for groups in _REASONS.findall(text))
    headline = text.split("\n", 1)[0].rsplit(" - ", 1)[-1]
    return ": ".join([headline, *reasons]) if reasons else headline


def _step(text: str) -> str:
    """Return which request of an upload an error is about, in words; empty for any other request."""
    found = ((pattern.search(text), words) for pattern, words in _STEPS)
    return next((words.format(*match.groups()) for match, words in found if match), "")
