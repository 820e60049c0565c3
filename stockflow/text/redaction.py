"""What must not be seen: credentials in URLs, in the environment and in what clients and servers say."""

import os
import re
import shlex
from collections.abc import Iterator
from urllib.parse import quote

FROM_ENVIRONMENT = "remove them, credentials come from the environment (AWS_PROFILE, ...)"
"""what to do about credentials in a URL or a recipe"""
_MIN_SECRET_CHARS = 8
"""Replacing shorter ones would garble messages: test servers take ``test`` for a secret."""
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|API_KEY|SAS_KEY|_SAS\b", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(FILE|PATH|DIR|FOLDER|URI|URL|ENDPOINT|PROFILE)$", re.IGNORECASE)
"""Variables like AWS_WEB_IDENTITY_TOKEN_FILE say where a secret is, not what it is."""

_RUN = re.compile(r"([\s'\"<>`]+)")
"""what URLs in a text end at"""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*$")
_PASSWORD = re.compile(r"[^/@:]*:(?!\d+(?:/|$)).*@", re.DOTALL)
"""``user:password@``; ``host:8443/a@b`` is none"""
_PASSWORD_WITHOUT_PORTS = re.compile(r"[^/@:]*:.*@", re.DOTALL)
_USER = re.compile(r"[^/]*@")
_SCHEMES_WITHOUT_PORTS = frozenset({"s3", "s3a", "gs", "gcs", "az"})
_SCHEMES_WITH_NAMES = frozenset({"hf", "abfs", "abfss", "wasb", "wasbs", "ssh", "sftp"})
"""Here what stands before an ``@`` is a container, a model or an account; elsewhere it may be a token."""

_ASSIGNED = re.compile(
    r"\b((?:X-Amz-|AWS_?)?(?:Signature|Credential|Security-?Token|Session_?Token|Access_?Key(?:_?Id)?|Secret\w*|Password)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s,;&<>\"']+",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(\bauthorization[\"']?\s*[=:])[^<>\n]*", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE)

_KEPT: set[str] = set()


def keep_secret(*secrets: str | None) -> None:
    """Replace these texts from now on wherever this process quotes a client or a server."""
    _KEPT.update(secret for secret in secrets if secret)


def redact(url: str) -> str:
    """Return one URL without credentials and query; a path as it is."""
    scheme, found, place = url.partition("://")
    return f"{scheme}{found}{_stripped(scheme, place)}" if found else url


def has_credentials(url: str) -> bool:
    """Return whether a URL names a user with a password, or what may be a token."""
    scheme, found, place = url.partition("://")
    return bool(found) and _user_information(scheme, place) is not None


def redact_urls(text: str) -> str:
    """Return a text whose URLs have neither credentials nor queries; nothing else in it changes."""
    return "".join(map(_redact_run, _RUN.split(text))) if "://" in text else text


def without_secrets(text: str) -> str:
    """Return a text without what looks like a secret, or is one that this process knows."""
    for secret in _known_secrets():
        text = text.replace(secret, "***")
    text = redact_urls(text)
    text = _AUTHORIZATION.sub(r"\1 ***", text)
    text = _BEARER.sub(r"\1 ***", text)
    return _ASSIGNED.sub(r"\1***", text)


def _known_secrets() -> list[str]:
    """Every known secret as it is and as it stands in a URL, the longest first: one may begin like another."""
    known = {*_KEPT, *_environment_secrets()}
    written = {form for secret in known for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])}
    return sorted((form for form in written if len(form) >= _MIN_SECRET_CHARS), key=len, reverse=True)


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            yield value


def _redact_run(run: str) -> str:
    """Redact every URL of a text without white space and quotes."""
    first, *places = run.split("://")
    redacted, before = [first], first
    for place in places:
        scheme = _SCHEME.search(before)
        redacted.append(_stripped(scheme[0] if scheme else "", place))
        before = place
    return "://".join(redacted)


def _stripped(scheme: str, place: str) -> str:
    found = _user_information(scheme, place)
    # The user information goes first: a password may hold a question mark.
    return place[found.end() if found else 0 :].partition("?")[0]


def _user_information(scheme: str, place: str) -> re.Match[str] | None:
    scheme = scheme.lower()
    password = _PASSWORD_WITHOUT_PORTS if scheme in _SCHEMES_WITHOUT_PORTS else _PASSWORD
    return password.match(place) or (None if scheme in _SCHEMES_WITH_NAMES else _USER.match(place))


def command_line(*words: str) -> str:
    """Return a command as somebody may type it: each word quoted where a shell needs it, without secrets."""
    return shlex.join(map(redact, words))
