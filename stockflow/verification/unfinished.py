"""Outputs without a manifest: what they are instead."""

from contextlib import suppress

from stockflow.errors import StorageError, UserError
from stockflow.output import claims
from stockflow.output.keys import CLAIM_FILE
from stockflow.progress import file as progress_file
from stockflow.verification.files import Output

MAX_KEYS = 1000
"""that are looked at: a wrong place may be a whole bucket"""


def what_is_there(output: Output, then: str) -> str:
    """Say what an output without a manifest is, and what to do before it is asked again."""
    if _exists(output, CLAIM_FILE):
        return f"it is not a finished output{_progress(output)}; run the command that makes it again, then {then}"
    keys = output.store.list(at_most=MAX_KEYS)
    if not keys:
        return "there is nothing. Check the place, or name the storage options with --recipe"
    if any(key.endswith((".safetensors", ".safetensors.index.json")) for key in keys):
        return (
            "it is a checkpoint that stockflow did not make, so nothing is on record about its making; "
            "`stockflow audit RECIPE MERGED` tells what a merge by another tool did"
        )
    return "it is not an output of stockflow"


def _exists(output: Output, key: str) -> bool:
    try:
        output.store.stamp(key)
    except (UserError, StorageError):
        return False
    return True


def _progress(output: Output) -> str:
    """Say how far an unfinished merge is, as far as it says so itself."""
    with suppress(UserError):
        progress = progress_file.read(output, claims.read(output).plan_id)
        return f" ({progress.shards_done:,} of {progress.shards:,} {progress.of})" if progress else ""
    return ""
