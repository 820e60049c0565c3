"""Files of an output: those that a plan publishes, and strangers, which somebody else put there."""

import re
from collections.abc import Collection

from stockflow.checkpoints.beside.left_out import WEIGHT_SUFFIXES
from stockflow.checkpoints.beside.side_files import KINDS
from stockflow.checkpoints.files.tree import is_hidden
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.output.keys import CARD_FILE, CLAIM_FILE, RECORDS, plan_key, tensors_key
from stockflow.planning.plan import MergePlan

_READ = re.compile(
    "|".join(pattern for kind, patterns in KINDS.items() if kind != "licence" for pattern in patterns)
    + r"|.*config\.json|model_index\.json|.+\.py|.+\.jinja"
)


def planned_files(plan: MergePlan, plan_id: str) -> dict[str, int | None]:
    """Return every file a plan publishes, with its size where the plan knows it."""
    files: dict[str, int | None] = {shard.file: shard.num_bytes for shard in plan.shards}
    files |= {side.key: side.stamp.size for side in plan.side_files}
    files |= {file.key: file.size for file in plan.written_files}
    files |= dict.fromkeys((CARD_FILE, plan_key(plan_id), tensors_key(plan_id)))
    if plan.indexed:
        files[plan.index_file] = None
    if plan.config is not None:
        files[CONFIG_FILE] = None
    return files


def strangers(present: Collection[str], ours: Collection[str]) -> list[str]:
    """Return the keys of what nobody of ours wrote; hidden files, and outputs in subfolders, are passed over.

    Args:
        present: all keys below an output.
        ours: those that belong there, records left out.
    """
    nested = tuple(key.removesuffix(CLAIM_FILE) for key in present if key.endswith(f"/{CLAIM_FILE}"))
    passed_over = (RECORDS, *nested)
    return [key for key in present if key not in ours and not key.startswith(passed_over) and not is_hidden(key)]


def loaders_read(key: str) -> bool:
    """Return whether a loader of the model may read a file of this name: weights, tokenizers, templates, code."""
    name = key.rpartition("/")[2]
    return name.endswith(WEIGHT_SUFFIXES) or bool(_READ.fullmatch(name))
