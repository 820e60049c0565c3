"""From a URL to the store that serves it."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from stockflow.errors import RecipeError
from stockflow.storage.base import StorageConfig, Store, check_plain
from stockflow.storage.joined import JoinedStore, LocalJoinedStore, halves_of, joined
from stockflow.storage.local import LocalStore
from stockflow.storage.sightings import Sightings
from stockflow.text.redaction import FROM_ENVIRONMENT, has_credentials, redact
from stockflow.text.strictjson import shown

OBJECT_SCHEMES = ("s3", "gs", "az")
"""Schemes served by obstore, readable and writable."""
WRITABLE_SCHEMES = ("file", "memory", *OBJECT_SCHEMES)
"""Schemes an output may live on; every other fsspec scheme is an input only."""
_WEIGHTS = re.compile(r"\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?$")
_REMOTE_WEIGHTS = re.compile(rf"((?!hf://)\w+://[^/]+|hf://[^/]+/[^/]+)/.+{_WEIGHTS.pattern}")
"""In a bucket, on a host, or in a model of the hub: not one of these itself."""
_READ_SCHEMES = ("hf", "http", "https")
_BROKEN = re.compile(
    r"(?:s3://)?arn:aws[\w-]*:(s3):::"
    r"|(?:(s3a?|gcs|gs|az|hf|https?|file|memory)(?::/?(?!/)|//)|([a-z][a-z0-9+.-]+):/(?!/))",
    re.IGNORECASE,
)
"""The begin of a URL that lost slashes or its colon, or of a bucket's ARN"""
_ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file", "asynclocal": "file"}
"""``local`` is fsspec's own disk, which follows every link"""


def normalize_url(location: str) -> str:
    """Return an absolute URL or path for ``location``, without a trailing slash; ``file://`` becomes a path.

    Raises:
        RecipeError: it carries credentials, a query or control characters; or an object's key would have empty or dot
            segments: clients disagree on what it names; or its scheme is unknown, or not followed by two slashes.
    """
    if not location:
        raise RecipeError("expected a folder or a URL, found an empty text")
    check_slashes(location)
    if location.lower().startswith("arn:"):
        location = f"s3://{location}"
    scheme = urlsplit(location).scheme if "://" in location else "file"
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in (*WRITABLE_SCHEMES, *_READ_SCHEMES):
        _check_scheme(scheme)
    if scheme != "file":
        _refuse_secrets(location)
        place = location.split("://", 1)[1].rstrip("/")
        if scheme == "s3" and place.lower().startswith("arn:"):
            raise RecipeError(
                f"{redact(location)} names an access point by its ARN, which is not read; write its alias in place of "
                "a bucket's name: s3://NAME-...-s3alias/folder"
            )
        if scheme in WRITABLE_SCHEMES and any(part in ("", ".", "..") for part in place.split("/")):
            raise RecipeError(f"{redact(location)} has an empty, `.` or `..` segment; write it without")
        return check_plain(f"{scheme}://{place}")
    path = Path(unquote(urlsplit(location).path) if "://" in location else location)
    path = (path.expanduser() if location.startswith("~") else path).absolute()  # `./~` is no home
    # A file of weights may be a link, into the blobs of the hub's cache, whose names say nothing.
    return check_plain(str(path.parent.resolve() / path.name if is_weights(str(path)) else path.resolve()))


def check_slashes(location: str) -> None:
    """Refuse what was meant to be a URL and would be a folder, as ``s3:/bucket/x``, or the ARN of a bucket.

    Raises:
        RecipeError: with what was meant.
    """
    if not (broken := _BROKEN.match(location)):
        return
    scheme, rest = next(filter(None, broken.groups())).lower(), location[broken.end() :].lstrip("/")
    meant = f"{scheme}://{'/' * (scheme == 'file')}{rest or 'bucket/folder'}"
    _refuse_secrets(meant)
    raise RecipeError(
        f"{shown(location)} is no URL; did you mean {shown(meant)}? A folder of that name is {shown(f'./{location}')}"
    )


def local_path(given: str) -> Path:
    """Return the absolute path of what can only be on this machine.

    Raises:
        RecipeError: a URL, or one that lost a slash.
    """
    url = normalize_url(given)
    if "://" in url:
        raise RecipeError(f"expected a folder or a file on this machine, found {redact(url)}; name a local one")
    return Path(url)


def _check_scheme(scheme: str) -> None:
    from fsspec.registry import known_implementations

    if scheme not in known_implementations:
        known = (*OBJECT_SCHEMES, *_READ_SCHEMES, "file")
        close = get_close_matches(scheme, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}://? " if close else ""
        raise RecipeError(
            f"{scheme}:// is no scheme of a store; {hint}Known: {', '.join(f'{each}://' for each in known)}"
        )


def _refuse_secrets(url: str) -> None:
    """A URL is printed, planned with and published; a query is how signatures travel."""
    scheme = url.partition("://")[0]
    if has_credentials(url):
        raise RecipeError(f"this {scheme}:// URL carries a user and a password; {FROM_ENVIRONMENT}")
    if "?" in url:
        raise RecipeError(
            f"{redact(url)} came with a query, where signatures hide; cut it off at the `?`, or fetch the file first"
        )


def scheme_of(url: str) -> str:
    """Return the scheme of a normalized URL; ``file`` for a path."""
    return url.split("://", 1)[0].lower() if "://" in url else "file"


def is_within(inner: str, outer: str) -> bool:
    """Return whether one normalized location is the other or lies inside it."""
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def pin_revision(location: str) -> str:
    """Return a location that names one state for good where it can: of the hub, a commit; of its cache, a snapshot.

    Raises:
        StockflowError: see ``hub.pin_revision`` and ``hub_cache.snapshot_of``.
    """
    if len(halves := halves_of(location)) > 1:
        return joined(*map(pin_revision, halves))
    if scheme_of(location) == "file":
        from stockflow.storage.hub_cache import snapshot_of

        return snapshot_of(location)
    if scheme_of(location) != "hf":
        return location
    from stockflow.storage import hub

    return hub.pin_revision(location)


def open_model(location: str, config: StorageConfig) -> Store:
    """Return the store of a model: of its folder, also where one file of weights in it is named.

    That of a model and an adapter reads only.

    Raises:
        RecipeError: the scheme is unknown.
    """
    if len(halves := halves_of(location)) > 1:
        return _open_joined(*[open_model(half, config) for half in halves])
    url = normalize_url(location)
    names_file = is_weights(url) if scheme_of(url) == "file" else bool(_REMOTE_WEIGHTS.fullmatch(url))
    folder, _, only = url.rpartition("/") if names_file else (url, "", "")
    if scheme_of(url) == "file":
        return LocalStore(folder or "/", config.trusted, only, config.sightings or Sightings())
    return _open(folder or "/", config, only=only, reads_twice=config.reads_twice)


def _open_joined(model: Store, adapter: Store) -> Store:
    is_local = isinstance(model, LocalStore) and isinstance(adapter, LocalStore)
    return cast(Store, (LocalJoinedStore if is_local else JoinedStore)(model, adapter))


def is_weights(path: str) -> bool:
    """Return whether a path names one file of weights, or their index, that is there."""
    return bool(_WEIGHTS.search(path)) and os.path.isfile(path)


def open_store(location: str, config: StorageConfig, *, writable: bool = False) -> Store:
    """Return the store for ``location``; nothing is contacted yet.

    Raises:
        RecipeError: the scheme is unknown, or is asked to be written and cannot be.
    """
    url = normalize_url(location)
    scheme = scheme_of(url)
    if writable and scheme not in WRITABLE_SCHEMES:
        raise RecipeError(
            f"the output {redact(url)} uses {scheme}://, which stockflow only reads; "
            f"expected a local folder or one of {', '.join(s + '://' for s in OBJECT_SCHEMES)}"
        )
    return _open(url, config)


def _open(url: str, config: StorageConfig, *, only: str = "", reads_twice: bool = False) -> Store:
    scheme = scheme_of(url)
    if scheme == "file":
        return LocalStore(url, config.trusted)
    options = config.for_url(url)
    if scheme in OBJECT_SCHEMES and options.client != "fsspec":
        from stockflow.storage.objects import ObjectStore

        return ObjectStore(url, options, only=only, reads_twice=reads_twice)
    from stockflow.storage.fs import FsspecStore

    return FsspecStore(url, options, only=only, reads_twice=reads_twice)
