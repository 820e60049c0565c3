"""What a plan asks of machines and stores: bytes, requests, elements; no seconds, no money. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import NamedTuple

from stockflow.checkpoints.files.layout import folder_of
from stockflow.methods.protocol import Linear
from stockflow.output.claims import FIRST_BEAT_S, HEARTBEAT_S
from stockflow.planning.budget import Workspace
from stockflow.planning.experts.units import layer_units, segments
from stockflow.planning.factors import FactorRanges, batches, factors_of
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.planning.reads import Load, Step, schedule
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.storage import scheme_of
from stockflow.storage.parts import RANGE_BYTES, SMALL_BYTES, part_bytes


class Kernel(NamedTuple):
    """Tensors that are computed alike."""

    method: str
    """``linear``, ``elementwise`` or ``copy``"""
    dtype: str
    """the widest of its sources and its output: what decides the working precision"""
    num_sources: int
    num_passes: int
    """statistics passes before the combine"""


@dataclass(slots=True)
class CheckpointReads:
    """What is read of one checkpoint."""

    num_requests: int = 0
    num_bytes: int = 0
    """every pass counted"""
    num_bytes_once: int = 0
    """the first pass alone: the most that must come from a disk whose files then stay in memory"""

    def twice(self) -> "CheckpointReads":
        """Return what it is if each range is read again."""
        return CheckpointReads(2 * self.num_requests, 2 * self.num_bytes, 2 * self.num_bytes_once)

    def add(self, other: "CheckpointReads") -> None:
        """Count what is read elsewhere, too."""
        self.num_requests += other.num_requests
        self.num_bytes += other.num_bytes
        self.num_bytes_once += other.num_bytes_once


@dataclass(slots=True)
class ShardAmounts:
    """What one shard asks of the worker that merges it."""

    file: str
    num_bytes: int
    """size of the output file"""
    reads: dict[int, CheckpointReads] = field(default_factory=dict)
    """by checkpoint, all passes"""
    elems: Counter[Kernel] = field(default_factory=Counter)
    """of the output; of what is carried over, bytes"""
    num_pieces: int = 0
    """sources of tensors: what Python handles one by one"""

    @property
    def num_parts(self) -> int:
        """Requests that upload the file to an object store, but for the start and the end of the upload."""
        return -(-self.num_bytes // part_bytes(self.num_bytes))


@dataclass(frozen=True)
class Workload:
    """What a whole merge asks for."""

    shards: tuple[ShardAmounts, ...]
    num_checkpoint_files: tuple[int, ...]
    """per checkpoint: the files that are opened"""
    num_tensors: int
    num_side_files: int
    side_files_from: int
    """checkpoint that gives them"""
    has_config: bool
    """whether there is a config.json to publish; each checkpoint's is read while it is opened"""
    passes: Mapping[int, int]
    """number of tensors by how often they are read"""
    num_looks: int = 0
    """per checkpoint: small reads before anything is planned"""
    num_written_files: int = 0
    """beside those that are copied"""
    read_twice: frozenset[int] = frozenset()
    """checkpoints of which all is read again and compared; ``shards`` count that already"""

    @property
    def num_bytes_again(self) -> int:
        """Bytes that are read only to be compared."""
        return sum(self.readings[index].num_bytes for index in self.read_twice) // 2

    @cached_property
    def readings(self) -> Mapping[int, CheckpointReads]:
        """What is read of each checkpoint, headers not counted."""
        total = {index: CheckpointReads() for index in range(len(self.num_checkpoint_files))}
        for shard in self.shards:
            for index, reads in shard.reads.items():
                total[index].add(reads)
        return total

    @property
    def has_index(self) -> bool:
        """Whether there is an index to publish: of more than one shard, those of modules not counted."""
        return sum(not folder_of(shard.file) for shard in self.shards) > 1

    @property
    def num_reads(self) -> int:
        """Requests for ranges of checkpoints, headers not counted."""
        return sum(reads.num_requests for reads in self.readings.values())

    @property
    def num_bytes_read(self) -> int:
        """Bytes of checkpoints, every pass counted."""
        return sum(reads.num_bytes for reads in self.readings.values())

    @property
    def num_bytes_written(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(slots=True)
class StoreRequests:
    """What one store is asked during a merge, counted as stores bill it."""

    gets: int = 0
    """reads of ranges, and questions for the state of an object"""
    puts: int = 0
    """small objects, parts of uploads with their start and end, and listings"""
    bytes_out: int = 0
    """read from it"""
    bytes_kept: int = 0
    """of the output"""

    def add(self, other: "StoreRequests") -> None:
        """Count what is asked elsewhere, too."""
        self.gets += other.gets
        self.puts += other.puts
        self.bytes_out += other.bytes_out
        self.bytes_kept += other.bytes_kept


MERGE_GETS, MERGE_PUTS = 16, 13
"""around the shards, four listings among the latter: whose prefix it is, claim, plan, table, card, manifest; run"""
SHARD_GETS, SHARD_PUTS = 7, 1
"""before and after a shard: whose prefix it is, the state it has, its receipt; a large
one is looked at once more"""
UPLOAD_PUTS = 2
"""start and end of an upload in parts"""
BEAT_PUTS = 2
"""Of each heartbeat after the first: that the run is alive, and how far it is."""
LAST_PROGRESS_PUTS = 1
"""Of a run that lasted until its second heartbeat: how it ended."""


def requests_of(work: Workload, inputs: Sequence[str], seconds: float) -> tuple[list[StoreRequests], StoreRequests]:
    """Return what each input's store is asked, and the output's, by a merge that takes so long.

    A test holds these numbers against what a server was asked.
    """
    by_input, asked = [], set()
    for index, (url, num_files) in enumerate(zip(inputs, work.num_checkpoint_files, strict=True)):
        reading, place = work.readings[index], "/".join(url.split("/")[:3])
        headers, stamps_hold = num_files, place not in asked  # whether they do is asked once per store
        small = (headers + work.num_looks + work.has_config) * (2 if index in work.read_twice else 1)
        gets = reading.num_requests + small + stamps_hold
        by_input.append(StoreRequests(gets, puts=1, bytes_out=reading.num_bytes))  # a listing
        asked.add(place)
    # Looked at, then copied.
    by_input[work.side_files_from].gets += work.num_side_files * (4 if work.side_files_from in work.read_twice else 2)
    num_further = work.has_config + work.num_side_files + work.num_written_files + work.has_index
    output = StoreRequests(
        gets=MERGE_GETS + num_further + sum(SHARD_GETS + (shard.num_bytes > SMALL_BYTES) for shard in work.shards),
        puts=MERGE_PUTS
        + num_further
        + len(work.shards) * SHARD_PUTS
        + sum(shard.num_parts + (UPLOAD_PUTS if shard.num_parts > 1 else 0) for shard in work.shards)
        + _clock_puts(seconds),
        bytes_kept=work.num_bytes_written,
    )
    return by_input, output


def _clock_puts(seconds: float) -> int:
    if seconds < FIRST_BEAT_S:
        return 0
    return (1 + int((seconds - FIRST_BEAT_S) // HEARTBEAT_S)) * BEAT_PUTS + LAST_PROGRESS_PUTS


def survey(plan: MergePlan, workspace: Workspace, num_looks: int = 0) -> Workload:
    """Return what a plan asks for when each worker divides its memory so, after so many small reads of each input."""
    passes: Counter[int] = Counter()
    shards = tuple(_shard_amounts(shard, workspace, passes) for shard in plan.shards)
    return Workload(
        shards=shards,
        num_checkpoint_files=tuple(len(checkpoint.files) for checkpoint in plan.checkpoints),
        num_tensors=sum(len(shard.jobs) for shard in plan.shards),
        num_side_files=len(plan.side_files),
        side_files_from=plan.side_files[0].checkpoint if plan.side_files else plan.donor,
        has_config=plan.config is not None,
        passes=dict(sorted(passes.items())),
        num_looks=num_looks,
        num_written_files=len(plan.written_files),
    )


def read_twice(work: Workload, urls: Sequence[str]) -> Workload:
    """Return what is asked for if every range, header and small file of a remote model is read a second time."""
    remote = frozenset(index for index, url in enumerate(urls) if scheme_of(url) != "file")

    def doubled(shard: ShardAmounts) -> ShardAmounts:
        reads = {index: each.twice() if index in remote else each for index, each in shard.reads.items()}
        return replace(shard, reads=reads)

    return replace(work, shards=tuple(map(doubled, work.shards)), read_twice=remote)


def kernel_of(job: TensorJob) -> Kernel:
    """Return how a tensor is computed."""
    if job.is_copy:
        return Kernel("copy", "U8", len(job.reading.operands), 0)
    rule = job.result.declared.rule
    return _kernel(isinstance(rule, Linear), job.reading.dtypes, job.output.dtype, job.num_statistic_passes)


@cache
def _kernel(is_linear: bool, dtypes: tuple[str, ...], output: str, num_passes: int) -> Kernel:
    widest = max((*dtypes, output), key=lambda name: (name == "F64", name == "F32", name))
    return Kernel("linear" if is_linear else "elementwise", widest, len(dtypes), num_passes)


def _shard_amounts(shard: ShardPlan, workspace: Workspace, passes: Counter[int]) -> ShardAmounts:
    amounts = ShardAmounts(shard.file, shard.num_bytes)
    for job in shard.jobs:
        amounts.elems[kernel_of(job)] += job.reading.num_elems
        amounts.num_pieces += job.reading.num_slots
    for unit in layer_units(shard.jobs):
        for step in schedule(unit.members, workspace):
            _add_reads(amounts, replace(step, num_sweeps=unit.members[0].num_statistic_passes, held=False), again=True)
    for jobs, held in (batch for run in segments(shard.jobs) for batch in batches(run, workspace.factor_bytes)):
        for step in schedule([*factors_of(jobs)], workspace):
            _add_reads(amounts, step)
        for step in schedule(jobs, workspace):
            _add_reads(amounts, step, held)
            passes[step.num_reads] += sum(piece.stop == piece.work.reading.num_elems for piece in step.loads[-1].pieces)
    return amounts


def _add_reads(amounts: ShardAmounts, step: Step, held: FactorRanges | None = None, *, again: bool = False) -> None:
    for load in step.loads:
        for checkpoint, size, num_requests in _requests(load, step, held):
            reads = amounts.reads.setdefault(checkpoint, CheckpointReads())
            reads.num_requests += num_requests * step.num_reads
            reads.num_bytes += size * step.num_reads
            reads.num_bytes_once += 0 if again else size


def _requests(load: Load, step: Step, held: FactorRanges | None) -> Iterator[tuple[int, int, int]]:
    """Per range that is not held: checkpoint, bytes, and in how many requests they are read in one pass."""
    if len(load.pieces) > 1 or (held and held.by_file):
        for request in load.requests:
            if held and held.covering(request.checkpoint, request.file, request.start, request.stop):
                continue
            size = request.stop - request.start
            yield request.checkpoint, size, -(-size // RANGE_BYTES)
        return
    ((job, start, stop),) = load.pieces
    for slot in job.reading.slots(start, stop):
        size = slot.num_bytes
        num_requests = -(-(stop - start) // SPAN_ELEMS) if step.direct else -(-size // RANGE_BYTES)
        if size:
            yield slot.checkpoint, size, num_requests


def worst_tensor(jobs: Iterable[TensorJob]) -> TensorJob | None:
    """Return the tensor whose smallest piece takes the most memory."""
    candidates: Sequence[TensorJob] = [job for job in jobs if job.reading.num_elems]
    return max(candidates, key=lambda job: (job.reading.bytes_per_elem, job.reading.num_elems), default=None)
