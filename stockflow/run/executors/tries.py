"""Tries: what is known of items, workers and starts; why each may fail, how often, and which pause follows. Pure."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from stockflow.errors import ComputeLostError

T = TypeVar("T")

MOST_PAUSE_S = 3600.0
"""between starts of workers that die before they are up"""


class Cause(StrEnum):
    """Why an item, or a worker, was lost; each is counted apart."""

    storage = "storage"
    lost = "lost"
    """its process or node died"""
    late = "late"
    """it counted nothing, was not done or not up, for too long"""
    out_of_memory = "out of memory"
    """its node, or its GPU, had no memory left"""
    error = "error"
    """something unexpected was raised, by a failing GPU or by a bug; or its start was refused while others work"""
    preempted = "preempted"
    """its node was taken away by whom it belongs to: nobody's fault, free"""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, and how often to try."""

    no_worker_timeout_s: float = 900.0
    """for the first worker, and for a next one once all are lost; a GPU node takes minutes"""
    stall_timeout_s: float = 900.0
    """an item that counts nothing for so long, or a start that takes so long, is taken for hung; its worker is
    replaced"""
    item_timeout_s: float | None = None
    """an item that is not done after so long is given to another worker, however busy this one is"""
    storage_failures: int = 3
    """per item, or per start of workers; each has many requests repeated within it"""
    storage_pause_s: float = 30.0
    """before what storage failed is tried again, four times as long before the last time: outages take minutes"""
    losses: int = 6
    """per item: workers that died under it, pre-emptions not counted"""
    delays: int = 3
    """per item: workers that were too slow with it; more would only be slower"""
    out_of_memory: int = 3
    """per item: workers that were lost because their node, or their GPU, had no memory left"""
    errors: int = 2
    """per item: workers that raised something unexpected; a bug raises it everywhere"""
    deaths_at_start: int = 3
    """rounds of workers that die before they are up: a broken image, not bad luck. While others work, starts pause"""
    start_pause_s: float = 60.0
    """how long, doubled each time"""
    slow_factor: float = 1.5
    """once none waits, an item that takes so many times as long as most did is given to an idle worker as well"""
    least_slow_s: float = 10.0
    """items that take less are not given out twice: another worker would hardly be faster"""
    say_waiting_s: float = 30.0
    """how often to say that no worker has come yet"""
    stop_grace_s: float = 2.0
    """for items to clean up after themselves when the run ends: a signal leaves it three seconds (`interruption`),
    though ``ray job stop`` gives a job that was submitted with ``stockflow submit`` thirty"""

    def storage_pause_after(self, num_failures: int) -> float:
        """Return how long to wait before something is tried again that storage has failed so often."""
        return self.storage_pause_s * 4.0 ** (num_failures - 1)


@dataclass(slots=True)
class Task(Generic[T]):
    """An item and its failures by cause."""

    item: T
    failures: Counter[Cause] = field(default_factory=Counter)
    memory_halvings: int = 0
    not_before: float = -math.inf
    was_copied: bool = False
    failed_by: int | None = None
    """the worker that storage failed last"""

    def lost(self, cause: Cause, name: str, text: str, limits: Limits, error: Exception | None) -> None:
        """Count that a worker was lost doing it.

        Raises:
            ComputeLostError: that was once too often; of what a worker raised, ``error`` itself.
        """
        self.failures[cause] += 1
        number = self.failures[cause]
        if error is not None and cause is Cause.error and number >= limits.errors:
            raise error
        bounds = {
            Cause.lost: (limits.losses, "look at the workers' logs (`ray logs`)"),
            Cause.late: (limits.delays, "raise the timeouts, or make shards smaller (--shard-size)"),
            Cause.out_of_memory: (
                limits.out_of_memory,
                "put fewer workers on a node, or lower what each may take (--memory)",
            ),
        }
        if cause in bounds and number >= bounds[cause][0]:
            raise ComputeLostError(
                f"{number} workers were lost doing {name} ({cause}): {text}; {bounds[cause][1]}, then run again"
            )


@dataclass(slots=True)
class WorkerState(Generic[T]):
    """A worker and what it is doing."""

    number: int
    round: int
    """of starts, see `Starts`"""
    placed: float | None = None
    """when its process was first heard of"""
    node: str | None = None
    """where it came up; None while it starts"""
    name: str = "a worker"
    task: Task[T] | None = None
    given: float = 0.0
    """when it was given its task"""
    moved: float = 0.0
    """when it was given its task, or last counted something"""
    memory_halvings: int = 0
    """with which it does its task"""
    failed: list[Task[T]] = field(default_factory=list)
    """what storage failed since it last finished an item"""
    failing_since: float = 0.0
    num_done: int = 0
    worked_s: float = 0.0
    """at those"""
    is_unfit: bool = False
    """storage fails it alone"""

    @property
    def is_idle(self) -> bool:
        """Whether it is up and has nothing to do."""
        return self.node is not None and self.task is None

    @property
    def expected_s(self) -> float:
        """How long it needs for an item, by those it has done; 0 if there is none."""
        return self.worked_s / self.num_done if self.num_done else 0.0

    def put_down(self) -> Task[T]:
        """Take away its task and return it."""
        task, self.task = self.task, None
        assert task is not None
        return task

    def delay(self, limits: Limits, now: float) -> str:
        """Return what is too long about it; nothing: an empty text."""
        if self.task is None:
            if self.node is None and self.placed is not None and now - self.placed > limits.stall_timeout_s:
                return f"its process is there, and not ready after {limits.stall_timeout_s:.0f} s"
            return ""
        if now - self.moved > limits.stall_timeout_s:
            return f"nothing read or written for {limits.stall_timeout_s:.0f} s"
        if limits.item_timeout_s is not None and now - self.given > limits.item_timeout_s:
            return f"not done after {limits.item_timeout_s:.0f} s"
        return ""


@dataclass(slots=True)
class Starts:
    """Paces the starts of workers, by those that died before they were up."""

    limits: Limits
    on_note: Callable[[str], None]
    has_come_up: bool = False
    """whether any worker ever did"""
    not_before: float = -math.inf
    round: int = 0
    """workers that are started before one of them dies are of one round"""
    _num_failed: int = 0
    """rounds in a row"""

    def came_up(self) -> None:
        """A worker is ready."""
        self.has_come_up = True
        self._num_failed = 0

    def hurry(self, now: float) -> None:
        """No worker is up any more: wait no longer than the shortest pause."""
        self.not_before = min(self.not_before, now + self.limits.start_pause_s)

    def pause(self, now: float) -> None:
        """Start none for a while."""
        self.not_before = max(self.not_before, now + self.limits.start_pause_s)

    def failed(
        self, round: int, cause: Cause, text: str, now: float, error: Exception | None, *, is_alone: bool
    ) -> None:
        """A worker died before it was up; those of one round count once.

        Raises:
            Exception: ``error``, or a ComputeLostError; that was once too often, and no worker is up.
        """
        if round != self.round:
            return
        self.round += 1
        self._num_failed += 1
        is_too_often = self._num_failed >= self.limits.deaths_at_start
        if is_too_often and is_alone:
            raise error or ComputeLostError(
                f"{self._num_failed} times in a row workers died before they were ready: {text}; "
                "look at the workers' logs (`ray logs`): the image or the node is at fault"
            )
        pause_s = 0.0
        if cause is Cause.storage:
            pause_s = self.limits.storage_pause_after(min(self._num_failed, self.limits.storage_failures))
        elif is_too_often:
            pause_s = self.limits.start_pause_s * 2.0 ** (self._num_failed - self.limits.deaths_at_start)
        pause_s = min(pause_s, MOST_PAUSE_S)
        self.not_before = max(self.not_before, now + pause_s)
        when = f"; the next one is started in {pause_s:.0f} s" if pause_s else ""
        self.on_note(f"a worker died before it was ready{when}: {text}")
