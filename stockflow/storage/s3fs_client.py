"""s3:// through s3fs: twice obstore's CPU per byte, for stores that obstore does not suit."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from fsspec.asyn import sync

from stockflow.storage.base import HalfWritten, Listing, Pin, Sink, Stamp, StoreOptions
from stockflow.storage.client import P, Pages
from stockflow.storage.endpoints import endpoint_mistake
from stockflow.storage.faults import Failure, RequestError, WrongAnswerError
from stockflow.storage.fsspec_faults import ERRORS, failure_of
from stockflow.storage.retry import RetryPolicy
from stockflow.storage.s3 import (
    Bucket,
    endpoint_in_words,
    endpoint_of,
    has_md5_etags,
    is_over_http,
    locate_bucket,
    require_credentials,
    s3fs_filesystem,
)
from stockflow.storage.s3_pages import files_on, listing_on
from stockflow.storage.s3_requests import abort_upload, checksums_of, list_pages, open_uploads, put_new_object
from stockflow.storage.s3fs_upload import PartsUpload


class S3fsClient:
    """Single requests through s3fs's connection, with the If-Match that its ``cat_file`` does not send."""

    pin: Pin = "if-match"
    errors = ERRORS

    def __init__(self, url: str, options: StoreOptions, policy: RetryPolicy) -> None:
        """Take a normalized URL; connections are made at the first use, in the process that uses them.

        ``policy`` is for timeouts, and for the parts of uploads, which only the library can repeat.
        """
        self._bucket, _, self._root = url.removeprefix("s3://").partition("/")
        self._options = options
        self._policy = policy
        self._lock = threading.Lock()
        self._kept: dict[float, Any] = {}

    @property
    def over_http(self) -> bool:
        """Whether bytes travel without TLS."""
        return is_over_http(self._options)

    def failure(self, error: Exception) -> Failure:
        """Return what an exception of s3fs, aiohttp or botocore says."""
        found = error.failure if isinstance(error, RequestError) else failure_of(error)
        return replace(found, is_unsigned=self._options.anonymous)

    def stamp(self, key: str) -> Stamp:
        """Return size and ETag of an object, by HEAD."""
        try:
            reply = self._call("head_object", Key=self._path(key))
        except FileNotFoundError:
            # The answer to a HEAD has no body; that of a GET says whether it is the bucket that is missing.
            return self.read(key, 0, 1, None)[1]
        return Stamp(reply["ContentLength"], _etag_of(reply))

    def read(self, key: str, start: int, stop: int, pinned: Stamp | None) -> tuple[memoryview, Stamp]:
        """Return one range; the server compares the ETag of ``pinned``."""
        match = {"IfMatch": pinned.version} if pinned and pinned.version else {}
        span = f"bytes={start}-{stop - 1}"
        payload, reply = sync(self._fs.loop, self._get, Key=self._path(key), Range=span, **match)
        # Without Content-Range the server ignored the range and sent everything.
        range_sent, _, size = reply.get("ContentRange", f"bytes 0-/{reply['ContentLength']}").rpartition("/")
        if not range_sent.startswith(f"bytes {start}-"):
            raise WrongAnswerError(f"{range_sent} came, expected {span}")
        return memoryview(payload), Stamp(int(size), _etag_of(reply))

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes of an object and its stamp."""
        try:
            payload, stamp = self.read(key, 0, max(num_bytes, 1), None)
        except OSError as error:
            # No range of an empty object can be satisfied.
            if self.failure(error).status == 416 and (stamp := self.stamp(key)).size == 0:
                return b"", stamp
            raise
        return bytes(payload[:num_bytes]), stamp

    def list(self, folder: str, at_most: int | None) -> Pages[Mapping[str, Stamp]]:
        """Return all objects below ``folder``, by name."""
        del at_most
        return self._pages(self._path(folder), "", partial(files_on, root=self._root))

    def listing(self) -> Pages[Listing]:
        """Return the objects and the folders directly under the URL."""
        return self._pages(self._root, "/", partial(listing_on, root=self._root))

    @contextmanager
    def create(self, key: str, part_bytes: int) -> Iterator[Sink]:
        """Upload parts one after another; leaving by an exception aborts the upload."""
        call = partial(self._call_on, self._connected(self._policy.write_timeout_s))
        upload = PartsUpload(call, self._path(key), part_bytes, self._policy, self.errors, self.failure)
        try:
            yield upload
            upload.finish()
        except BaseException:
            with suppress(*self.errors):
                upload.abort()
            raise

    def put(self, key: str, payload: bytes) -> str:
        """Write a small object in one request."""
        return _etag_of(self._call("put_object", Key=self._path(key), Body=payload))

    def put_new(self, key: str, payload: bytes) -> str:
        """Write a small object unless there is one."""
        # Not through s3fs: aiohttp silently repeats a PUT whose answer is lost, and the second one would find
        # the first one's object (aiohttp 3.14, `_retry_connection`).
        return put_new_object(self._bucket_at(), self._path(key), payload, self._policy.read_timeout_s)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects one by one: not every store knows the bulk request."""
        for key in keys:
            self._call("delete_object", Key=self._path(key))

    def has_md5_etags(self) -> bool:
        """Return whether ETags may be held against what was sent."""
        return has_md5_etags(self._bucket_at())

    def checksums(self, key: str) -> Mapping[str, str]:
        """Return what S3 has kept of an object's checksums."""
        return checksums_of(self._bucket_at(), self._path(key))

    @property
    def endpoint(self) -> str:
        """The endpoint and what names it."""
        return endpoint_in_words(self._options)

    def endpoint_mistake(self) -> str | None:
        """Return what must be changed about the endpoint."""
        endpoint = endpoint_of(self._options)
        return endpoint_mistake(endpoint, f"/{self._bucket}") if endpoint else None

    def asks_to_wait_s(self, key: str) -> None:
        """Return None: errors tell."""
        del key

    def uploads(self) -> Pages[Sequence[HalfWritten]]:
        """Return the open multipart uploads below the URL."""
        return open_uploads(self._bucket_at(), self._root)

    def abort(self, key: str, upload: str) -> None:
        """Abort a multipart upload."""
        abort_upload(self._bucket_at(), self._path(key), upload)

    @property
    def _fs(self) -> Any:
        return self._connected(self._policy.read_timeout_s)

    def _connected(self, timeout_s: float) -> Any:
        """Return the connection that waits so long for answers, made once."""
        with self._lock:
            if timeout_s not in self._kept:
                self._kept[timeout_s] = s3fs_filesystem(self._bucket_at(), timeout_s=timeout_s)
            return self._kept[timeout_s]

    def _bucket_at(self) -> Bucket:
        if not self._options.anonymous:
            require_credentials()
        return locate_bucket(self._bucket, self._options)

    def _call(self, method: str, **arguments: object) -> Any:
        return self._call_on(self._fs, method, **arguments)

    def _call_on(self, filesystem: Any, method: str, **arguments: object) -> Any:
        return filesystem.call_s3(method, Bucket=self._bucket, **arguments)

    async def _get(self, **arguments: object) -> tuple[bytes, Mapping[str, Any]]:
        reply = await self._fs._call_s3("get_object", Bucket=self._bucket, **arguments)
        async with reply["Body"] as body:
            return await body.read(), reply

    def _pages(self, folder: str, delimiter: str, read: Callable[[Mapping[str, Any]], P]) -> Pages[P]:
        return list_pages(self._bucket_at(), folder, delimiter, self._policy.read_timeout_s, read)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".strip("/")


def _etag_of(answer: Mapping[str, Any]) -> str:
    """Return the ETag, which S3 gives to every object: an answer without one is of something else."""
    if not answer.get("ETag"):
        raise WrongAnswerError("the answer has no ETag")
    return str(answer["ETag"])
