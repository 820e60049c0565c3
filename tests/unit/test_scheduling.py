"""The policy of a run on many workers, step by step, at times that the test chooses."""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from stockflow.errors import ComputeLostError, PlanError, StorageError
from stockflow.run.executors.scheduling import NUM_TYPICAL, End, Give, Scheduler, Start
from stockflow.run.executors.tries import MOST_PAUSE_S, Cause, Limits

LIMITS = Limits(no_worker_timeout_s=100.0, stall_timeout_s=10.0)
ITEMS = "abcdefghijklmnopqrstuvwxyz"


def scheduler(items: Sequence[str], num_workers: int, notes: list[str] | None = None) -> Scheduler[str]:
    told = [] if notes is None else notes
    return Scheduler(items, num_workers, LIMITS, now=0.0, need=lambda: "there is nothing", on_note=told.append)


def with_workers_up(items: Sequence[str], num_workers: int, notes: list[str] | None = None) -> Scheduler[str]:
    made = scheduler(items, num_workers, notes)
    for action in made.decide(0.0):
        assert isinstance(action, Start)
        made.came_up(action.worker, f"node{action.worker}", 0.0, f"w{action.worker}")
    return made


def started(run: Scheduler[str], now: float) -> list[int]:
    """Decide, bring up whom that starts, give them work; return their numbers."""
    numbers = [action.worker for action in run.decide(now) if isinstance(action, Start)]
    for number in numbers:
        run.came_up(number, f"node{number}", now)
    run.decide(now)
    return numbers


def test_items_go_to_workers_as_they_come_up_and_no_more_are_started_than_there_are_items() -> None:
    run = scheduler(["a", "b"], 5)

    assert run.decide(0.0) == [Start(0), Start(1)]
    run.came_up(1, "node", 1.0)
    assert run.decide(1.0) == [Give(1, "a")]
    assert run.finished(1, 2.0) == []
    assert run.decide(2.0) == [Give(1, "b"), End(0)]  # nothing is left for the one that is not up
    run.finished(1, 3.0)
    assert run.is_done


def test_the_item_of_a_lost_worker_is_the_next_one_given_out() -> None:
    notes: list[str] = []
    run = with_workers_up(["a", "b", "c"], 2, notes)
    assert run.decide(0.0) == [Give(0, "a"), Give(1, "b")]

    run.lost(0, Cause.lost, "gone", 1.0)
    run.finished(1, 1.0)

    assert run.decide(1.0) == [Start(2), Give(1, "a")]
    assert notes == ["w0 was lost, another does a again: gone"]


@pytest.mark.parametrize(
    ("cause", "most"), [(Cause.lost, 6), (Cause.late, 3), (Cause.out_of_memory, 3)], ids=lambda value: str(value)
)
def test_an_item_under_which_workers_keep_dying_ends_the_run(cause: Cause, most: int) -> None:
    run = with_workers_up(["a"], 1)
    run.decide(0.0)
    for number in range(most - 1):
        run.lost(number, cause, "why", 1.0)
        assert started(run, 1.0) == [number + 1]

    with pytest.raises(ComputeLostError, match=rf"{most} workers were lost doing a \({cause}\): why"):
        run.lost(most - 1, cause, "why", 1.0)


def test_an_unexpected_error_is_tried_elsewhere_and_raised_as_itself_if_it_comes_again() -> None:
    """A GPU that fails raises plain errors; a bug raises them everywhere."""
    run, error = with_workers_up(["a", "b"], 2), RuntimeError("CUDA error")
    run.decide(0.0)
    run.lost(0, Cause.error, "CUDA error", 1.0, error)
    run.finished(1, 1.0)
    assert run.decide(1.0)[-1] == Give(1, "a")

    with pytest.raises(RuntimeError) as raised:
        run.lost(1, Cause.error, "CUDA error", 2.0, error)

    assert error is raised.value


def test_preemptions_are_free() -> None:
    run = scheduler(["a"], 1)
    for number in range(100):
        assert started(run, float(number)) == [number]
        run.lost(number, Cause.preempted, "spot", float(number))

    assert run.num_waiting == 1


def test_a_worker_lost_with_a_node_that_was_told_to_go_is_preempted_even_if_nobody_says_so_any_more() -> None:
    told: list[tuple[Cause, str | None]] = []
    run = Scheduler(["a"], 1, LIMITS, now=0.0, on_failure=lambda cause, item: told.append((cause, item)))
    started(run, 0.0)
    run.drain(frozenset({"node0"}))
    run.drain(frozenset())

    run.lost(0, Cause.lost, "no heartbeats", 3.0)

    assert told == [(Cause.preempted, "a")]


def test_an_idle_worker_that_is_lost_costs_no_item_anything() -> None:
    """They may all be, while the last item is in work: the next one must not be given to each of them."""
    notes: list[str] = []
    run = with_workers_up(["a", "b", "c"], 3, notes)
    run.decide(0.0)
    run.finished(1, 1.0)
    run.lost(1, Cause.lost, "gone", 2.0)
    run.lost(0, Cause.lost, "gone", 2.0)

    assert run.decide(2.0) == [Start(3)]
    assert notes == ["w1 was lost, it was idle: gone", "w0 was lost, another does a again: gone"]


def test_each_cause_has_a_counter_of_its_own() -> None:
    run = with_workers_up(["a"], 1)
    run.decide(0.0)
    for number, cause in enumerate([Cause.lost, Cause.out_of_memory, Cause.late] * 2):
        run.lost(number, cause, "why", 1.0)
        started(run, 1.0)
    for now in (2.0, 100.0):
        run.storage_failed(6, StorageError("down"), "down", now)
        run.decide(now + 120.0)
    run.finished(6, 1000.0)

    assert run.is_done


# Storage


def test_storage_that_keeps_failing_ends_the_run_with_its_own_error_after_pauses() -> None:
    notes: list[str] = []
    run, error = with_workers_up(["a"], 1, notes), StorageError("down")
    run.decide(0.0)

    run.storage_failed(0, error, "down", 1.0)
    assert (run.due(), run.decide(30.9), run.decide(31.0)) == (31.0, [], [Give(0, "a")])
    run.storage_failed(0, error, "down", 40.0)
    assert (run.due(), run.decide(159.9), run.decide(160.0)) == (160.0, [], [Give(0, "a")])
    with pytest.raises(StorageError) as raised:
        run.storage_failed(0, error, "down", 170.0)

    assert str(raised.value) == "a was tried 3 times, the last time: down"
    assert notes == ["w0 failed at a, tried again in 30 s: down", "w0 failed at a, tried again in 120 s: down"]


def test_what_storage_failed_is_next_done_by_another_worker() -> None:
    run = with_workers_up(["a", "b", "c", "d"], 2)
    run.decide(0.0)
    run.storage_failed(0, StorageError("down"), "down", 1.0)
    assert run.decide(1.0) == [Give(0, "c")]

    run.finished(0, 40.0)
    assert run.decide(40.0) == [Give(0, "d")]  # not the one it failed at
    run.finished(1, 41.0)
    assert run.decide(41.0) == [Give(1, "a")]


def test_a_worker_that_storage_fails_alone_is_ended_and_its_items_are_not_at_fault() -> None:
    """A node without a route to the store, among a hundred that have one."""
    notes: list[str] = []
    run = with_workers_up(ITEMS, 3, notes)
    run.decide(0.0)
    now, num_ended = 0.0, 0
    while not run.is_done:
        now += 10.0
        for number in list(run.busy):
            if number in (0, 3, 4, 5, 6, 7, 8):  # that node's; the others come up elsewhere
                run.storage_failed(number, StorageError("no route"), "no route", now)
            else:
                run.finished(number, now)
        for action in run.decide(now):
            num_ended += isinstance(action, End)
            if isinstance(action, Start):
                run.came_up(action.worker, "node", now)
        run.decide(now)
        assert now < 1000.0

    assert num_ended >= 2
    assert "w0 is ended: storage fails it, and does not fail others" in notes


def test_starts_that_storage_fails_are_paced_and_end_the_run_with_its_error() -> None:
    run, error = scheduler(["a", "b"], 2), StorageError("the claim cannot be read")
    run.decide(0.0)

    run.start_failed(0, error, "down", 1.0)
    run.start_failed(1, error, "down", 1.0)  # of the same round
    assert (run.due(), run.decide(30.0), run.decide(31.0)) == (31.0, [], [Start(2), Start(3)])
    run.start_failed(2, error, "down", 40.0)
    assert (run.decide(159.0), run.decide(160.0)) == ([], [Start(4)])
    with pytest.raises(StorageError) as raised:
        run.start_failed(4, error, "down", 170.0)

    assert error is raised.value


# Starts


def test_workers_that_die_at_the_start_end_the_run_and_those_of_one_round_count_once() -> None:
    """A node of eight that is lost while its workers start is bad luck, once."""
    run = scheduler(ITEMS, 8)
    for number in range(0, 16, 8):
        assert len(run.decide(1.0)) == 8
        for worker in range(number, number + 8):
            run.lost(worker, Cause.lost, "no module", 1.0)
    run.decide(2.0)

    with pytest.raises(ComputeLostError, match="3 times in a row workers died before they were ready: no module"):
        run.lost(16, Cause.lost, "no module", 3.0)


def test_workers_that_die_at_the_start_while_others_work_are_started_ever_less_often() -> None:
    notes: list[str] = []
    run = scheduler(ITEMS, 2, notes)
    run.decide(0.0)
    run.came_up(0, "good", 0.0)
    run.decide(0.0)
    now, times = 0.0, []
    for number in range(1, 12):
        run.lost(number, Cause.lost, "no module", now)
        now = max(run.due() or now, now)
        times.append(now)
        assert run.decide(now) == [Start(number + 1)]

    pauses = [after - before for before, after in pairwise(times)]
    assert times[:2] == [0.0, 0.0]
    assert pauses == [0.0, *(min(60.0 * 2**n, MOST_PAUSE_S) for n in range(9))]
    assert "the next one is started in 60 s: no module" in notes[2]


def test_a_start_that_is_refused_ends_the_run_only_if_no_worker_ever_came_up() -> None:
    error = PlanError("does not see the output")
    alone, with_another = scheduler(["a", "b"], 2), scheduler(["a", "b"], 2)
    alone.decide(0.0)
    with_another.decide(0.0)
    with_another.came_up(1, "node", 1.0)

    with pytest.raises(PlanError):
        alone.start_failed(0, error, "does not see the output", 2.0)
    with_another.start_failed(0, error, "does not see the output", 2.0)

    assert with_another.decide(2.0) == [Start(2), Give(1, "a")]


def test_a_start_that_hangs_is_given_up_once_its_process_was_there_for_long() -> None:
    run = with_workers_up(["a", "b"], 1)
    run.want(2)
    assert run.decide(0.0) == [Start(1), Give(0, "a")]
    for now in range(0, 50, 5):  # no place for it yet
        run.counted(0, float(now))
        assert run.check(float(now)) == []
    run.placed(1, 50.0)
    run.placed(1, 55.0)
    run.counted(0, 60.0)

    assert run.check(60.0) == []
    assert run.check(61.0) == [End(1)]


def test_that_no_worker_comes_is_said_and_then_ends_the_run() -> None:
    notes: list[str] = []
    run = scheduler(["a"], 1, notes)
    run.decide(0.0)

    for now in range(100):
        run.check(float(now))

    assert notes == [f"no worker has come for {31 * number} s: there is nothing" for number in (1, 2, 3)]
    with pytest.raises(ComputeLostError, match=r"no worker came within 100 s: there is nothing"):
        run.check(101.0)


# Time


def test_a_worker_that_counts_nothing_is_replaced() -> None:
    run = with_workers_up(["a", "b"], 2)
    run.decide(0.0)
    run.counted(1, 5.0)

    assert run.check(LIMITS.stall_timeout_s) == []
    assert run.check(LIMITS.stall_timeout_s + 1) == [End(0)]
    assert run.decide(11.0) == [Start(2)]
    assert list(run.busy) == [1]


def test_an_item_has_a_deadline_of_its_own_however_busy_its_worker_is() -> None:
    run = Scheduler(["a"], 1, Limits(stall_timeout_s=10.0, item_timeout_s=30.0), now=0.0)
    run.decide(0.0)
    run.came_up(0, "node", 5.0)
    run.decide(5.0)
    for now in range(6, 36):
        run.counted(0, float(now))
        assert run.check(float(now)) == []

    assert run.check(36.0) == [End(0)]


def with_a_slow_one(item_s: float) -> tuple[Scheduler[str], float]:
    """A run at whose end worker 0 is still at its first item, and the others have done all else; and the time then."""
    run = with_workers_up(ITEMS[: 2 * NUM_TYPICAL + 1], 3)
    run.decide(0.0)
    now = 0.0
    while run.num_waiting:
        now += item_s
        for number in (1, 2):
            run.finished(number, now)
        run.decide(now)
    now += item_s
    run.finished(1, now)
    run.finished(2, now)
    return run, now


def test_an_item_that_takes_far_longer_than_others_is_given_to_an_idle_worker_too_and_the_first_result_counts() -> None:
    run, now = with_a_slow_one(20.0)

    assert run.decide(now) == [Give(1, "a")]
    assert (run.num_in_work, list(run.busy)) == (1, [0, 1])
    assert run.finished(1, now + 20.0) == [End(0, may_clean_up=True)]
    assert run.is_done


def test_the_item_of_a_worker_known_to_be_slow_is_given_to_an_idle_one_if_that_is_done_earlier() -> None:
    """It takes 60 s where others take 20, so the rest of its item takes longer than all of it elsewhere."""
    run = with_workers_up(ITEMS[:10], 3)
    run.decide(0.0)
    for now in (20.0, 40.0, 60.0):
        for number in (0, 1, 2) if now == 60.0 else (1, 2):
            run.finished(number, now)
        given = run.decide(now)
    assert given == [Give(0, "h"), Give(1, "i"), Give(2, "j")]

    run.finished(1, 80.0)
    assert run.decide(80.0) == [Give(1, "h")]


def test_the_copy_of_a_slow_item_is_ended_if_the_first_one_is_faster_after_all_or_lives_on_if_it_is_lost() -> None:
    run, now = with_a_slow_one(20.0)
    run.decide(now)
    lost, _ = with_a_slow_one(20.0)
    lost.decide(now)

    assert run.finished(0, now) == [End(1, may_clean_up=True)]
    lost.lost(0, Cause.lost, "gone", now)
    assert (lost.decide(now), lost.num_waiting) == ([], 0)
    assert lost.finished(1, now) == []
    assert run.is_done
    assert lost.is_done


def test_a_copy_that_fails_costs_its_item_nothing_and_is_not_made_again() -> None:
    """Else an outage of seconds would use up all tries of an item that its first worker may yet finish."""
    run, now = with_a_slow_one(20.0)
    run.decide(now)
    run.storage_failed(1, StorageError("down"), "down", now)
    lost, _ = with_a_slow_one(20.0)
    lost.decide(now)
    lost.lost(1, Cause.out_of_memory, "killed", now)

    for each in (run, lost):
        assert not any(isinstance(action, Give) for action in each.decide(now + 60.0))
        each.finished(0, now + 61.0)
        assert each.is_done


def test_a_pause_of_starts_is_short_once_no_worker_is_up() -> None:
    run = with_workers_up(ITEMS, 1)
    run.want(2)
    for number in range(1, 9):
        run.decide(float(10_000 * number))
        run.lost(number, Cause.lost, "no module", float(10_000 * number))
    run.lost(0, Cause.preempted, "spot", 80_001.0)

    assert run.decide(80_061.0) == [Start(9), Start(10)]


def test_items_are_not_given_out_twice_while_they_are_no_slower_than_others_or_all_are_short() -> None:
    run = with_workers_up(ITEMS[:8], 2)
    run.decide(0.0)
    for now in (20.0, 40.0, 60.0):
        run.finished(0, now)
        run.finished(1, now)
        run.decide(now)
    run.finished(0, 80.0)
    assert run.decide(80.0) == []
    assert run.due() == 60.0 + 1.5 * 20.0
    assert run.decide(89.9) == []
    assert run.decide(90.0) == [Give(0, "h")]

    short, now = with_a_slow_one(LIMITS.least_slow_s / 10)
    assert not any(isinstance(action, Give) for action in short.decide(now))


# Nodes and memory


def test_a_node_that_goes_is_left_by_idle_workers_at_once_and_by_others_after_their_item() -> None:
    run = with_workers_up(["a", "b", "c"], 2)
    run.decide(0.0)

    run.drain(frozenset({"node0"}))
    assert run.decide(1.0) == []
    run.finished(0, 2.0)

    assert run.decide(2.0) == [End(0), Start(2)]


def test_workers_for_whom_nothing_is_left_are_ended_but_as_many_spare_ones_as_items_in_work() -> None:
    """An autoscaler takes their nodes back; and brings no more for workers that are not up."""
    run = scheduler(ITEMS[:10], 10)
    run.decide(0.0)
    for number in range(8):
        run.came_up(number, "node", 1.0)
    run.decide(1.0)
    for number in range(6):
        run.finished(number, 5.0)

    assert run.decide(5.0) == [Give(0, "i"), Give(1, "j"), End(8), End(9)]
    for number in (0, 1, 6):
        run.finished(number, 6.0)
    assert run.decide(6.0) == [End(number) for number in (1, 2, 3, 4, 5, 6)]


def test_workers_are_added_while_the_cluster_grows_and_kept_when_it_shrinks() -> None:
    run = with_workers_up(["a", "b", "c", "d"], 1)
    run.decide(0.0)

    run.want(3)
    assert run.decide(1.0) == [Start(1), Start(2)]
    run.want(2)
    run.finished(0, 2.0)

    assert run.decide(2.0) == [Give(0, "b")]


def test_an_item_that_ran_out_of_memory_is_done_with_less_of_it_by_whoever_does_it_next() -> None:
    notes: list[str] = []
    run = with_workers_up(["a", "b"], 2, notes)
    assert run.decide(0.0) == [Give(0, "a", memory_halvings=0), Give(1, "b", memory_halvings=0)]

    run.lost(0, Cause.out_of_memory, "killed", 1.0)
    run.finished(1, 1.0)

    assert Give(1, "a", memory_halvings=1) in run.decide(1.0)
    assert notes == ["w0 was lost, another does a again, with half the memory: killed"]


def test_if_one_item_after_the_other_runs_out_of_memory_all_are_done_with_less_of_it() -> None:
    notes: list[str] = []
    run = with_workers_up(ITEMS, 5, notes)
    run.decide(0.0)
    run.lost(0, Cause.out_of_memory, "killed", 1.0)
    run.finished(1, 1.0)  # one had enough: begin to count again
    run.decide(1.0)
    for number in (2, 3, 4):
        assert not any("from now on" in note for note in notes)
        run.lost(number, Cause.out_of_memory, "killed", 2.0)
    assert started(run, 3.0) == [6, 7, 8]

    run.finished(6, 4.0)
    assert run.decide(4.0) == [Give(6, "f", memory_halvings=1)]
    assert any("3 items in a row ran out of memory: from now on each has 1/2 of --memory" in note for note in notes)


def test_every_failure_after_which_something_is_done_again_is_told_with_its_cause() -> None:
    told: list[tuple[Cause, str | None]] = []
    run = Scheduler(["a"], 1, LIMITS, now=0.0, on_failure=lambda cause, item: told.append((cause, item)))
    run.decide(0.0)
    run.start_failed(0, StorageError("full"), "full", 0.0)
    assert started(run, 30.0) == [1]
    run.storage_failed(1, StorageError("full"), "full", 31.0)
    run.decide(100.0)
    run.check(111.0)
    assert run.decide(111.0) == [Start(2)]
    run.lost(2, Cause.preempted, "spot", 112.0)
    started(run, 113.0)
    run.storage_failed(3, StorageError("full"), "full", 113.0)
    run.decide(400.0)
    with pytest.raises(StorageError):
        run.storage_failed(3, StorageError("full"), "full", 401.0)

    assert told == [
        (Cause.storage, None),
        (Cause.storage, "a"),
        (Cause.late, "a"),
        (Cause.preempted, None),
        (Cause.storage, "a"),
    ]
