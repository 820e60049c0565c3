"""What every store can do, and what identifies one state of an object."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

from stockflow.errors import InputChangedError, RecipeError
from stockflow.storage.sightings import Sightings
from stockflow.text.strictjson import shown

Pin = Literal["if-match", "open-etag", "stat"]
"""How a store holds a read to a stamp.

``if-match``: each range request carries the ETag and the server refuses another object.
``open-etag``: the client library compares ETags of the object it opened.
``stat``: stamps are compared by us, on every read (local files) or before and after each shard.
"""


@dataclass(frozen=True, slots=True)
class Stamp:
    """One state of an object: equal stamps mean equal bytes, as far as the store can tell."""

    size: int
    """bytes"""
    version: str
    """the ETag of an object, ``mtime_ns=...`` of a file, empty where the store has nothing"""

    def __str__(self) -> str:
        """Return both, for a sentence."""
        return f"{self.size:,} bytes, {self.version or 'no version'}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies directly under a prefix."""

    files: dict[str, Stamp]
    """by name"""
    folders: tuple[str, ...]
    """names, sorted; a link to a folder is none"""


@dataclass(frozen=True, slots=True)
class HalfWritten:
    """What an object that has not appeared yet is made of."""

    key: str
    """of the object that was to appear"""
    name: str
    """the id of an open multipart upload, or the name of a temporary file beside the key"""
    is_abandoned: bool
    """whether nobody can be writing it any more; False: the store cannot tell"""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach the objects under one URL prefix. Never a secret: those come from the environment."""

    endpoint: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    anonymous: bool = False
    requester_pays: bool = False
    kms_key: str | None = None
    ca_bundle: str | None = None
    client: Literal["auto", "obstore", "fsspec"] = "auto"
    """``fsspec`` forces the general path where the fast one (obstore) would be chosen"""


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Store options by URL prefix, which ends where a folder does; the longest matching prefix wins."""

    by_prefix: Mapping[str, StoreOptions] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()
    """local folders, resolved, that links of weights may lead into; named by who runs the merge, never by a recipe"""
    sightings: Sightings | None = field(default=None, compare=False)
    """of the run that reads local models"""
    reads_twice: bool = False
    """whether what is read of remote models is read again over another connection and compared"""

    def for_url(self, url: str) -> StoreOptions:
        """Return the options that apply to ``url``."""
        matching = [prefix for prefix in self.by_prefix if f"{url}/".startswith(f"{prefix.rstrip('/')}/")]
        return self.by_prefix[max(matching, key=len)] if matching else StoreOptions()


class Sink(Protocol):
    """Where the bytes of one new object go, in order."""

    def write(self, payload: memoryview | bytes, /) -> object:
        """Append all of ``payload``, or raise; it may be reused by the caller as soon as this returns."""


class NewObject(Sink, Protocol):
    """An object on its way, which nobody sees yet."""

    def sync(self) -> None:
        """Make durable what was written, as far as that takes time and can be done before the object appears."""


class Store(Protocol):
    """The objects under one URL. Keys are relative, ``/``-separated and never leave the prefix.

    Methods raise NotFoundError and AccessDeniedError for what the user must mend, StorageError for
    what remains wrong after retries. All methods may be called from several threads.
    """

    @property
    def url(self) -> str:
        """The prefix, absolute, without a trailing slash."""

    def where(self, key: str = "") -> str:
        """Return what an object, or the prefix, is called in messages: without secrets."""

    @property
    def only(self) -> str:
        """The one file of weights there that is meant; empty: whatever lies under the URL."""

    @property
    def pin(self) -> Pin:
        """How reads are held to a stamp."""

    @property
    def over_http(self) -> bool:
        """Whether what is read travels without TLS: a bit that flips on the way may not be noticed."""

    @property
    def num_retries(self) -> int:
        """Read attempts that failed and were repeated, since the store was opened."""

    def stamp(self, key: str) -> Stamp:
        """Return the present state of an object (one HEAD or stat)."""

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first ``num_bytes`` (fewer if the object is shorter) and the stamp, in one round trip."""

    def read_into(self, key: str, start: int, buffer: memoryview, stamp: Stamp) -> None:
        """Fill ``buffer`` from byte ``start`` of the object that ``stamp`` describes.

        Raises:
            InputChangedError: the object is no longer the one ``stamp`` describes.
        """

    def list(self, prefix: str = "", *, at_most: int | None = None) -> dict[str, Stamp]:
        """Return every object whose key starts with ``prefix`` (a folder ending in ``/``, or empty), recursively.

        A prefix under which nothing exists lists as empty; with ``at_most``, as soon as so many are found that is all.
        """

    def listing(self) -> Listing:
        """Return the objects and the folders directly under the prefix, in as many requests as ``list_top`` takes."""

    def list_top(self) -> dict[str, Stamp]:
        """Return the objects directly under the prefix, subfolders left out."""

    def check_links(self, keys: Iterable[str]) -> None:
        """Refuse those of ``keys`` that are links which reading them would refuse; only folders have links.

        Raises:
            LinkError: one leads where it is not followed, or nowhere.
        """

    def create(self, key: str, *, size: int | None = None) -> AbstractContextManager[NewObject]:
        """Write one object, all or nothing: it appears, durable, when the block ends without error.

        Args:
            key: where it goes; an object there is replaced.
            size: bytes that will be written, if known; object stores choose the size of parts from it.
        """

    def put(self, key: str, payload: bytes) -> None:
        """Write a small object, replacing what was there."""

    def put_new(self, key: str, payload: bytes) -> None:
        """Write a small object that must not exist yet; a failed attempt leaves nothing.

        Raises:
            AlreadyExistsError: the key is taken.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is already gone is no error."""

    def half_written(self, *, also_held: bool = False) -> Sequence[HalfWritten] | None:
        """Return what writers left, or are still writing, below the prefix; None where the store does not tell.

        Args:
            also_held: whether files count that a process holds; of uploads no store tells who holds them.
        """

    def discard(self, leftovers: Iterable[HalfWritten]) -> None:
        """Remove what ``half_written`` returned; what is already gone is no error."""

    def creates_exclusively(self, key: str, payload: bytes) -> bool:
        """Return whether ``key``, which exists, cannot be created again; where it can, it now holds ``payload``."""

    def pins_reads(self, key: str) -> bool:
        """Return whether a read pinned to a state that ``key`` is not in is refused before bytes are sent."""


def read_small(store: Store, key: str, *, max_bytes: int) -> bytes:
    """Return a whole small object, at most ``max_bytes`` of it plus one (so that the caller can refuse)."""
    payload, _ = store.read_head(key, max_bytes + 1)
    return payload


def check_stamp(store: Store, key: str, expected: Stamp) -> None:
    """Compare an object with the state it was planned in.

    Raises:
        InputChangedError: it is another one now.
    """
    found = store.stamp(key)
    if found != expected:
        raise changed(store.where(key), expected, found)


def changed(where: str, expected: Stamp, found: Stamp) -> InputChangedError:
    """Return the error for an object that is in another state than planned."""
    return InputChangedError(
        f"{where} changed since it was planned: expected {expected}; found {found}. Restore it, or plan again"
    )


_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""control characters, those that turn the direction of text, and what is no Unicode"""
MAX_KEY_BYTES = 1024
"""of S3, Google and Azure"""
MAX_NAME_BYTES = 255
"""of one segment, on local file systems"""


def check_plain(name: str) -> str:
    """Return a name, path or URL if it can be written into records and shown as it is.

    Raises:
        RecipeError: it holds control characters, turns the direction of text, or is no Unicode.
    """
    if _UNWRITABLE.search(name):
        raise RecipeError(f"the name {shown(name)} holds control characters or is not Unicode; rename it")
    return name


@lru_cache(maxsize=4096)
def check_key(key: str) -> str:
    """Return ``key`` if it stays inside a prefix and every store can hold it.

    Raises:
        RecipeError: it is absolute, empty, climbs out, is too long, or holds control characters or what is no Unicode.
    """
    parts = key.split("/")
    if not key or key.startswith("/") or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise RecipeError(f"the name {shown(key)} leaves its folder; expected a plain relative path")
    check_plain(key)
    if len(key.encode()) > MAX_KEY_BYTES or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        raise RecipeError(
            f"the name {shown(key)} is too long; expected at most {MAX_NAME_BYTES} bytes, "
            f"{MAX_KEY_BYTES:,} with its folders"
        )
    return key
