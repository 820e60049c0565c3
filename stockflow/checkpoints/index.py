"""Index of a sharded checkpoint: which file it says holds which tensor, held against the headers."""

from collections.abc import Mapping
from functools import lru_cache

from stockflow.checkpoints.documents import is_file_name, read_json
from stockflow.checkpoints.layout import Extent
from stockflow.errors import CheckpointError
from stockflow.storage import Store, redact
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 200_000_000


def read_index(store: Store) -> dict[str, str]:
    """Return the file that each tensor is said to be in.

    Raises:
        CheckpointError: the index is malformed, or names a file elsewhere.
    """
    where = f"{redact(store.url)}/{INDEX_FILE}"
    weight_map = read_json(store, INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a mapping `weight_map` from tensor names to files")
    is_name = lru_cache(maxsize=None)(is_file_name)
    for name, file in weight_map.items():
        if isinstance(file, str) and is_name(file):
            continue
        raise CheckpointError(
            f"{where}: tensor {shown(name)} is said to be in {shown(file)}; "
            "expected the name of a file in the same folder"
        )
    return weight_map


def check_coverage(where: str, weight_map: Mapping[str, str], extents: Mapping[str, Extent]) -> None:
    """Hold an index against the headers.

    Raises:
        CheckpointError: they disagree.
    """
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
