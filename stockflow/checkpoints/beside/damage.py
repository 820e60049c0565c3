"""Damage of files that are to be copied: what lies in place of one, seen from its first bytes and its last ones."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.checkpoints.modules import MODULES_FILE, is_list_of_modules
from stockflow.checkpoints.opening import Checkpoint
from stockflow.storage import Stamp, Store, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import parse_text_json

MAX_PARSED_BYTES = 2**20
"""Of a longer JSON file, begin and end are looked at."""
NUM_READERS = 8
_NEVER_EMPTY = (".json", ".model", ".spm", ".tiktoken")
_ARCHIVES = (".pt", ".npz")
"""Ends of what is a pickle or a zip archive by itself: the voices of a model that speaks."""
_BRACKETS = {b"{": b"}", b"[": b"]"}


def without_damaged(store: Store, checkpoint: Checkpoint, is_taken: Callable[[str], bool]) -> Checkpoint:
    """Return a checkpoint that gives no damaged file to an output, and remarks on those it has.

    One request for each file that would be copied, and a second one for a JSON file of more than 1 MiB.

    Args:
        store: the checkpoint's.
        checkpoint: to look at.
        is_taken: whether one of its side files would be copied.

    Raises:
        StorageError: reading failed after retries.
    """
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="side files") as pool:
        taken = list(filter(is_taken, checkpoint.side_files))
        found = list(pool.map(lambda key: _damage_of(store, key), taken))
    damaged = {key: what for key, what in zip(taken, found, strict=True) if what}
    where = redact(checkpoint.url)
    remarks = [
        Remark(
            "damaged-file",
            f"{where}/{in_a_line(key)} {what}. Accepted, the output goes without it",
            "refusal",
            (where,),
            values={key: what},
        )
        for key, what in damaged.items()
    ]
    return replace(
        checkpoint,
        side_files={key: stamp for key, stamp in checkpoint.side_files.items() if key not in damaged},
        remarks=(*checkpoint.remarks, *remarks),
    )


def _damage_of(store: Store, key: str) -> str | None:
    head, stamp = store.read_head(key, MAX_PARSED_BYTES if key.endswith(".json") else 512)
    if not stamp.size and not key.endswith(_NEVER_EMPTY):
        return None
    is_archive = key.endswith(_ARCHIVES) and head.startswith((b"PK", b"\x80"))
    if not is_archive and (found := disguise_of(head, stamp.size)):
        return found
    return _json_damage(store, key, head, stamp) if key.endswith(".json") else None


def _expected(key: str) -> str:
    return "list of modules, each with its path" if key == MODULES_FILE else "object"


def _json_damage(store: Store, key: str, head: bytes, stamp: Stamp) -> str | None:
    if len(head) == stamp.size:
        try:
            parsed = parse_text_json(head, allows_constants=not key.endswith("tokenizer.json"))  # Rust reads that
        except ValueError as error:
            return f"is not valid JSON ({error}): download it again, or mend it"
        is_right = is_list_of_modules(parsed) if key == MODULES_FILE else isinstance(parsed, dict | list)
        return None if is_right else f"is no JSON {_expected(key)}: download it again, or mend it"
    tail = bytearray(64)
    store.read_into(key, stamp.size - len(tail), memoryview(tail), stamp)
    opening = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if opening not in _BRACKETS or bytes(tail).rstrip()[-1:] != _BRACKETS[opening]:
        return "is not valid JSON, or its end is missing: download it again"
    return None
