"""Files beside the weights of one model: which an output takes over, which stay behind, and what is said of them."""

import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stockflow.checkpoints.beside.left_out import (
    OTHERS,
    REPLACED,
    are_again,
    files_remark,
    kind_of,
    left_out,
    strays,
    weights_remark,
)
from stockflow.checkpoints.beside.side_files import MISTRAL_CONFIG, code_files, is_known, module_files
from stockflow.checkpoints.files.candidates import MISTRAL_STEM, WRITTEN_STEMS, written_stem
from stockflow.checkpoints.files.documents import find_json, is_key
from stockflow.checkpoints.files.header import PlacedTensor
from stockflow.checkpoints.files.layout import HeaderCache, folder_of, read_header, unheard
from stockflow.checkpoints.files.tree import Tree, is_hidden
from stockflow.checkpoints.modules import Modules
from stockflow.errors import UserError
from stockflow.storage import Stamp, Store, read_small, redact
from stockflow.text.remarks import Remark

MAX_DOCUMENT_BYTES = 16_000_000
MAX_SIDE_FILE_BYTES = 64_000_000
MAX_STRAYS_OPENED = 16
"""files of weights that are not merged, whose headers are read so that their tensors can be counted"""
_OWN = re.compile(
    "|".join(map(re.escape, REPLACED)) + rf"|({'|'.join(WRITTEN_STEMS)})(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
"""names of files that an output has, none of which can be a folder of it"""


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside the weights that are merged."""

    copied: Mapping[str, Stamp]
    omitted: tuple[str, ...]
    others: tuple[str, ...]
    missing: tuple[str, ...]
    """what documents name and is not there"""
    remarks: tuple[Remark, ...]


def look_beside(
    store: Store,
    tree: Tree,
    modules: Modules,
    config: Mapping[str, object] | None,
    merged: Collection[str],
    used: Collection[str],
) -> Beside:
    """Return what an output takes over and what stays behind.

    Args:
        store: the model's.
        tree: all that lies there.
        modules: those it has.
        config: what config.json says.
        merged: names of the tensors that are merged.
        used: the files that hold them, and the index.

    Raises:
        LinkError: a file that would be copied is a link which is not followed.
    """
    where = redact(store.url)
    of_library = {MISTRAL_CONFIG} if written_stem(used) == MISTRAL_STEM else set[str]()
    needed, missing = _needed(store, tree, modules, config, of_library)
    folders = {folder for key in needed for folder in _above(key)}
    copied = {key: tree.files[key] for key in needed if _can_be_copied(key, tree, folders)}
    used = {*used, *_indexes(tree, {folder_of(key) for key in modules.weights})}
    found = _opened(store, tree, strays(tree, {*used, *needed}))
    unlisted = {key: each for key, each in found.items() if not are_again(key, each[1], merged)}
    left = left_out(tree, {*used, *needed, *unlisted})
    return Beside(
        copied,
        tuple(key for key in needed if key not in copied),
        tuple(key for key in left if kind_of(key) == OTHERS),
        (*modules.missing, *missing),
        (
            *weights_remark(where, unlisted, merged),
            *files_remark(where, left, tree.cut),
        ),
    )


def _needed(
    store: Store, tree: Tree, modules: Modules, config: Mapping[str, object] | None, of_library: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return what a loader needs, and code that is missing; a link that is not followed is refused, not left out."""
    plain = [key for key in tree.files if is_key(key) and not is_hidden(key) and key not in REPLACED]
    of_modules = {*module_files(plain, modules.folders), modules.document}
    known = [key for key in tree.files if is_known(key) or key in of_modules or key in of_library]
    store.check_links(key for key in known if is_key(key))
    code, missing = code_files(
        plain,
        config,
        modules.types,
        lambda key: find_json(store, key, MAX_DOCUMENT_BYTES),
        lambda key: _read_code(store, key),
    )
    return [key for key in tree.files if key in code or key in known], missing


def _indexes(tree: Tree, folders: Collection[str]) -> Iterator[str]:
    """Yield the indexes of the weights of modules."""
    return (key for key in tree.files if key.endswith(".index.json") and folder_of(key) in folders)


def _read_code(store: Store, key: str) -> str:
    """Return a Python file, for its imports alone: what is not UTF-8 is none."""
    return read_small(store, key, max_bytes=MAX_DOCUMENT_BYTES).decode(errors="replace")


def _can_be_copied(key: str, tree: Tree, folders: Collection[str]) -> bool:
    """Whether a file is small and every store takes its name, beside those of the others and of the output's own."""
    above = list(_above(key))
    clashes = key in folders or any(folder in tree.files or _OWN.fullmatch(folder) for folder in above)
    return tree.files[key].size <= MAX_SIDE_FILE_BYTES and is_key(key) and not clashes


def _above(key: str) -> Iterator[str]:
    """Yield the folders a file lies in."""
    parts = key.split("/")
    return ("/".join(parts[:number]) for number in range(1, len(parts)))


def _opened(store: Store, tree: Tree, keys: Collection[str]) -> dict[str, tuple[Stamp, list[PlacedTensor] | None]]:
    """Return size and tensors of weights that are not merged; of a file that cannot be read, or one too many, none."""

    def tensors_of(key: str) -> list[PlacedTensor] | None:
        try:
            return read_header(store, key, HeaderCache(), unheard)[0].tensors if is_key(key) else None
        except UserError:
            return None

    few = list(keys)[:MAX_STRAYS_OPENED]
    with ThreadPoolExecutor(MAX_STRAYS_OPENED) as pool:
        found = dict(zip(few, pool.map(tensors_of, few), strict=True))
    return {key: (tree.files[key], found.get(key)) for key in keys}
