"""A plan and a result in words and numbers, for people and for programs."""

from collections import Counter
from collections.abc import Iterator

from stockflow.budget import Workspace, mib
from stockflow.driver import MergeResult
from stockflow.plan import MergePlan
from stockflow.schedule import schedule, split_request
from stockflow.storage import redact


def project(plan: MergePlan, workspace: Workspace) -> dict[str, object]:
    """Return what a merge of this plan will read, write and hold within the given memory.

    Passes and requests are those of one worker with this workspace; a worker with more or less memory
    reads the same bytes in other portions.
    """
    requests = bytes_read = 0
    passes: Counter[int] = Counter()
    for shard in plan.shards:
        for step in schedule(shard.jobs, workspace):
            for load in step.loads:
                requests += step.num_reads * sum(len(list(split_request(request))) for request in load.requests)
                bytes_read += step.num_reads * sum(request.stop - request.start for request in load.requests)
            finished = [piece for piece in step.loads[-1].pieces if piece.stop == piece.job.num_elems]
            passes[step.num_reads] += len(finished)
    return {
        "plan_id": plan.plan_id,
        "merge_id": plan.merge_id,
        "checkpoints": [
            {
                "url": redact(checkpoint.url),
                "files": len(checkpoint.files),
                "bytes": sum(stamp.size for stamp in checkpoint.files.values()),
            }
            for checkpoint in plan.checkpoints
        ],
        "shards": [{"file": shard.file, "tensors": len(shard.jobs), "bytes": shard.num_bytes} for shard in plan.shards],
        "tensors": sum(len(shard.jobs) for shard in plan.shards),
        "methods": dict(Counter(job.method for job in plan.jobs)),
        "skipped": list(plan.skipped),
        "side_files": [side.key for side in plan.side_files],
        "source_bytes": plan.num_source_bytes,
        "bytes_to_read": bytes_read,
        "bytes_to_write": plan.num_output_bytes,
        "requests": requests,
        "passes": {str(number): count for number, count in sorted(passes.items())},
        "projected_memory_bytes": workspace.projected_bytes,
        "notes": list(plan.notes),
    }


def plan_lines(plan: MergePlan, workspace: Workspace) -> Iterator[str]:
    """Yield the dry run, line by line."""
    facts = project(plan, workspace)
    yield f"plan {plan.plan_id[:12]}"
    for index, checkpoint in enumerate(plan.checkpoints):
        total = sum(stamp.size for stamp in checkpoint.files.values())
        role = " (names, order, config)" if index == plan.donor else ""
        yield f"  input   {redact(checkpoint.url)}: {len(checkpoint.files)} files, {gb(total)}{role}"
    methods = ", ".join(f"{count} by {name}" for name, count in sorted(Counter(j.method for j in plan.jobs).items()))
    yield f"  tensors {facts['tensors']}: {methods}; {len(plan.skipped)} skipped"
    smallest, largest = (pick(shard.num_bytes for shard in plan.shards) for pick in (min, max))
    yield f"  output  {len(plan.shards)} shards of {gb(smallest)} to {gb(largest)}, {gb(plan.num_output_bytes)} in all"
    yield f"  read    {gb(facts['bytes_to_read'])} in {facts['requests']} requests"
    yield f"  passes  {_passes(facts['passes'])}"
    yield f"  memory  {mib(workspace.projected_bytes)} per worker projected"
    for note in plan.notes:
        yield f"  note    {note}"


def result_lines(result: MergeResult) -> Iterator[str]:
    """Yield the summary of a finished merge, line by line."""
    where = redact(result.output_url)
    if result.outcome == "already_finished":
        yield f"already finished: {where} holds this plan's output ({result.plan.plan_id[:12]}); nothing was done"
        yield f"next: stockflow verify {where}"
        return
    facts = result.manifest.summary
    read, written = facts["bytes_read"], facts["bytes_written"]
    parameters = facts["parameters"] / 1e9
    yield f"merged {facts['tensors']:.0f} tensors ({parameters:.3g} B parameters) in {result.seconds:.1f} s"
    yield f"  read {gb(read)}, wrote {gb(written)}: {(read + written) / 1e9 / max(result.seconds, 1e-9):.2f} GB/s"
    stages = {name.removeprefix("seconds_"): value for name, value in facts.items() if name.startswith("seconds_")}
    yield "  seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in stages.items() if name != "total")
    yield f"  peak memory {mib(facts['peak_memory_bytes'])}"
    if result.num_resumed:
        yield f"  resumed: {result.num_resumed} of {len(result.plan.shards)} shards were there already"
    if facts["clamped_tensors"]:
        yield (
            f"  {facts['clamped_tensors']:.0f} tensors were clamped to the base in whole or part: their task vectors "
            "oppose each other (stockflow: on_negative)"
        )
    if facts["zero_delta_tensors"]:
        yield f"  {facts['zero_delta_tensors']:.0f} tensors are unchanged in at least one model"
    if facts["retries"]:
        yield f"  {facts['retries']:.0f} reads were retried"
    yield f"output: {where}"
    yield f"next: stockflow verify {where}"


def _passes(passes: object) -> str:
    assert isinstance(passes, dict)
    return "; ".join(
        f"{count} tensors read {'once' if number == '1' else number + ' times'}" for number, count in passes.items()
    )


def gb(num_bytes: object) -> str:
    """Return a size for people, in decimal units as storage is sold."""
    assert isinstance(num_bytes, int | float)
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
