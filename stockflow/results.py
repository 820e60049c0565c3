"""What the functions of the Python API return for a plan and a merge."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from stockflow.forecast.amounts import Workload
from stockflow.forecast.lines import (
    forecast_facts,
    forecast_lines,
    money,
    plan_lines,
    project,
    result_facts,
    result_lines,
)
from stockflow.forecast.seconds import STAGES, Forecast
from stockflow.output.keys import tensors_key
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import TensorFacts
from stockflow.planning.budget import Workspace
from stockflow.planning.plan import MergePlan
from stockflow.run import driver
from stockflow.run.driver import Outcome
from stockflow.storage import StorageConfig, open_store, read_small, redact
from stockflow.text import notebook
from stockflow.text.sizes import estimate, gb, mib

MAX_TABLE_BYTES = 2_000_000_000
NUM_SHOWN = 20
"""Rows of a table in a notebook."""


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
    """requests, bytes and elements, shard by shard"""
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
        projected = project(self.plan, self.workspace, self.work, self.least_memory_bytes, self.notes)
        return projected | {"forecast": forecast_facts(self.forecast)}

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


@dataclass(frozen=True)
class MergeResult:
    """What a finished merge was."""

    result: driver.Merged
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


def _counted(counts: object) -> str:
    assert isinstance(counts, Mapping)
    return ", ".join(f"{count} by {name}" for name, count in counts.items())


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
