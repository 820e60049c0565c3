"""Everything fsspec can reach: the general path for any URL, s3:// included where the options say so."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

import fsspec
from fsspec.asyn import sync

from stockflow.errors import RecipeError
from stockflow.storage.base import HalfWritten, Listing, Pin, Sink, Stamp, StoreOptions
from stockflow.storage.client import Client, Pages
from stockflow.storage.faults import Failure, scrub
from stockflow.storage.fsspec_faults import ERRORS, failure_of, open_uncommitted
from stockflow.storage.redirects import Guard
from stockflow.storage.remote import RemoteStore
from stockflow.storage.retry import RetryPolicy
from stockflow.text.redaction import redact

_VERSION_KEYS = (
    *("ETag", "etag", "checksum", "oid", "blob_id", "md5"),
    *("mtime", "LastModified", "Last-Modified", "created"),
)
"""what a file system may tell of an object's version, best first"""
MAX_DEPTH = 4
"""Levels of folders that a bounded listing goes down: a web server's pages may lead anywhere."""
_MEMORY_LOCK = threading.Lock()
"""memory:// hands every reader the same file with the same position, and checks before it creates"""


class FsspecStore(RemoteStore):
    """The objects under one URL of any scheme fsspec knows."""

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
        super().__init__(url, partial(_client, url, options, policy), policy, only=only, reads_twice=reads_twice)


def _client(url: str, options: StoreOptions, policy: RetryPolicy) -> Client:
    if not url.startswith("s3://"):
        return FsspecClient(url, options)
    from stockflow.storage.s3fs_client import S3fsClient

    return S3fsClient(url, options, policy)


class FsspecClient:
    """Single requests through any fsspec file system; see ``client.Client``."""

    pin: Pin = "stat"

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Take a normalized URL and find the file system for its scheme.

        Raises:
            RecipeError: fsspec does not know the scheme, or lacks the package for it.
        """
        self._scheme = scheme = url.split("://", 1)[0]
        self._guarded = Guard()
        self._fs = _open_filesystem(scheme, url, options, self._guarded)
        self._root = str(self._fs._strip_protocol(url)).rstrip("/")
        self._guard: AbstractContextManager[object] = _MEMORY_LOCK if scheme == "memory" else nullcontext()
        self._is_buffered = scheme == "memory"
        # The hub's client reads each range through a file, which would read 5 MiB ahead of it.
        self._reading = {"cache_type": "none"} if scheme == "hf" else {}
        self._answers_ranges = scheme not in ("http", "https")
        self.errors = (*ERRORS, *_errors_of(scheme))

    @property
    def over_http(self) -> bool:
        """Whether bytes travel without TLS."""
        endpoint = os.environ.get("HF_ENDPOINT", "") if self._scheme == "hf" else f"{self._scheme}://"
        return endpoint.startswith("http://")

    def failure(self, error: Exception) -> Failure:
        """Return what an exception of fsspec or of a library below it says.

        Raises:
            RecipeError: a web server redirects where it is not followed.
        """
        if self._guarded.refusal:
            raise self._guarded.refusal from None
        return failure_of(error)

    def stamp(self, key: str) -> Stamp:
        """Return size and the best version the file system tells."""
        details = self._fs.info(self._path(key))
        if details["type"] == "directory":
            raise FileNotFoundError(f"{key} is a folder")
        return _stamp_of(details)

    def read(self, key: str, start: int, stop: int, pinned: Stamp | None) -> tuple[memoryview, None]:
        """Return one range; nothing ties it to a stamp."""
        del pinned
        if not self._answers_ranges:
            sync(self._fs.loop, self._require_ranges, self._path(key))
            self._answers_ranges = True
        with self._guard:
            return memoryview(self._fs.cat_file(self._path(key), start=start, end=stop, **self._reading)), None

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes and the stamp: two requests, as fsspec has no answer with both."""
        stamp = self.stamp(key)
        wanted = min(num_bytes, stamp.size)
        payload = bytes(self.read(key, 0, wanted, None)[0]) if wanted else b""
        return payload[:wanted], stamp

    def list(self, folder: str, at_most: int | None) -> Pages[Mapping[str, Stamp]]:
        """Return all files below ``folder``, in one piece; the first ones only as deep as a model's folders are."""
        return Pages.of_one(partial(self._list, folder, at_most))

    def listing(self) -> Pages[Listing]:
        """Return the files and the folders directly under the URL, in one piece."""
        return Pages.of_one(self._listing)

    def _list(self, folder: str, at_most: int | None) -> Mapping[str, Stamp]:
        deepest = None if at_most is None else MAX_DEPTH
        with suppress(FileNotFoundError):
            found = self._fs.find(self._path(folder), maxdepth=deepest, detail=True)
            return self._by_key(islice(found.values(), at_most))
        return {}

    def _listing(self) -> Listing:
        with suppress(FileNotFoundError):
            found = self._fs.ls(self._root, detail=True)
            return Listing(self._by_key(found), tuple(self._folders(found)))
        return Listing({}, ())

    @contextmanager
    def create(self, key: str, part_bytes: int) -> Iterator[Sink]:
        """Write one object through fsspec's uncommitted files; into memory in one piece."""
        if not self._is_buffered:
            with open_uncommitted(self._fs, self._path(key), part_bytes) as file:
                yield file
            return
        collected = bytearray()
        yield _Collector(collected)
        self.put(key, bytes(collected))

    def put(self, key: str, payload: bytes) -> str:
        """Write a small object."""
        with self._guard:
            self._fs.pipe_file(self._path(key), payload)
        return ""

    def put_new(self, key: str, payload: bytes) -> str:
        """Write a small object unless there is one."""
        with self._guard:
            self._fs.pipe_file(self._path(key), payload, mode="create")
        return ""

    def has_md5_etags(self) -> bool:
        """Return False: no ETag comes back from a write."""
        return False

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects one by one."""
        for key in keys:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

    def checksums(self, key: str) -> Mapping[str, str]:
        """Return nothing: fsspec does not tell."""
        del key
        return {}

    @property
    def endpoint(self) -> str:
        """Nothing: the URL says it."""
        return ""

    def endpoint_mistake(self) -> None:
        """Return None: the URL is all there is."""

    def asks_to_wait_s(self, key: str) -> None:
        """Return None: errors tell."""
        del key

    def uploads(self) -> Pages[Sequence[HalfWritten]] | None:
        """Return nothing for memory, where nothing outlives a writer; elsewhere fsspec does not tell."""
        return Pages.of_one(tuple) if self._is_buffered else None

    def abort(self, key: str, upload: str) -> None:
        """Never called: ``uploads`` names none."""
        raise NotImplementedError(f"{key}: upload {upload}")

    async def _require_ranges(self, url: str) -> None:
        """Refuse a web server that would send a whole file for every range of it, before it sends one."""
        session = await self._fs.set_session()
        async with session.get(url, headers={"Range": "bytes=0-0"}) as answer:
            if answer.status == 200:
                raise RecipeError(
                    f"the server of {redact(url)} ignores range requests, and stockflow reads parts of files; "
                    "copy the model to a folder or a bucket"
                )

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def _folders(self, found: Any) -> Iterator[str]:
        for details in found:
            folder = str(details["name"]).rstrip("/").removeprefix(f"{self._root}/")
            if details["type"] == "directory" and folder and "/" not in folder:
                yield folder

    def _by_key(self, found: Any) -> dict[str, Stamp]:
        top = f"{self._root}/"
        files = [details for details in found if details["type"] == "file" and str(details["name"]).startswith(top)]
        by_key = {str(details["name"]).removeprefix(top): details for details in files}
        # The links of a web server's listing come without sizes.
        return {
            key: self.stamp(key) if details.get("size") is None else _stamp_of(details)
            for key, details in by_key.items()
        }


class _Collector:
    def __init__(self, collected: bytearray) -> None:
        self._collected = collected

    def write(self, payload: memoryview | bytes, /) -> int:
        self._collected += payload
        return len(payload)


def _open_filesystem(scheme: str, url: str, options: StoreOptions, guard: Guard) -> Any:
    anonymous: dict[str, dict[str, object]] = {"gs": {"token": "anon"}, "az": {"anon": True}}
    try:
        guarded = guard.client_settings() if scheme in ("http", "https") else {}
        return fsspec.filesystem(scheme, **guarded, **(anonymous.get(scheme, {}) if options.anonymous else {}))
    except (ImportError, ValueError) as error:
        raise RecipeError(f"cannot open {redact(url)}: {scrub(str(error))}") from None


def _errors_of(scheme: str) -> tuple[type[Exception], ...]:
    """Return the exceptions of a scheme's own HTTP library that are not OSErrors."""
    if scheme != "hf":
        return ()
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[:1]  # httpx's HTTPError, or httpx2's: it depends on the version


def _stamp_of(details: Mapping[str, Any]) -> Stamp:
    size = int(details["size"] or 0)
    for name in _VERSION_KEYS:
        if value := details.get(name):
            if name.lower() == "etag":
                return Stamp(size, str(value))
            return Stamp(size, f"{name}={value.timestamp() if isinstance(value, datetime) else value}")
    return Stamp(size, "")
