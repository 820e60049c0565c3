"""What a run would take: the scheduler of the real executor, driven by events in virtual time. No I/O, no waiting."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Generic, TypeVar

from stockflow.run.executors.scheduling import Action, End, Give, Scheduler, Start
from stockflow.run.executors.tries import Cause, Limits

T = TypeVar("T")

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Stragglers:
    """Workers that are slow for as long as they live."""

    share: float = 0.0
    """probability of a worker to be one"""
    slowdown: float = 1.0
    """how much longer its items take"""


@dataclass(frozen=True, slots=True)
class Preemptions:
    """Workers that are taken away, at random moments, whatever they are at."""

    per_worker_hour: float = 0.0
    """expected number"""
    replacement_s: float = 0.0
    """until there is room for another worker in its place; its start-up comes on top"""


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """What a simulated run took."""

    makespan_s: float
    """from the wish for workers to the end of the last item"""
    efficiency: float
    """the work, at the pace of workers that are not slow, against the makespan of as many workers"""
    tail_s: float
    """from when a worker that was up found no item waiting, to the end"""
    num_preempted: int
    """workers taken away"""
    lost_s: float
    """time they had spent on items that others did again"""


def simulate(
    items: Sequence[T],
    num_workers: int,
    *,
    duration: Callable[[T], float],
    startup_s: float = 0.0,
    stragglers: Stragglers = Stragglers(),
    preemptions: Preemptions = Preemptions(),
    seed: int = 0,
) -> SimulatedRun:
    """Return what doing ``items`` would take.

    Args:
        items: in any order; those that take longest go first, as the executor does by size.
        num_workers: how many there is room for.
        duration: seconds of an item on a worker that is not slow.
        startup_s: from a worker's place to its first item: process, imports, clients.
        stragglers: how many are slow, and how slow.
        preemptions: how often one is taken away.
        seed: equal seeds give equal runs.
    """
    return _Simulation(items, num_workers, duration, startup_s, stragglers, preemptions, seed).run()


@dataclass(order=True, slots=True)
class _Event:
    when: float
    number: int
    """in the order they were planned, so that ties are decided"""
    happen: Callable[[], None] = field(compare=False)


@dataclass(slots=True)
class _Life:
    """One worker."""

    slowdown: float
    item_since: float = 0.0
    work_s: float = 0.0
    """of its item"""


class _Simulation(Generic[T]):
    def __init__(
        self,
        items: Sequence[T],
        num_workers: int,
        duration: Callable[[T], float],
        startup_s: float,
        stragglers: Stragglers,
        preemptions: Preemptions,
        seed: int,
    ) -> None:
        self._work_s = sum(map(duration, items))
        self._num_workers = num_workers
        self._duration = duration
        self._startup_s = startup_s
        self._stragglers = stragglers
        self._preemptions = preemptions
        self._random = Random(seed)
        # Timeouts are for what hangs; nothing hangs here.
        limits = Limits(no_worker_timeout_s=float("inf"), stall_timeout_s=float("inf"))
        self._scheduler = Scheduler(sorted(items, key=duration, reverse=True), num_workers, limits, now=0.0)
        self._now = 0.0
        self._events: list[_Event] = []
        self._num_events = 0
        self._room = [0.0] * num_workers
        """when there is room for a worker: one entry per place that is free, or will be"""
        self._lives: dict[int, _Life] = {}
        self._wakes: float | None = None
        """when it is planned to decide again, whatever happens"""
        self._tail_began: float | None = None
        self._num_preempted = 0
        self._lost_s = 0.0

    def run(self) -> SimulatedRun:
        self._decide()
        while not self._scheduler.is_done:
            event = heapq.heappop(self._events)
            self._now = event.when
            event.happen()
            self._decide()
            idle_for_good = not self._scheduler.num_waiting and self._scheduler.num_in_work < self._num_workers
            if not idle_for_good:
                self._tail_began = None
            elif self._tail_began is None:
                self._tail_began = self._now
        makespan = self._now
        return SimulatedRun(
            makespan_s=makespan,
            efficiency=self._work_s / (self._num_workers * makespan) if makespan else 1.0,
            tail_s=makespan - (makespan if self._tail_began is None else self._tail_began),
            num_preempted=self._num_preempted,
            lost_s=self._lost_s,
        )

    def _decide(self) -> None:
        self._act(self._scheduler.decide(self._now))
        due = self._scheduler.due()
        if due is not None and due > self._now and due != self._wakes:
            self._wakes = due
            self._plan(due, lambda: None)

    def _act(self, actions: Sequence[Action[T]]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._begin(action.worker)
            elif isinstance(action, Give):
                self._give(action)
            elif isinstance(action, End):
                del self._lives[action.worker]
                heapq.heappush(self._room, self._now)

    def _begin(self, number: int) -> None:
        placed = max(heapq.heappop(self._room), self._now)
        is_slow = self._random.random() < self._stragglers.share
        self._lives[number] = _Life(self._stragglers.slowdown if is_slow else 1.0)
        self._plan(placed + self._startup_s, lambda: self._come_up(number))
        if self._preemptions.per_worker_hour:
            rate = self._preemptions.per_worker_hour / HOUR_S
            self._plan(placed + self._random.expovariate(rate), lambda: self._preempt(number))

    def _come_up(self, number: int) -> None:
        if number in self._lives:
            self._scheduler.came_up(number, f"node {number}", self._now)

    def _give(self, given: Give[T]) -> None:
        life = self._lives[given.worker]
        life.item_since = self._now
        life.work_s = self._duration(given.item)
        self._plan(self._now + life.work_s * life.slowdown, lambda: self._finish(given.worker))

    def _finish(self, number: int) -> None:
        life = self._lives.get(number)
        if life is not None:
            life.work_s = 0.0
            self._act(self._scheduler.finished(number, self._now))

    def _preempt(self, number: int) -> None:
        life = self._lives.pop(number, None)
        if life is None:
            return
        self._num_preempted += 1
        self._lost_s += self._now - life.item_since if life.work_s else 0.0
        heapq.heappush(self._room, self._now + self._preemptions.replacement_s)
        self._scheduler.lost(number, Cause.preempted, "pre-empted", self._now)

    def _plan(self, when: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, _Event(when, self._num_events, happen))
