"""A checkpoint at a URL: its tensors and where their bytes lie, its files and their stamps.

Only the index and the headers are read. The layout is Hugging Face's: one ``model.safetensors``, or shards
named by ``model.safetensors.index.json``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stockflow.checkpoints.beside import look_beside
from stockflow.checkpoints.documents import find_json, read_json
from stockflow.checkpoints.header import TensorSpec
from stockflow.checkpoints.index import INDEX_FILE, check_coverage, read_index
from stockflow.checkpoints.layout import Extent, HeaderCache, OnFile, folder_of, read_header, unheard
from stockflow.checkpoints.left_out import WEIGHT_SUFFIXES
from stockflow.checkpoints.modules import MODULES_FILE, ROUTER_FILE, find_modules
from stockflow.checkpoints.tree import Tree, list_tree
from stockflow.errors import NotFoundError
from stockflow.storage import LocalStore, Stamp, Store, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted

SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

MAX_CONFIG_BYTES = 16_000_000
NUM_HEADER_READERS = 16

MAX_LINKS_SAID = 20


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
    """the ones that are too large to be copied, or whose names not every store takes beside the others"""
    remarks: tuple[Remark, ...] = ()
    """what was found of it alone"""
    other_files: tuple[str, ...] = ()
    """what else lies there and is of no known kind; hidden files and what an output has of its own left out"""


def open_checkpoint(store: Store, cache: HeaderCache, on_file: OnFile = unheard) -> Checkpoint:
    """Read the index and the headers of the checkpoint in ``store``.

    Raises:
        NotFoundError: there is no checkpoint at this location.
        CheckpointError: index, headers or config are malformed or contradict each other.
    """
    tree = list_tree(store, store.listing())
    where = redact(store.url)
    modules = find_modules(tree, {key: _document(store, tree, key) for key in (MODULES_FILE, ROUTER_FILE)}, where)
    weight_map, files = None, list(modules.weights)
    if SINGLE_FILE in tree.files:
        files = [SINGLE_FILE, *files]
    elif INDEX_FILE in tree.files:
        weight_map = read_index(store)
        files = [*sorted(set(weight_map.values())), *files]
    elif not files:
        raise NotFoundError(_nothing_here(where, tree.files))
    with ThreadPoolExecutor(NUM_HEADER_READERS) as pool:
        headers = list(pool.map(lambda file: read_header(store, file, cache, on_file), files))
    specs, extents = cache.collect(where, files, [placed for placed, _ in headers])
    if weight_map is not None:
        check_coverage(where, weight_map, _outside_modules(extents) if modules.weights else extents)
    stamps = {file: stamp for file, (_, stamp) in zip(files, headers, strict=True)}
    if weight_map is not None:
        stamps[INDEX_FILE] = tree.files[INDEX_FILE]
    config = read_json(store, CONFIG_FILE, MAX_CONFIG_BYTES) if CONFIG_FILE in tree.files else None
    beside = look_beside(store, tree, modules, config, specs.keys(), stamps.keys())
    return Checkpoint(
        url=store.url,
        specs=specs,
        extents=extents,
        files=stamps,
        config=config,
        side_files=beside.copied,
        omitted_side_files=beside.omitted,
        remarks=beside.remarks,
        other_files=beside.others,
    )


def _document(store: Store, tree: Tree, key: str) -> object:
    return find_json(store, key, MAX_CONFIG_BYTES) if key in tree.files else None


def _outside_modules(extents: Mapping[str, Extent]) -> dict[str, Extent]:
    return {name: extent for name, extent in extents.items() if not folder_of(extent.file)}


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
