"""What a plan asks of machines and stores: bytes, requests, elements; no seconds, no money. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stockflow.methods.protocol import Linear
from stockflow.output.claims import FIRST_BEAT_S, HEARTBEAT_S
from stockflow.planning.budget import OPTIMAL_READ_BYTES, Workspace
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import MergePlan, ShardPlan
from stockflow.planning.reads import Load, Step, schedule
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.storage.parts import part_bytes


class Kernel(NamedTuple):
    """Tensors that are computed alike."""

    method: str
    """``linear``, ``elementwise`` or ``copy``"""
    dtype: str
    """of the widest source, which decides the working precision"""
    num_sources: int


@dataclass(slots=True)
class Reading:
    """What is read of one checkpoint."""

    num_requests: int = 0
    num_bytes: int = 0
    """every pass counted"""
    num_bytes_once: int = 0
    """the first pass alone: the most that must come from a disk whose files then stay in memory"""


@dataclass(slots=True)
class LoadWork:
    """What is read, computed and written together."""

    elems: Mapping[Kernel, int]
    """of the output"""
    num_bytes_out: int
    readings: Mapping[int, Reading]
    """by checkpoint, of one pass"""
    num_tensors: int = 0
    """that begin here"""
    num_pieces: int = 0
    """sources of these tensors: what Python handles one by one"""
    num_turns: int = 0
    """sources of spans that the threads that compute read themselves, in one pass"""


@dataclass(slots=True)
class StepWork:
    """Loads that are decided as one: statistics over all of them, then the combine, load by load."""

    loads: tuple[LoadWork, ...]
    num_passes: int
    """statistics passes; elements of small tensors that share a load are passed over together"""
    num_reads: int
    """how often the loads are read"""
    idle_share: float = 0.0
    """of the threads' time: at the end of each load some have nothing to do"""


@dataclass(slots=True)
class ShardWork:
    """What one shard asks of the worker that merges it."""

    file: str
    num_bytes: int
    """size of the output file"""
    steps: tuple[StepWork, ...]

    def readings(self) -> dict[int, Reading]:
        """Return what is read, by checkpoint, all passes."""
        found: dict[int, Reading] = {}
        for step in self.steps:
            for load in step.loads:
                for index, reading in load.readings.items():
                    total = found.setdefault(index, Reading())
                    total.num_requests += reading.num_requests * step.num_reads
                    total.num_bytes += reading.num_bytes * step.num_reads
                    total.num_bytes_once += reading.num_bytes
        return found

    @property
    def num_pieces(self) -> int:
        """Sources of tensors."""
        return sum(load.num_pieces for step in self.steps for load in step.loads)

    @property
    def num_parts(self) -> int:
        """Requests that upload the file to an object store, but for the start and the end of the upload."""
        return -(-self.num_bytes // part_bytes(self.num_bytes))


@dataclass(frozen=True)
class Workload:
    """What a whole merge asks for."""

    shards: tuple[ShardWork, ...]
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

    num_slabs: int = 4
    """loads in memory at once"""

    @cached_property
    def readings(self) -> Mapping[int, Reading]:
        """What is read of each checkpoint, headers not counted."""
        total = {index: Reading() for index in range(len(self.num_checkpoint_files))}
        for shard in self.shards:
            for index, reading in shard.readings().items():
                total[index].num_requests += reading.num_requests
                total[index].num_bytes += reading.num_bytes
                total[index].num_bytes_once += reading.num_bytes_once
        return total

    @property
    def num_reads(self) -> int:
        """Requests for ranges of checkpoints, headers not counted."""
        return sum(reading.num_requests for reading in self.readings.values())

    @property
    def num_bytes_read(self) -> int:
        """Bytes of checkpoints, every pass counted."""
        return sum(reading.num_bytes for reading in self.readings.values())

    @property
    def num_bytes_written(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(slots=True)
class Requests:
    """What one store is asked during a merge, counted as stores bill it."""

    gets: int = 0
    """reads of ranges, and questions for the state of an object"""
    puts: int = 0
    """small objects, parts of uploads with their start and end, and listings"""
    bytes_out: int = 0
    """read from it"""
    bytes_kept: int = 0
    """of the output"""


OPENING_LISTS, OPENING_GETS_PER_FILE = 1, 1
MERGE_GETS, MERGE_PUTS = 11, 18
"""around the shards, nine listings among the latter: whose prefix it is, claim, plan, table, card, manifest; run"""
ASKING_GETS = 1
"""of each place that inputs come from: whether it holds reads to a stamp"""
SHARD_GETS, SHARD_PUTS = 6, 3
"""before and after a shard, two listings among the latter: whose prefix it is, the state it has, its receipt"""
UPLOAD_PUTS = 2
"""start and end of an upload in parts"""
PUBLISHED_GETS, PUBLISHED_PUTS = 1, 1
"""of each further file that is published: index, config.json, side files"""
BEAT_PUTS = 2
"""Of each heartbeat after the first: that the run is alive, and how far it is."""
LAST_PROGRESS_PUTS = 1
"""Of a run that lasted until its second heartbeat: how it ended."""


def requests_of(work: Workload, inputs: Sequence[str], seconds: float) -> tuple[list[Requests], Requests]:
    """Return what each input's store is asked, and the output's, by a merge that takes so long.

    A test holds these numbers against what a server was asked.
    """
    by_input = []
    for index, num_files in enumerate(work.num_checkpoint_files):
        reading = work.readings[index]
        gets = reading.num_requests + num_files * OPENING_GETS_PER_FILE + work.has_config
        by_input.append(Requests(gets, OPENING_LISTS, reading.num_bytes))
    asked: set[str] = set()
    for url, requests in zip(inputs, by_input, strict=True):
        place = "/".join(url.split("/")[:3])
        requests.gets += 0 if place in asked else ASKING_GETS
        asked.add(place)
    by_input[work.side_files_from].gets += work.num_side_files
    num_further = work.has_config + work.num_side_files + (len(work.shards) > 1)
    output = Requests(
        gets=MERGE_GETS + num_further * PUBLISHED_GETS + len(work.shards) * SHARD_GETS,
        puts=MERGE_PUTS
        + num_further * PUBLISHED_PUTS
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


def survey(plan: MergePlan, workspace: Workspace, num_threads: int) -> Workload:
    """Return what a plan asks for when each worker divides its memory so and computes on so many threads."""
    passes: Counter[int] = Counter()
    shards = tuple(_shard_work(shard, workspace, num_threads, passes) for shard in plan.shards)
    return Workload(
        shards=shards,
        num_checkpoint_files=tuple(len(checkpoint.files) for checkpoint in plan.checkpoints),
        num_tensors=sum(len(shard.jobs) for shard in plan.shards),
        num_side_files=len(plan.side_files),
        side_files_from=plan.side_files[0].checkpoint if plan.side_files else plan.donor,
        has_config=plan.config is not None,
        passes=dict(sorted(passes.items())),
        num_slabs=workspace.num_slabs,
    )


def kernel_of(job: TensorJob) -> Kernel:
    """Return how a tensor is computed."""
    if job.is_copy:
        return Kernel("copy", "U8", len(job.reading.operands))
    dtype = max(job.reading.dtypes, key=lambda name: (name == "F64", name == "F32", name))
    is_linear = isinstance(job.result.declared.rule, Linear)
    return Kernel("linear" if is_linear else "elementwise", dtype, len(job.reading.operands))


def _shard_work(shard: ShardPlan, workspace: Workspace, num_threads: int, passes: Counter[int]) -> ShardWork:
    steps = []
    for step in schedule(shard.jobs, workspace):
        finished = [piece for piece in step.loads[-1].pieces if piece.stop == piece.work.reading.num_elems]
        passes[step.num_reads] += len(finished)
        steps.append(_step_work(step, num_threads))
    return ShardWork(shard.file, shard.num_bytes, tuple(steps))


def _step_work(step: Step, num_threads: int) -> StepWork:
    num_passes = max((piece.work.num_sweeps - 1 for piece in step.loads[0].pieces), default=0)
    elems, slots = _occupied(step, num_threads)
    idle_share = 1.0 - elems / slots if slots else 0.0
    return StepWork(tuple(_load_work(load, step) for load in step.loads), num_passes, step.num_reads, idle_share)


def _load_work(load: Load, step: Step) -> LoadWork:
    elems: Counter[Kernel] = Counter()
    num_bytes = num_tensors = num_pieces = 0
    for job, start, stop in load.pieces:
        assert isinstance(job, TensorJob)
        elems[kernel_of(job)] += stop - start
        num_bytes += job.output_width * (stop - start)
        num_tensors += start == 0
        num_pieces += job.reading.num_slots if start == 0 else 0
    readings: dict[int, Reading] = {}
    for checkpoint, size, num_requests in _requests(load, step):
        reading = readings.setdefault(checkpoint, Reading())
        reading.num_requests += num_requests
        reading.num_bytes += size
        reading.num_bytes_once += size
    num_turns = sum(reading.num_requests for reading in readings.values()) if step.direct else 0
    return LoadWork(elems, num_bytes, readings, num_tensors, num_pieces, num_turns)


def _requests(load: Load, step: Step) -> Iterator[tuple[int, int, int]]:
    """Per range: checkpoint, bytes, and in how many requests they are read in one pass."""
    if len(load.pieces) > 1:
        for request in load.requests:
            size = request.stop - request.start
            yield request.checkpoint, size, -(-size // OPTIMAL_READ_BYTES)
        return
    ((job, start, stop),) = load.pieces
    for slot in job.reading.slots(start, stop):
        size = slot.num_bytes
        num_requests = -(-(stop - start) // SPAN_ELEMS) if step.direct else -(-size // OPTIMAL_READ_BYTES)
        if size:
            yield slot.checkpoint, size, num_requests


def _occupied(step: Step, num_threads: int) -> tuple[float, float]:
    """Elements of a step, and what all threads could have computed until its last span is done."""
    if len(step.loads) == 1 and len(step.loads[0].pieces) > 1:
        num_elems = float(sum(stop - start for _, start, stop in step.loads[0].pieces))
        return num_elems, num_elems  # small tensors go side by side
    pieces = [piece for load in step.loads for piece in load.pieces]
    num_elems = float(sum(stop - start for _, start, stop in pieces))
    return num_elems, num_threads * sum(_longest(stop - start, num_threads) for _, start, stop in pieces)


def _longest(num_elems: int, num_threads: int) -> float:
    """Elements until the last of several threads has done its spans."""
    rounds, left = divmod(num_elems, SPAN_ELEMS * num_threads)
    return rounds * SPAN_ELEMS + min(left, SPAN_ELEMS)


def worst_tensor(jobs: Iterable[TensorJob]) -> TensorJob | None:
    """Return the tensor whose smallest piece takes the most memory."""
    candidates: Sequence[TensorJob] = [job for job in jobs if job.reading.num_elems]
    return max(candidates, key=lambda job: (job.reading.bytes_per_elem, job.reading.num_elems), default=None)
