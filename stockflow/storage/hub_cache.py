"""Cache of the Hugging Face hub on disk: from the folder of a model to the snapshot that its name stands for."""

import os
import re

from stockflow.errors import NotFoundError, RecipeError
from stockflow.text.examples import some

MODELS = "models--"
"""how the name of a model's folder begins; it holds ``snapshots/<commit>``, ``blobs`` and ``refs/<revision>``"""
COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REF_BYTES = 256
NUM_NAMED = 3


def snapshot_of(folder: str) -> str:
    """Return the snapshot that the folder of a model in the hub's cache stands for; any other folder as it is.

    It is the one of ``refs/main``, else the only one.

    Raises:
        NotFoundError: nothing is downloaded.
        RecipeError: it holds another thing than a model, or nothing says which of its snapshots is meant.
    """
    model = os.path.dirname(folder) if os.path.basename(folder) == "snapshots" else folder
    kind, _, name = os.path.basename(model).partition("--")
    snapshots = os.path.join(model, "snapshots")
    if not name or (not os.path.isdir(os.path.join(model, "refs")) and not os.path.isdir(snapshots)):
        return folder
    if kind in ("datasets", "spaces"):
        raise RecipeError(f"{folder} is a {kind[:-1]} in the hub's cache, no model; name the folder of a model")
    if kind != "models":
        return folder
    if folder == snapshots and any(entry.is_file() for entry in os.scandir(folder)):
        return folder
    entries = os.scandir(snapshots) if os.path.isdir(snapshots) else ()
    there = sorted(entry.name for entry in entries if entry.is_dir())
    commit = _commit(model, "main")
    if commit in there or len(there) == 1:
        return os.path.join(snapshots, commit if commit in there else there[0])
    if not there:
        raise NotFoundError(f"{folder} holds no snapshot; download it: `hf download {name.replace('--', '/')}`")
    names = some(there, NUM_NAMED, str)
    raise RecipeError(f"{folder} has {len(there)} snapshots and no refs/main among them; name one: {snapshots}/{names}")


def cached(cache: str, repository: str, revision: str) -> str | None:
    """Return the snapshot in the hub's cache that a revision of a model stands for; None if it is not there."""
    model = os.path.join(cache, f"{MODELS}{repository.replace('/', '--')}")
    commit = revision if COMMIT.fullmatch(revision) else _commit(model, revision)
    folder = os.path.join(model, "snapshots", commit)
    return folder if commit and os.path.isdir(folder) else None


def _commit(model: str, revision: str) -> str:
    try:
        with open(os.path.join(model, "refs", revision), "rb") as file:
            said = file.read(_MAX_REF_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return said if COMMIT.fullmatch(said) else ""
