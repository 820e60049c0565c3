"""The loop of the driver: gives items to actors, replaces actors, counts failures by cause."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from stockflow import __version__
from stockflow.errors import ComputeLostError, StockflowError, StorageError
from stockflow.executors.ray.actor import Actor, Counters, Work
from stockflow.executors.ray.cluster import (
    RayOptions,
    brief,
    connected,
    describe_resources,
    draining_nodes,
    worker_count,
)

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 1.0
STOP_GRACE_S = 2.0
"""For items to clean up after themselves; ``ray job stop`` gives the driver three seconds in all."""
SAY_WAITING_S = 30.0
MAX_STORAGE_FAILURES = 3
"""Per item, or per start of a worker; each has many requests repeated within it."""
MAX_LOSSES = 6
"""Per item: workers that died under it, pre-emptions not counted."""
MAX_OUT_OF_MEMORY = 3
"""Per item: workers that Ray killed because their node had no memory left."""
MAX_DEATHS_AT_START = 3
"""Workers dying one after the other before one comes up: a broken image, not bad luck."""


def run(
    start: Callable[[], Work[T, R]],
    items: Sequence[T],
    *,
    size: Callable[[T], int],
    options: RayOptions,
    on_count: Callable[[int, int], None],
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[R]:
    """Yield results as items finish, largest items first.

    Args:
        start: called once in every worker; returns what does an item.
        items: picklable.
        size: of an item; the largest go first.
        options: workers, GPUs, cluster.
        on_count: told what the workers count.
        on_note: told of what costs time: no worker yet, a lost one, storage that failed.

    Raises:
        ComputeLostError: Ray cannot be reached, no worker comes, or workers keep dying.
        StorageError: an item failed on storage more often than the bound.
        StockflowError: any other error of an item, as itself.
    """
    with connected(options, len(items)):
        loop: _Loop[T, R] = _Loop(start, sorted(items, key=size, reverse=True), options, on_count, on_note)
        try:
            yield from loop.results()
        finally:
            loop.close()


@dataclass
class _Task(Generic[T]):
    """An item and its failures by cause."""

    item: T
    storage_failures: int = 0
    losses: int = 0
    out_of_memory: int = 0


@dataclass
class _Slot(Generic[T]):
    """One actor and what it is doing."""

    actor: Any
    call: Any
    """in flight: the start, or a task; None if idle"""
    task: _Task[T] | None = None
    node: str | None = None
    """where the actor came up"""
    storage_failures: int = 0
    """of its start"""
    counted: Counters = (0, 0)
    counting: Any = None
    """a question for its counters, in flight"""
    moved: float = 0.0
    """when it was given its task, or last counted something"""


class _Loop(Generic[T, R]):
    def __init__(
        self,
        start: Callable[[], Work[T, R]],
        items: Sequence[T],
        options: RayOptions,
        on_count: Callable[[int, int], None],
        on_note: Callable[[str], None],
    ) -> None:
        # By value and once: every worker of a large plan reads the same object.
        self._start = ray.put(cloudpickle.dumps(start))  # type: ignore[no-untyped-call]
        self._waiting = deque(_Task(item) for item in items)
        self._options = options
        self._on_count = on_count
        self._on_note = on_note
        self._num_workers = min(worker_count(options), len(items))
        self._actor_class: Any = ray.remote(Actor)
        self._slots: list[_Slot[T]] = []
        self._deaths_at_start = 0
        self._draining: frozenset[str] = frozenset()
        self._polled = self._had_worker = self._said_waiting = time.monotonic()

    def results(self) -> Iterator[R]:
        num_left = len(self._waiting)
        while num_left:
            self._fill()
            calls = {slot.call: slot for slot in self._slots if slot.call is not None}
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_S)
            for call in ready:
                result = self._settle(calls[call])
                if result is not None:
                    num_left -= 1
                    yield result[0]
            if time.monotonic() - self._polled >= POLL_S:
                self._poll()
                self._check_for_workers()

    def close(self) -> None:
        """Let items in work clean up for a moment, then end every actor."""
        busy = [slot for slot in self._slots if slot.task is not None]
        try:
            for slot in busy:
                slot.actor.stop.remote()
            self._await_stopped([slot.call for slot in busy])
        finally:
            while self._slots:
                _kill(self._slots.pop())

    def _await_stopped(self, calls: list[Any]) -> None:
        if not calls:
            return
        with suppress(RayError):
            stopped, _ = ray.wait(calls, num_returns=len(calls), timeout=STOP_GRACE_S)
            for call in stopped:
                with suppress(RayError, StockflowError):  # taken, lest Ray prints it as unheard
                    ray.get(call)

    def _fill(self) -> None:
        """Leave nodes that go, start missing actors and give idle ones work."""
        for slot in [slot for slot in self._slots if slot.call is None and slot.node in self._draining]:
            self._forget(slot)
        busy = sum(slot.task is not None for slot in self._slots)
        while len(self._slots) < min(self._num_workers, busy + len(self._waiting)):
            actor = self._actor_class.options(
                num_cpus=1,
                num_gpus=self._options.gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=2,  # an item, and beside it what `Actor` promises
                scheduling_strategy="SPREAD",
            ).remote()
            self._slots.append(_Slot(actor, actor.start.remote(__version__, self._start)))
        for slot in self._slots:
            if slot.call is None and self._waiting:
                slot.task = self._waiting.popleft()
                slot.call = slot.actor.work.remote(slot.task.item)
                slot.moved = time.monotonic()

    def _settle(self, slot: _Slot[T]) -> tuple[R] | None:
        """Take the outcome of a finished call; return the result of an item in a tuple."""
        try:
            outcome = ray.get(slot.call)
        except RayTaskError as error:
            self._retry_or_raise(slot, error)
            return None
        except RayError as error:
            self._replace(slot, error)
            return None
        slot.call = None
        self._deaths_at_start = 0
        if slot.task is None:
            slot.node = outcome
            self._had_worker = time.monotonic()
            return None
        slot.task = None
        result, counters = outcome
        self._take_counters(slot, counters)
        return (result,)

    def _retry_or_raise(self, slot: _Slot[T], error: RayTaskError) -> None:
        """Try storage failures again, a bounded number of times; raise all else as itself."""
        cause = error.cause
        failed: _Slot[T] | _Task[T] = slot if slot.task is None else slot.task
        failed.storage_failures += isinstance(cause, StorageError)
        if not isinstance(cause, StorageError) or failed.storage_failures >= MAX_STORAGE_FAILURES:
            raise cause if isinstance(cause, StockflowError) else error
        self._on_note(f"tried again: {brief(cause)}")
        if slot.task is None:
            slot.call = slot.actor.start.remote(__version__, self._start)
        else:
            self._waiting.appendleft(slot.task)
            slot.task = slot.call = None

    def _replace(self, slot: _Slot[T], error: Exception) -> None:
        """Forget a lost actor and put its task back; pre-empted nodes do not count against anyone."""
        self._forget(slot)
        is_preempted = getattr(error, "preempted", False)
        if slot.task is None:
            self._deaths_at_start += slot.node is None and not is_preempted
            if self._deaths_at_start >= MAX_DEATHS_AT_START:
                raise ComputeLostError(
                    f"{self._deaths_at_start} workers in a row died before they were ready: {brief(error)}; "
                    "look at the workers' logs (`ray logs`): the image or the node is at fault"
                )
            return
        if isinstance(error, OutOfMemoryError):
            slot.task.out_of_memory += 1
        elif not is_preempted:
            slot.task.losses += 1
        if slot.task.losses >= MAX_LOSSES or slot.task.out_of_memory >= MAX_OUT_OF_MEMORY:
            raise ComputeLostError(
                f"{slot.task.losses + slot.task.out_of_memory} workers died doing the same item: {brief(error)}; "
                "give workers more memory (--memory bounds each), then run again to resume"
            )
        self._on_note(f"a worker was lost, another does its item again: {brief(error)}")
        self._waiting.appendleft(slot.task)

    def _forget(self, slot: _Slot[T]) -> None:
        self._slots.remove(slot)
        _kill(slot)  # an actor that is only unreachable would keep its CPU

    def _poll(self) -> None:
        """Ask busy actors what they have counted, without waiting for answers; replace those that hang."""
        self._polled = now = time.monotonic()
        self._draining = draining_nodes()
        asked = {slot.counting: slot for slot in self._slots if slot.counting is not None}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for question in answered:
            slot = asked[question]
            slot.counting = None
            with suppress(RayError):  # a dead actor shows in its call
                self._take_counters(slot, ray.get(question))
        for slot in [slot for slot in self._slots if slot.task is not None]:
            if now - slot.moved > self._options.stall_timeout_s:
                stalled_s = self._options.stall_timeout_s
                self._replace(slot, TimeoutError(f"nothing read or written for {stalled_s:.0f} s"))
            elif slot.counting is None:
                slot.counting = slot.actor.counters.remote()

    def _take_counters(self, slot: _Slot[T], counters: Counters) -> None:
        read, written = counters[0] - slot.counted[0], counters[1] - slot.counted[1]
        if read > 0 or written > 0:  # an answer to a question from before comes late and says less
            slot.counted = counters
            slot.moved = time.monotonic()
            self._on_count(read, written)

    def _check_for_workers(self) -> None:
        """Say from time to time that no worker has come, and give up in the end."""
        now = time.monotonic()
        if any(slot.node for slot in self._slots):
            self._had_worker = self._said_waiting = now
            return
        need = f"the cluster has {describe_resources()}, a worker needs 1 CPU and {self._options.gpus_per_worker:g} GPU"
        if now - self._had_worker > self._options.no_worker_timeout_s:
            raise ComputeLostError(
                f"no worker came within {self._options.no_worker_timeout_s:.0f} s: {need}; "
                "free or add resources, or ask for fewer GPUs, then run again to resume"
            )
        if now - self._said_waiting > SAY_WAITING_S:
            self._said_waiting = now
            self._on_note(f"no worker has come for {now - self._had_worker:.0f} s: {need}")


def _kill(slot: _Slot[Any]) -> None:
    if not ray.is_initialized():  # `ray.kill` would start a cluster to kill in (2.60)
        return
    with suppress(RayError, ValueError):
        ray.kill(slot.actor)
