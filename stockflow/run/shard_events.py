"""Events of a merge's shards: what the driver and the places tell of them; sizes are those of tensors alone."""

from collections.abc import Collection

from stockflow.events import Begun, Cost, Done, Dropped, Stage
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import MergePlan, ShardPlan


def merging(plan: MergePlan, resumed: Collection[str]) -> Stage:
    """Return the stage in which shards are merged; ``resumed`` files are there already."""
    sizes = {shard.file: tensor_bytes(shard) for shard in plan.shards}
    return Stage(
        "merging",
        total_bytes=sum(sizes.values()),
        done_bytes=sum(sizes[file] for file in resumed),
        num_items=len(plan.shards),
        num_done=len(resumed),
        unit="shards",
        counts_written=True,
        resumed=tuple(resumed),
    )


def begun(shard: ShardPlan, worker: str) -> Begun:
    """Return that a worker begins with a shard."""
    return Begun(shard.file, worker, tensor_bytes(shard))


def done(shard: ShardPlan, receipt: Receipt) -> Done:
    """Return that a shard is done, and what it took."""
    cost = Cost(
        num_bytes=tensor_bytes(shard),
        num_tensors=len(receipt.tensors),
        seconds=receipt.seconds,
        retries=receipt.retries,
        peak_memory_bytes=receipt.peak_memory_bytes,
    )
    return Done(shard.file, receipt.worker, cost)


def dropped(shard: ShardPlan) -> Dropped:
    """Return that a shard is merged again."""
    return Dropped(shard.file, tensor_bytes(shard))


def tensor_bytes(shard: ShardPlan) -> int:
    """Return the bytes of a shard's tensors, its header left out: as workers count."""
    return shard.num_bytes - len(shard.header)
