"""The scheduler under any order of events: nothing is lost, nothing done twice over, nothing waits for ever."""

import math
from collections import Counter
from collections.abc import Iterable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.errors import ComputeLostError, PlanError, StorageError
from stockflow.run.executors.scheduling import Action, Give, Scheduler, Start
from stockflow.run.executors.tries import Cause, Limits

CRASHES = (Cause.lost, Cause.out_of_memory, Cause.late, Cause.error, Cause.preempted)
GIVEN_UP = (ComputeLostError, StorageError, PlanError, RuntimeError)


class Cluster:
    """What an executor and its workers would do, and what must hold whatever that is."""

    def __init__(self, num_items: int, num_workers: int, random: Random) -> None:
        self.scheduler = Scheduler(range(num_items), num_workers, Limits(), now=0.0)
        self.now = 0.0
        self.finished: Counter[int] = Counter()
        self.at: dict[int, int | None] = {}
        """the workers that are up, and their items"""
        self.starting: set[int] = set()
        self._ever: set[int] = set()
        self._memory_halvings: dict[int, int] = {}
        self._num_items, self._num_workers, self._random = num_items, num_workers, random

    def act(self, actions: Iterable[Action[int]]) -> None:
        for action in actions:
            if isinstance(action, Start):
                assert action.worker not in self._ever
                self._ever.add(action.worker)
                self.starting.add(action.worker)
            elif isinstance(action, Give):
                assert self.at[action.worker] is None
                assert not self.finished[action.item]
                assert action.memory_halvings >= self._memory_halvings.get(action.item, 0)
                self._memory_halvings[action.item] = action.memory_halvings
                self.at[action.worker] = action.item
            else:
                self.forget(action.worker)
        items = [item for item in self.at.values() if item is not None]
        assert max(Counter(items).values(), default=0) <= 2
        assert len(self.at) + len(self.starting) <= self._num_workers

    def forget(self, worker: int) -> None:
        assert worker in self.at or worker in self.starting
        self.at.pop(worker, None)
        self.starting.discard(worker)

    def decide(self) -> None:
        self.act(self.scheduler.decide(self.now))
        items = {item for item in self.at.values() if item is not None}
        assert self.scheduler.num_in_work == len(items)
        assert self.scheduler.num_waiting + len(items) + len(self.finished) == self._num_items

    def happen(self) -> None:
        """Let something happen to a worker: good or bad."""
        random, scheduler = self._random, self.scheduler
        everybody = sorted(self.at) + sorted(self.starting)
        if not everybody or random.random() < 0.2:
            self.pass_time()
            return
        worker = random.choice(everybody)
        if worker in self.starting:
            self._begin(worker, random.choice(["up", "up", "lost", "storage", "refused", "placed"]))
        elif self.at[worker] is None:
            self.forget(worker)
            scheduler.lost(worker, Cause.lost, "gone", self.now)
        else:
            self._work(worker, random.choice(["done", "done", "counted", "storage", "crash"]))
        if random.random() < 0.05:
            scheduler.drain(frozenset({f"node{random.randrange(5)}"}))

    def _begin(self, worker: int, how: str) -> None:
        if how in ("up", "up elsewhere"):
            self.starting.discard(worker)
            self.at[worker] = None
            self.scheduler.came_up(worker, f"node{worker % 5}" if how == "up" else f"new node{worker}", self.now)
        elif how == "placed":
            self.scheduler.placed(worker, self.now)
        else:
            self.forget(worker)
            error = StorageError("down") if how == "storage" else PlanError("no")
            if how == "lost":
                self.scheduler.lost(worker, Cause.lost, "gone", self.now)
            else:
                self.scheduler.start_failed(worker, error, "no", self.now)

    def _work(self, worker: int, how: str) -> None:
        if how == "done":
            item = self.at[worker]
            assert item is not None
            self.at[worker] = None
            self.finished[item] += 1
            assert self.finished[item] == 1
            self.act(self.scheduler.finished(worker, self.now))
            assert item not in self.at.values()
        elif how == "counted":
            self.scheduler.counted(worker, self.now)
        elif how == "storage":
            self.at[worker] = None
            self.scheduler.storage_failed(worker, StorageError("down"), "down", self.now)
        else:
            self.forget(worker)
            cause = self._random.choice(CRASHES)
            self.scheduler.lost(worker, cause, "gone", self.now, RuntimeError("ECC") if cause is Cause.error else None)

    def pass_time(self) -> None:
        self.now += self._random.choice([0.0, 1.0, 20.0, 200.0])
        for worker in [worker for worker, item in self.at.items() if item is not None]:
            self.scheduler.counted(worker, self.now)
        self.act(self.scheduler.check(self.now))

    def go_well(self) -> None:
        """From now on only good things happen; time passes only if nothing else can."""
        busy = [worker for worker, item in self.at.items() if item is not None]
        if busy:
            self._work(busy[0], "done")
        elif self.starting:
            self._begin(min(self.starting), "up elsewhere")  # Ray places nothing on nodes that go
        else:
            due = self.scheduler.due()
            assert due is not None, "nothing is in work, nothing starts, and nothing is due"
            assert math.isfinite(due)
            self.now = max(self.now, due)


@settings(max_examples=300)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 150), st.randoms(use_true_random=False))
def test_whatever_happens_every_item_is_done_once_or_the_run_ends_with_an_error(
    num_items: int, num_workers: int, num_bad_events: int, random: Random
) -> None:
    cluster = Cluster(num_items, num_workers, random)
    try:
        for _ in range(num_bad_events):
            cluster.decide()
            if cluster.scheduler.is_done:
                break
            cluster.happen()
    except GIVEN_UP:
        return
    for _ in range(10 * (num_items + num_workers + num_bad_events)):
        cluster.decide()
        if cluster.scheduler.is_done:
            break
        cluster.go_well()

    assert cluster.scheduler.is_done
    assert cluster.finished == Counter(range(num_items))
