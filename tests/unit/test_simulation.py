"""The simulation against bounds of scheduling theory, cases done by hand, and itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation import HOUR_S, Preemptions, SimulatedRun, Stragglers, simulate

DURATIONS = st.lists(st.floats(0.1, 100.0), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("durations", "num_workers", "makespan_s", "tail_s"),
    [
        ([3, 3, 3, 3], 2, 6, 0),
        ([5, 4, 3, 3, 3], 2, 10, 2),  # 5 3 | 4 3, then 3 at 7
        ([2, 2, 2], 2, 4, 2),
        ([7], 3, 7, 7),
    ],
)
def test_cases_done_by_hand(durations: list[float], num_workers: int, makespan_s: float, tail_s: float) -> None:
    run = simulate(durations, num_workers, duration=float)

    assert (run.makespan_s, run.tail_s) == (makespan_s, tail_s)
    assert run.efficiency == pytest.approx(sum(durations) / (num_workers * makespan_s))


@settings(max_examples=50)
@given(DURATIONS, st.integers(1, 20), st.floats(0.0, 30.0))
def test_a_run_without_misfortune_is_within_grahams_bound(
    durations: list[float], num_workers: int, startup_s: float
) -> None:
    """Graham 1969: the longest first takes at most 4/3 - 1/(3 m) of the best schedule."""
    run = simulate(durations, num_workers, duration=float, startup_s=startup_s)

    least = max(sum(durations) / num_workers, max(durations))
    most = sum(durations) / num_workers + max(durations) * (1 - 1 / num_workers)
    assert least - 1e-6 <= run.makespan_s - startup_s <= most + 1e-6


@settings(max_examples=50)
@given(DURATIONS, st.integers(1, 20), st.integers(0, 5))
def test_misfortune_is_paid_for_by_time_and_nothing_is_left_undone(
    durations: list[float], num_workers: int, seed: int
) -> None:
    def run(per_worker_hour: float) -> SimulatedRun:
        preemptions = Preemptions(per_worker_hour, replacement_s=5.0)
        return simulate(durations, num_workers, duration=float, startup_s=1.0, preemptions=preemptions, seed=seed)

    with_it = run(HOUR_S / 200)

    assert with_it == run(HOUR_S / 200)
    # What is lost is done again on the same places: all of it fits between start and end.
    assert num_workers * (with_it.makespan_s - 1.0) >= sum(durations) + with_it.lost_s - 1e-6


def test_slow_workers_do_fewer_items() -> None:
    all_slow = simulate([10.0] * 8, 2, duration=float, stragglers=Stragglers(1.0, 2.0))
    half_slow = simulate([10.0] * 300, 20, duration=float, stragglers=Stragglers(0.5, 2.0), seed=3)

    assert (all_slow.makespan_s, all_slow.efficiency) == (80.0, 0.5)
    assert 150 < half_slow.makespan_s < 300  # dealt out evenly beforehand it would be 300
