"""The policy of a run on many workers, step by step, at times that the test chooses."""

from collections.abc import Sequence

import pytest

from stockflow.errors import ComputeLostError, StorageError
from stockflow.executors.scheduling import Cause, End, Give, Limits, Scheduler, Start

LIMITS = Limits(no_worker_timeout_s=100.0, stall_timeout_s=10.0)


def scheduler(items: Sequence[str], num_workers: int, notes: list[str] | None = None) -> Scheduler[str]:
    told = [] if notes is None else notes
    return Scheduler(items, num_workers, LIMITS, now=0.0, need=lambda: "there is nothing", on_note=told.append)


def with_workers_up(items: Sequence[str], num_workers: int, notes: list[str] | None = None) -> Scheduler[str]:
    made = scheduler(items, num_workers, notes)
    for action in made.decide(0.0):
        assert isinstance(action, Start)
        made.came_up(action.worker, f"node{action.worker}", 0.0)
    return made


def test_items_go_to_workers_as_they_come_up_and_no_more_are_started_than_there_are_items() -> None:
    run = scheduler(["a", "b"], 5)

    assert run.decide(0.0) == [Start(0), Start(1)]
    run.came_up(1, "node", 1.0)
    assert run.decide(1.0) == [Give(1, "a")]
    assert run.finished(1) == "a"
    assert run.decide(2.0) == [Give(1, "b")]
    run.finished(1)
    assert run.is_done


def test_the_item_of_a_lost_worker_is_the_next_one_given_out() -> None:
    notes: list[str] = []
    run = with_workers_up(["a", "b", "c"], 2, notes)
    assert run.decide(0.0) == [Give(0, "a"), Give(1, "b")]

    run.lost(0, Cause.lost, "gone")
    run.finished(1)

    assert run.decide(1.0) == [Start(2), Give(1, "a")]
    assert notes == ["a worker was lost, another does its item again: gone"]


@pytest.mark.parametrize(
    ("cause", "most"), [(Cause.lost, 6), (Cause.late, 3), (Cause.out_of_memory, 3)], ids=lambda value: str(value)
)
def test_an_item_under_which_workers_keep_dying_ends_the_run(cause: Cause, most: int) -> None:
    run = with_workers_up(["a"], 1)
    run.decide(0.0)
    for number in range(most - 1):
        run.lost(number, cause, "why")
        run.decide(1.0)
        run.came_up(number + 1, "node", 1.0)
        run.decide(1.0)

    with pytest.raises(ComputeLostError, match=rf"{most} workers were lost doing the same item \({cause}\): why"):
        run.lost(most - 1, cause, "why")


def test_preemptions_are_free() -> None:
    run = scheduler(["a"], 1)
    for number in range(100):
        run.decide(float(number))
        run.came_up(number, "node", float(number))
        run.decide(float(number))
        run.lost(number, Cause.preempted, "spot")

    assert run.num_waiting == 1


def test_each_cause_has_a_counter_of_its_own() -> None:
    run = with_workers_up(["a"], 1)
    run.decide(0.0)
    for number, cause in enumerate([Cause.lost, Cause.out_of_memory, Cause.late] * 2):
        run.lost(number, cause, "why")
        run.decide(1.0)
        run.came_up(number + 1, "node", 1.0)
        run.decide(1.0)
    for _ in range(LIMITS.storage_failures - 1):
        run.storage_failed(6, StorageError("down"), "down")
        run.decide(2.0)
    run.finished(6)

    assert run.is_done


def test_storage_that_keeps_failing_ends_the_run_with_its_own_error() -> None:
    run = with_workers_up(["a"], 1)
    run.decide(0.0)
    error = StorageError("down")
    for _ in range(LIMITS.storage_failures - 1):
        run.storage_failed(0, error, "down")
        assert run.decide(1.0) == [Give(0, "a")]

    with pytest.raises(StorageError) as raised:
        run.storage_failed(0, error, "down")

    assert error is raised.value


def test_workers_that_die_at_the_start_end_the_run_unless_one_came_up_between() -> None:
    run = scheduler(["a", "b"], 2)
    run.decide(0.0)
    run.lost(0, Cause.lost, "no module")
    run.lost(1, Cause.lost, "no module")
    run.decide(1.0)
    run.came_up(2, "node", 1.0)
    run.lost(3, Cause.lost, "no module")
    run.decide(2.0)
    run.lost(4, Cause.lost, "no module")
    run.decide(3.0)

    with pytest.raises(ComputeLostError, match="3 workers in a row died before they were ready: no module"):
        run.lost(5, Cause.lost, "no module")


def test_a_worker_that_counts_nothing_is_replaced() -> None:
    run = with_workers_up(["a", "b"], 2)
    run.decide(0.0)
    run.counted(1, 5.0)

    assert run.check(LIMITS.stall_timeout_s) == []
    assert run.check(LIMITS.stall_timeout_s + 1) == [End(0)]
    assert run.decide(11.0) == [Start(2)]
    assert list(run.busy) == [1]


def test_a_node_that_goes_is_left_by_idle_workers_at_once_and_by_others_after_their_item() -> None:
    run = with_workers_up(["a", "b", "c"], 2)
    run.decide(0.0)

    run.drain(frozenset({"node0"}))
    assert run.decide(1.0) == []
    run.finished(0)

    assert run.decide(2.0) == [End(0), Start(2)]


def test_that_no_worker_comes_is_said_and_then_ends_the_run() -> None:
    notes: list[str] = []
    run = scheduler(["a"], 1, notes)
    run.decide(0.0)

    for now in range(100):
        run.check(float(now))

    assert notes == [f"no worker has come for {31 * number} s: there is nothing" for number in (1, 2, 3)]
    with pytest.raises(ComputeLostError, match=r"no worker came within 100 s: there is nothing"):
        run.check(101.0)


def test_an_item_that_ran_out_of_memory_is_done_with_less_of_it_by_whoever_does_it_next() -> None:
    notes: list[str] = []
    run = with_workers_up(["a", "b"], 2, notes)
    assert run.decide(0.0) == [Give(0, "a", frugality=0), Give(1, "b", frugality=0)]

    run.lost(0, Cause.out_of_memory, "killed")
    run.finished(1)

    assert Give(1, "a", frugality=1) in run.decide(1.0)
    assert notes == ["a worker was lost, another does its item again, with half the memory: killed"]


def test_an_item_has_a_deadline_of_its_own_however_busy_its_worker_is() -> None:
    run = Scheduler(["a"], 1, Limits(stall_timeout_s=10.0, item_timeout_s=30.0), now=0.0)
    run.decide(0.0)
    run.came_up(0, "node", 5.0)
    run.decide(5.0)
    for now in range(6, 36):
        run.counted(0, float(now))
        assert run.check(float(now)) == []

    assert run.check(36.0) == [End(0)]


def test_workers_are_added_while_the_cluster_grows_and_kept_when_it_shrinks() -> None:
    run = with_workers_up(["a", "b", "c", "d"], 1)
    run.decide(0.0)

    run.want(3)
    assert run.decide(1.0) == [Start(1), Start(2)]
    run.want(2)
    run.finished(0)

    assert run.decide(2.0) == [Give(0, "b")]
