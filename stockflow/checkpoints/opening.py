"""A checkpoint at a URL: its tensors and where their bytes lie, its files and their stamps.

Only the index and the headers are read. The layout is Hugging Face's: one ``model.safetensors``, or shards
named by ``model.safetensors.index.json``.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from stockflow.checkpoints.header import PlacedTensor, TensorSpec, header_bytes, parse_header
from stockflow.checkpoints.side_files import code_files, is_known
from stockflow.errors import CheckpointError, NotFoundError, RecipeError
from stockflow.storage import LocalStore, Stamp, Store, check_key, read_small, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted
from stockflow.text.strictjson import parse_text_json, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

FIRST_READ_BYTES = 128 * 1024
"""Guess for length field plus header, so that most files take one round trip: a shard of a 405B model has
a header of about 100 KB, one of a 92,000-tensor expert model about 70 KB."""
MAX_INDEX_BYTES = 200_000_000
MAX_CONFIG_BYTES = 16_000_000
NUM_HEADER_READERS = 16

MAX_LINKS_SAID = 20

MAX_SIDE_FILE_BYTES = 64_000_000
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pkl", ".tar",
)  # fmt: skip
EXCLUDED_SIDE_FILES = (CONFIG_FILE, "README.md", "manifest.json", "mergekit_config.yml")


class Extent(NamedTuple):
    """Where a tensor's bytes lie."""

    file: str
    start: int
    """absolute byte offset in the file"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a checkpoint from its index and headers."""

    url: str
    specs: Mapping[str, TensorSpec]
    """by name, in on-disk order: files by name, tensors by offset"""
    extents: Mapping[str, Extent]
    files: Mapping[str, Stamp]
    """the weight files and the index"""
    config: Mapping[str, object] | None
    """config.json, if there is one"""
    side_files: Mapping[str, Stamp]
    """the files that a loader needs besides the weights: tokenizer, templates, code that configs name"""
    omitted_side_files: tuple[str, ...]
    """the ones that are too large to be copied, or whose names not every store takes"""
    remarks: tuple[Remark, ...] = ()
    """what was found of it alone"""
    other_files: tuple[str, ...] = ()
    """what else lies there, and no loader needs; hidden files, weights and what an output has of its own left out"""


OnFile = Callable[[str], None]
"""Told of each file whose header was read, from several threads."""
Layout = tuple[dict[str, TensorSpec], dict[str, Extent]]
"""Specs and extents by name."""


class HeaderCache:
    """What was parsed before: fine-tuned models are mostly cut like their base, header for header.

    It saves time, and equal specs and extents of all checkpoints are then the same objects. Headers are parsed
    one at a time: Python would not parse two at once anyway, and a large one takes twenty times its size meanwhile.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._parsed: dict[tuple[bytes, int], list[PlacedTensor]] = {}
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}

    def collect(self, where: str, files: Sequence[str], headers: Sequence[list[PlacedTensor]]) -> Layout:
        """Return the tensors of all files together; equal files of equal headers give the same objects."""
        key = tuple((file, id(placed)) for file, placed in zip(files, headers, strict=True))
        if key not in self._layouts:
            self._layouts[key] = _collect(where, files, headers)
        return self._layouts[key]

    def parse(self, head: bytes, file_size: int, where: str) -> list[PlacedTensor]:
        """Return what ``parse_header`` returns."""
        with self._lock:
            placed = self._parsed.get((head, file_size))
            if placed is None:
                placed = self._parsed[head, file_size] = parse_header(head, file_size, where)
            return placed


def unheard(file: str) -> None:
    """Do nothing."""


def open_checkpoint(store: Store, cache: HeaderCache, on_file: OnFile = unheard) -> Checkpoint:
    """Read the index and the headers of the checkpoint in ``store``.

    Raises:
        NotFoundError: there is no checkpoint at this location.
        CheckpointError: index, headers or config are malformed or contradict each other.
    """
    listing = store.list_top()
    where = redact(store.url)
    if SINGLE_FILE in listing:
        weight_map, files = None, [SINGLE_FILE]
    elif INDEX_FILE in listing:
        weight_map = _read_index(store)
        files = sorted(set(weight_map.values()))
    else:
        raise NotFoundError(_nothing_here(where, listing))
    with ThreadPoolExecutor(NUM_HEADER_READERS) as pool:
        headers = list(pool.map(lambda file: _read_header(store, file, cache, on_file), files))
    specs, extents = cache.collect(where, files, [placed for placed, _ in headers])
    if weight_map is not None:
        _check_coverage(where, weight_map, extents)
    stamps = {file: stamp for file, (_, stamp) in zip(files, headers, strict=True)}
    if weight_map is not None:
        stamps[INDEX_FILE] = listing[INDEX_FILE]
    config = _read_json(store, CONFIG_FILE, MAX_CONFIG_BYTES) if CONFIG_FILE in listing else None
    beside = {key: stamp for key, stamp in listing.items() if _is_beside(key)}
    candidates = _side_files(store, beside, config)
    return Checkpoint(
        url=store.url,
        specs=specs,
        extents=extents,
        files=stamps,
        config=config,
        side_files={key: stamp for key, stamp in candidates.items() if _can_be_copied(key, stamp)},
        omitted_side_files=tuple(key for key, stamp in candidates.items() if not _can_be_copied(key, stamp)),
        other_files=tuple(key for key in beside if key not in candidates),
    )


def open_checkpoints(stores: Sequence[Store], on_file: OnFile = unheard) -> list[Checkpoint]:
    """Open several checkpoints, the first one first and the others concurrently, in the order given."""
    cache = HeaderCache()
    first = [open_checkpoint(store, cache, on_file) for store in stores[:1]]  # fills the cache for the others
    with ThreadPoolExecutor(max(len(stores), 1)) as pool:
        return first + list(pool.map(lambda store: open_checkpoint(store, cache, on_file), stores[1:]))


def link_notes(store: Store, files: Iterable[str]) -> Iterator[str]:
    """Yield which of a checkpoint's files lie where only ``--follow-links`` lets them be read."""
    if not isinstance(store, LocalStore):
        return
    strays = [(file, real) for file in sorted(files) if (real := store.links.stray(file))]
    for file, real in strays[:MAX_LINKS_SAID]:
        yield f"{store.url}/{file} is read from {real!r}, where its link leads (--follow-links)"
    if len(strays) > MAX_LINKS_SAID:
        yield f"... and so are {len(strays) - MAX_LINKS_SAID} more files of {store.url}"


def _nothing_here(where: str, listing: Mapping[str, Stamp]) -> str:
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE}"
    if not listing and where.endswith((*WEIGHT_SUFFIXES, ".json")):
        return f"there is no checkpoint at {where}: it names a file; give the folder it is in"
    if not listing:
        return f"there is no checkpoint at {where}: the folder does not exist or is empty; {expected}"
    others = [name for name in listing if name.endswith(WEIGHT_SUFFIXES)]
    files = f"{counted(len(listing), 'file')} but no weights"
    found = f"it has {', '.join(map(in_a_line, others[:3])) if others else files}"
    return f"there is no checkpoint at {where}: {expected}; {found}. Other formats must be converted first"


def _read_index(store: Store) -> dict[str, str]:
    where = f"{redact(store.url)}/{INDEX_FILE}"
    weight_map = _read_json(store, INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a mapping `weight_map` from tensor names to files")
    is_file_name = lru_cache(maxsize=None)(_is_file_name)
    for name, file in weight_map.items():
        if isinstance(file, str) and is_file_name(file):
            continue
        raise CheckpointError(
            f"{where}: tensor {shown(name)} is said to be in {shown(file)}; "
            "expected the name of a file in the same folder"
        )
    return weight_map


def _is_file_name(file: str) -> bool:
    try:
        return "/" not in check_key(file)
    except RecipeError:
        return False


def _read_json(store: Store, key: str, max_bytes: int) -> dict[str, object]:
    where = f"{redact(store.url)}/{key}"
    payload, stamp = store.read_head(key, max_bytes)
    if stamp.size > max_bytes:
        raise CheckpointError(f"{where} is {stamp.size:,} bytes long; at most {max_bytes:,} are read")
    try:
        parsed = parse_text_json(payload, allows_constants=True)
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return parsed


def _read_header(store: Store, file: str, cache: HeaderCache, on_file: OnFile) -> tuple[list[PlacedTensor], Stamp]:
    where = f"{redact(store.url)}/{file}"
    try:
        head, stamp = store.read_head(file, FIRST_READ_BYTES)
    except NotFoundError:
        raise CheckpointError(f"{redact(store.url)}: the index names {file}, which is not there") from None
    needed = header_bytes(head, stamp.size, where)
    if needed > len(head):
        rest = bytearray(needed - len(head))
        store.read_into(file, len(head), memoryview(rest), stamp)
        head += bytes(rest)
    placed = cache.parse(head[:needed], stamp.size, where)
    on_file(where)
    return placed, stamp


def _collect(where: str, files: Sequence[str], headers: Sequence[list[PlacedTensor]]) -> Layout:
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, Extent] = {}
    for file, placed in zip(files, headers, strict=True):
        for tensor in placed:
            name = tensor.spec.name
            if name in specs:
                raise CheckpointError(f"{where}: tensor {shown(name)} is in both {extents[name].file} and {file}")
            specs[name] = tensor.spec
            extents[name] = Extent(file, tensor.start)
    return specs, extents


def _check_coverage(where: str, weight_map: Mapping[str, str], extents: Mapping[str, Extent]) -> None:
    if len(weight_map) == len(extents) and all(weight_map.get(name) == extent.file for name, extent in extents.items()):
        return
    missing = [name for name, file in weight_map.items() if name not in extents or extents[name].file != file]
    unlisted = [name for name in extents if name not in weight_map]
    problems = [f"{shown(name)} is listed in {weight_map[name]} but not there" for name in missing]
    problems += [f"{shown(name)} is in {extents[name].file} but not listed" for name in unlisted]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{where}: the index and the shards disagree on {counted(len(problems), 'tensor')}:\n  "
            + "\n  ".join(problems[:20])
            + more
        )


def _side_files(store: Store, beside: Mapping[str, Stamp], config: Mapping[str, object] | None) -> dict[str, Stamp]:
    """Return the files that a loader needs; a link among them that is not followed is refused, not left out."""
    known = [key for key in beside if is_known(key)]
    store.check_links(key for key in known if _is_file_name(key))
    code = code_files(
        [key for key in beside if _is_file_name(key)],
        config,
        lambda key: _read_json(store, key, MAX_CONFIG_BYTES),
        lambda key: _read_code(store, key),
    )
    return {key: stamp for key, stamp in beside.items() if key in code or key in known}


def _read_code(store: Store, key: str) -> str:
    """Return a Python file, for its imports alone: what is not UTF-8 is none."""
    return read_small(store, key, max_bytes=MAX_CONFIG_BYTES).decode(errors="replace")


def _is_beside(key: str) -> bool:
    """Whether a file is neither weights nor what an output has of its own, nor hidden."""
    return not (
        key.startswith(".")
        or key in EXCLUDED_SIDE_FILES
        or key.endswith(WEIGHT_SUFFIXES)
        or key.endswith(".index.json")
    )


def _can_be_copied(key: str, stamp: Stamp) -> bool:
    return stamp.size <= MAX_SIDE_FILE_BYTES and _is_file_name(key)
