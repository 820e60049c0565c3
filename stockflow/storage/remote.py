"""What all remote stores share: keys, retries, typed errors. A client only speaks its library's language."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from stockflow.errors import (
    AlreadyExistsError,
    LostUploadError,
    RecipeError,
    StockflowError,
    StorageError,
)
from stockflow.storage.base import HalfWritten, Listing, NewObject, Pin, Stamp, changed, check_key
from stockflow.storage.checksums import WholeObjects
from stockflow.storage.client import Client, Pages
from stockflow.storage.etags import PartDigests, md5_etag, names_same
from stockflow.storage.faults import Failure, Operation, WrongAnswerError, storage_error, user_error
from stockflow.storage.parts import RANGE_BYTES, SMALL_BYTES, part_bytes
from stockflow.storage.retry import RetryLoop, RetryPolicy
from stockflow.storage.sinks import Collected, NamedSink
from stockflow.text.redaction import redact

T = TypeVar("T")
LAG_ATTEMPTS = 6
"""How often a store is asked for what was written here a moment ago; the pauses between add up to three seconds."""
READS_DIFFER = "two reads of it over two connections gave different bytes: the network or the store damages them"


class RemoteStore:
    """A ``Store`` over a client."""

    def __init__(
        self, url: str, connect: Callable[[], Client], policy: RetryPolicy, *, only: str = "", reads_twice: bool = False
    ) -> None:
        """Take what makes clients for ``url``; nothing is contacted yet.

        Args:
            url: normalized.
            connect: returns a client that shares no connection with others.
            policy: how requests are repeated.
            only: the one file of weights there that is meant; empty: whatever lies under the URL.
            reads_twice: whether what is read is read again by another client, and must be the same.
        """
        self.url = f"{url}/{only}" if only else url
        self.only = only
        self._folder = url
        self._client = connect()
        self._witness = connect() if reads_twice else None
        self._policy = policy
        self._retries = RetryLoop(policy)
        self._known_md5_etags: bool | None = None
        self._written: set[str] = set()
        """keys that were written here: what is not found under one of them may be found a moment later"""
        self._whole = WholeObjects(self._client)

    def where(self, key: str = "") -> str:
        """Return the URL of an object, or of the prefix, without secrets."""
        return redact(f"{self._folder}/{key}" if key else self._folder)

    @property
    def pin(self) -> Pin:
        """How reads are held to a stamp."""
        return self._client.pin

    @property
    def over_http(self) -> bool:
        """Whether what is read travels without TLS."""
        return self._client.over_http

    @property
    def num_retries(self) -> int:
        """Requests that failed and were repeated, since the store was opened."""
        return self._retries.num_retries

    def stamp(self, key: str) -> Stamp:
        """Return the present state of an object."""
        return self._run("stat", key, partial(self._client.stamp, check_key(key)))

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes and the stamp, from one answer."""
        earlier: set[bytes] = set()

        def attempt() -> tuple[bytes, Stamp]:
            payload, stamp = self._client.read_head(check_key(key), num_bytes)
            if len(payload) != min(num_bytes, stamp.size):
                raise WrongAnswerError(f"{len(payload)} bytes came of the first {min(num_bytes, stamp.size)}")
            if len(payload) == stamp.size:
                self._whole.check(key, payload, stamp, earlier)
            if self._witness is not None and self._witness.read_head(key, num_bytes) != (payload, stamp):
                raise WrongAnswerError(READS_DIFFER)
            return payload, stamp

        return self._run("read", key, attempt)

    def read_into(self, key: str, start: int, buffer: memoryview, stamp: Stamp) -> None:
        """Fill ``buffer`` by requests of at most ``RANGE_BYTES``, each held to ``stamp`` if the store can."""
        check_key(key)
        target = buffer.cast("B")
        earlier: set[bytes] = set()

        def attempt() -> None:
            for done in range(0, target.nbytes, RANGE_BYTES):
                self._read_range(key, start + done, target[done : done + RANGE_BYTES], stamp)
            if target.nbytes == stamp.size:
                self._whole.check(key, target, stamp, earlier)

        self._run("read", key, attempt, stamp)

    def list(self, prefix: str = "", *, at_most: int | None = None) -> dict[str, Stamp]:
        """Return every object below ``prefix``, recursively, or the first ones found."""
        folder = check_key(prefix.rstrip("/")) if prefix else ""
        pages = self._each("list", folder, self._client.list(folder, at_most))
        found = dict(islice(chain.from_iterable(page.items() for page in pages), at_most))
        return dict(sorted(found.items()))

    def list_top(self) -> dict[str, Stamp]:
        """Return the objects directly under the URL."""
        return self.listing().files

    def listing(self) -> Listing:
        """Return the objects and the folders directly under the URL."""
        pages = list(self._each("list", "", self._client.listing()))
        files = dict(chain.from_iterable(page.files.items() for page in pages))
        folders = chain.from_iterable(page.folders for page in pages)
        return Listing(dict(sorted(files.items())), tuple(sorted(folders)))

    def check_links(self, keys: Iterable[str]) -> None:
        """Refuse nothing: objects are no links."""

    @contextmanager
    def create(self, key: str, *, size: int | None = None) -> Iterator[NewObject]:
        """Write one object, all or nothing; ``size``, if known, keeps the number of parts within limits.

        What arrived is held against what was sent, where the store's ETags are MD5s. What one request can write is
        written by ``put``, which repeats it whatever went wrong.
        """
        if size is not None and size <= min(part_bytes(size), SMALL_BYTES):
            collected = Collected()
            yield collected
            self.put(key, collected.getvalue())
            return
        refuse = partial(self._refused_upload, key)
        raised: BaseException | None = None
        sent: PartDigests | None = None
        try:
            with self._client.create(check_key(key), part_bytes(size)) as sink:
                sent = PartDigests(part_bytes(size)) if self._has_md5_etags else None
                try:
                    yield NamedSink(sink, sent, self._client.errors, refuse)
                except BaseException as error:
                    raised = error
                    raise
        except self._client.errors as error:
            if error is raised:  # the caller's own trouble, not the store's
                raise
            # The last answer of an upload may be lost after the store has acted on it.
            if raised is not None or sent is None or not self._holds(key, sent):
                raise refuse(error) from None
            return
        self._written.add(key)
        if sent is not None:
            self._check_upload(key, sent)

    def put(self, key: str, payload: bytes) -> None:
        """Write a small object, replacing what was there."""

        def attempt() -> None:
            if not self._arrived(key, payload, self._client.put(check_key(key), payload)):
                raise WrongAnswerError("what arrived is not what was sent")

        self._run("write", key, attempt)
        self._written.add(key)

    def put_new(self, key: str, payload: bytes) -> None:
        """Write a small object that must not exist yet.

        An attempt whose answer was lost may have succeeded: found by a later attempt, the object is ours if
        it has our bytes. Rivals for one key must therefore write different payloads.
        """
        num_before = self.num_retries
        try:
            etag = self._run("create", key, partial(self._put_new, check_key(key), payload))
        except AlreadyExistsError:
            if self.num_retries == num_before or self.read_head(key, len(payload) + 1)[0] != payload:
                raise
            return
        self._written.add(key)
        if not self._arrived(key, payload, etag):
            self.put(key, payload)  # the key is ours; what lies there is not

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is already gone is no error."""
        if doomed := [check_key(key) for key in keys]:
            self._written -= set(doomed)
            self._run("delete", doomed[0], partial(self._client.delete, doomed))

    def half_written(self, *, also_held: bool = False) -> Sequence[HalfWritten] | None:
        """Return the open multipart uploads below the URL, those of live writers included."""
        del also_held
        pages = self._client.uploads()
        found: list[HalfWritten] = []
        while pages and not pages.are_over:
            page = self._run("list uploads below", "", partial(self._uploads_on_next, pages))
            if page is None:
                return None
            found += page
        return found if pages else None

    def _uploads_on_next(self, pages: Pages[Sequence[HalfWritten]]) -> Sequence[HalfWritten] | None:
        try:
            return pages.next()
        except self._client.errors as error:
            if self._client.failure(error).status in (405, 501):
                return None
            raise

    def discard(self, leftovers: Iterable[HalfWritten]) -> None:
        """Abort multipart uploads."""
        for leftover in leftovers:
            key = check_key(leftover.key)
            self._run("abort the upload of", key, partial(self._client.abort, key, leftover.name))

    def creates_exclusively(self, key: str, payload: bytes) -> bool:
        """Return whether the store itself refuses to create ``key``, which exists, again."""

        def attempt() -> bool:
            try:
                self._client.put_new(check_key(key), payload)
            except self._client.errors as error:
                if (status := self._client.failure(error).status) in (412, 501):
                    return status == 412
                raise
            return False

        return self._run("create", key, attempt)

    def pins_reads(self, key: str) -> bool:
        """Return whether the store itself refuses a read held to an ETag that ``key`` never had."""

        def attempt() -> bool:
            try:
                self._client.read(check_key(key), 0, 1, Stamp(0, '"stockflow-asks-whether-this-is-compared"'))
            except self._client.errors as error:
                if self._client.failure(error).status == 412:
                    return True
                raise
            return False

        return self.pin != "if-match" or self._run("read", key, attempt)

    def _put_new(self, key: str, payload: bytes) -> str:
        try:
            return self._client.put_new(key, payload)
        except self._client.errors as error:
            if self._client.failure(error).status != 501:
                raise
            # Swift has no conditional writes. Looking first leaves a moment between two requests to a rival.
            if self._is_there(key):
                raise AlreadyExistsError(f"{self.where(key)} already exists") from None
            return self._client.put(key, payload)

    @property
    def _has_md5_etags(self) -> bool:
        if self._known_md5_etags is None:
            self._known_md5_etags = self._client.has_md5_etags()
        return self._known_md5_etags

    def _arrived(self, key: str, payload: bytes, etag: str) -> bool:
        """Whether a small object is what was sent, by its ETag; with another ETag its bytes decide."""
        if not etag or not self._has_md5_etags or names_same(etag, (md5_etag(payload),)):
            return True
        has_arrived = self.read_head(key, len(payload) + 1)[0] == payload
        self._known_md5_etags = not has_arrived
        return has_arrived

    def _holds(self, key: str, sent: PartDigests) -> bool:
        with suppress(StockflowError):
            found = self.stamp(key)
            return found.size == sent.num_bytes and names_same(found.version, sent.etags())
        return False

    def _check_upload(self, key: str, sent: PartDigests) -> None:
        """Hold an object against what was sent, by its ETag, asked for twice; with another ETag its bytes decide.

        Raises:
            LostUploadError: they are not what was sent.
        """
        for ask in (self.stamp, lambda key: self.read_head(key, 1)[1]):
            found = ask(key)
            if found.size == sent.num_bytes and names_same(found.version, sent.etags()):
                return
        if found.size != sent.num_bytes or self._digests_of(key, found, sent.part_bytes).etags() != sent.etags():
            raise LostUploadError(
                f"{self.where(key)} is not what was sent: found {found}; expected {sent.num_bytes} bytes, "
                f"{sent.etags()[0]}. The network or the store damaged it, or another writes there; run again"
            )
        self._known_md5_etags = False  # some stores, and keys of a KMS, make ETags of another kind

    def _digests_of(self, key: str, stamp: Stamp, part_bytes: int) -> PartDigests:
        digests = PartDigests(part_bytes)
        buffer = memoryview(bytearray(min(RANGE_BYTES, stamp.size)))
        for start in range(0, stamp.size, RANGE_BYTES):
            piece = buffer[: min(RANGE_BYTES, stamp.size - start)]
            self._read_range(key, start, piece, stamp)
            digests.update(piece)
        return digests

    def _is_there(self, key: str) -> bool:
        try:
            self._client.stamp(key)
        except self._client.errors as error:
            if self._client.failure(error).status != 404:
                raise
            return False
        return True

    def _read_range(self, key: str, start: int, target: memoryview, stamp: Stamp) -> None:
        def attempt() -> None:
            payload, found = self._client.read(key, start, start + target.nbytes, stamp)
            # A store that ignores If-Match still says whose bytes it sent.
            if found is not None and found != stamp:
                raise WrongAnswerError(f"{found} came, expected {stamp}")
            if payload.nbytes != target.nbytes:
                raise WrongAnswerError(
                    f"{payload.nbytes} bytes came from byte {start}, expected {target.nbytes}: "
                    "it is shorter than planned, or its server ignores range requests"
                )
            target[:] = payload
            del payload  # or two ranges would be held by each thread
            self._read_again(key, start, target, stamp)

        self._run("read", key, attempt, stamp)

    def _read_again(self, key: str, start: int, first: memoryview, stamp: Stamp) -> None:
        if self._witness is None:
            return
        second, _ = self._witness.read(key, start, start + first.nbytes, stamp)
        if hashlib.sha256(first).digest() != hashlib.sha256(second).digest():
            raise WrongAnswerError(READS_DIFFER)

    def _each(self, operation: Operation, key: str, pages: Pages[T]) -> Iterator[T]:
        """Yield pages, each asked for by attempts of its own."""
        while not pages.are_over:
            yield self._run(operation, key, pages.next)

    def _run(self, operation: Operation, key: str, attempt: Callable[[], T], pinned: Stamp | None = None) -> T:
        waits: list[float | None] = [None]

        def asked(error: Exception) -> float | None:
            failure = self._failure(error)
            asks = failure.is_throttle and failure.wait_s is None
            waits.append(self._client.asks_to_wait_s(key) if asks else failure.wait_s)
            return waits[-1]

        def judge(error: Exception, attempts: int, is_last: bool) -> StockflowError | None:
            failure = self._failure(error)
            is_ours = key in self._written and operation in ("stat", "read")
            if failure.status == 404 and is_ours and attempts < LAG_ATTEMPTS:
                return None
            is_another = failure.status in (412, 416) or isinstance(error, WrongAnswerError)
            if pinned is not None and is_another and (found := self.stamp(key)) != pinned:
                return changed(self.where(key), pinned, found)
            if failure.is_transient and not is_last:
                return None
            return self._final(replace(failure, wait_s=waits[-1]), attempts, operation, key)

        catch = (*self._client.errors, WrongAnswerError)
        return self._retries.run(attempt, catch=catch, judge=judge, asked=asked, where=self.where())

    def _failure(self, error: Exception) -> Failure:
        return Failure(str(error)) if isinstance(error, WrongAnswerError) else self._client.failure(error)

    def _refused_upload(self, key: str, error: Exception) -> StockflowError:
        """Return the error for an upload, whose requests the client library repeats."""
        failure = self._failure(error)
        told = failure.attempts or (self._policy.attempts if failure.status is None else 1)
        refusal = self._final(failure, told, "write", key)
        is_lost = failure.is_of_lost_upload or (failure.is_transient and told == 1)
        return LostUploadError(str(refusal)) if is_lost and type(refusal) is StorageError else refusal

    def _final(self, failure: Failure, attempts: int, operation: Operation, key: str) -> StockflowError:
        where = self.where(key)
        if operation == "create" and failure.status == 412:
            return AlreadyExistsError(f"{where} already exists")
        if failure.may_be_endpoint and (mistake := self._client.endpoint_mistake()):
            return RecipeError(
                f"cannot {operation} {where} ({failure}): the endpoint is {self._client.endpoint}, and {mistake}"
            )
        return user_error(failure, operation, where) or storage_error(
            failure, operation, where, attempts, endpoint=self._client.endpoint
        )
