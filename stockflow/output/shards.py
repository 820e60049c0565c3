"""Shards that are there already: which of them are still what their receipts say."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.layout import folder_of
from stockflow.errors import CheckpointError, InputChangedError, NotFoundError
from stockflow.output import receipts
from stockflow.output.keys import receipt_folder, receipt_key
from stockflow.output.receipts import Receipt, condensed
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.storage import Stamp, Store
from stockflow.storage.parts import RANGE_BYTES

NUM_READERS = 16
"""Receipts that are read at the same time: on object storage each takes a round trip."""


def valid_receipts(store: Store, plan: MergePlan) -> dict[str, Receipt]:
    """Receipts of shards that are still what they were when the receipt was written, condensed."""
    plan_id = plan.plan_id
    known = store.list(receipt_folder(plan_id))
    present = present_files(store, [shard.file for shard in plan.shards]) if known else {}
    shards = [shard for shard in plan.shards if receipt_key(plan_id, shard.file) in known and shard.file in present]
    read = partial(_receipt_of, store, plan_id)
    valid = {}
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="receipts") as pool:
        for shard, receipt in zip(shards, map_ahead(pool, NUM_READERS, read, shards), strict=True):
            if receipt and is_intact(store, receipt, present[shard.file]):
                valid[shard.file] = receipt
    return valid


def present_files(store: Store, files: Iterable[str]) -> dict[str, Stamp]:
    """Return what lies directly in an output, and in the subfolders that some of its files have."""
    folders = sorted({folder_of(file) for file in files} - {""})
    return dict(chain(store.list_top().items(), *(store.list(f"{folder}/").items() for folder in folders)))


def is_finished(store: Store, plan_id: str, shard: ShardPlan, numerics_class: str) -> bool:
    """Return whether a shard is there with its receipt: a worker that was lost may have done it, and not said so."""
    try:
        found = store.stamp(shard.file)
        receipt = _receipt_of(store, plan_id, shard)
        return receipt is not None and is_intact(store, receipt, found) and receipt.numerics_class == numerics_class
    except NotFoundError:
        return False


def _receipt_of(store: Store, plan_id: str, shard: ShardPlan) -> Receipt | None:
    """Return the condensed receipt of a shard; None if it proves nothing: the shard must be merged again.

    Raises:
        NotFoundError: there is none.
    """
    try:
        receipt = receipts.read(store, plan_id, shard.file)
    except CheckpointError:
        return None
    is_of_shard = (receipt.plan_id, receipt.file, receipt.size) == (plan_id, shard.file, shard.num_bytes)
    return condensed(receipt) if is_of_shard else None


def is_intact(store: Store, receipt: Receipt, found: Stamp) -> bool:
    """Whether a shard is the one of the receipt; with another stamp but equal size its bytes decide."""
    if found == receipt.stamp and found.size == receipt.size:
        return True
    if found.size != receipt.size:
        return False
    try:
        return sha256_of(store, receipt.file, found) == receipt.sha256
    except InputChangedError:  # a run of the same plan beside this one replaced it by its own copy while it was read
        return is_intact(store, receipt, store.stamp(receipt.file))


def sha256_of(store: Store, key: str, stamp: Stamp, chunk_bytes: int = RANGE_BYTES) -> str:
    """Return the sha256 of an object's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(chunk_bytes, stamp.size)))
    for start in range(0, stamp.size, chunk_bytes):
        part = buffer[: min(chunk_bytes, stamp.size - start)]
        store.read_into(key, start, part, stamp)
        digest.update(part)
    return digest.hexdigest()
