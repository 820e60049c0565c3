"""Which bytes are read together, in which order, how often."""

import math
import sys
from itertools import pairwise
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.methods.protocol import Scope
from stockflow.planning.budget import (
    MIB,
    MIN_SLABS,
    Workspace,
    divide,
)
from stockflow.planning.job import COPY, COPY_EQUAL, TensorJob
from stockflow.planning.reads import ALIGNMENT, MAX_GAP_BYTES, Load, LoadPiece, Request, Step, schedule, split_request
from stockflow.planning.spans import SPAN_ELEMS, span_bounds
from stockflow.storage.parts import RANGE_BYTES
from tests.plans import job


@given(num_groups=st.integers(0, 40), group_elems=st.integers(1, 3 * SPAN_ELEMS + 5))
def test_spans_cover_a_tensor_once_and_never_straddle_their_boundaries(num_groups: int, group_elems: int) -> None:
    num_elems = num_groups * group_elems

    spans = list(span_bounds(num_elems, group_elems))

    assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), num_elems]
    for start, stop in spans:
        assert 0 < stop - start <= SPAN_ELEMS
        if group_elems <= SPAN_ELEMS:
            assert start % group_elems == stop % group_elems == 0
        else:
            assert start // group_elems == (stop - 1) // group_elems
            assert start % group_elems % SPAN_ELEMS == 0
            assert stop % group_elems % SPAN_ELEMS == 0 or stop % group_elems == 0


def test_nothing_has_no_spans() -> None:
    assert list(span_bounds(0, 0)) == []
    assert list(span_bounds(0, 5)) == []


shapes = st.one_of(
    st.lists(st.integers(0, 50), max_size=3).map(tuple),
    st.tuples(st.integers(1, 9), st.integers(1, 2 * SPAN_ELEMS)),
    st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 1000)),
    st.tuples(st.integers(1, 9 * SPAN_ELEMS)),
)
methods = st.sampled_from(
    [
        *(("model_stock", scope) for scope in get_args(Scope)),
        *((method, "tensor") for method in ("linear", COPY, COPY_EQUAL)),
    ]
)


@st.composite
def shards(draw: st.DrawFn) -> list[TensorJob]:
    """Tensors laid out one after the other, with gaps and in another order in some checkpoints."""
    num_sources = draw(st.integers(2, 4))
    float_dtypes = st.tuples(*[st.sampled_from(["BF16", "F32", "F64"])] * num_sources)
    drawn = [(draw(shapes), draw(methods), draw(float_dtypes)) for _ in range(draw(st.integers(1, 12)))]
    starts: list[list[int]] = [[0] * len(drawn) for _ in range(num_sources)]
    for checkpoint in range(num_sources):
        position = draw(st.integers(8, 200))
        for index in draw(st.permutations(range(len(drawn)))) if draw(st.booleans()) else range(len(drawn)):
            starts[checkpoint][index] = position
            shape, _, dtypes = drawn[index]
            position += TensorSpec("", dtypes[checkpoint], shape).num_bytes + draw(
                st.sampled_from([0, 0, 0, 5, 8, 128, 136])
            )
    jobs = []
    for index, (shape, (method, scope), dtypes) in enumerate(drawn):
        count = 1 if method == COPY else num_sources
        jobs.append(
            job(
                f"t{index}",
                shape,
                dtypes[:1] * count if method == COPY_EQUAL else dtypes[:count],
                method=method,
                scope=scope,
                starts=tuple(row[index] for row in starts),
            )
        )
    return jobs


def workspace_for(jobs: list[TensorJob], spare: int, *, direct: bool = False) -> Workspace:
    return divide(jobs, spare, num_threads=1, baseline_bytes=0, direct=direct)


def pieces_of(steps: list[Step]) -> list[LoadPiece]:
    return [piece for step in steps for load in step.loads for piece in load.pieces]


def check_load(load: Load, workspace: Workspace, room: int) -> None:
    """Every source byte of every piece is where the offsets say, in ``room`` bytes."""
    taken = sorted((request.offset, request.offset + request.stop - request.start) for request in load.requests)
    assert all(before[1] <= after[0] for before, after in pairwise(taken)), "requests overwrite each other"
    assert all(stop <= room for _, stop in taken), "a load is larger than its slab"
    assert sum(piece.work.output_width * (piece.stop - piece.start) for piece in load.pieces) <= workspace.out_bytes
    for piece, offsets in zip(load.pieces, load.offsets, strict=True):
        reading = piece.work.reading
        for operand, width, offset in zip(reading.operands, reading.widths, offsets, strict=True):
            start = operand.extents[0].start + width * piece.start
            num_bytes = width * (piece.stop - piece.start)
            if num_bytes:
                holders = [
                    request
                    for request in load.requests
                    if request.checkpoint == operand.checkpoint and request.start <= start < request.stop
                ]
                assert any(
                    start + num_bytes <= holder.stop and offset == holder.offset + start - holder.start
                    for holder in holders
                )
                assert offset % width == 0
    widths = {
        (operand.checkpoint, operand.extents[0].file, operand.extents[0].start + width * piece.start): width
        for piece in load.pieces
        for operand, width in zip(piece.work.reading.operands, piece.work.reading.widths, strict=True)
        if piece.stop > piece.start
    }
    for before, after in pairwise(load.requests):
        is_same_file = (before.checkpoint, before.file) == (after.checkpoint, after.file)
        near = is_same_file and after.start <= before.stop + MAX_GAP_BYTES
        aligned = (after.start - before.start) % widths[after.checkpoint, after.file, after.start] == 0
        assert not (near and aligned), "neighbours in a file are read by one request"


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB), direct=st.booleans())
@settings(max_examples=120)
def test_the_schedule_covers_every_tensor_once_within_its_slabs(
    jobs: list[TensorJob], spare: int, direct: bool
) -> None:
    workspace = workspace_for(jobs, spare, direct=direct)

    steps = list(schedule(jobs, workspace))

    pieces = pieces_of(steps)
    for each in jobs:
        own = [piece for piece in pieces if piece.work is each]
        assert [0, *(piece.stop for piece in own)] == [*(piece.start for piece in own), each.reading.num_elems]
        spans = list(span_bounds(each.reading.num_elems, each.reading.group_elems))
        assert {piece.start for piece in own if piece.stop} <= {start for start, _ in spans}
        assert {piece.stop for piece in own if piece.stop} <= {stop for _, stop in spans}
    order = [piece.work.output.name for piece in pieces]
    assert [each.output.name for each in jobs] == list(dict.fromkeys(order))
    for step in steps:
        for load in step.loads:
            check_load(load, workspace, sys.maxsize if step.direct else workspace.slab_bytes)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB))
@settings(max_examples=120)
def test_steps_are_whole_units_and_held_ones_fit(jobs: list[TensorJob], spare: int) -> None:
    workspace = workspace_for(jobs, spare)

    for step in schedule(jobs, workspace):
        if step.held:
            assert len(step.loads) <= workspace.num_slabs
            assert step.num_reads == 1
        if len(step.loads) == 1:
            assert (step.num_sweeps, step.held) == (1, True)
            continue
        pieces = [piece for load in step.loads for piece in load.pieces]
        assert len(pieces) == len(step.loads)
        [owner] = {id(piece.work): piece.work for piece in pieces}.values()
        assert step.num_sweeps == owner.num_sweeps
        assert pieces[0].start % owner.reading.group_elems == 0
        assert pieces[-1].stop - pieces[0].start == owner.reading.group_elems
        assert all(before.stop == after.start for before, after in pairwise(pieces))
        if step.num_sweeps > 1:
            assert step.held == (len(step.loads) <= workspace.num_slabs)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB), direct=st.booleans())
@settings(max_examples=60)
def test_the_workspace_keeps_within_the_memory(jobs: list[TensorJob], spare: int, direct: bool) -> None:
    workspace = workspace_for(jobs, spare, direct=direct)

    assert workspace.projected_bytes <= spare or not any(each.reading.num_elems for each in jobs)
    assert workspace.num_slabs >= MIN_SLABS
    for each in jobs:
        if each.reading.num_elems:
            assert workspace.chunk_elems(each) >= SPAN_ELEMS


def test_neighbours_in_a_file_are_one_request() -> None:
    """What makes small tensors cheap on object storage: 100 norms of 4 checkpoints are 4 requests."""
    jobs = [job(f"n{i}", (64,), ("BF16",) * 4, starts=(8 + 128 * i,) * 4) for i in range(100)]

    [step] = schedule(jobs, workspace_for(jobs, 64 * MIB))

    assert len(step.loads) == 1
    assert [(request.checkpoint, request.start, request.stop) for request in step.loads[0].requests] == [
        (0, 8, 12_808),
        (1, 8, 12_808),
        (2, 8, 12_808),
        (3, 8, 12_808),
    ]


def test_what_lies_between_and_is_not_read_parts_no_request_up_to_a_bound() -> None:
    """Shapes of packed codes take 8 or 16 bytes: with them, experts of Kimi's layout were one request per tensor."""
    for gap, num_requests in ((MAX_GAP_BYTES, 1), (MAX_GAP_BYTES + 2, 100)):
        jobs = [job(f"n{i}", (64,), ("BF16",), method=COPY, starts=(8 + (128 + gap) * i,)) for i in range(100)]

        [step] = schedule(jobs, workspace_for(jobs, 64 * MIB))

        assert len(step.loads) == 1
        assert len(step.loads[0].requests) == num_requests
        check_load(step.loads[0], workspace_for(jobs, 64 * MIB), workspace_for(jobs, 64 * MIB).slab_bytes)


def test_a_large_tensor_is_held_if_it_fits_and_read_again_if_not() -> None:
    large = job("t", (40 * SPAN_ELEMS,), ("F32",) * 3)
    roomy = divide([large], 1024 * MIB, num_threads=1, baseline_bytes=0)
    tight = divide([large], 16 * MIB, num_threads=1, baseline_bytes=0)

    [held], [streamed] = schedule([large], roomy), schedule([large], tight)

    assert (held.held, held.num_sweeps, held.num_reads) == (True, 2, 1)
    assert (streamed.held, streamed.num_sweeps, streamed.num_reads) == (False, 2, 2)
    assert len(held.loads) < len(streamed.loads)


@given(jobs=shards(), spare=st.integers(60, 300).map(lambda mib: mib * MIB))
@settings(max_examples=120)
def test_direct_steps_are_the_units_larger_than_a_span_and_hold_nothing(jobs: list[TensorJob], spare: int) -> None:
    for step in schedule(jobs, workspace_for(jobs, spare, direct=True)):
        pieces = [piece for load in step.loads for piece in load.pieces]
        if not step.direct:
            assert all(piece.stop - piece.start <= SPAN_ELEMS for piece in pieces)
            continue
        owner = pieces[0].work
        assert {id(piece.work) for piece in pieces} == {id(owner)}
        assert pieces[-1].stop - pieces[0].start > SPAN_ELEMS
        assert step.num_reads == step.num_sweeps == owner.num_sweeps


def test_direct_reading_takes_the_same_memory_whatever_the_tensor() -> None:
    small, huge = (job("t", (spans * SPAN_ELEMS,), ("BF16",) * 5) for spans in (40, 400_000))

    small_bytes, huge_bytes = (workspace_for([each], 2**40, direct=True).projected_bytes for each in (small, huge))

    assert small_bytes == huge_bytes < 32 * MIB


def test_without_statistics_nothing_is_read_twice() -> None:
    for method in ("linear", COPY, COPY_EQUAL):
        large = job("t", (40 * SPAN_ELEMS,), ("F32",) * 3, method=method)

        [step] = schedule([large], divide([large], 16 * MIB, num_threads=1, baseline_bytes=0))

        assert len(step.loads) > 1
        assert step.num_reads == 1


def test_rows_that_fit_are_units_of_their_own_in_one_pass() -> None:
    rows = job("t", (1000, 4096), ("BF16",) * 3, scope="row")

    steps = list(schedule([rows], divide([rows], 32 * MIB, num_threads=1, baseline_bytes=0)))

    assert len(steps) > 1
    assert all((len(step.loads), step.num_reads) == (1, 1) for step in steps)
    assert all(piece.start % 4096 == piece.stop % 4096 == 0 for piece in pieces_of(steps))


@given(start=st.integers(0, 10**12), size=st.integers(1, 5 * RANGE_BYTES))
def test_a_range_is_split_into_the_size_that_storage_serves_best(start: int, size: int) -> None:
    request = Request(0, "model.safetensors", start, start + size, offset=ALIGNMENT)

    parts = list(split_request(request))

    assert [start, *(part.stop for part in parts)] == [*(part.start for part in parts), start + size]
    assert all(part.stop - part.start == RANGE_BYTES for part in parts[:-1])
    assert all(part.offset - request.offset == part.start - start for part in parts)
    assert len(parts) == math.ceil(size / RANGE_BYTES)
