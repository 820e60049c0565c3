"""What a plan asks of machines and stores: bytes, requests, elements; no seconds, no money. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

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

NONE_HELD = FactorRanges()


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
class InputAmounts:
    """What is read of one checkpoint."""

    url: str
    num_files: int
    """that are opened"""
    is_read_twice: bool = False
    """whether all of it is read again and compared; what follows counts that already"""
    num_requests: int = 0
    """for ranges, headers not counted"""
    num_bytes: int = 0
    """every pass counted"""
    num_bytes_once: int = 0
    """the first pass alone: the most that must come from a disk whose files then stay in memory"""


@dataclass(frozen=True)
class Workload:
    """What a whole merge asks for."""

    inputs: tuple[InputAmounts, ...]
    shard_sizes: tuple[int, ...]
    """bytes of each file"""
    elems: Mapping[Kernel, int]
    """of the output; of what is carried over, bytes"""
    num_tensors: int
    num_pieces: int
    """sources of tensors: what Python handles one by one"""
    passes: Mapping[int, int]
    """number of tensors by how often they are read"""
    num_looks: int = 0
    """per checkpoint: small reads before anything is planned"""

    @property
    def num_reads(self) -> int:
        """Requests for ranges of checkpoints, headers not counted."""
        return sum(each.num_requests for each in self.inputs)

    @property
    def num_bytes_read(self) -> int:
        """Bytes of checkpoints, every pass counted."""
        return sum(each.num_bytes for each in self.inputs)

    @property
    def num_bytes_again(self) -> int:
        """Bytes that are read only to be compared."""
        return sum(each.num_bytes for each in self.inputs if each.is_read_twice) // 2

    @property
    def num_bytes_written(self) -> int:
        """Bytes of all shards."""
        return sum(self.shard_sizes)

    @property
    def num_parts(self) -> int:
        """Requests that upload all shards to an object store, but for the start and the end of each upload."""
        return sum(map(_num_parts, self.shard_sizes))


def _num_parts(size: int) -> int:
    return -(-size // part_bytes(size))


class StoreRequests(NamedTuple):
    """What one store is asked during a merge, counted as stores bill it."""

    url: str
    gets: int
    """reads of ranges, and questions for the state of an object"""
    puts: int
    """small objects, parts of uploads with their start and end, and listings"""
    bytes_out: int = 0
    """read from it"""
    bytes_kept: int = 0
    """of the output"""


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


def requests_of(plan: MergePlan, work: Workload, output: str, seconds: float) -> Iterator[StoreRequests]:
    """Yield what each input's store is asked, then the output's, by a merge that takes so long.

    A test holds these numbers against what a server was asked.
    """
    has_config, asked = plan.config is not None, set[str]()
    copied_from = plan.side_files[0].checkpoint if plan.side_files else plan.donor
    for index, each in enumerate(work.inputs):
        store = store_of(each.url)
        small = each.num_files + work.num_looks + has_config  # which is read while a checkpoint is opened
        small += 2 * len(plan.side_files) * (index == copied_from)  # looked at, then copied
        stamps_hold = store not in asked  # whether they do is asked once per store
        gets = each.num_requests + small * (1 + each.is_read_twice) + stamps_hold
        yield StoreRequests(each.url, gets, puts=1, bytes_out=each.num_bytes)  # a listing
        asked.add(store)
    further = has_config + len(plan.side_files) + len(plan.written_files) + bool(plan.indexed)
    uploads = sum(UPLOAD_PUTS for size in work.shard_sizes if _num_parts(size) > 1)
    yield StoreRequests(
        output,
        gets=MERGE_GETS + further + sum(SHARD_GETS + (size > SMALL_BYTES) for size in work.shard_sizes),
        puts=MERGE_PUTS + further + len(plan.shards) * SHARD_PUTS + work.num_parts + uploads + _clock_puts(seconds),
        bytes_kept=work.num_bytes_written,
    )


def store_of(url: str) -> str:
    """Return the bucket that a URL is in; of what is in a folder, something of its path."""
    return "/".join(url.split("/")[:3])


def _clock_puts(seconds: float) -> int:
    if seconds < FIRST_BEAT_S:
        return 0
    return (1 + int((seconds - FIRST_BEAT_S) // HEARTBEAT_S)) * BEAT_PUTS + LAST_PROGRESS_PUTS


def survey(plan: MergePlan, workspace: Workspace, num_looks: int = 0, *, reads_twice: bool = False) -> Workload:
    """Return what a plan asks for.

    Args:
        plan: of the merge.
        workspace: how each worker divides its memory.
        num_looks: small reads of each input before anything is planned.
        reads_twice: whether every range, header and small file of a remote model is read a second time.
    """
    inputs = tuple(
        InputAmounts(each.url, len(each.files), is_read_twice=reads_twice and scheme_of(each.url) != "file")
        for each in plan.checkpoints
    )
    elems, passes = Counter[Kernel](), Counter[int]()
    for job in plan.jobs:
        elems[kernel_of(job)] += job.reading.num_elems
    for shard in plan.shards:
        _count_reads(shard, workspace, inputs, passes)
    for each in inputs:
        if each.is_read_twice:
            each.num_requests, each.num_bytes = 2 * each.num_requests, 2 * each.num_bytes
    return Workload(
        inputs=inputs,
        shard_sizes=tuple(shard.num_bytes for shard in plan.shards),
        elems=elems,
        num_tensors=sum(len(shard.jobs) for shard in plan.shards),
        num_pieces=sum(job.reading.num_slots for job in plan.jobs),
        passes=dict(sorted(passes.items())),
        num_looks=num_looks,
    )


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


def _count_reads(shard: ShardPlan, workspace: Workspace, inputs: Sequence[InputAmounts], passes: Counter[int]) -> None:
    for unit in layer_units(shard.jobs):  # its statistics come before its members are merged
        for step in schedule(unit.members, workspace):
            _add(inputs, step, unit.members[0].num_statistic_passes, again=True)
    for jobs, held in (batch for run in segments(shard.jobs) for batch in batches(run, workspace.factor_bytes)):
        for step in schedule([*factors_of(jobs)], workspace):
            _add(inputs, step, step.num_reads)
        for step in schedule(jobs, workspace):
            _add(inputs, step, step.num_reads, held)
            passes[step.num_reads] += sum(piece.stop == piece.work.reading.num_elems for piece in step.loads[-1].pieces)


def _add(
    inputs: Sequence[InputAmounts], step: Step, num_reads: int, held: FactorRanges = NONE_HELD, *, again: bool = False
) -> None:
    for load in step.loads:
        for checkpoint, size, num_requests in _requests(load, step, held):
            amounts = inputs[checkpoint]
            amounts.num_requests += num_requests * num_reads
            amounts.num_bytes += size * num_reads
            amounts.num_bytes_once += 0 if again else size


def _requests(load: Load, step: Step, held: FactorRanges) -> Iterator[tuple[int, int, int]]:
    """Per range that is not held: checkpoint, bytes, and in how many requests they are read in one pass."""
    if step.direct and not held.by_file:
        ((job, start, stop),) = load.pieces
        num_spans = -(-(stop - start) // SPAN_ELEMS)
        yield from (
            (slot.checkpoint, slot.num_bytes, num_spans) for slot in job.reading.slots(start, stop) if slot.num_bytes
        )
        return
    for checkpoint, file, start, stop, _ in load.requests:
        if not (held.by_file and held.covering(checkpoint, file, start, stop)):
            yield checkpoint, stop - start, -(-(stop - start) // RANGE_BYTES)
