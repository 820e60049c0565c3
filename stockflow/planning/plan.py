"""The plan: the recipe made exact. What is read, how it is merged, what is written where.

Nothing of memory, workers, device, executor or clock is in a plan: equal plans give equal bytes.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from stockflow.checkpoints.header import DTYPES, TensorSpec, encode_header
from stockflow.checkpoints.opening import Extent
from stockflow.methods import METHODS
from stockflow.methods.protocol import Method, Parameters, Scope
from stockflow.storage import Stamp, redact

NUMERICS = 2
"""Bumped with any change of a golden digest."""
COPY = "copy"
"""Pseudo-method: the donor's bytes, unchanged."""
COPY_EQUAL = "copy_equal"
"""Pseudo-method: the donor's bytes, after every source proved to hold the same ones."""
SHARD_METADATA = {"format": "pt"}

OnNonfinite = Literal["error", "propagate"]


class Source(NamedTuple):
    """One input of an output tensor."""

    checkpoint: int
    """index into the plan's checkpoints"""
    spec: TensorSpec
    extent: Extent


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: from which sources, by which method."""

    output: TensorSpec
    sources: tuple[Source, ...]
    """the anchor (base or first model) first"""
    method: str
    parameters: Parameters
    scope: Scope

    @cached_property
    def num_elems(self) -> int:
        """Elements to go through; a copy counts bytes, so that dtypes below a byte need no care."""
        return self.output.num_bytes if self.is_copy else self.output.num_elems

    @cached_property
    def group_elems(self) -> int:
        """Elements that share one decision."""
        shape = self.output.shape
        if self.scope == "row" and len(shape) > 1:
            return shape[-1]
        if self.scope == "leading" and len(shape) > 2:
            return math.prod(shape[1:])
        return self.num_elems

    @property
    def num_groups(self) -> int:
        """How many decisions the tensor takes; 0 if it is empty."""
        return self.num_elems // self.group_elems if self.num_elems else 0

    @cached_property
    def source_widths(self) -> tuple[int, ...]:
        """Bytes per element of each source."""
        if self.is_copy:
            return (1,) * len(self.sources)
        return tuple(DTYPES[source.spec.dtype].bits // 8 for source in self.sources)

    @property
    def output_width(self) -> int:
        """Bytes per element of the output."""
        return 1 if self.is_copy else DTYPES[self.output.dtype].bits // 8

    @cached_property
    def is_copy(self) -> bool:
        """Whether bytes are carried over instead of computed."""
        return self.method in (COPY, COPY_EQUAL)

    @cached_property
    def float_bits(self) -> Literal[32, 64]:
        """Width of the working precision."""
        specs = [self.output, *(source.spec for source in self.sources)]
        return 64 if any(spec.dtype == "F64" for spec in specs) else 32

    @cached_property
    def bytes_per_elem(self) -> int:
        """Source bytes per element, all sources together."""
        return sum(self.source_widths)

    @property
    def num_statistic_passes(self) -> int:
        """How often the sources are read before they are combined."""
        return 0 if self.is_copy else METHODS[self.method].num_statistic_passes(self.float_bits)


@dataclass(frozen=True)
class ShardPlan:
    """One output file: the unit of work of an executor."""

    file: str
    jobs: tuple[TensorJob, ...]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return encode_header((job.output for job in self.jobs), SHARD_METADATA)

    @cached_property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(job.output.num_bytes for job in self.jobs)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of all sources, each counted once."""
        return sum(source.spec.num_bytes for job in self.jobs for source in job.sources)


@dataclass(frozen=True)
class CheckpointRef:
    """An input of the merge and the state of its files."""

    url: str
    files: Mapping[str, Stamp]


@dataclass(frozen=True)
class SideFile:
    """A file the output takes over from an input."""

    checkpoint: int
    key: str
    stamp: Stamp


@dataclass(frozen=True)
class MergePlan:
    """Everything that decides the bytes of the output."""

    checkpoints: tuple[CheckpointRef, ...]
    donor: int
    """index of the checkpoint that gave names, order, dtypes and config"""
    shards: tuple[ShardPlan, ...]
    side_files: tuple[SideFile, ...]
    config: Mapping[str, object] | None
    on_nonfinite: OnNonfinite
    skipped: tuple[str, ...]
    """tensors left out because a rule says so"""
    notes: tuple[str, ...]
    """what the user should know before starting"""

    @cached_property
    def plan_id(self) -> str:
        """sha256 of everything that decides the output bytes, inputs with their locations and stamps."""
        return canonical_digest(self._canonical(with_inputs=True))

    @cached_property
    def merge_id(self) -> str:
        """The same without locations and stamps: equal for the same merge of copies elsewhere.

        It knows nothing of the inputs' contents: other models of the same shapes share it.
        """
        return canonical_digest(self._canonical(with_inputs=False))

    @cached_property
    def num_output_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def num_source_bytes(self) -> int:
        """Bytes of all sources, each counted once."""
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def jobs(self) -> Iterable[TensorJob]:
        """All output tensors in order."""
        return (job for shard in self.shards for job in shard.jobs)

    def to_json(self) -> dict[str, object]:
        """Return the plan as plain JSON."""
        return {
            "format": "stockflow-plan-1",
            "plan_id": self.plan_id,
            "merge_id": self.merge_id,
            "donor": self.donor,
            "skipped": list(self.skipped),
            "notes": list(self.notes),
            **self._canonical(with_inputs=True),
        }

    def _canonical(self, *, with_inputs: bool) -> dict[str, object]:
        settings = _Settings()
        shards = [
            {
                "file": shard.file,
                "num_bytes": shard.num_bytes,
                "tensors": [_canonical_job(job, settings, with_inputs=with_inputs) for job in shard.jobs],
            }
            for shard in self.shards
        ]
        return {
            "numerics": NUMERICS,
            "on_nonfinite": self.on_nonfinite,
            "checkpoints": [_canonical_checkpoint(checkpoint) for checkpoint in self.checkpoints]
            if with_inputs
            else len(self.checkpoints),
            "side_files": [
                [side.checkpoint, side.key, *((side.stamp.size, side.stamp.version) if with_inputs else ())]
                for side in self.side_files
            ],
            "settings": [json.loads(text) for text in settings.texts],
            "metadata": SHARD_METADATA,
            "config": self.config,
            "shards": shards,
        }


class _Settings:
    """The distinct ways tensors are merged, numbered in order of appearance."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self._by_identity: dict[tuple[str, Scope, int], int] = {}

    def number(self, job: TensorJob) -> int:
        key = (job.method, job.scope, id(job.parameters))  # tensors with equal parameters mostly share one object
        if key not in self._by_identity:
            setting = [job.method, job.scope, dict(job.parameters.shared), dict(job.parameters.per_model)]
            text = json.dumps(setting, sort_keys=True)
            self._by_identity[key] = self.texts.setdefault(text, len(self.texts))
        return self._by_identity[key]


def _canonical_job(job: TensorJob, settings: _Settings, *, with_inputs: bool) -> list[object]:
    dtypes = [source.spec.dtype for source in job.sources]
    row: list[object] = [job.output.name, job.output.dtype, job.output.shape, settings.number(job), dtypes]
    if with_inputs:
        row += [(source.checkpoint, *source.extent) for source in job.sources]
    return row


def _canonical_checkpoint(checkpoint: CheckpointRef) -> dict[str, object]:
    files = {key: [stamp.size, stamp.version] for key, stamp in sorted(checkpoint.files.items())}
    return {"url": redact(checkpoint.url), "files": files}


def canonical_digest(canonical: object) -> str:
    """Return the sha256 of a JSON value, the same for every order of keys."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def method_of(job: TensorJob) -> Method | None:
    """Return the merge method of a job, None for a copy."""
    return None if job.is_copy else METHODS[job.method]


def is_linear(job: TensorJob) -> bool:
    """Return whether a tensor is a weighted sum of its sources."""
    method = method_of(job)
    return method is not None and method.linear is not None
