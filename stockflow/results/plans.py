"""A plan in words, in numbers and as an object: what a merge will read, write and hold."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stockflow.forecast.amounts import Workload
from stockflow.forecast.lines import forecast_facts, forecast_lines, money
from stockflow.forecast.seconds import STAGES, Forecast
from stockflow.planning.budget import LEAST_MEMORY_BYTES, Workspace
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import MergePlan
from stockflow.storage import redact
from stockflow.text import notebook
from stockflow.text.records import as_plain
from stockflow.text.sizes import counted, estimate, gb, least_mib, mib, times


@dataclass(frozen=True)
class PlanResult:
    """What a merge would read, write and hold."""

    plan: MergePlan
    """the recipe made exact: every tensor, its sources, its method"""
    workspace: Workspace
    """how a worker would divide its memory"""
    notes: tuple[str, ...]
    """what a merge would find at its output"""
    output_url: str
    work: Workload
    """requests, bytes and elements"""
    least_memory_bytes: int
    """a worker given less would refuse"""
    forecast: Forecast
    """time and money"""

    @property
    def plan_id(self) -> str:
        """sha256 of everything that decides the output's bytes."""
        return self.plan.plan_id

    @property
    def seconds(self) -> float:
        """How long a merge is predicted to take, from the start of its process to the end."""
        return self.forecast.prediction.seconds

    def facts(self) -> dict[str, object]:
        """Return what `stockflow plan --json` prints."""
        facts = projected(self.plan, self.workspace, self.work, self.least_memory_bytes, self.notes)
        return facts | {"forecast": forecast_facts(self.forecast)}

    def lines(self) -> Iterator[str]:
        """Yield what `stockflow plan` prints."""
        yield from plan_lines(self.plan, self.workspace, self.work, self.least_memory_bytes, self.notes)
        yield from forecast_lines(self.forecast)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        facts = self.facts()
        plan = self.plan
        inputs = [
            (redact(checkpoint.url), len(checkpoint.files), gb(sum(stamp.size for stamp in checkpoint.files.values())))
            for checkpoint in plan.checkpoints
        ]
        return notebook.block(
            f"plan {plan.plan_id[:12]}",
            notebook.table(("input", "files", "size"), inputs),
            notebook.facts(
                {
                    "output": redact(self.output_url),
                    "tensors": facts["tensors"],
                    "methods": _counted(facts["methods"]),
                    "shards": len(plan.shards),
                    "to read": gb(_number(facts["bytes_to_read"])),
                    "to write": gb(plan.num_output_bytes),
                    "requests": facts["requests"],
                    "memory per worker": mib(self.workspace.projected_bytes),
                    "time": f"about {estimate(self.seconds)}",
                    "waits for": STAGES[self.forecast.prediction.bottleneck],
                    "cost": None if self.forecast.cost is None else money(self.forecast.cost),
                    "notes": "; ".join((*plan.notes, *self.notes)) or None,
                }
            ),
        )


def projected(
    plan: MergePlan, workspace: Workspace, work: Workload, least_bytes: int, notes: Sequence[str] = ()
) -> dict[str, object]:
    """Return what a merge of this plan will read, write and hold, for programs."""
    worst = _worst_tensor(plan)
    return {
        "plan_id": plan.plan_id,
        "merge_id": plan.merge_id,
        "checkpoints": [
            {
                "url": redact(checkpoint.url),
                "files": len(checkpoint.files),
                "bytes": sum(stamp.size for stamp in checkpoint.files.values()),
                "bytes_to_read": reading.num_bytes,
                "requests": reading.num_requests,
            }
            for checkpoint, reading in zip(plan.checkpoints, work.inputs, strict=True)
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
    yield from copied_lines(plan)
    yield f"  read    {gb(work.num_bytes_read)} in {counted(work.num_reads, 'request')}"
    if work.num_bytes_again:
        yield f"  again   {gb(work.num_bytes_again)} of that to compare what is read of remote models (--verify-inputs)"
    passes = (f"{counted(count, 'tensor')} read {times(number)}" for number, count in work.passes.items())
    yield f"  passes  {'; '.join(passes)}"
    worst = _worst_tensor(plan)
    because = ""
    if least_bytes == LEAST_MEMORY_BYTES:
        because = ", which compiling takes, once per machine"
    elif worst:
        because = f", for {worst.output.name!r} ({len(worst.reading.operands)} x {gb(worst.output.num_bytes)})"
    projected, least = mib(workspace.projected_bytes), least_mib(least_bytes)
    yield f"  memory  {projected} per worker projected; the least --memory is {least}{because}"
    for remark in plan.remarks:
        yield f"  {'note' if remark.severity == 'note' else 'warning':<7} {remark} [{remark.code}]"
    for note in notes:
        yield f"  note    {note}"


def _worst_tensor(plan: MergePlan) -> TensorJob | None:
    """The tensor whose smallest piece takes the most memory."""
    candidates = (job for job in plan.jobs if job.reading.num_elems)
    return max(candidates, key=lambda job: (job.reading.bytes_per_elem, job.reading.num_elems), default=None)


def _source_lines(plan: MergePlan, work: Workload) -> Iterator[str]:
    for index, (checkpoint, reading) in enumerate(zip(plan.checkpoints, work.inputs, strict=True)):
        total = sum(stamp.size for stamp in checkpoint.files.values())
        role = " (names, order, config)" if index == plan.donor else ""
        yield (
            f"  input   {redact(checkpoint.url)}: {counted(len(checkpoint.files), 'file')}, {gb(total)}{role}; "
            f"{gb(reading.num_bytes)} read in {counted(reading.num_requests, 'request')}"
        )


def _shards_in_words(plan: MergePlan) -> str:
    sizes = [shard.num_bytes for shard in plan.shards]
    if len(sizes) == 1:
        return f"1 shard of {gb(sizes[0])}"
    return f"{counted(len(sizes), 'shard')} of {gb(min(sizes))} to {gb(max(sizes))}, {gb(sum(sizes))} in all"


def copied_lines(plan: MergePlan) -> Iterator[str]:
    """Yield which files are published as they are, and which are written anew."""
    for donor in dict.fromkeys(side.checkpoint for side in plan.side_files):
        keys = ", ".join(side.key for side in plan.side_files if side.checkpoint == donor)
        yield f"  copied  {keys} from {redact(plan.checkpoints[donor].url)}"
    if plan.written_files:
        yield f"  written {', '.join(file.key for file in plan.written_files)}"


def _counted(counts: object) -> str:
    assert isinstance(counts, Mapping)
    return ", ".join(f"{count} by {name}" for name, count in counts.items())


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
