"""The memory model: what one worker process may hold, one formula each. All sizes in bytes."""

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stockflow.errors import BudgetError
from stockflow.methods.protocol import FLOAT_BYTES
from stockflow.planning.job import Reading
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.planning.work import Work
from stockflow.storage.parts import upload_bytes
from stockflow.text.sizes import MIB, least_mib, mib

BASELINE_BYTES = {"cpu": 184 * MIB, "cuda": 1200 * MIB}
"""Interpreter, libraries, loaded kernels and thread stacks, by device: 160 MiB measured before threads start."""
LEAST_MEMORY_BYTES = 304 * MIB
"""What a process takes that compiles the kernels before it has buffers, once per machine: 290 MiB measured."""
REMOTE_CLIENT_BYTES = 64 * MIB
"""A client's libraries, connections and what its allocator keeps."""
RANGES_IN_FLIGHT_BYTES = 192 * MIB
"""16 ranges of 8 MiB and their copies: obstore took 176 MiB, s3fs 170; with an upload beside them 296 and 247."""
PLANNED_TENSOR_BYTES, PLANNED_SOURCE_BYTES = 5 * 2**10, 2**9
"""Header entries, plan, facts and receipt of one tensor, and of each of its sources: 11,610 x 3 and x 5 measured."""
MAX_CHUNK_SPANS = 16
"""At most this many spans of each source are read at a time: 4 Mi elements, 8 MiB of BF16."""
CHUNK_SPANS = tuple(MAX_CHUNK_SPANS >> halved for halved in range(MAX_CHUNK_SPANS.bit_length()))
"""Sizes of a chunk to choose from, the best first."""
MAX_SHARED_SPANS = 4
"""Spans of each source in a slab that only small tensors share: little enough to stay in the caches."""
MAX_SHARED_SLABS = 4
MIN_SLABS = 2
GOOD_NUM_SLABS = 6
"""With fewer slabs than this reading and computing hardly overlap, so smaller ones are tried first."""
LOOKAHEAD_BYTES = 128 * MIB
"""How far reading may run ahead of computing: as much as is in flight on object storage."""
NUM_OUT_BUFFERS = 3
"""One being filled, one being hashed and written, one between them."""
MAX_CHUNK_GROUPS = 2**14
"""At most this many rows are decided together, so that products of very short rows stay few."""
PIECE_OVERHEAD = 128
"""Alignment loss of one range in a slab."""
SLOT_ROOM = 2**14
"""Multiples of which slots of a direct span begin at, so that the others stay where they are if one has a row more."""
WAITING_BYTES = 4
"""Of a result that waits for its codes: float32."""
SPANS_AHEAD = 3
"""Results of spans, per thread, that may wait for their turn to be added up."""
NUM_GROUP_FACTS = 12
"""Cosines, ratios and flags of a group, on their way and where they are kept."""
LAYER_BYTES = 96 * MIB
"""Kept of a layer that is decided as one, at most."""
_NO_UNIT = ", as a number without a unit counts bytes"
FACTOR_BYTES = 256 * MIB
"""Held of factors from their products to the merge of what they change, at most."""
LEAST_FACTOR_BYTES = 16 * MIB
"""With less room than this, of more, they are read again."""
PRODUCT_COPIES = 6
"""Products per span in working precision and float64, their sum with what came before, and temporaries."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """How a worker divides its budget."""

    slab_bytes: int
    """size of a reading buffer; one read of all sources of a chunk, or of many small tensors, fills it"""
    num_slabs: int
    out_bytes: int
    """size of an output buffer: what one slab can become"""
    fixed_bytes: int
    """baseline, clients and the threads' scratch"""
    direct: bool = False
    """whether the threads that compute read large units themselves, span by span and on every sweep"""
    waiting_bytes: int = 0
    """results that wait for their codes"""
    ahead_bytes: int = 0
    """baseline, clients, and what is held before anything is merged and there are any results"""
    factor_bytes: int = 0
    """factors that are held from their products to the merge of what they change"""

    @property
    def projected_bytes(self) -> int:
        """Peak of the worker process."""
        merging_bytes = self.fixed_bytes + NUM_OUT_BUFFERS * self.out_bytes + self.waiting_bytes
        return self.num_slabs * self.slab_bytes + max(merging_bytes, self.ahead_bytes) + self.factor_bytes

    def chunk_elems(self, work: Work) -> int:
        """Most elements of a tensor that are read, and then written, as one: what a slab or an output buffer holds."""
        reading = work.reading
        if work.place_beside[1]:
            return reading.num_elems + SPAN_ELEMS
        if not self.direct:
            most = int((self.slab_bytes - overhead_bytes(reading)) // reading.bytes_per_elem)
        elif work.output_width:
            most = self.out_bytes // work.output_width
        else:
            most = MAX_CHUNK_SPANS * SPAN_ELEMS
        return min(most, max(MAX_CHUNK_GROUPS * reading.group_elems, SPAN_ELEMS))


def stage_bytes(reading: Reading) -> int:
    """Return what one thread needs to decode one span of operands that kernels cannot take as they are."""
    if reading.is_plain:
        return 0
    num_elems = min(SPAN_ELEMS, reading.num_elems)
    return (len(reading.operands) * num_elems + reading.scratch_elems(num_elems)) * reading.float_bits // 8


def overhead_bytes(reading: Reading) -> int:
    """Return what every piece of a reading takes in a slab beside its elements."""
    return PIECE_OVERHEAD * reading.num_slots + reading.run_bytes


def beside_elems(work: Work) -> int:
    """Return how many elements must be in memory at once for a work that is not read as suits the memory; else 0."""
    return work.place_beside[1] * work.reading.num_elems


def span_state_bytes(work: Work) -> int:
    """Return what one span leaves behind for the decision: products of its groups, or counts of digits."""
    reading = work.reading
    return work.span_state_bytes(-(-min(SPAN_ELEMS, reading.num_elems) // reading.group_elems))


def decision_bytes(work: Work) -> int:
    """Return what the groups of a tensor need beside its elements, in row and leading scope.

    Facts of every group are kept until the tensor is done; products of all sources, in a few copies, until a
    chunk is decided. Rows of four elements take more here than in the sources.
    """
    reading = work.reading
    num_sources = len(reading.operands)
    if reading.num_groups <= 1:
        return work.kept_bytes
    together = min(reading.num_groups, max(MAX_CHUNK_GROUPS, SPAN_ELEMS // reading.group_elems))
    facts = reading.num_groups * (num_sources + NUM_GROUP_FACTS) * FLOAT_BYTES
    return work.kept_bytes + facts + together * num_sources**2 * FLOAT_BYTES * PRODUCT_COPIES


def divide(
    works: Iterable[Work],
    memory_bytes: int,
    *,
    num_threads: int,
    baseline_bytes: int,
    direct: bool = False,
) -> Workspace:
    """Return how to spend ``memory_bytes`` on these tensors.

    Args:
        works: the tensors one worker will go through.
        memory_bytes: bound of the whole process.
        num_threads: compute threads.
        baseline_bytes: what the process takes before it reads anything, clients included.
        direct: whether reading a source again costs next to nothing, as from local files in the page cache. Large
            units are then never held: they are read into scratch that stays in the processor's caches.

    Raises:
        BudgetError: not even one span of the widest tensor fits.
    """
    counted = _counted(works)
    found, least = _divided(counted, memory_bytes, num_threads, baseline_bytes, direct)
    if counted and least > memory_bytes:
        limit = f"the limit is {mib(memory_bytes)}{'' if memory_bytes >= MIB else _NO_UNIT}. Raise --memory"
        if least == LEAST_MEMORY_BYTES:
            raise BudgetError(
                f"a process needs at least {least_mib(least)} of memory, which compiling the kernels takes once per "
                f"machine; {limit}"
            )
        widest = max((work for work, _ in counted), key=lambda work: (beside_elems(work), _width(work))).reading
        most = max(SPAN_ELEMS, *(beside_elems(work) for work, _ in counted))
        raise BudgetError(
            f"tensor {widest.name!r} needs at least {least_mib(least)} of memory for its smallest chunk "
            f"({most:,} elements x {len(widest.operands)} checkpoints x {num_threads} threads, "
            f"{mib(baseline_bytes)} of it for the process itself); "
            f"{limit}{' or lower --workers' if num_threads > 1 else ''}"
        )
    return found


def least_memory(works: Iterable[Work], *, num_threads: int, baseline_bytes: int, direct: bool = False) -> int:
    """Return the least ``memory_bytes`` that ``divide`` accepts for these tensors."""
    return _divided(_counted(works), 0, num_threads, baseline_bytes, direct)[1]


Counted = Sequence[tuple[Work, int]]
"""One of each sort of works that take the same memory, and how many there are."""


def _counted(works: Iterable[Work]) -> Counted:
    found: dict[Hashable, Work] = {}
    counts: Counter[Hashable] = Counter()
    for work in works:
        if work.reading.num_elems:
            costs = work.costs
            found.setdefault(costs, work)
            counts[costs] += 1
    return [(found[costs], count) for costs, count in counts.items()]


def _divided(
    works: Counted, memory_bytes: int, num_threads: int, baseline_bytes: int, direct: bool
) -> tuple[Workspace, int]:
    """The best division, the smallest one if none fits; and the memory it takes at least."""
    if not works:
        return Workspace(PIECE_OVERHEAD, MIN_SLABS, 1, baseline_bytes), baseline_bytes
    per_thread = max(work.scratch_bytes(SPAN_ELEMS) for work, _ in works)
    per_thread += (SPANS_AHEAD + 1) * max(span_state_bytes(work) for work, _ in works)
    per_thread += max(stage_bytes(work.reading) for work, _ in works)
    fixed_bytes = baseline_bytes + _out_beside(works)  # where results are put in order before they are written
    per_thread += direct * max(_span_source_bytes(work.reading) for work, _ in works)
    fixed = fixed_bytes + num_threads * per_thread + max(decision_bytes(work) for work, _ in works)
    fixed += min(sum(count * work.kept_bytes for work, count in works if work.reading.scope == "layer"), LAYER_BYTES)
    ahead = baseline_bytes + max(work.ahead_bytes for work, _ in works)
    waiting = partial(_waiting_bytes, works, num_threads=num_threads, direct=direct)
    found = (_direct if direct else _streamed)(works, memory_bytes, fixed, ahead, waiting)
    if not direct:
        found = replace(found, factor_bytes=_factor_bytes(works, memory_bytes - found.projected_bytes))
    return found, max(found.projected_bytes, LEAST_MEMORY_BYTES if baseline_bytes >= BASELINE_BYTES["cpu"] else 0)


def _streamed(
    works: Counted, memory_bytes: int, fixed_bytes: int, ahead_bytes: int, waiting_of: Callable[[int], int]
) -> Workspace:
    """Large chunks in enough slabs to read ahead, and to hold the largest unit; the least if nothing fits."""
    overhead = max(overhead_bytes(work.reading) for work, _ in works)
    out_per_source_byte = max(work.output_width / work.reading.bytes_per_elem for work, _ in works)
    for num_spans in CHUNK_SPANS:
        slab = (
            max(math.ceil(work.reading.bytes_per_elem * _load_elems(work, num_spans)) for work, _ in works) + overhead
        )
        slab = max(slab, _slab_beside(works))
        out = max(int(slab * out_per_source_byte) + 1, _out_beside(works))
        waiting = waiting_of(num_spans)
        num_slabs = (memory_bytes - max(fixed_bytes + waiting + NUM_OUT_BUFFERS * out, ahead_bytes)) // slab
        if num_slabs >= GOOD_NUM_SLABS:
            break
    lookahead = max(-(-LOOKAHEAD_BYTES // slab), 2)
    holding = min(num_slabs, -(-_held_bytes(works) // (slab - overhead)))
    total = math.ceil(sum(count * work.reading.num_elems * work.reading.bytes_per_elem for work, count in works))
    wanted = min(holding + lookahead, -(-total // (slab - overhead)) + 1)
    num_slabs = max(min(num_slabs, wanted), MIN_SLABS)
    return Workspace(slab, num_slabs, out, fixed_bytes, waiting_bytes=waiting, ahead_bytes=ahead_bytes)


def _factor_bytes(works: Counted, left: int) -> int:
    """Return how much of factors is held of what other needs leave: all, at most half of what is held ahead."""
    room, total = min(left, FACTOR_BYTES), sum(count * (work.ahead_bytes // 2) for work, count in works)
    return total if total <= room else room if room >= LEAST_FACTOR_BYTES else 0


def _load_elems(work: Work, num_spans: int) -> int:
    """Return how many elements are loaded at a time if there is room for so many spans: one band at least."""
    return max(SPAN_ELEMS * num_spans, work.reading.band)


def _waiting_bytes(works: Counted, num_spans: int, *, num_threads: int, direct: bool) -> int:
    """Return what results take that wait in float32 for their codes: a load's, and of each thread those of a small one.

    Small ones share a load, so that all together are no more than it holds, but for those that are read at once.
    """
    coded = [work for work, _ in works if work.reading.band > 1]
    most = max((min(_load_elems(work, num_spans), work.reading.num_elems) for work in coded), default=0)
    beside = max((work.reading.num_elems for work in coded if work.place_beside[1]), default=0)
    largest = SPAN_ELEMS if direct else most
    small = max((work.reading.num_elems for work in coded if work.reading.num_elems <= largest), default=0)
    shared = MAX_SHARED_SPANS * SPAN_ELEMS if direct else most
    return WAITING_BYTES * (most + max(min(num_threads * small, shared), num_threads * beside))


def _direct(
    works: Counted, memory_bytes: int, fixed_bytes: int, ahead_bytes: int, waiting_of: Callable[[int], int]
) -> Workspace:
    """Output buffers of many spans, a few slabs for tensors smaller than one; the least if nothing fits."""
    out_per_source_byte = max(work.output_width / work.reading.bytes_per_elem for work, _ in works)
    readings = [work.reading for work, _ in works]
    small = [(work.reading, count) for work, count in works if work.reading.group_elems <= SPAN_ELEMS]
    shared = sum(count * _span_source_bytes(reading) for reading, count in small)
    for num_spans in CHUNK_SPANS:
        widest = _widest(works).reading.bytes_per_elem
        largest = math.ceil(widest * SPAN_ELEMS * min(num_spans, MAX_SHARED_SPANS))
        slab = max(min(largest, shared), PIECE_OVERHEAD) + max(map(overhead_bytes, readings))
        slab = max(slab, _slab_beside(works))
        large_out = max(work.output_width * _load_elems(work, num_spans) for work, _ in works)
        out = max(large_out, int(slab * out_per_source_byte) + 1, _out_beside(works))
        num_slabs = min(MAX_SHARED_SLABS, -(-shared // slab) + 1)
        waiting = waiting_of(num_spans)
        found = Workspace(slab, max(num_slabs, MIN_SLABS), out, fixed_bytes, True, waiting, ahead_bytes)
        if found.projected_bytes <= memory_bytes:
            break
    return found


def _widest(works: Counted) -> Work:
    return max((work for work, _ in works), key=_width)


def _width(work: Work) -> float:
    return work.reading.bytes_per_elem


def _slab_beside(works: Counted) -> int:
    """What a slab must hold at least: all that is read at once of some tensors."""
    return max(
        math.ceil(beside_elems(work) * work.reading.bytes_per_elem)
        + work.place_beside[1] * overhead_bytes(work.reading)
        for work, _ in works
    )


def _out_beside(works: Counted) -> int:
    """What an output buffer must hold at least: all that is written at once."""
    return max(beside_elems(work) * work.output_width for work, _ in works)


def _span_source_bytes(reading: Reading) -> int:
    """What the operands of one span take, each on a boundary of its own."""
    room = 0 if reading.is_plain else SLOT_ROOM * reading.num_slots
    return math.ceil(min(SPAN_ELEMS, reading.num_elems) * reading.bytes_per_elem) + overhead_bytes(reading) + room


def _held_bytes(works: Counted) -> int:
    """The largest unit that is wanted in memory from one sweep to the next."""
    return max(math.ceil(_unit_elems(work.reading) * work.reading.bytes_per_elem) for work, _ in works)


def _unit_elems(reading: Reading) -> int:
    return reading.group_elems if reading.group_elems > SPAN_ELEMS else min(SPAN_ELEMS, reading.num_elems)


def planned_bytes(works: Iterable[Work]) -> int:
    """Return what planning and publishing hold of these tensors in one process."""
    return sum(PLANNED_TENSOR_BYTES + PLANNED_SOURCE_BYTES * work.reading.num_slots for work in works)


def client_bytes(inputs: Iterable[str], output: str, shard_bytes: int) -> int:
    """Return what storage clients hold while shards of ``shard_bytes`` are read from ``inputs`` and uploaded.

    The end of one upload overlaps the begin of the next.
    """
    ranges = RANGES_IN_FLIGHT_BYTES if any(map(_is_remote, inputs)) else 0
    parts = 2 * upload_bytes(shard_bytes) if _is_remote(output) else 0
    return ranges + parts + REMOTE_CLIENT_BYTES if ranges or parts else 0


def _is_remote(url: str) -> bool:
    return "://" in url


def default_memory(num_slots: int = 1) -> int:
    """Return 80 % of what this process may use, divided by the worker slots on the node, less /dev/shm's use."""
    available = min(_physical_bytes(), *_cgroup_limits())
    shared_memory = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    used_shared = (shared_memory.f_blocks - shared_memory.f_bfree) * shared_memory.f_frsize if shared_memory else 0
    return max(int(0.8 * available) - used_shared, 0) // num_slots


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits() -> Iterable[int]:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            yield int(text)
    yield _physical_bytes()
