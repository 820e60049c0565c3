"""Layout of a checkpoint: which tensor lies in which file at which byte, read from the headers of its files."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, TypeVar, TypeVarTuple, cast

from stockflow.checkpoints.decodes.joined import Joined
from stockflow.checkpoints.files import torch_files
from stockflow.checkpoints.files.archives import file_archive
from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.checkpoints.files.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    FileContents,
    PlacedTensor,
    TensorSpec,
    format_of,
    header_bytes,
    parse_header,
)
from stockflow.errors import CheckpointError, HeaderError, NotFoundError
from stockflow.storage import Stamp, Store
from stockflow.text.strictjson import shown

FIRST_READ_BYTES = 128 * 1024
"""Guess for length field plus header, so that most files take one round trip: a shard of a 405B model has
a header of about 100 KB, one of a 92,000-tensor expert model about 70 KB."""


class Extent(NamedTuple):
    """Where a tensor's bytes lie."""

    file: str
    start: int
    """absolute byte offset in the file"""


class Pieces(NamedTuple):
    """How a tensor lies in several runs of bytes, one after the other."""

    decode: Joined
    extents: tuple[Extent, ...]

    def part(self, start: int, stop: int) -> "Pieces":
        """Return how a run of its elements lies."""
        width = self.decode.width
        runs = list(self.decode.within(start, stop))
        extents = [self.extents[number] for number, _, _ in runs]
        return Pieces(
            Joined(self.decode.dtype, tuple(accumulate(last - first for _, first, last in runs))),
            tuple(
                extent._replace(start=extent.start + width * first)
                for extent, (_, first, _) in zip(extents, runs, strict=True)
            ),
        )


Found = TypeVar("Found")
Known = TypeVarTuple("Known")
OnFile = Callable[[str], None]
"""Told of each file whose header was read, from several threads."""
Homes = Mapping[str, str]
"""File by tensor name, as an index says."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of some files lie."""

    specs: dict[str, TensorSpec]
    """by name, in on-disk order: files by name, tensors by offset"""
    extents: dict[str, Extent]
    doubled: tuple[str, ...]
    """names of the tensors that several files hold, of which one is taken"""


class HeaderCache:
    """What was parsed before: fine-tuned models are mostly cut like their base, header for header.

    It saves time, and equal specs and extents of all checkpoints are then the same objects. Headers are parsed
    one at a time: Python would not parse two at once anyway, and a large one takes twenty times its size meanwhile.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._parsed: dict[tuple[Hashable, str], FileContents] = {}
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}
        self._made: dict[Hashable, object] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def found(self, find: Callable[[*Known], Found], *known: *Known) -> Found:
        """Return what ``find`` says of what is known of a checkpoint; what several have in common is asked once."""
        _, found = self.shared((find, *map(id, known)), lambda: (known, find(*known)))  # kept: no other has their ids
        return found

    def shared(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """Return what was made for a key before, or make it; objects whose ``id`` is in a key must live on."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Found, self._made[key])

    def once(self, key: Hashable, make: Callable[[], Found]) -> tuple[Found, bool]:
        """Return what was made for a key, and whether it was made now; others who ask meanwhile wait."""
        with self._lock_of(key):
            is_first = key not in self._made
            return self.shared(key, make), is_first

    def _lock_of(self, key: Hashable) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())

    def collect(self, where: str, headers: Mapping[str, list[PlacedTensor]], homes: Homes) -> Layout:
        """Return the tensors of all files together; equal files of equal headers give the same objects.

        Args:
            where: names the checkpoint in messages.
            headers: of each file, in order.
            homes: settles which file a tensor is read from that several hold.

        Raises:
            CheckpointError: several files hold a tensor, and ``homes`` names none of them.
        """
        key = tuple((file, id(placed)) for file, placed in headers.items())
        if key not in self._layouts:
            self._layouts[key] = _collect(headers)
        layout = self._layouts[key]
        return _settled(where, headers, layout.doubled, homes) if layout.doubled else layout

    def parse(self, said: Hashable, folder: str, parse: Callable[[], FileContents]) -> FileContents:
        """Return what ``parse`` makes of what a file says of itself, named as tensors of a file in that folder are."""
        key = said, folder
        with self._lock:
            contents = self._parsed.get(key)
            if contents is None:
                found = parse()
                contents = self._parsed[key] = found._replace(tensors=in_folder(folder, found.tensors))
            return contents


def folder_of(key: str) -> str:
    """Return the folder of a file, empty for those directly in the model's."""
    return key.rpartition("/")[0]


def in_folder(folder: str, placed: list[PlacedTensor]) -> list[PlacedTensor]:
    """Return the tensors of a file in a subfolder, which has names of its own: ``2_Dense/linear.weight``."""
    if not folder:
        return placed
    return [each._replace(spec=each.spec._replace(name=f"{folder}/{each.spec.name}")) for each in placed]


def unheard(file: str) -> None:
    """Do nothing."""


def read_header(
    store: Store, file: str, cache: HeaderCache, on_file: OnFile, *, is_listed: bool = False
) -> tuple[FileContents, Stamp]:
    """Return what is in one file of weights, and its stamp.

    Args:
        store: the model's.
        file: its key.
        cache: what was parsed before.
        on_file: told of it.
        is_listed: an index above it names its tensors as they are called in it, whatever folder it lies in.

    Raises:
        CheckpointError: the file is not there, or its header is malformed.
    """
    where = store.where(file)
    try:
        head, stamp = store.read_head(file, FIRST_READ_BYTES)
    except NotFoundError:
        raise CheckpointError(f"{where} was listed and is not there; fetch it again") from None
    read = _read_torch_file if torch_files.is_torch_file(file) else _read_safetensors
    contents = read(_FileOfWeights(store, file, "" if is_listed else folder_of(file)), head, stamp, cache)
    on_file(where)
    return contents, stamp


class _FileOfWeights(NamedTuple):
    """A file of weights, and the folder that the names of its tensors begin with."""

    store: Store
    key: str
    folder: str


def _read_torch_file(file: _FileOfWeights, head: bytes, stamp: Stamp, cache: HeaderCache) -> FileContents:
    said = torch_files.describe(file_archive(file.store, file.key, stamp), head)
    return cache.parse(said, file.folder, lambda: torch_files.contents_of(said, file.store.where(file.key)))


def _read_safetensors(file: _FileOfWeights, head: bytes, stamp: Stamp, cache: HeaderCache) -> FileContents:
    where = file.store.where(file.key)
    _refuse_disguise(head, stamp.size, where)
    needed = header_bytes(head, stamp.size, where)
    if needed > len(head):
        rest = bytearray(needed - len(head))
        file.store.read_into(file.key, len(head), memoryview(rest), stamp)
        head += bytes(rest)
    own = head[:needed]
    return cache.parse(
        (own, stamp.size),
        file.folder,
        lambda: FileContents(parse_header(own, stamp.size, where), format=format_of(own)),
    )


def _refuse_disguise(head: bytes, size: int, where: str) -> None:
    if 0 < int.from_bytes(head[:LENGTH_BYTES], "little") <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        return
    if disguise := disguise_of(head, size):
        raise HeaderError(f"{where} {disguise}")


def _collect(headers: Mapping[str, list[PlacedTensor]]) -> Layout:
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, Extent] = {}
    doubled = []
    for file, placed in headers.items():
        for tensor in placed:
            name = tensor.spec.name
            if name in specs:
                doubled.append(name)
            else:
                specs[name] = tensor.spec
                extents[name] = Extent(file, tensor.start)
    return Layout(specs, extents, tuple(dict.fromkeys(doubled)))


def _settled(where: str, headers: Mapping[str, list[PlacedTensor]], doubled: Sequence[str], homes: Homes) -> Layout:
    """Take each doubled tensor from the file that an index says holds it."""
    several = frozenset(doubled)
    layout = _collect(
        {
            file: [each for each in placed if each.spec.name not in several or homes.get(each.spec.name) == file]
            for file, placed in headers.items()
        }
    )
    for name in doubled:
        if name not in layout.specs:
            holders = [file for file, placed in headers.items() if any(each.spec.name == name for each in placed)]
            both = f"{holders[0]} and {holders[1]}"
            text = f"{where}: tensor {shown(name)} is in both {both}, and no index says which is meant"
            if 2 * len(doubled) > len({each.spec.name for placed in headers.values() for each in placed}):
                raise CheckpointError(
                    f"{text}; nor of {len(doubled):,} tensors in all: files that hold the same names have what each "
                    "of several processes held of every matrix (tensor parallelism), and are no model; take the model "
                    "they were made from, or move the file away that is a copy"
                )
            raise CheckpointError(f"{text}; remove one of the files, or write an index that names one")
    return replace(layout, doubled=tuple(doubled))
