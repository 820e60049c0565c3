"""Pages of an S3 listing, as both clients get them: objects and folders by their keys below a root.

Left out is what no key of a store can name: clients disagree on empty, ``.`` and ``..`` segments.
"""

from collections.abc import Mapping
from typing import Any

from stockflow.storage.base import Listing, Stamp

_UNNAMED = frozenset(("", ".", ".."))


def files_on(page: Mapping[str, Any], root: str) -> dict[str, Stamp]:
    """Return the objects; the empty marker of a folder ends in a slash, and is none."""
    entries = ((_below(root, entry["Key"]), entry) for entry in page.get("Contents", ()))
    return {
        key: Stamp(entry["Size"], entry.get("ETag", ""))
        for key, entry in entries
        if not _UNNAMED.intersection(key.split("/"))
    }


def listing_on(page: Mapping[str, Any], root: str) -> Listing:
    """Return the objects and the folders directly below the root."""
    folders = (_below(root, entry["Prefix"])[:-1] for entry in page.get("CommonPrefixes", ()))
    return Listing(files_on(page, root), tuple(name for name in folders if name not in _UNNAMED))


def _below(root: str, key: str) -> str:
    return key.removeprefix(f"{root}/") if root else key
