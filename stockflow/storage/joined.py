"""A model with an adapter as one place to read from, ``MODEL + ADAPTER``: a ``+`` is before the names of its files."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from stockflow.storage.base import Listing, Pin, Stamp, Store
from stockflow.storage.local import LocalStore, PinnedFile

_JOINT = " + "
_JOINED = re.compile(r" \+ (?=/|[a-z0-9]+://)")
_ADAPTERS = "+"


def joined(model: str, adapter: str) -> str:
    """Return the one location of a model and an adapter, both normalized."""
    return f"{model}{_JOINT}{adapter}"


def halves_of(location: str) -> tuple[str, ...]:
    """Return the normalized locations of a model and its adapter; of a model alone, its own."""
    return tuple(_JOINED.split(location, maxsplit=1))


def key_of_adapter(key: str) -> str:
    """Return the key that a file of the adapter's folder has in the place of both."""
    return f"{_ADAPTERS}{key}"


def own_key(key: str) -> str:
    """Return the key of a file in the adapter's folder, of that in the place of both."""
    return key.removeprefix(_ADAPTERS)


@runtime_checkable
class ReadsInPlace(Protocol):
    """A store whose files the threads that compute may keep open."""

    @contextmanager
    def open_pinned(self, key: str, stamp: Stamp) -> Iterator[PinnedFile]:
        """Keep a file open, from which nothing is read but the state that ``stamp`` describes."""


class JoinedStore:
    """What reading needs of a store, of two of them; nothing is written there."""

    def __init__(self, model: Store, adapter: Store) -> None:
        """Take the stores of both folders."""
        self.model, self.adapter = model, adapter
        self.url = joined(model.url, adapter.url)
        self._of_adapter: frozenset[str] = frozenset()

    @property
    def only(self) -> str:
        """The one file of the model that was named."""
        return self.model.only

    @property
    def pin(self) -> Pin:
        """How reads of both are held to a stamp."""
        return "stat" if "stat" in (self.model.pin, self.adapter.pin) else self.model.pin

    @property
    def over_http(self) -> bool:
        """Whether what is read of either travels without TLS."""
        return self.model.over_http or self.adapter.over_http

    @property
    def num_retries(self) -> int:
        """Reads of either that were repeated."""
        return self.model.num_retries + self.adapter.num_retries

    def take_from_adapter(self, keys: Iterable[str]) -> None:
        """Let the adapter's folder stand for the model's as far as these keys go."""
        self._of_adapter = frozenset(keys)

    def where(self, key: str = "") -> str:
        """Return what a file is called in messages, or both folders."""
        if not key:
            return joined(self.model.where(), self.adapter.where())
        store, own = self._home(key)
        return store.where(own)

    def stamp(self, key: str) -> Stamp:
        """Return the present state of a file."""
        store, own = self._home(key)
        return store.stamp(own)

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes and the stamp of a file."""
        store, own = self._home(key)
        return store.read_head(own, num_bytes)

    def read_into(self, key: str, start: int, buffer: memoryview, stamp: Stamp) -> None:
        """Fill ``buffer`` from byte ``start`` of a file."""
        store, own = self._home(key)
        store.read_into(own, start, buffer, stamp)

    def listing(self) -> Listing:
        """Return what lies directly in the model's folder."""
        return self.model.listing()

    def list(self, prefix: str = "", *, at_most: int | None = None) -> dict[str, Stamp]:
        """Return what lies below the model's folder."""
        return self.model.list(prefix, at_most=at_most)

    def check_links(self, keys: Iterable[str]) -> None:
        """Refuse links of either that are not followed."""
        for key in keys:
            store, own = self._home(key)
            store.check_links([own])

    def pins_reads(self, key: str) -> bool:
        """Return whether a read that is pinned to another state of a file is refused."""
        store, own = self._home(key)
        return store.pins_reads(own)

    def _home(self, key: str) -> tuple[Store, str]:
        """Return the store that holds a file, and its key there."""
        if key.startswith(_ADAPTERS):
            return self.adapter, own_key(key)
        return (self.adapter if key in self._of_adapter else self.model), key


class LocalJoinedStore(JoinedStore):
    """Two folders on disk."""

    @contextmanager
    def open_pinned(self, key: str, stamp: Stamp) -> Iterator[PinnedFile]:
        """Keep a file of either open."""
        store, own = self._home(key)
        assert isinstance(store, LocalStore)
        with store.open_pinned(own, stamp) as file:
            yield file
