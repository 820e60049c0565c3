"""Identity: which locations name one model, by what they resolve to or by the bytes of their files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from stockflow.checkpoints.opening import Checkpoint
from stockflow.storage import Stamp, halves_of, is_weights, scheme_of
from stockflow.storage.sightings import Sightings

_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_PINNED = re.compile(r"hf://([^/@]+)/([^/@]+)@([0-9a-f]{40})")
_WITH_ETAGS = ("s3", "gs", "az")


def same_models(
    locations: Sequence[str], checkpoints: Sequence[Checkpoint], seen: Sightings | None = None
) -> dict[str, str]:
    """Return the first location of the same model, by the later ones.

    Args:
        locations: as the recipe resolves them, base first.
        checkpoints: what was opened at each; the hub's by their commits.
        seen: the local files that were opened, which may be one another's links.
    """
    first: dict[object, str] = {}
    same = {}
    for location, checkpoint in zip(locations, checkpoints, strict=True):
        keys = [key for key in (*_keys_of(checkpoint), *_linked(checkpoint, seen)) if key]
        known = next((first[key] for key in keys if key in first), None)
        if known is not None:
            same[location] = known
        for key in keys:
            first.setdefault(key, known or location)
    return same


def _keys_of(checkpoint: Checkpoint) -> tuple[object, ...]:
    return _model_of(checkpoint.url), _place_of(checkpoint), _contents_of(checkpoint)


def _model_of(url: str) -> tuple[str, ...]:
    """Return what a location resolves to; names on the hub know no case, a snapshot in its cache is a commit of it."""
    if found := _PINNED.fullmatch(url) or _SNAPSHOT.fullmatch(url):
        return "hf", *(part.lower() for part in found.groups())
    return (url,)


def _place_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the folder and the names of the files that were read of it, of a model that one of them may name."""
    return (_folder_of(checkpoint), *sorted(checkpoint.files)) if len(halves_of(checkpoint.url)) == 1 else ()


def _folder_of(checkpoint: Checkpoint) -> str:
    return checkpoint.url.rpartition("/")[0] if is_weights(checkpoint.url) else checkpoint.url


def _linked(checkpoint: Checkpoint, seen: Sightings | None) -> Iterator[object]:
    """Yield the files of a local checkpoint as the disk knows them, whatever links lead there, and its config."""
    if seen is None or scheme_of(checkpoint.url) != "file" or len(halves_of(checkpoint.url)) > 1:
        return
    folder = _folder_of(checkpoint)
    files = ((f"{folder}/{name}", stamp) for name, stamp in checkpoint.files.items() if not name.endswith(".json"))
    found = {seen.place_of(path, stamp.size, stamp.version) for path, stamp in files}
    if None not in found:
        yield frozenset(found), json.dumps(checkpoint.config, sort_keys=True)


def _contents_of(checkpoint: Checkpoint) -> tuple[tuple[str, Stamp], ...]:
    """Return name and stamp of every file of weights where stamps follow from the bytes, () elsewhere."""
    files: Mapping[str, Stamp] = checkpoint.files
    is_telling = scheme_of(checkpoint.url) in _WITH_ETAGS and all(stamp.version for stamp in files.values())
    return tuple(sorted(files.items())) if is_telling else ()
