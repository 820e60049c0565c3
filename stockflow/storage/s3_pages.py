"""Pages of an S3 listing, as both clients get them: objects and folders by their keys below a root.

Left out is what no key of a store can name: clients disagree on empty, ``.`` and ``..`` segments.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stockflow.storage.base import Listing, Stamp

_UNNAMED = frozenset(("", ".", ".."))


def files_on(pages: Iterable[Mapping[str, Any]], root: str) -> Iterator[tuple[str, Stamp]]:
    """Yield the objects; the empty marker of a folder ends in a slash, and is none."""
    for page in pages:
        for entry in page.get("Contents", ()):
            key = _below(root, entry["Key"])
            if not _UNNAMED.intersection(key.split("/")):
                yield key, Stamp(entry["Size"], entry.get("ETag", ""))


def listing_on(pages: Iterable[Mapping[str, Any]], root: str) -> Listing:
    """Return the objects and the folders directly below the root."""
    pages = list(pages)
    folders = (_below(root, entry["Prefix"])[:-1] for page in pages for entry in page.get("CommonPrefixes", ()))
    return Listing(dict(files_on(pages, root)), tuple(name for name in folders if name not in _UNNAMED))


def _below(root: str, key: str) -> str:
    return key.removeprefix(f"{root}/") if root else key
