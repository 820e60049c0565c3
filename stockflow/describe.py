"""A plan and a result in words and numbers, for people and for programs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stockflow.budget import OPTIMAL_READ_BYTES, Workspace, gb, mib
from stockflow.driver import MergeResult
from stockflow.plan import MergePlan
from stockflow.schedule import Load, schedule
from stockflow.storage import redact


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one worker with a given workspace reads; another budget reads the same bytes in other portions."""

    requests: int
    bytes_to_read: int
    passes: Mapping[int, int]
    """number of tensors by how often they are read"""


def traffic(plan: MergePlan, workspace: Workspace) -> Traffic:
    """Return the requests, bytes and passes of a merge."""
    requests = bytes_to_read = 0
    passes: Counter[int] = Counter()
    for shard in plan.shards:
        for step in schedule(shard.jobs, workspace):
            for load in step.loads:
                sizes = request_sizes(load)
                requests += step.num_reads * sum(-(-size // OPTIMAL_READ_BYTES) for size in sizes)
                bytes_to_read += step.num_reads * sum(sizes)
            finished = [piece for piece in step.loads[-1].pieces if piece.stop == piece.job.num_elems]
            passes[step.num_reads] += len(finished)
    return Traffic(requests, bytes_to_read, dict(sorted(passes.items())))


def project(plan: MergePlan, workspace: Workspace, notes: Sequence[str] = ()) -> dict[str, object]:
    """Return what a merge of this plan will read, write and hold, for programs."""
    reading = traffic(plan, workspace)
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
        "bytes_to_read": reading.bytes_to_read,
        "bytes_to_write": plan.num_output_bytes,
        "requests": reading.requests,
        "passes": {str(number): count for number, count in reading.passes.items()},
        "projected_memory_bytes": workspace.projected_bytes,
        "notes": [*plan.notes, *notes],
    }


def request_sizes(load: Load) -> list[int]:
    """Return the bytes of each range of a load; for a load of one tensor without laying it out."""
    if len(load.pieces) > 1:
        return [request.stop - request.start for request in load.requests]
    ((job, start, stop),) = load.pieces
    return [width * (stop - start) for width in job.source_widths]


def plan_lines(plan: MergePlan, workspace: Workspace, notes: Sequence[str] = ()) -> Iterator[str]:
    """Yield the dry run, line by line."""
    reading = traffic(plan, workspace)
    yield f"plan {plan.plan_id[:12]}"
    for index, checkpoint in enumerate(plan.checkpoints):
        total = sum(stamp.size for stamp in checkpoint.files.values())
        role = " (names, order, config)" if index == plan.donor else ""
        yield f"  input   {redact(checkpoint.url)}: {len(checkpoint.files)} files, {gb(total)}{role}"
    methods = Counter(job.method for job in plan.jobs)
    how = ", ".join(f"{count} by {name}" for name, count in sorted(methods.items()))
    yield f"  tensors {methods.total()}: {how}; {len(plan.skipped)} skipped"
    smallest, largest = (pick(shard.num_bytes for shard in plan.shards) for pick in (min, max))
    yield f"  output  {len(plan.shards)} shards of {gb(smallest)} to {gb(largest)}, {gb(plan.num_output_bytes)} in all"
    yield f"  read    {gb(reading.bytes_to_read)} in {reading.requests:,} requests"
    times = (f"{count} tensors read {_times(number)}" for number, count in reading.passes.items())
    yield f"  passes  {'; '.join(times)}"
    yield f"  memory  {mib(workspace.projected_bytes)} per worker projected"
    for note in (*plan.notes, *notes):
        yield f"  note    {note}"


def result_facts(result: MergeResult) -> dict[str, object]:
    """Return what a finished merge was, for programs."""
    files = result.manifest.files
    return {
        "outcome": result.outcome,
        "output": result.output_url,
        "plan_id": result.plan.plan_id,
        "merge_id": result.plan.merge_id,
        "seconds": result.seconds,
        "resumed_shards": result.num_resumed,
        "shards": {shard.file: files[shard.file].sha256 for shard in result.plan.shards},
        "summary": dict(result.manifest.summary),
    }


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


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
