"""Documents of a checkpoint, which others wrote: JSON objects, and names of files in it."""

from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.errors import CheckpointError, RecipeError
from stockflow.storage import Store, check_key, read_small
from stockflow.text.strictjson import parse_text_json


def is_key(text: str) -> bool:
    """Return whether a text names something in the folder or below it, and every store takes it."""
    try:
        return bool(check_key(text))
    except RecipeError:
        return False


def is_file_name(file: str) -> bool:
    """Return whether a text names a file directly in the folder, and every store takes it."""
    return "/" not in file and is_key(file)


def find_json(store: Store, key: str, max_bytes: int) -> object:
    """Return what a JSON file says, None if that cannot be told: whoever copies it looks for damage."""
    try:
        return parse_text_json(read_small(store, key, max_bytes=max_bytes), allows_constants=True)
    except ValueError:
        return None


def read_json(store: Store, key: str, max_bytes: int) -> dict[str, object]:
    """Return what a JSON file says.

    Raises:
        CheckpointError: it is too long, no JSON, or no object.
    """
    return json_object(read_whole(store, key, max_bytes), store.where(key))


def read_whole(store: Store, key: str, max_bytes: int) -> bytes:
    """Return the bytes of a document.

    Raises:
        CheckpointError: it is too long.
    """
    payload, stamp = store.read_head(key, max_bytes)
    if stamp.size > max_bytes:
        raise CheckpointError(f"{store.where(key)} is {stamp.size:,} bytes long; at most {max_bytes:,} are read")
    return payload


def json_object(payload: bytes, where: str) -> dict[str, object]:
    """Return what the bytes of a JSON file say.

    Raises:
        CheckpointError: they are no JSON, or no object.
    """
    try:
        parsed = parse_text_json(payload, allows_constants=True)
    except ValueError as error:
        said = disguise_of(payload, len(payload))
        raise CheckpointError(f"{where} {said}" if said else f"{where} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return parsed
