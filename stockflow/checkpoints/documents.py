"""Documents of a checkpoint, which others wrote: JSON objects, and names of files in it."""

from stockflow.errors import CheckpointError, RecipeError
from stockflow.storage import Store, check_key, redact
from stockflow.text.strictjson import parse_text_json


def is_file_name(file: str) -> bool:
    """Return whether a text names a file directly in the folder, and every store takes it."""
    try:
        return "/" not in check_key(file)
    except RecipeError:
        return False


def read_json(store: Store, key: str, max_bytes: int) -> dict[str, object]:
    """Return what a JSON file says.

    Raises:
        CheckpointError: it is too long, no JSON, or no object.
    """
    where = f"{redact(store.url)}/{key}"
    payload, stamp = store.read_head(key, max_bytes)
    if stamp.size > max_bytes:
        raise CheckpointError(f"{where} is {stamp.size:,} bytes long; at most {max_bytes:,} are read")
    try:
        parsed = parse_text_json(payload, allows_constants=True)
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return parsed
