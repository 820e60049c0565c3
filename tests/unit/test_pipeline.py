"""The pipeline in virtual time: it ends whatever it is given, and never beats what each of its parts takes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.forecast.pipeline import LoadTime, StepTime, run

SECONDS = st.just(0.0) | st.floats(1e-15, 1e6)
LOADS = st.builds(LoadTime, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
STEPS = st.lists(
    st.builds(
        StepTime,
        st.lists(LOADS, min_size=1, max_size=4).map(tuple),
        st.integers(0, 2),
        st.integers(1, 3),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(STEPS, st.integers(1, 5), st.floats(0.1, 8.0), st.integers(1, 4), st.integers(1, 4))
def test_it_takes_no_less_than_its_parts_and_no_more_than_one_after_the_other(
    steps: list[StepTime], num_threads: int, cores: float, num_slabs: int, num_buffers: int
) -> None:
    found = run(steps, num_threads=num_threads, cores=cores, num_slabs=num_slabs, num_buffers=num_buffers)

    loads = [(step, load) for step in steps for load in step.loads]
    computing = sum(step.num_passes * load.statistics_s + load.serial_s + load.combine_s for step, load in loads)
    writing = sum(load.write_s for _, load in loads)
    reading = sum(load.read_s * max(step.num_passes, step.num_reads) for step, load in loads)
    slowest = max((num_threads + 1) / cores, 1.0)
    assert found.seconds >= max(computing, writing) * (1 - 1e-9)
    assert found.seconds <= (computing + writing + reading) * slowest * (1 + 1e-9)


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 1e300, 5e-324])
def test_it_ends_with_any_number(seconds: float) -> None:
    load = LoadTime(seconds, seconds, seconds, seconds, seconds)

    run([StepTime((load,) * 5, 2, 2)] * 5, num_threads=3, cores=2.0, num_slabs=2, num_buffers=3)


def test_writing_overlaps_with_the_next_output_and_only_as_far_as_there_are_buffers() -> None:
    load = LoadTime(0.0, 0.0, 1.0, 0.0, 3.0)
    step = StepTime((load,), 0, 1)

    enough, one = (run([step] * 4, num_threads=1, cores=2.0, num_slabs=4, num_buffers=n).seconds for n in (4, 1))

    assert enough == pytest.approx(1.0 + 4 * 3.0), "the writer never waits after the first output"
    assert one == pytest.approx(4 * (1.0 + 3.0)), "a buffer is filled only when the one before is written"


def test_threads_and_the_writer_share_the_cores() -> None:
    load = LoadTime(0.0, 0.0, 2.0, 0.0, 2.0)

    both = run([StepTime((load,) * 2, 0, 1)], num_threads=1, cores=1.0, num_slabs=4, num_buffers=4)

    assert both.seconds == pytest.approx(8.0), "all of it on one core"
