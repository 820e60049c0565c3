"""s3://, gs:// and az:// through obstore: the fast path for the bytes of object stores."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore import exceptions

from stockflow.errors import AccessDeniedError, RecipeError
from stockflow.storage.base import HalfWritten, Listing, Pin, Sink, Stamp, StoreOptions
from stockflow.storage.client import Cursor, P, Pages
from stockflow.storage.endpoints import endpoint_mistake
from stockflow.storage.faults import Failure, RequestError, WrongAnswerError, scrub
from stockflow.storage.obstore_faults import detail_of, failure_of
from stockflow.storage.obstore_upload import Upload
from stockflow.storage.parts import PARTS_IN_FLIGHT
from stockflow.storage.remote import RemoteStore
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import (
    CONNECT_TIMEOUT,
    Bucket,
    endpoint_in_words,
    endpoint_of,
    has_md5_etags,
    is_over_http,
    locate_bucket,
    obstore_bucket,
    require_credentials,
)
from stockflow.storage.s3_pages import files_on, listing_on
from stockflow.storage.s3_requests import abort_upload, asks_to_wait_s, checksums_of, list_pages, open_uploads

if TYPE_CHECKING:
    from obstore import GetOptions, ListStream, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Connection

_NO_RETRIES: "RetryConfig" = {"max_retries": 0, "retry_timeout": timedelta(0)}
ASK_EVERY_S = 5.0
"""A store that throttles is not asked more often how long to wait."""
LISTED = 100
"""Objects that obstore gives at once of a listing: a failure loses fewer than these."""
_SLOW_READ = 2
"""A whole answer may take so many times the silence that ends one."""

_GOOGLE_VARIABLES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
"""where obstore looks for a key"""
_HINTS = {"az": "; set AZURE_STORAGE_ACCOUNT_NAME and credentials in the environment"}


class ObjectStore(RemoteStore):
    """The objects under one ``s3://``, ``gs://`` or ``az://`` URL."""

    def __init__(
        self,
        url: str,
        options: StoreOptions,
        policy: RetryPolicy | None = None,
        *,
        only: str = "",
        reads_twice: bool = False,
    ) -> None:
        """Take the URL, how to reach it, and the one file of weights that is meant; nothing is contacted yet."""
        policy = policy or RetryPolicy()
        super().__init__(url, partial(ObstoreClient, url, options, policy), policy, only=only, reads_twice=reads_twice)


class ObstoreClient:
    """Single requests through obstore; see ``client.Client``."""

    pin: Pin = "if-match"
    errors: tuple[type[Exception], ...] = (exceptions.BaseError, OSError)

    def __init__(self, url: str, options: StoreOptions, policy: RetryPolicy) -> None:
        """Take a normalized URL; connections are made at the first use, in the process that uses them.

        ``policy`` is for timeouts, and for the parts of uploads, which only obstore can repeat.
        """
        self._scheme, _, place = url.partition("://")
        self._bucket, _, self._root = place.partition("/")
        self._options = options
        self._policy = policy
        self._lock = threading.Lock()
        self._connections: dict[bool, Connection] = {}
        self._asked_at = -ASK_EVERY_S

    @property
    def over_http(self) -> bool:
        """Whether bytes travel without TLS."""
        return self._scheme == "s3" and is_over_http(self._options)

    def failure(self, error: Exception) -> Failure:
        """Return the HTTP status, the store's code and the telling words of an obstore error."""
        found = error.failure if isinstance(error, RequestError) else failure_of(error)
        return replace(found, is_unsigned=self._options.anonymous)

    def stamp(self, key: str) -> Stamp:
        """Return size and ETag of an object, by HEAD."""
        path = self._path(key)
        try:
            return _stamp_of(obstore.head(self._reader, path))
        except FileNotFoundError:
            # The answer to a HEAD has no body; that of a GET says whether it is the bucket that is missing.
            return _stamp_of(obstore.get(self._reader, path, options={"range": (0, 1)}).meta)

    def read(self, key: str, start: int, stop: int, pinned: Stamp | None) -> tuple[memoryview, Stamp]:
        """Return one range; the server compares the ETag of ``pinned``."""
        options: GetOptions = {"range": (start, stop)}
        if pinned and pinned.version:
            options["if_match"] = pinned.version
        result = obstore.get(self._reader, self._path(key), options=options)
        return memoryview(result.bytes()), _stamp_of(result.meta)

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes of an object and its stamp."""
        try:
            payload, stamp = self.read(key, 0, max(num_bytes, 1), None)
        except exceptions.BaseError as error:
            # No range of an empty object can be satisfied.
            if self.failure(error).status == 416 and (stamp := self.stamp(key)).size == 0:
                return b"", stamp
            raise
        return bytes(payload[:num_bytes]), stamp

    def list(self, folder: str, at_most: int | None) -> Pages[Mapping[str, Stamp]]:
        """Return all objects below ``folder``, by name."""
        if self._scheme == "s3":
            return self._pages(self._path(folder), "", partial(files_on, root=self._root))
        return self._pages_elsewhere(self._path(folder) or None, at_most)

    def listing(self) -> Pages[Listing]:
        """Return the objects and the folders directly under the URL."""
        if self._scheme == "s3":
            return self._pages(self._root, "/", partial(listing_on, root=self._root))
        return Pages.of_one(self._listing_elsewhere)

    def _pages_elsewhere(self, folder: str | None, at_most: int | None) -> Pages[Mapping[str, Stamp]]:
        """Return pages of obstore's, which gives no token: after a failure it lists anew, from the last key on.

        The last one has all, as the marker of a folder is told by what comes after it.
        """
        streams: list[ListStream[Sequence[ObjectMeta]]] = []
        found: list[ObjectMeta] = []

        def ask(cursor: Cursor) -> tuple[Mapping[str, Stamp], Cursor | None]:
            if not streams:
                streams.append(obstore.list(self._reader, folder, offset=cursor.get("after"), chunk_size=LISTED))
            try:
                page = next(streams[0], ())
            except self.errors:
                streams.clear()
                raise
            found.extend(page)
            if page and (at_most is None or len(found) < at_most):
                return {}, {"after": page[-1]["path"]}
            return self._by_key(found), None

        return Pages(ask)

    def _listing_elsewhere(self) -> Listing:
        found = obstore.list_with_delimiter(self._reader, self._root or None)
        folders = tuple(name for prefix in found["common_prefixes"] if (name := prefix.rpartition("/")[2]))
        files = {
            key: stamp for key, stamp in self._by_key(found["objects"]).items() if stamp.size or key not in folders
        }
        return Listing(files, folders)

    @contextmanager
    def create(self, key: str, part_bytes: int) -> Iterator[Sink]:
        """Upload parts side by side; leaving by an exception aborts the upload."""
        start = partial(
            obstore.open_writer,
            self._writer,
            self._path(key),
            buffer_size=part_bytes,
            max_concurrency=PARTS_IN_FLIGHT,
        )
        with Upload(start, part_bytes, self._policy) as upload:
            yield upload

    def put(self, key: str, payload: bytes) -> str:
        """Write a small object in one request."""
        return obstore.put(self._reader, self._path(key), payload, use_multipart=False)["e_tag"] or ""

    def put_new(self, key: str, payload: bytes) -> str:
        """Write a small object unless there is one."""
        reply = obstore.put(self._reader, self._path(key), payload, mode="create", use_multipart=False)
        return reply["e_tag"] or ""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, in bulk where the store can and does not mind absent ones."""
        paths = [self._path(key) for key in keys]
        if self._scheme == "s3":
            obstore.delete(self._reader, paths)
            return
        for path in paths:
            with suppress(FileNotFoundError):
                obstore.delete(self._reader, path)

    def has_md5_etags(self) -> bool:
        """Return whether ETags may be held against what was sent."""
        return self._scheme == "s3" and has_md5_etags(locate_bucket(self._bucket, self._options))

    def checksums(self, key: str) -> Mapping[str, str]:
        """Return what S3 has kept of an object's checksums."""
        return checksums_of(self._bucket_at(), self._path(key)) if self._scheme == "s3" else {}

    @property
    def endpoint(self) -> str:
        """The endpoint and what names it."""
        return endpoint_in_words(self._options) if self._scheme == "s3" else ""

    def endpoint_mistake(self) -> str | None:
        """Return what must be changed about the endpoint."""
        endpoint = endpoint_of(self._options) if self._scheme == "s3" else None
        return endpoint_mistake(endpoint, f"/{self._bucket}") if endpoint else None

    def asks_to_wait_s(self, key: str) -> float | None:
        """Return what a throttle asks for, by a request now and then: obstore shows no headers. AWS never asks."""
        is_due = time.monotonic() - self._asked_at > ASK_EVERY_S
        if self._scheme != "s3" or not is_due or (bucket := self._bucket_at()).endpoint is None:
            return None
        self._asked_at = time.monotonic()
        return asks_to_wait_s(bucket, self._path(key), self._policy.read_timeout_s)

    def uploads(self) -> Pages[Sequence[HalfWritten]] | None:
        """Return the open multipart uploads below the URL; known of S3 only."""
        return open_uploads(self._bucket_at(), self._root) if self._scheme == "s3" else None

    def abort(self, key: str, upload: str) -> None:
        """Abort a multipart upload of S3."""
        abort_upload(self._bucket_at(), self._path(key), upload)

    @property
    def _reader(self) -> "Connection":
        return self._connection(repeats=False)

    @property
    def _writer(self) -> "Connection":
        return self._connection(repeats=True)

    def _connection(self, *, repeats: bool) -> "Connection":
        """Return the connection whose requests obstore repeats (parts of uploads), or the one where we do."""
        with self._lock:
            if repeats not in self._connections:
                try:
                    self._connections[repeats] = self._connect(repeats)
                except RecipeError:
                    raise
                except (exceptions.BaseError, ValueError) as error:
                    place, reason = f"{self._scheme}://{self._bucket}", scrub(detail_of(str(error)))
                    raise RecipeError(
                        f"cannot configure {place}: {reason}{_HINTS.get(self._scheme, '; see stockflow.storage')}"
                    ) from None
            return self._connections[repeats]

    def _connect(self, repeats: bool) -> "Connection":
        retries = _retries_of(self._policy) if repeats else _NO_RETRIES
        timeouts = _write_timeouts(self._policy) if repeats else _read_timeouts(self._policy)
        if self._scheme == "s3":
            return obstore_bucket(self._bucket_at(), retries, timeouts)
        return _connect_elsewhere(self._scheme, self._bucket, self._options, retries, timeouts)

    def _bucket_at(self) -> Bucket:
        if not self._options.anonymous:
            require_credentials()
        return locate_bucket(self._bucket, self._options)

    def _pages(self, folder: str, delimiter: str, read: Callable[[Mapping[str, Any]], P]) -> Pages[P]:
        return list_pages(self._bucket_at(), folder, delimiter, self._policy.read_timeout_s, read)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".strip("/")

    def _by_key(self, metas: "Sequence[ObjectMeta]") -> dict[str, Stamp]:
        top = f"{self._root}/" if self._root else ""
        inside = (meta for meta in metas if meta["path"].startswith(top))
        stamps = {meta["path"].removeprefix(top): _stamp_of(meta) for meta in inside}
        # obstore gives the empty marker "folder/" of a web console as "folder".
        folders = {key[:end] for key in stamps for end in _slashes(key)}
        return {key: stamp for key, stamp in stamps.items() if stamp.size or key not in folders}


def _connect_elsewhere(
    scheme: str, bucket: str, options: StoreOptions, retries: "RetryConfig", timeouts: "ClientConfig"
) -> "Connection":
    """Return a Google or Azure client with its default credentials. Written from the documentation."""
    from obstore.store import AzureStore, GCSStore

    if scheme == "gs" and not options.anonymous:
        _require_google_credentials()
    store_type: Any = GCSStore if scheme == "gs" else AzureStore
    return store_type(  # type: ignore[no-any-return]
        bucket,
        client_options={"connect_timeout": CONNECT_TIMEOUT, **timeouts},
        retry_config=retries,
        **({"skip_signature": True} if options.anonymous else {}),
    )


def _require_google_credentials() -> None:
    """Refuse early when there are no credentials at all: obstore would go on asking for the metadata server.

    Raises:
        AccessDeniedError: no key file is named, nobody signed in, and this is no machine of Google's.
    """
    signed_in = Path("~/.config/gcloud/application_default_credentials.json").expanduser()
    if any(os.environ.get(name) for name in _GOOGLE_VARIABLES) or signed_in.exists():
        return
    host, _, port = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal").partition(":")
    try:
        socket.create_connection((host, int(port or 80)), timeout=CONNECT_TIMEOUT.total_seconds()).close()
    except OSError:
        raise AccessDeniedError(
            "no Google credentials found; set GOOGLE_APPLICATION_CREDENTIALS, run `gcloud auth application-default "
            "login`, or set `anonymous: true` for public objects"
        ) from None


def _read_timeouts(policy: RetryPolicy) -> "ClientConfig":
    silence = timedelta(seconds=policy.read_timeout_s)
    return {"read_timeout": silence, "timeout": _SLOW_READ * silence}


def _write_timeouts(policy: RetryPolicy) -> "ClientConfig":
    # No read_timeout: it would run while a part is still being sent (measured).
    return {"timeout": timedelta(seconds=policy.write_timeout_s)}


def _retries_of(policy: RetryPolicy) -> "RetryConfig":
    return {
        "max_retries": policy.attempts - 1,
        # obstore sends nothing again that failed later than this: one part that stalled must not be the last.
        "retry_timeout": timedelta(seconds=max(policy.deadline_s, 2 * policy.write_timeout_s)),
        "backoff": {
            "init_backoff": timedelta(seconds=policy.first_delay_s),
            "max_backoff": timedelta(seconds=policy.max_delay_s),
        },
    }


def _stamp_of(meta: "ObjectMeta") -> Stamp:
    """Return size and ETag, which every object of these stores has: an answer without one is of something else."""
    if not meta["e_tag"]:
        raise WrongAnswerError("the answer has no ETag")
    return Stamp(size=meta["size"], version=meta["e_tag"])


def _slashes(key: str) -> list[int]:
    return [match.start() for match in re.finditer("/", key)]
