"""A plan, its forecast and a result in words and numbers, for people and for programs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from stockflow.forecast.amounts import StoreRequests, Workload, worst_tensor
from stockflow.forecast.seconds import STAGES, Forecast
from stockflow.planning.budget import LEAST_MEMORY_BYTES, Workspace
from stockflow.planning.plan import MergePlan
from stockflow.run.driver import Merged
from stockflow.storage import redact, scheme_of
from stockflow.text.records import as_plain
from stockflow.text.redaction import command_line
from stockflow.text.sizes import counted, estimate, gb, least_mib, mib, times

NUM_STAGES = 3
"""Of what goes on side by side so many are listed, the longest."""


def project(
    plan: MergePlan, workspace: Workspace, work: Workload, least_bytes: int, notes: Sequence[str] = ()
) -> dict[str, object]:
    """Return what a merge of this plan will read, write and hold, for programs."""
    worst = worst_tensor(plan.jobs)
    return {
        "plan_id": plan.plan_id,
        "merge_id": plan.merge_id,
        "checkpoints": [
            {
                "url": redact(checkpoint.url),
                "files": len(checkpoint.files),
                "bytes": sum(stamp.size for stamp in checkpoint.files.values()),
                "bytes_to_read": work.readings[index].num_bytes,
                "requests": work.readings[index].num_requests,
            }
            for index, checkpoint in enumerate(plan.checkpoints)
        ],
        "shards": [{"file": shard.file, "tensors": len(shard.jobs), "bytes": shard.num_bytes} for shard in plan.shards],
        "tensors": work.num_tensors,
        "methods": dict(Counter(job.result.method for job in plan.jobs)),
        "skipped": list(plan.skipped),
        "side_files": [side.key for side in plan.side_files],
        "source_bytes": plan.num_source_bytes,
        "bytes_to_read": work.num_bytes_read,
        "bytes_to_write": plan.num_output_bytes,
        "bytes_to_read_again": work.num_bytes_again,
        "requests": work.num_reads,
        "passes": {str(number): count for number, count in work.passes.items()},
        "projected_memory_bytes": workspace.projected_bytes,
        "least_memory_bytes": least_bytes,
        "worst_tensor": worst.output.name if worst else None,
        "notes": [*plan.notes, *notes],
        "remarks": [as_plain(remark) for remark in plan.remarks],
    }


def _shards_in_words(plan: MergePlan) -> str:
    sizes = [shard.num_bytes for shard in plan.shards]
    if len(sizes) == 1:
        return f"1 shard of {gb(sizes[0])}"
    return f"{counted(len(sizes), 'shard')} of {gb(min(sizes))} to {gb(max(sizes))}, {gb(sum(sizes))} in all"


def plan_lines(
    plan: MergePlan, workspace: Workspace, work: Workload, least_bytes: int, notes: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the dry run, line by line."""
    yield f"plan {plan.plan_id[:12]}"
    yield from _source_lines(plan, work)
    methods = Counter(job.result.method for job in plan.jobs)
    how = ", ".join(f"{count} by {name}" for name, count in sorted(methods.items()))
    yield f"  tensors {methods.total()}: {how}; {len(plan.skipped)} skipped"
    yield f"  output  {_shards_in_words(plan)}"
    yield from _copied_lines(plan)
    yield f"  read    {gb(work.num_bytes_read)} in {counted(work.num_reads, 'request')}"
    if work.read_twice:
        yield f"  again   {gb(work.num_bytes_again)} of that to compare what is read of remote models (--verify-inputs)"
    passes = (f"{counted(count, 'tensor')} read {times(number)}" for number, count in work.passes.items())
    yield f"  passes  {'; '.join(passes)}"
    worst = worst_tensor(plan.jobs)
    if least_bytes == LEAST_MEMORY_BYTES:
        because = ", which compiling takes, once per machine"
    else:
        because = (
            f", for {worst.output.name!r} ({len(worst.reading.operands)} x {gb(worst.output.num_bytes)})"
            if worst
            else ""
        )
    projected, least = mib(workspace.projected_bytes), least_mib(least_bytes)
    yield f"  memory  {projected} per worker projected; the least --memory is {least}{because}"
    for remark in plan.remarks:
        yield f"  {'note' if remark.severity == 'note' else 'warning':<7} {remark} [{remark.code}]"
    for note in notes:
        yield f"  note    {note}"


def _copied_lines(plan: MergePlan) -> Iterator[str]:
    """Yield which files are published as they are, and which are written anew."""
    for donor in dict.fromkeys(side.checkpoint for side in plan.side_files):
        keys = ", ".join(side.key for side in plan.side_files if side.checkpoint == donor)
        yield f"  copied  {keys} from {redact(plan.checkpoints[donor].url)}"
    if plan.written_files:
        yield f"  written {', '.join(file.key for file in plan.written_files)}"


def _source_lines(plan: MergePlan, work: Workload) -> Iterator[str]:
    for index, checkpoint in enumerate(plan.checkpoints):
        reading = work.readings[index]
        total = sum(stamp.size for stamp in checkpoint.files.values())
        role = " (names, order, config)" if index == plan.donor else ""
        yield (
            f"  input   {redact(checkpoint.url)}: {counted(len(checkpoint.files), 'file')}, {gb(total)}{role}; "
            f"{gb(reading.num_bytes)} read in {counted(reading.num_requests, 'request')}"
        )


def forecast_facts(found: Forecast) -> dict[str, object]:
    """Return time, requests and money, for programs."""
    prediction, conditions = found.prediction, found.conditions
    price, num_machines = conditions.machine_price, conditions.num_machines
    return {
        "seconds": prediction.seconds,
        "phases": dict(prediction.phases),
        "stages": dict(prediction.stages),
        "bottleneck": prediction.bottleneck,
        "bottleneck_in_words": STAGES[prediction.bottleneck],
        "workers": conditions.num_workers,
        "threads_per_worker": conditions.num_threads,
        "inputs_in_memory": prediction.in_memory,
        "disk_seconds": prediction.disk_s,
        "cost": {"machine_price": price, "num_machines": num_machines, "machines": found.cost},
        "store_requests": [
            {"url": redact(url), "gets": asked.gets, "puts": asked.puts, "bytes_out": asked.bytes_out}
            for url, asked in found.requests
        ],
        "sources": list(found.sources),
    }


def forecast_lines(found: Forecast) -> Iterator[str]:
    """Yield time, requests and money, line by line."""
    prediction, conditions = found.prediction, found.conditions
    workers = counted(conditions.num_workers, "worker") if conditions.on_ray else "one process"
    each = " each" if conditions.num_workers > 1 else ""
    parts = ", ".join(
        f"{phase} {estimate(seconds)}" for phase, seconds in prediction.phases.items() if seconds >= 0.005
    )
    threads = counted(conditions.num_threads, "thread")
    yield f"  time    about {estimate(prediction.seconds)} by {workers} of {threads}{each}: {parts}"
    yield f"  limit   {STAGES[prediction.bottleneck]}; side by side: {_longest(prediction.stages)}"
    for place, asked in _by_store(found.requests).items():
        yield (
            f"  store   {place}: {asked.gets:,} GETs, {asked.puts:,} PUTs and listings; "
            f"{gb(asked.bytes_out)} out, {gb(asked.bytes_kept)} in"
        )
    if found.cost is not None:
        machines = counted(conditions.num_machines, "machine")
        yield f"  cost    {money(found.cost)}: {machines} at {conditions.machine_price:g} an hour, start to end"
    for source in found.sources:
        yield f"  model   {source}"
    if prediction.disk_s:
        yield f"  model   {_disk_words(found)}"


def _disk_words(found: Forecast) -> str:
    takes = estimate(found.prediction.disk_s)
    if found.prediction.in_memory:
        return f"inputs in folders are taken to be in memory; from the disk, reading them takes at least {takes}"
    why = "at the rate that is given" if found.conditions.read_rate else "as they do not fit into memory"
    return f"inputs in folders are taken to come from the disk, {why}: {takes}"


def _by_store(requests: Sequence[tuple[str, StoreRequests]]) -> dict[str, StoreRequests]:
    """What each bucket is asked; folders are not counted."""
    stores: dict[str, StoreRequests] = {}
    for url, asked in requests:
        if scheme_of(url) not in ("file", "memory"):
            total = stores.setdefault(redact("/".join(url.split("/")[:3])), StoreRequests())
            total.add(asked)
    return stores


def _longest(stages: Mapping[str, float]) -> str:
    shown = sorted(stages, key=lambda stage: -stages[stage])[:NUM_STAGES]
    return ", ".join(f"{STAGES[stage]} {estimate(stages[stage])}" for stage in shown)


def money(amount: float) -> str:
    """Return an amount for people, in whatever currency the price was."""
    return f"{amount:.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"


def result_facts(result: Merged) -> dict[str, object]:
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


def result_lines(result: Merged) -> Iterator[str]:
    """Yield the summary of a finished merge, line by line."""
    where = redact(result.output_url)
    if result.outcome == "already_finished":
        yield f"already finished: {where} holds this plan's output ({result.plan.plan_id[:12]}); nothing was done"
        yield f"next: {command_line('stockflow', 'verify', result.output_url)}"
        return
    facts = result.manifest.summary
    read, written = facts["bytes_read"], facts["bytes_written"]
    what = f"{counted(facts['tensors'], 'tensor')} ({counted(facts['parameters'], 'parameter', cut=True)})"
    yield f"merged {what} in {result.seconds:.1f} s"
    # A resumed merge's bytes are all its runs'; its seconds, this run's.
    pace = "all runs together" if result.num_resumed else f"{gb((read + written) / max(result.seconds, 1e-9))}/s"
    yield f"  read {gb(read)}, wrote {gb(written)}: {pace}"
    stages = {name.removeprefix("seconds_"): value for name, value in facts.items() if name.startswith("seconds_")}
    yield "  seconds by stage, summed over threads: " + ", ".join(
        f"{name} {value:.1f}" for name, value in stages.items() if name != "total"
    )
    yield from _copied_lines(result.plan)
    yield f"  peak memory {mib(facts['peak_memory_bytes'])}"
    if result.num_resumed:
        yield f"  resumed: {result.num_resumed} of {len(result.plan.shards)} shards were there already"
    if facts["clamped_tensors"]:
        yield (
            f"  clamped to the base in whole or part: {counted(facts['clamped_tensors'], 'tensor')}, whose task "
            "vectors oppose each other (stockflow: on_negative)"
        )
    if facts["zero_delta_tensors"]:
        yield f"  unchanged in at least one model: {counted(facts['zero_delta_tensors'], 'tensor')}"
    if facts["retries"]:
        yield f"  retried: {counted(facts['retries'], 'read')}"
    for remark in result.manifest.remarks[len(result.plan.remarks) :]:
        yield f"  {remark} [{remark.code}]"
    yield f"output: {where}"
    yield f"next: {command_line('stockflow', 'verify', result.output_url)}"
