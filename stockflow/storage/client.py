"""A client: one library's way to the objects of a store, in single requests."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from stockflow.storage.base import HalfWritten, Listing, Pin, Sink, Stamp
from stockflow.storage.faults import Failure


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

    def list(self, folder: str, at_most: int | None) -> Mapping[str, Stamp]:
        """Return all objects below ``folder`` (empty: the URL itself), by key; not many more than ``at_most``."""

    def listing(self) -> Listing:
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

    def uploads(self) -> Sequence[HalfWritten] | None:
        """Return the open multipart uploads below the URL; None where they cannot be listed."""

    def abort(self, key: str, upload: str) -> None:
        """Abort an upload that may be gone already."""
