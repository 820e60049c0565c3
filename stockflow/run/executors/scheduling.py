"""Who does which item next, who is started and who is ended. Pure: no Ray, no clock, no I/O.

An executor tells a `Scheduler` what happened and when, and does what it decides. The simulation of
the tests tells it what could happen; so what is simulated and what is done are one policy.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stockflow.errors import ComputeLostError, StorageError
from stockflow.run.executors.tries import Cause, Limits, Starts, Task, WorkerState

T = TypeVar("T")

NUM_TYPICAL = 3
"""After so many items it is known how long one takes."""
LEAST_GAIN = 1.1
"""How many times as long a slow worker needs for the rest of an item as another one for all of it, if it is copied."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker under this number; numbers are never used again."""

    worker: int


@dataclass(frozen=True, slots=True)
class Give(Generic[T]):
    """Give an item to an idle worker."""

    worker: int
    item: T
    memory_halvings: int = 0
    """how often the item ran out of memory: it should be done with half as much, a quarter, ..."""


@dataclass(frozen=True, slots=True)
class End:
    """End a worker; nothing more is heard of it."""

    worker: int
    may_clean_up: bool = False
    """whether nobody waits for its place: it is at an item that another one has done"""


Action = Start | Give[T] | End


class Scheduler(Generic[T]):
    """The state of a run. Times are seconds of any one clock, passed in and never going back."""

    def __init__(
        self,
        items: Iterable[T],
        num_workers: int,
        limits: Limits,
        *,
        now: float,
        name: Callable[[T], str] = str,
        need: Callable[[], str] = lambda: "",
        on_note: Callable[[str], None] = lambda text: None,
        on_failure: Callable[[Cause, T | None], None] = lambda cause, item: None,
    ) -> None:
        """Plan to do ``items`` in this order.

        Args:
            items: the largest first, so that little is left to wait for in the end.
            num_workers: how many to have at once; never more than there are items left.
            limits: how long to wait, and how often to try.
            now: when the run begins.
            name: of an item, for messages.
            need: says in words what there is and what a worker needs, for messages.
            on_note: told of what costs time: no worker yet, a lost one, storage that failed.
            on_failure: told the cause whenever an item is to be done again, or (None) a worker to be started again.
        """
        self._on_failure = on_failure
        self._waiting = deque(Task(item) for item in items)
        self._paused: list[Task[T]] = []
        self._num_workers = num_workers
        self._limits = limits
        self._name = name
        self._need = need
        self._on_note = on_note
        self._workers: dict[int, WorkerState[T]] = {}
        self._num_started = 0
        self._starts = Starts(limits, on_note)
        self._draining: frozenset[str] = frozenset()
        self._had_worker = self._said_waiting = now
        self._succeeded = -math.inf
        self._durations: list[float] = []
        self._memory_halvings = 0
        """of every item"""
        self._num_starved = 0
        """items that ran out of memory with that memory_halvings, since one did not"""

    @property
    def is_done(self) -> bool:
        """Whether no item is waiting or in work."""
        return not self.num_waiting and not self.busy

    @property
    def num_waiting(self) -> int:
        """How many items no worker has been given."""
        return len(self._waiting) + len(self._paused)

    @property
    def num_in_work(self) -> int:
        """How many items are in work; one that two workers are at counts once."""
        return len({id(worker.task) for worker in self._workers.values() if worker.task is not None})

    @property
    def busy(self) -> Sequence[int]:
        """The workers that are at an item."""
        return [worker.number for worker in self._workers.values() if worker.task is not None]

    # What is to be done

    def decide(self, now: float) -> list[Action[T]]:
        """Leave nodes that go, start missing workers and give idle ones work.

        Call it after anything happened, and when it is `due`.
        """
        for paused in [task for task in self._paused if task.not_before <= now]:
            self._paused.remove(paused)
            self._waiting.appendleft(paused)
        actions: list[Action[T]] = [self._end(number) for number in self._leaving()]
        for _ in range(self._num_missing if now >= self._starts.not_before else 0):
            worker: WorkerState[T] = WorkerState(self._num_started, self._starts.round)
            self._num_started += 1
            self._workers[worker.number] = worker
            actions.append(Start(worker.number))
        num_up = self._num_up
        for worker in self._idle():
            task = self._next_for(worker, num_up)
            if task is not None:
                actions.append(self._give(worker, task, now))
        if not self.num_waiting:
            for copier, slow in zip(self._idle(), self._slow(now), strict=False):
                slow.was_copied = True
                actions.append(self._give(copier, slow, now))
            actions += [self._end(number) for number in self._needless()]
        return actions

    def due(self) -> float | None:
        """Return when to decide again if nothing happens until then: a pause ends, or an item becomes a slow one."""
        times = [task.not_before for task in self._paused]
        if self._num_missing:
            times.append(self._starts.not_before)
        if not self.num_waiting and self._idle():
            slow_s = self._slow_s(statistics.median(self._durations)) if self._durations else math.inf
            times += [worker.given + slow_s for worker, _ in self._uncopied()]
        return min((time for time in times if math.isfinite(time)), default=None)

    def check(self, now: float) -> list[Action[T]]:
        """End workers that hang or are too slow; call it about once a second, with all that happened told before.

        Raises:
            ComputeLostError: no worker came, or an item was lost too often.
        """
        actions: list[Action[T]] = []
        for worker in list(self._workers.values()):
            delay = worker.delay(self._limits, now)
            if delay:
                actions.append(End(worker.number))
                self.lost(worker.number, Cause.late, delay, now)
        self._check_for_workers(now)
        return actions

    def want(self, num_workers: int) -> None:
        """Have this many workers from now on, if it is more than before: the cluster has grown."""
        self._num_workers = max(self._num_workers, num_workers)

    # What happened

    def placed(self, number: int, now: float) -> None:
        """The process of a worker is there; it is not up yet."""
        worker = self._workers[number]
        worker.placed = now if worker.placed is None else worker.placed

    def came_up(self, number: int, node: str, now: float, name: str = "a worker") -> None:
        """A worker is ready, on a node."""
        worker = self._workers[number]
        worker.node, worker.name = node, name
        self._starts.came_up()
        self._had_worker = now

    def counted(self, number: int, now: float) -> None:
        """A worker got on with its item."""
        self._workers[number].moved = now

    def finished(self, number: int, now: float) -> list[Action[T]]:
        """A worker has done its item; end those that were at the same one."""
        worker = self._workers[number]
        task = worker.put_down()
        worker.failed.clear()
        self._succeeded = now
        self._durations.append(now - worker.given)
        worker.num_done += 1
        worker.worked_s += now - worker.given
        if worker.memory_halvings == self._memory_halvings:
            self._num_starved = 0
        return [self._end(other.number, may_clean_up=True) for other in self._at(task)]

    def storage_failed(self, number: int, error: StorageError, text: str, now: float) -> None:
        """An item failed on storage: it is tried again after a pause, by another worker if there is one.

        Raises:
            StorageError: that was once too often.
        """
        worker = self._workers[number]
        task = worker.put_down()
        if self._at(task):
            self._on_note(
                f"{worker.name} failed at its copy of {self._name(task.item)}, another goes on with it: {text}"
            )
            return
        task.failures[Cause.storage] += 1
        worker.failing_since = worker.failing_since if worker.failed else now
        worker.failed.append(task)
        if len({id(failed) for failed in worker.failed}) > 1 and self._succeeded > worker.failing_since:
            self._give_up_on(worker, now)
        elif task.failures[Cause.storage] >= self._limits.storage_failures:
            raise error.of_tries(self._name(task.item), task.failures[Cause.storage])
        self._on_failure(Cause.storage, task.item)
        pause_s = self._limits.storage_pause_after(max(task.failures[Cause.storage], 1))
        task.not_before, task.failed_by = now + pause_s, number
        self._on_note(f"{worker.name} failed at {self._name(task.item)}, tried again in {pause_s:.0f} s: {text}")
        self._put_back(task, now)

    def start_failed(self, number: int, error: Exception, text: str, now: float) -> None:
        """A worker did not become ready, and said why.

        Raises:
            Exception: ``error`` itself, if it is no fault of storage's and no worker ever came up; or if storage
                failed once too often.
        """
        if isinstance(error, StorageError):
            self.lost(number, Cause.storage, text, now, error)
        elif self._starts.has_come_up:
            self.lost(number, Cause.error, text, now)
        else:
            raise error

    def lost(self, number: int, cause: Cause, text: str, now: float, error: Exception | None = None) -> None:
        """A worker is no more; its item goes to another one.

        Args:
            number: the worker.
            cause: why.
            text: the same in words.
            now: when.
            error: what it raised, to be raised again once that was too often.

        Raises:
            ComputeLostError: that was once too often, for the item or in a row at the start.
        """
        worker = self._workers.pop(number)
        is_alone = not self._num_up
        if worker.node is not None and is_alone:
            self._starts.hurry(now)
        if cause is Cause.lost and worker.node in self._draining:
            cause = Cause.preempted  # before it had to go, or nobody says any more that it was told to
        if worker.task is None:
            self._on_failure(cause, None)
            if worker.node is not None:
                self._on_note(f"{worker.name} was lost, it was idle: {text}")
            elif cause is not Cause.preempted:
                self._starts.failed(worker.round, cause, text, now, error, is_alone=is_alone)
            return
        task = worker.task
        if self._at(task):
            self._on_note(f"{worker.name} was lost, another goes on with {self._name(task.item)}: {text}")
            return
        task.lost(cause, self._name(task.item), text, self._limits, error)
        again = ""
        if cause is Cause.out_of_memory:
            again = ", with half the memory"
            self._starved(task, worker.memory_halvings)
        self._on_failure(cause, task.item)
        self._on_note(f"{worker.name} was lost, another does {self._name(task.item)} again{again}: {text}")
        self._put_back(task, now)

    def drain(self, nodes: frozenset[str]) -> None:
        """These nodes are about to leave: their workers end as soon as they are idle."""
        self._draining |= nodes

    # Who does what

    def _idle(self) -> list[WorkerState[T]]:
        return [worker for worker in self._workers.values() if worker.is_idle]

    def _at(self, task: Task[T]) -> list[WorkerState[T]]:
        return [worker for worker in self._workers.values() if worker.task is task]

    def _leaving(self) -> list[int]:
        return [worker.number for worker in self._idle() if worker.is_unfit or worker.node in self._draining]

    @property
    def _num_up(self) -> int:
        return sum(worker.node is not None for worker in self._workers.values())

    @property
    def _num_missing(self) -> int:
        return max(min(self._num_workers, self.num_in_work + self.num_waiting) - len(self._workers), 0)

    def _next_for(self, worker: WorkerState[T], num_up: int) -> Task[T] | None:
        """Take the first waiting task that this worker has not just failed at, if others might do that one."""
        for index, task in enumerate(self._waiting):
            if task.failed_by != worker.number or num_up == 1:
                del self._waiting[index]
                return task
        return None

    def _give(self, worker: WorkerState[T], task: Task[T], now: float) -> Give[T]:
        worker.task = task
        worker.given = worker.moved = now
        worker.memory_halvings = max(task.memory_halvings, self._memory_halvings)
        return Give(worker.number, task.item, worker.memory_halvings)

    def _slow(self, now: float) -> list[Task[T]]:
        """Tasks that an idle worker would most likely be done with earlier, the oldest first; each is copied once."""
        if len(self._durations) < NUM_TYPICAL:
            return []
        typical_s = statistics.median(self._durations)
        oldest_first = sorted(self._uncopied(), key=lambda pair: pair[0].given)
        return [task for worker, task in oldest_first if self._is_slow(worker, now, typical_s)]

    def _is_slow(self, worker: WorkerState[T], now: float, typical_s: float) -> bool:
        passed_s = now - worker.given
        if passed_s >= self._slow_s(typical_s):
            return True
        return worker.expected_s - passed_s > max(LEAST_GAIN * typical_s, self._limits.least_slow_s)

    def _slow_s(self, typical_s: float) -> float:
        return max(self._limits.slow_factor * typical_s, self._limits.least_slow_s)

    def _uncopied(self) -> list[tuple[WorkerState[T], Task[T]]]:
        at_work = [(worker, worker.task) for worker in self._workers.values() if worker.task is not None]
        return [(worker, task) for worker, task in at_work if not task.was_copied]

    def _needless(self) -> list[int]:
        """Workers that nothing is left for: those not up, and more idle ones than items that might come back."""
        starting = [worker.number for worker in self._workers.values() if worker.node is None]
        return starting + [worker.number for worker in self._idle()[self.num_in_work :]]

    def _put_back(self, task: Task[T], now: float) -> None:
        if task.not_before > now:
            self._paused.append(task)
        else:
            self._waiting.appendleft(task)

    def _end(self, number: int, *, may_clean_up: bool = False) -> End:
        del self._workers[number]
        return End(number, may_clean_up)

    # When to give up

    def _give_up_on(self, worker: WorkerState[T], now: float) -> None:
        """Storage fails this worker and no other: it is at fault, and the items are not."""
        worker.is_unfit = True
        for task in worker.failed:
            task.failures[Cause.storage] -= 1
        self._starts.pause(now)
        self._on_note(f"{worker.name} is ended: storage fails it, and does not fail others")

    def _starved(self, task: Task[T], memory_halvings: int) -> None:
        """Do an item with less memory; do all of them with less if that happens to one after the other."""
        task.memory_halvings = max(task.memory_halvings, memory_halvings + 1)
        if memory_halvings == self._memory_halvings:
            self._num_starved += 1
        if self._num_starved == self._limits.out_of_memory:
            self._memory_halvings, self._num_starved = self._memory_halvings + 1, 0
            self._on_note(
                f"{self._limits.out_of_memory} items in a row ran out of memory: from now on each has "
                f"1/{2**self._memory_halvings} of --memory; lower it, or put fewer workers on a node"
            )

    def _check_for_workers(self, now: float) -> None:
        """Say from time to time that no worker has come, and give up in the end."""
        if self._num_up:
            self._had_worker = self._said_waiting = now
            return
        waited_s = now - self._had_worker
        if waited_s > self._limits.no_worker_timeout_s:
            raise ComputeLostError(
                f"no worker came within {self._limits.no_worker_timeout_s:.0f} s: {self._need()}; "
                "free or add resources, or ask for less, then run again"
            )
        if now - self._said_waiting > self._limits.say_waiting_s:
            self._said_waiting = now
            self._on_note(f"no worker has come for {waited_s:.0f} s: {self._need()}")
