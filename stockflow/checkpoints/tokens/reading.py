"""Reading files of tokenizers, those of several models: each is read and parsed once, bounded."""

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.token_rows import stated_sizes, vocabulary_rows
from stockflow.checkpoints.tokens.vocabularies import Ids, json_of
from stockflow.storage import Stamp, Store

T = TypeVar("T")

MAX_FILE_BYTES = 64_000_000
"""Of a file that is parsed; Gemma's tokenizer.json has 33 MB."""
_TELLS_BYTES = re.compile(r"(?!(mtime|mtime_ns|LastModified|Last-Modified|created)=).")
"""versions of objects that are the same for equal bytes only: ETags, and not times"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which id stands for which token."""

    ids: Ids
    """by token; empty if they cannot be read"""
    numbering: str = ""
    """what else decides them, code or bytes that are not read: no more is known of it than whether it is the same"""
    problem: str = ""
    """why they cannot be read"""
    is_open: bool = field(default=False, compare=False)
    """whether code of a class that is not known may add tokens behind them"""


class Reader:
    """Files of several models, each read and parsed once as far as stores can tell them apart."""

    def __init__(self, with_documents: bool) -> None:
        self.with_documents = with_documents
        self._lock = threading.Lock()
        self._made: dict[object, object] = {}

    def parsed(self, store: Store, key: str, stamp: Stamp, parse: Callable[[bytes], T]) -> T:
        """Return what a file holds; what ``parse`` raises is raised again for equal files."""
        known = (parse, stamp, "" if _TELLS_BYTES.match(stamp.version) else store.where(key))
        if known in self._made:
            return cast(T, self._found(known))
        payload = _payload(store, key, stamp)
        made = (parse, hashlib.sha256(payload).digest())
        with self._lock:  # Python would not parse two at once anyway
            self.once(made, lambda: _parsed(parse, payload))
        self._made[known] = self._made[made]
        return cast(T, self._found(made))

    def once(self, key: object, make: Callable[[], T]) -> None:
        """Make what has not been made for a key before."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except ValueError as error:
                self._made[key] = error

    def vocabulary(self, ids: Ids, added: Ids, numbering: str, *, added_first: bool, is_open: bool) -> Vocabulary:
        """Return ids with the tokens beside them, which loaders of older forms ask first; equal ones are one object."""
        key = (id(ids), tuple(sorted(added.items())), numbering, is_open)
        is_plain = added.items() <= ids.items() if added_first else added.keys() <= ids.keys()
        first, then = (added, ids) if added_first else (ids, added)
        with self._lock:
            self.once(key, lambda: Vocabulary(ids if is_plain else {**then, **first}, numbering, is_open=is_open))
        return cast(Vocabulary, self._found(key))

    def _found(self, key: object) -> object:
        found = self._made[key]
        if isinstance(found, ValueError):
            raise found
        return found


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """The small files of one model."""

    reader: Reader
    store: Store
    model: Checkpoint
    num_rows: int
    """of its input embedding"""

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """By name, what tells one version of a file from another."""
        return self.model.side_files

    def rows_of(self, vocabulary: Vocabulary | None) -> int:
        """Return how many rows are tokens' in the tensors that have one per token."""
        ids = vocabulary.ids if vocabulary else {}
        sizes = {*stated_sizes(self.model.config), len(ids), max(ids.values(), default=-1) + 1} - {0}
        return self.num_rows or (vocabulary_rows(self.model.specs, sizes) if vocabulary else 0)

    def json(self, key: str) -> dict[str, object]:
        """Return a JSON object, empty if it is not there or none: whether that is a fault is not said here."""
        try:
            return self.parsed(key, json_of) if key in self.stamps else {}
        except ValueError:
            return {}

    def parsed(self, key: str, parse: Callable[[bytes], T]) -> T:
        """Return what a file holds."""
        return self.reader.parsed(self.store, key, self.stamps[key], parse)


def is_small(stamp: Stamp) -> bool:
    """Return whether a file is read at all."""
    return stamp.size <= MAX_FILE_BYTES


def _payload(store: Store, key: str, stamp: Stamp) -> bytes:
    if not is_small(stamp):
        raise ValueError(f"it has {stamp.size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    payload = bytearray(stamp.size)
    store.read_into(key, 0, memoryview(payload), stamp)
    return bytes(payload)


def _parsed(parse: Callable[[bytes], T], payload: bytes) -> T:
    """Return what a file holds; where it stands for another one, or is a web page, the fault says so."""
    try:
        return parse(payload)
    except ValueError as error:
        raise ValueError(disguise_of(payload[:512], len(payload)) or str(error)) from error
