"""Index of a sharded checkpoint: which file it says holds which tensor, held against the headers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from stockflow.checkpoints.files.documents import is_key, json_object, read_whole
from stockflow.checkpoints.files.layout import Extent, HeaderCache, Homes
from stockflow.checkpoints.files.tree import RECORDS_FOLDER, is_hidden
from stockflow.errors import CheckpointError
from stockflow.storage import Store
from stockflow.text.escaping import in_a_line
from stockflow.text.strictjson import shown

MAX_INDEX_BYTES = 200_000_000
NUM_SHOWN = 20


@dataclass(frozen=True, slots=True)
class IndexMismatch:
    """What an index and the headers of the files that are there do not agree on."""

    absent: Mapping[str, str]
    """by tensor that is not in the file the index names: that file"""
    unlisted: Mapping[str, str]
    """by tensor the index does not list: the file that holds it"""

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.absent or self.unlisted)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors it is about."""
        return tuple({**self.absent, **self.unlisted})

    def without(self, is_settled: Callable[[str], bool]) -> "IndexMismatch":
        """Return what is left of it."""
        absent = {name: file for name, file in self.absent.items() if not is_settled(name)}
        return IndexMismatch(absent, {name: file for name, file in self.unlisted.items() if not is_settled(name)})


def read_index(store: Store, key: str, cache: HeaderCache) -> Homes:
    """Return the file that each tensor is said to be in; equal indices are parsed once.

    Raises:
        CheckpointError: the index is malformed, or names a file elsewhere.
    """
    payload, where = read_whole(store, key, MAX_INDEX_BYTES), store.where(key)
    homes, _ = cache.once((_homes, sha256(payload).digest()), lambda: _homes(payload, where))
    return homes


def _homes(payload: bytes, where: str) -> Homes:
    weight_map = json_object(payload, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a mapping `weight_map` from tensor names to files")
    named = lru_cache(maxsize=None)(_named)
    homes = {name: named(file) if isinstance(file, str) else "" for name, file in weight_map.items()}
    strange = next((name for name, file in homes.items() if not file), None)
    if strange is not None:
        raise CheckpointError(
            f"{where}: tensor {shown(strange)} is said to be in {shown(weight_map[strange])}; "
            "expected the name of a file beside the index, or in a folder there that is not hidden"
        )
    return homes


def _named(file: str) -> str:
    """Return the file in the folder or below it that a path names, ``./x`` as ``x``; empty where it leads elsewhere."""
    name = file.removeprefix("./")
    return name if is_key(name) and not is_hidden(name) and not name.startswith(f"{RECORDS_FOLDER}/") else ""


def mismatch_of(homes: Homes, extents: Mapping[str, Extent]) -> IndexMismatch:
    """Hold an index against the headers."""
    if len(homes) == len(extents) and all(homes.get(name) == extent.file for name, extent in extents.items()):
        return IndexMismatch({}, {})
    return IndexMismatch(
        {name: file for name, file in homes.items() if name not in extents or extents[name].file != file},
        {name: extent.file for name, extent in extents.items() if name not in homes},
    )


def missing_files(homes: Homes, listing: Collection[str]) -> Sequence[str]:
    """Return the files that an index names and a folder does not have."""
    return sorted({file for file in homes.values() if file not in listing})


def lines_of(found: IndexMismatch) -> Iterator[str]:
    """Yield what differs, a tensor a line, and how many more there are."""
    said = [f"{shown(name)} is listed in {in_a_line(file)} but not there" for name, file in found.absent.items()]
    said += [f"{shown(name)} is in {in_a_line(file)} but not listed" for name, file in found.unlisted.items()]
    yield from said[:NUM_SHOWN]
    if len(said) > NUM_SHOWN:
        yield f"... and {len(said) - NUM_SHOWN} more"
