"""Modules of a model for sentence embeddings: the folders that ``modules.json`` chains, and the weights in them.

The layout is that of sentence-transformers: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stockflow.checkpoints.files.candidates import DIFFUSION_STEM
from stockflow.checkpoints.files.documents import is_key
from stockflow.checkpoints.files.tree import RECORDS_FOLDER, Tree, is_hidden
from stockflow.errors import CheckpointError
from stockflow.text.strictjson import shown

MODULES_FILE = "modules.json"
ROUTER_FILE = "router_config.json"
MODULE_WEIGHTS = "model.safetensors"
MODULE_INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = "pytorch_model.bin"
_WITHOUT_FILES = ("Normalize",)
"""types of modules whose folder is empty, and so is in no copy of the model"""


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of one model that have folders of their own."""

    folders: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    """dotted names of classes: of the library, or of code beside the model"""
    weights: tuple[str, ...] = ()
    """keys of their weights"""
    missing: tuple[str, ...] = ()
    """folders that are not there, of modules that have files"""
    document: str = ""
    """key of what names them, where every loader of the model needs it"""


def find_modules(tree: Tree, documents: Mapping[str, object], where: str) -> Modules:
    """Return the modules that a model's documents name.

    Args:
        tree: what lies in its folder.
        documents: what ``modules.json`` and ``router_config.json`` say, where they are there and can be read.
        where: the model, for messages.

    Raises:
        CheckpointError: a name leaves the folder.
    """
    named = [*_listed(documents.get(MODULES_FILE)), *_routed(documents.get(ROUTER_FILE))]
    types = {folder: name for folder, name in named if folder}
    folders = tuple(types)
    for folder in folders:
        if not is_key(folder) or is_hidden(folder) or folder.split("/")[0] == RECORDS_FOLDER:
            raise CheckpointError(f"{where}/{MODULES_FILE} names the folder {shown(folder)}, which is none of a model")
    return Modules(
        folders,
        tuple(name for _, name in named),
        tuple(key for folder in folders for key in _weights_of(tree, folder)),
        tuple(_missing(tree, types)),
    )


def published_as(key: str) -> str:
    """Return the key under which weights in a folder are published, by the donor's; empty for the model's own."""
    folder, _, name = key.rpartition("/")
    file = f"{DIFFUSION_STEM}.safetensors" if name.startswith(DIFFUSION_STEM) else MODULE_WEIGHTS
    return folder and f"{folder}/{file}"


def is_list_of_modules(document: object) -> bool:
    """Return whether ``modules.json`` says what a loader can follow."""
    return isinstance(document, list) and len(list(_listed(document))) == len(document)


def _listed(document: object) -> Iterator[tuple[str, str]]:
    """Yield folder (empty: the model's own) and type of each entry of ``modules.json``."""
    for entry in document if isinstance(document, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            yield entry["path"].removeprefix("./").rstrip("/").removesuffix("."), str(entry.get("type", ""))


def _routed(document: object) -> Iterator[tuple[str, str]]:
    """Yield folder and type of the modules between which a router in the model's own folder chooses."""
    types = document.get("types") if isinstance(document, dict) else None
    for folder, name in types.items() if isinstance(types, dict) else ():
        yield folder, str(name)


def _weights_of(tree: Tree, folder: str) -> Iterator[str]:
    """Yield the weights of a module, and of those nested in it."""
    below = tree.below(folder)
    for key in below:
        inner, _, name = key.rpartition("/")
        single, index = (f"{inner}/{file}" in tree.files for file in (MODULE_WEIGHTS, MODULE_INDEX))
        is_shard = name.endswith(".safetensors") and index and not single
        if name == MODULE_WEIGHTS or is_shard or (name == OTHER_WEIGHTS and not single and not index):
            yield key


def _missing(tree: Tree, types: Mapping[str, str]) -> Iterator[str]:
    for folder, name in types.items():
        is_unknown = folder.split("/")[0] in tree.cut or name.rpartition(".")[2] in _WITHOUT_FILES
        if not is_unknown and not tree.below(folder):
            yield folder
