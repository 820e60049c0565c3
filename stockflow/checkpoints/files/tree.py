"""The folder of a model and what is below it: every file with its stamp, listed in few requests."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from stockflow.checkpoints.files.documents import is_key
from stockflow.storage import Listing, Stamp, Store

RECORDS_FOLDER = "_stockflow"
"""What an output has there is no part of the model."""
MANIFEST_FILE = "manifest.json"
"""An output has it once it is whole."""
MAX_FOLDERS = 32
"""Subfolders that are listed: those that a loader may ask for first."""
MAX_FILES = 1000
"""Files that are listed of each: as many as S3 answers with at once."""
NUM_LISTERS = 8

_ASKED_FOR = re.compile(r"\d+_.+|additional_chat_templates|(\w+_)?tokenizer")
"""names of modules, templates and tokenizers"""


@dataclass(frozen=True, slots=True)
class Tree:
    """What lies in a model's folder; hidden folders and an output's own records left out."""

    files: Mapping[str, Stamp]
    """by key: those directly in the folder, then those of its subfolders"""
    cut: tuple[str, ...] = ()
    """subfolders that were not listed, or not to their end"""

    def below(self, folder: str) -> list[str]:
        """Return the keys of what lies in a subfolder, at any depth."""
        return [key for key in self.files if key.startswith(f"{folder}/")]


def list_tree(store: Store, listing: Listing) -> Tree:
    """Return what is there: one request for each subfolder, none if there is none.

    Args:
        store: the model's.
        listing: what lies directly in it.
    """
    shown = [folder for folder in listing.folders if not folder.startswith(".") and folder != RECORDS_FOLDER]
    folders = [folder for folder in shown if is_key(folder)]
    if not shown:
        return Tree(listing.files)
    folders.sort(key=lambda folder: not _ASKED_FOR.fullmatch(folder))
    with ThreadPoolExecutor(NUM_LISTERS, thread_name_prefix="list") as pool:
        found = list(pool.map(lambda folder: store.list(f"{folder}/", at_most=MAX_FILES), folders[:MAX_FOLDERS]))
    cut = [folder for folder, files in zip(folders, found, strict=False) if len(files) == MAX_FILES]
    files = dict(listing.files)
    for each in found:
        files |= {key: stamp for key, stamp in each.items() if not is_hidden(key)}
    return Tree(files, (*cut, *folders[MAX_FOLDERS:], *(folder for folder in shown if not is_key(folder))))


def is_hidden(key: str) -> bool:
    """Return whether a file, or a folder above it, is hidden."""
    return key.startswith(".") or "/." in key
