"""A client: one library's way to the objects of a store, in single requests."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from stockflow.storage.base import HalfWritten, Listing, Pin, Sink, Stamp
from stockflow.storage.faults import Failure

P = TypeVar("P")
Cursor = Mapping[str, str]
"""what a request for a page says beside the first one's words; of the first one: nothing"""


class Pages(Generic[P]):
    """Pages that are asked for one by one; one that failed is asked for again, and those before it are kept."""

    def __init__(self, ask: Callable[[Cursor], tuple[P, Cursor | None]]) -> None:
        """Take what returns the page at a cursor, and the next one's cursor; None: there is none."""
        self._ask = ask
        self._cursor: Cursor | None = {}

    @property
    def are_over(self) -> bool:
        """Whether the last page has come."""
        return self._cursor is None

    def next(self) -> P:
        """Return the next page, which there must be, by one request."""
        page, self._cursor = self._ask(self._cursor or {})
        return page

    @classmethod
    def of_one(cls, ask: Callable[[], P]) -> "Pages[P]":
        """Return the pages of what comes in one piece."""
        return cls(lambda _: (ask(), None))


class Client(Protocol):
    """One library's way to the objects under one URL: single requests, its own exceptions, no retries."""

    @property
    def pin(self) -> Pin:
        """How a read with an ``etag`` is held to it."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the library raises when a request fails."""

    @property
    def over_http(self) -> bool:
        """Whether bytes travel without TLS."""

    def failure(self, error: Exception) -> Failure:
        """Return what one of ``errors`` says."""

    def stamp(self, key: str) -> Stamp:
        """Return the present state of an object."""

    def read(self, key: str, start: int, stop: int, pinned: Stamp | None) -> tuple[memoryview, Stamp | None]:
        """Return up to ``stop - start`` bytes and, if the answer tells, the stamp of their object."""

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes and the stamp."""

    def list(self, folder: str, at_most: int | None) -> Pages[Mapping[str, Stamp]]:
        """Return all objects below ``folder`` (empty: the URL itself), by key; not many more than ``at_most``."""

    def listing(self) -> Pages[Listing]:
        """Return the objects directly under the URL, by key, and the folders beside them."""

    def create(self, key: str, part_bytes: int) -> AbstractContextManager[Sink]:
        """Write one object in parts, all or nothing."""

    def put(self, key: str, payload: bytes) -> str:
        """Write a small object; return its ETag, empty where the library does not tell."""

    def put_new(self, key: str, payload: bytes) -> str:
        """Write a small object unless there is one (then: a failure with status 412); return its ETag."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects that may be gone already."""

    def has_md5_etags(self) -> bool:
        """Return whether an ETag may be held against the MD5 of what was sent."""

    def checksums(self, key: str) -> Mapping[str, str]:
        """Return what the store has kept of an object's checksums, by S3's names; nothing where it keeps none."""

    @property
    def endpoint(self) -> str:
        """The address that requests go to and what names it, in words; empty where it is the service's own."""

    def endpoint_mistake(self) -> str | None:
        """Return what must be changed about the endpoint, asked there; None if nothing is seen."""

    def asks_to_wait_s(self, key: str) -> float | None:
        """Return for how long a store that throttles asks to be left alone, where its errors do not tell; or None."""

    def uploads(self) -> Pages[Sequence[HalfWritten]] | None:
        """Return the open multipart uploads below the URL; None where they cannot be listed."""

    def abort(self, key: str, upload: str) -> None:
        """Abort an upload that may be gone already."""
