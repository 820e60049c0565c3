"""A checkpoint at a URL: its tensors and where their bytes lie, its files and their stamps.

Only the index and the headers are read. The layout is Hugging Face's: one ``model.safetensors``, or shards
named by ``model.safetensors.index.json``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stockflow.checkpoints.documents import is_file_name, read_json
from stockflow.checkpoints.header import TensorSpec
from stockflow.checkpoints.index import INDEX_FILE, check_coverage, read_index
from stockflow.checkpoints.layout import Extent, HeaderCache, OnFile, read_header, unheard
from stockflow.checkpoints.side_files import code_files, is_known
from stockflow.errors import NotFoundError
from stockflow.storage import LocalStore, Stamp, Store, read_small, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted

SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 16_000_000
NUM_HEADER_READERS = 16

MAX_LINKS_SAID = 20

MAX_SIDE_FILE_BYTES = 64_000_000
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pkl", ".tar",
)  # fmt: skip
EXCLUDED_SIDE_FILES = (CONFIG_FILE, "README.md", "manifest.json", "mergekit_config.yml")


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
        weight_map = read_index(store)
        files = sorted(set(weight_map.values()))
    else:
        raise NotFoundError(_nothing_here(where, listing))
    with ThreadPoolExecutor(NUM_HEADER_READERS) as pool:
        headers = list(pool.map(lambda file: read_header(store, file, cache, on_file), files))
    specs, extents = cache.collect(where, files, [placed for placed, _ in headers])
    if weight_map is not None:
        check_coverage(where, weight_map, extents)
    stamps = {file: stamp for file, (_, stamp) in zip(files, headers, strict=True)}
    if weight_map is not None:
        stamps[INDEX_FILE] = listing[INDEX_FILE]
    config = read_json(store, CONFIG_FILE, MAX_CONFIG_BYTES) if CONFIG_FILE in listing else None
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


def _side_files(store: Store, beside: Mapping[str, Stamp], config: Mapping[str, object] | None) -> dict[str, Stamp]:
    """Return the files that a loader needs; a link among them that is not followed is refused, not left out."""
    known = [key for key in beside if is_known(key)]
    store.check_links(key for key in known if is_file_name(key))
    code = code_files(
        [key for key in beside if is_file_name(key)],
        config,
        lambda key: read_json(store, key, MAX_CONFIG_BYTES),
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
    return stamp.size <= MAX_SIDE_FILE_BYTES and is_file_name(key)
