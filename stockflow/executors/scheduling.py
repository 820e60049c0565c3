"""Who does which item next, when an item is tried again, when a run gives up. Pure: no Ray, no clock, no I/O.

An executor tells a `Scheduler` what happened and when, and does what it decides. The simulation tells it what
could happen; so what is predicted and what is done are one policy.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from stockflow.errors import ComputeLostError, StorageError

T = TypeVar("T")

SAY_WAITING_S = 30.0
"""How often to say that no worker has come yet."""


class Cause(StrEnum):
    """Why an item, or a worker, was lost; each is counted apart."""

    storage = "storage"
    lost = "lost"
    """its process or node died"""
    late = "late"
    """it counted nothing, or was not done, for too long"""
    out_of_memory = "out of memory"
    """its node, or its GPU, had no memory left"""
    preempted = "preempted"
    """its node was taken away by whom it belongs to: nobody's fault, free"""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, and how often to try."""

    no_worker_timeout_s: float = 900.0
    """for the first worker, and for a next one once all are lost; a GPU node takes minutes"""
    stall_timeout_s: float = 900.0
    """an item that counts nothing for so long is taken for hung; its worker is replaced"""
    item_timeout_s: float | None = None
    """an item that is not done after so long is given to another worker, however busy this one is"""
    storage_failures: int = 3
    """per item, or per start of a worker; each has many requests repeated within it"""
    losses: int = 6
    """per item: workers that died under it, pre-emptions not counted"""
    delays: int = 3
    """per item: workers that were too slow with it; more would only be slower"""
    out_of_memory: int = 3
    """per item: workers that were lost because their node, or their GPU, had no memory left"""
    deaths_at_start: int = 3
    """workers dying one after the other before one comes up: a broken image, not bad luck"""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker under this number; numbers are never used again."""

    worker: int


@dataclass(frozen=True, slots=True)
class Give(Generic[T]):
    """Give an item to an idle worker."""

    worker: int
    item: T
    frugality: int = 0
    """how often the item ran out of memory: it should be done with half as much, a quarter, ..."""


@dataclass(frozen=True, slots=True)
class End:
    """End a worker; nothing more is heard of it."""

    worker: int


Action = Start | Give[T] | End


@dataclass(slots=True)
class _Task(Generic[T]):
    """An item and its failures by cause."""

    item: T
    failures: Counter[Cause] = field(default_factory=Counter)


@dataclass(slots=True)
class _Worker(Generic[T]):
    """A worker and what it is doing."""

    number: int
    node: str | None = None
    """where it came up; None while it starts"""
    task: _Task[T] | None = None
    given: float = 0.0
    """when it was given its task"""
    moved: float = 0.0
    """when it was given its task, or last counted something"""
    storage_failures: int = 0
    """of its start"""


class Scheduler(Generic[T]):
    """The state of a run. Times are seconds of any one clock, passed in and never going back."""

    def __init__(
        self,
        items: Iterable[T],
        num_workers: int,
        limits: Limits,
        *,
        now: float,
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
            need: says in words what there is and what a worker needs, for messages.
            on_note: told of what costs time: no worker yet, a lost one, storage that failed.
            on_failure: told the cause whenever an item is to be done again, or (None) a worker to be started again.
        """
        self._on_failure = on_failure
        self._waiting = deque(_Task(item) for item in items)
        self._num_workers = num_workers
        self._limits = limits
        self._need = need
        self._on_note = on_note
        self._workers: dict[int, _Worker[T]] = {}
        self._num_started = 0
        self._deaths_at_start = 0
        self._draining: frozenset[str] = frozenset()
        self._had_worker = self._said_waiting = now

    @property
    def is_done(self) -> bool:
        """Whether no item is waiting or in work."""
        return not self._waiting and not self.busy

    @property
    def num_waiting(self) -> int:
        """How many items no worker has been given."""
        return len(self._waiting)

    @property
    def busy(self) -> Sequence[int]:
        """The workers that are at an item."""
        return [worker.number for worker in self._workers.values() if worker.task is not None]

    # What is to be done

    def decide(self, now: float) -> list[Action[T]]:
        """Leave nodes that go, start missing workers and give idle ones work; call it after anything happened."""
        leaving = [
            worker.number
            for worker in self._workers.values()
            if worker.node in self._draining and worker.node is not None and worker.task is None
        ]
        actions: list[Action[T]] = [self._end(number) for number in leaving]
        wanted = min(self._num_workers, len(self.busy) + len(self._waiting))
        while len(self._workers) < wanted:
            worker: _Worker[T] = _Worker(self._num_started)
            self._num_started += 1
            self._workers[worker.number] = worker
            actions.append(Start(worker.number))
        for worker in self._workers.values():
            if worker.node is not None and worker.task is None and self._waiting:
                worker.task = self._waiting.popleft()
                worker.given = worker.moved = now
                actions.append(Give(worker.number, worker.task.item, worker.task.failures[Cause.out_of_memory]))
        return actions

    def check(self, now: float) -> list[Action[T]]:
        """End workers that hang or are too slow; call it about once a second.

        Raises:
            ComputeLostError: no worker came, or an item was lost too often.
        """
        actions: list[Action[T]] = []
        for worker in list(self._workers.values()):
            delay = self._delay_of(worker, now)
            if delay:
                actions.append(End(worker.number))
                self.lost(worker.number, Cause.late, delay)
        self._check_for_workers(now)
        return actions

    def want(self, num_workers: int) -> None:
        """Have this many workers from now on, if it is more than before: the cluster has grown."""
        self._num_workers = max(self._num_workers, num_workers)

    # What happened

    def came_up(self, number: int, node: str, now: float) -> None:
        """A worker is ready, on a node."""
        self._workers[number].node = node
        self._deaths_at_start = 0
        self._had_worker = now

    def counted(self, number: int, now: float) -> None:
        """A worker got on with its item."""
        self._workers[number].moved = now

    def finished(self, number: int) -> T:
        """A worker has done its item; return that."""
        task = self._workers[number].task
        assert task is not None
        self._workers[number].task = None
        self._deaths_at_start = 0
        return task.item

    def storage_failed(self, number: int, error: StorageError, text: str) -> None:
        """An item, or the start of a worker, failed on storage: it is tried again, a start by the same worker.

        Raises:
            StorageError: that was once too often.
        """
        worker = self._workers[number]
        if worker.task is None:
            worker.storage_failures += 1
            num_failures = worker.storage_failures
        else:
            worker.task.failures[Cause.storage] += 1
            num_failures = worker.task.failures[Cause.storage]
        if num_failures >= self._limits.storage_failures:
            raise error
        self._on_failure(Cause.storage, None if worker.task is None else worker.task.item)
        self._on_note(f"tried again: {text}")
        if worker.task is not None:
            self._waiting.appendleft(worker.task)
            worker.task = None

    def lost(self, number: int, cause: Cause, text: str) -> None:
        """A worker is no more; its item goes to another one.

        Raises:
            ComputeLostError: that was once too often, for the item or in a row at the start.
        """
        worker = self._workers.pop(number)
        self._on_failure(cause, None if worker.task is None else worker.task.item)
        if worker.task is None:
            self._deaths_at_start += worker.node is None and cause is not Cause.preempted
            if self._deaths_at_start >= self._limits.deaths_at_start:
                raise ComputeLostError(
                    f"{self._deaths_at_start} workers in a row died before they were ready: {text}; "
                    "look at the workers' logs (`ray logs`): the image or the node is at fault"
                )
            return
        worker.task.failures[cause] += 1
        self._give_up_if_hopeless(worker.task.failures, text)
        again = ", with half the memory" if cause is Cause.out_of_memory else ""
        self._on_note(f"a worker was lost, another does its item again{again}: {text}")
        self._waiting.appendleft(worker.task)

    def drain(self, nodes: frozenset[str]) -> None:
        """These nodes, and no others, are about to leave: their workers end as soon as they are idle."""
        self._draining = nodes

    def _give_up_if_hopeless(self, failures: Counter[Cause], text: str) -> None:
        advice = {
            Cause.lost: (self._limits.losses, "look at the workers' logs (`ray logs`)"),
            Cause.late: (self._limits.delays, "raise the timeouts, or make shards smaller (--shard-size)"),
            Cause.out_of_memory: (
                self._limits.out_of_memory,
                "put fewer workers on a node, or lower what each may take (--memory)",
            ),
        }
        for cause, (most, what_to_do) in advice.items():
            if failures[cause] >= most:
                raise ComputeLostError(
                    f"{failures[cause]} workers were lost doing the same item ({cause}): {text}; "
                    f"{what_to_do}, then run again to resume"
                )

    def _delay_of(self, worker: _Worker[T], now: float) -> str:
        """What is too long about a worker; nothing: an empty text."""
        limits = self._limits
        if worker.task is None:
            return ""
        if now - worker.moved > limits.stall_timeout_s:
            return f"nothing read or written for {limits.stall_timeout_s:.0f} s"
        if limits.item_timeout_s is not None and now - worker.given > limits.item_timeout_s:
            return f"not done after {limits.item_timeout_s:.0f} s"
        return ""

    def _end(self, number: int) -> End:
        del self._workers[number]
        return End(number)

    def _check_for_workers(self, now: float) -> None:
        """Say from time to time that no worker has come, and give up in the end."""
        if any(worker.node for worker in self._workers.values()):
            self._had_worker = self._said_waiting = now
            return
        waited_s = now - self._had_worker
        if waited_s > self._limits.no_worker_timeout_s:
            raise ComputeLostError(
                f"no worker came within {self._limits.no_worker_timeout_s:.0f} s: {self._need()}; "
                "free or add resources, or ask for less, then run again to resume"
            )
        if now - self._said_waiting > SAY_WAITING_S:
            self._said_waiting = now
            self._on_note(f"no worker has come for {waited_s:.0f} s: {self._need()}")
