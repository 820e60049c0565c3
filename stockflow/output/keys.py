"""Keys: the names of everything in an output."""

from stockflow.checkpoints.files import tree

MANIFEST_FILE = tree.MANIFEST_FILE
CARD_FILE = "README.md"
RECORDS = f"{tree.RECORDS_FOLDER}/"
"""Folder of everything in an output that is not part of the model."""
CLAIM_FILE = RECORDS + "claim.json"


def plan_folder(plan_id: str) -> str:
    """Return the folder of all records of a plan."""
    return f"{RECORDS}{plan_id}/"


def plan_key(plan_id: str) -> str:
    """Return where the plan lies."""
    return f"{plan_folder(plan_id)}plan.json"


def progress_key(plan_id: str) -> str:
    """Return where a running merge reports."""
    return f"{plan_folder(plan_id)}progress.json"


def tensors_key(plan_id: str) -> str:
    """Return where the table of tensor facts lies."""
    return f"{plan_folder(plan_id)}tensors.parquet"


def receipt_folder(plan_id: str) -> str:
    """Return the folder of a plan's receipts."""
    return f"{plan_folder(plan_id)}receipts/"


def receipt_key(plan_id: str, file: str) -> str:
    """Return where the receipt of a shard lies."""
    return f"{receipt_folder(plan_id)}{file}.json"


def receipted_file(plan_id: str, key: str) -> str | None:
    """Return the shard whose receipt lies there, None if ``key`` is that of no receipt."""
    file = key.removeprefix(receipt_folder(plan_id)).removesuffix(".json")
    return file if key == receipt_key(plan_id, file) else None


def factors_folder(plan_id: str) -> str:
    """Return the folder of what is done of an adapter that is being made; when it is whole, nothing is there."""
    return f"{plan_folder(plan_id)}factors/"


def run_folder(plan_id: str) -> str:
    """Return the folder where the runs of a plan say that they are alive."""
    return f"{plan_folder(plan_id)}runs/"


def run_key(plan_id: str, run: str) -> str:
    """Return where a run says that it is alive."""
    return f"{run_folder(plan_id)}{run}.json"


def numerics_folder(plan_id: str) -> str:
    """Return the folder that says which numerics class a plan's shards keep to."""
    return f"{plan_folder(plan_id)}numerics/"


def numerics_key(plan_id: str, number: int) -> str:
    """Return where the class that was agreed on after ``number`` others lies."""
    return f"{numerics_folder(plan_id)}{number:06d}.json"
