"""How memory is divided."""

import os
import re

import pytest

from stockflow.errors import BudgetError
from stockflow.planning.budget import (
    GOOD_NUM_SLABS,
    MAX_CHUNK_SPANS,
    MIB,
    default_memory,
    divide,
)
from stockflow.planning.job import COPY
from stockflow.planning.reads import schedule
from stockflow.planning.spans import SPAN_ELEMS
from tests.plans import job


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    jobs = [job("small", (9,), ("BF16",) * 2), job("model.wide", (10**9,), ("F32",) * 9)]

    with pytest.raises(BudgetError) as caught:
        divide(jobs, 100 * MIB, num_threads=4, baseline_bytes=80 * MIB)

    found = str(caught.value)
    needed = int(re.search(r"at least ([\d,]+) MiB", found)[1].replace(",", ""))  # type: ignore[index]
    assert "'model.wide'" in found
    assert "262,144 elements x 9 checkpoints x 4 threads, 80 MiB of it for the process itself" in found
    assert "the limit is 100 MiB. Raise --memory or lower --workers" in found
    divide(jobs, (needed + 1) * MIB, num_threads=4, baseline_bytes=80 * MIB)
    with pytest.raises(BudgetError):
        divide(jobs, (needed - 1) * MIB, num_threads=4, baseline_bytes=80 * MIB)


def test_fewer_workers_are_no_advice_for_one_thread() -> None:
    """A Ray worker has one thread, however many workers there are."""
    with pytest.raises(BudgetError, match=r"the limit is 100 MiB\. Raise --memory$"):
        divide([job("w", (10**9,), ("F32",) * 9)], 100 * MIB, num_threads=1, baseline_bytes=80 * MIB)


def test_more_memory_buys_larger_chunks_then_more_slabs_and_no_more_than_is_useful() -> None:
    jobs = [job("t", (10**9,), ("BF16",) * 5)]
    sizes = [2**exponent * MIB for exponent in range(4, 15)]

    workspaces = [divide(jobs, size, num_threads=2, baseline_bytes=0) for size in sizes]

    assert [w.slab_bytes for w in workspaces] == sorted(w.slab_bytes for w in workspaces)
    assert workspaces[0].chunk_elems(jobs[0]) == SPAN_ELEMS
    assert workspaces[-1].chunk_elems(jobs[0]) == MAX_CHUNK_SPANS * SPAN_ELEMS
    assert all(w.num_slabs >= GOOD_NUM_SLABS for w in workspaces[1:])
    assert all(w.projected_bytes <= size for w, size in zip(workspaces, sizes, strict=True))
    small = divide([job("t", (10,))], 2**40, num_threads=2, baseline_bytes=0)
    assert small.projected_bytes < 200 * MIB


def test_nothing_to_do_needs_no_buffers() -> None:
    workspace = divide([job("e", (0, 4), method=COPY)], MIB, num_threads=1, baseline_bytes=0)

    assert workspace.projected_bytes < MIB
    [step] = schedule([job("e", (0, 4), method=COPY)], workspace)
    assert step.loads[0].requests == ()


def test_default_memory_is_a_share_of_what_is_there() -> None:
    whole = default_memory()

    assert 0 < whole <= 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert default_memory(4) == pytest.approx(whole / 4, rel=0.05)
