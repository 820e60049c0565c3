"""A finished merge in words, in numbers and as an object."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from stockflow.output.keys import tensors_key
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import TensorFacts
from stockflow.planning.plan import MergePlan
from stockflow.results.plans import copied_lines
from stockflow.run.driver import Merged, Outcome
from stockflow.storage import StorageConfig, open_store, read_small, redact
from stockflow.text import notebook
from stockflow.text.records import as_plain
from stockflow.text.redaction import command_line
from stockflow.text.sizes import counted, gb, mib

MAX_TABLE_BYTES = 2_000_000_000
NUM_SHOWN = 20
"""Rows of a table in a notebook."""


@dataclass(frozen=True)
class MergeResult:
    """What a finished merge was."""

    result: Merged
    storage: StorageConfig

    @property
    def outcome(self) -> Outcome:
        """``merged``, or ``already_finished`` if there was nothing to do."""
        return self.result.outcome

    @property
    def output_url(self) -> str:
        """Where it is."""
        return self.result.output_url

    @property
    def plan(self) -> MergePlan:
        """What was merged, how."""
        return self.result.plan

    @property
    def manifest(self) -> Manifest:
        """What was published."""
        return self.result.manifest

    @property
    def summary(self) -> Mapping[str, float]:
        """Tensors, bytes, seconds by stage, peak memory, retries and more, by name."""
        return self.result.manifest.summary

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.result.seconds

    @cached_property
    def tensors(self) -> tuple[TensorFacts, ...]:
        """One row of facts per tensor, read from the output: cosines, ratio, norms, flags.

        Raises:
            StockflowError: it cannot be read.
        """
        from stockflow.output.tables import decode_tensors

        store = open_store(self.output_url, self.storage)
        payload = read_small(store, tensors_key(self.plan.plan_id), max_bytes=MAX_TABLE_BYTES)
        return tuple(TensorFacts(**row) for row in decode_tensors(payload))  # type: ignore[arg-type]

    def facts(self) -> dict[str, object]:
        """Return what `stockflow merge --json` prints."""
        return result_facts(self.result)

    def lines(self) -> Iterator[str]:
        """Yield what `stockflow merge` prints."""
        return result_lines(self.result)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        columns = ("name", "num_elems", "mean_cosine", "ratio", "base_norm")
        rows = [[getattr(tensor, column) for column in columns] for tensor in self.tensors]
        return notebook.block(
            f"{self.outcome.replace('_', ' ')}: {redact(self.output_url)}",
            notebook.lines(str(self)),
            notebook.table(columns, rows[:NUM_SHOWN]),
            f"<p>the first {NUM_SHOWN} of {len(rows):,} tensors</p>" if len(rows) > NUM_SHOWN else "",
        )


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
        "remarks": [as_plain(remark) for remark in result.manifest.remarks],
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
    yield from copied_lines(result.plan)
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
