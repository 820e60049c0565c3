"""The Ray executor: long-lived actors fed by a ``ray.wait`` loop. The words tensor and checkpoint do not occur.

The driver owns every retry: Ray restarts nothing by itself (``max_restarts=0``), so that causes are counted
apart and a poisoned item cannot loop. Running an item twice is harmless: both runs write the same bytes.
"""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from stockflow.errors import ComputeLostError, StockflowError, StorageError

T = TypeVar("T")
R = TypeVar("R")

Counters = tuple[int, int]
Work = Callable[[T, Callable[[int, int], None]], R]
"""Does one item, telling its second argument what it counts."""

OBJECT_STORE_BYTES = 100_000_000
"""Only keys and counters pass through Ray."""
POLL_S = 1.0
MAX_STORAGE_FAILURES = 3
MAX_LOSSES = 6
"""Per item: workers that died under it, pre-emptions not counted."""
MAX_DEATHS_AT_START = 3
"""Workers dying one after the other before one comes up: a broken image, not bad luck."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the executor asks of Ray."""

    num_workers: int | None = None
    """None: one per GPU if GPUs are asked for, else one per CPU of the cluster"""
    gpus_per_worker: float = 0.0
    address: str | None = None
    """None: RAY_ADDRESS, else a cluster on this machine"""
    no_worker_timeout_s: float = 300.0
    """how long to wait for the first worker, and for a next one once all are lost"""


@dataclass
class _Slot:
    """One actor and what it is doing."""

    actor: Any
    call: Any
    """the call in flight: the start, or an item"""
    item: Any = None
    started: bool = False
    counted: Counters = (0, 0)


@dataclass
class _Attempts:
    """Failures of one item, by cause."""

    storage: int = 0
    losses: int = 0


class _Actor:
    """Runs in a process of its own on some node."""

    def __init__(self, start: Callable[[], Work[Any, Any]]) -> None:
        self._start = start
        self._work: Work[Any, Any] | None = None
        self._read = self._written = 0

    def start(self) -> bool:
        """Make ready; an error here is raised as itself."""
        self._work = self._start()
        return True

    def work(self, item: Any) -> Any:
        """Do one item."""
        assert self._work is not None
        return self._work(item, self._count)

    def counters(self) -> Counters:
        """Return what has been counted so far."""
        return self._read, self._written

    def _count(self, num_read: int, num_written: int) -> None:
        self._read += num_read
        self._written += num_written


def run(
    start: Callable[[], Work[T, R]],
    items: Sequence[T],
    *,
    size: Callable[[T], int],
    options: RayOptions,
    on_count: Callable[[int, int], None],
) -> Iterator[R]:
    """Yield results as items finish, largest items first.

    Args:
        start: called once in every worker; returns what does an item.
        items: picklable.
        size: of an item; the largest go first.
        options: workers, GPUs, cluster.
        on_count: told what the workers count.

    Raises:
        ComputeLostError: Ray cannot be reached, no worker comes, or workers keep dying.
        StorageError: an item failed on storage more often than the bound.
        StockflowError: any other error of an item, as itself.
    """
    with connected(options, len(items)):
        loop: _Loop[T, R] = _Loop(start, items, size, options, on_count)
        try:
            yield from loop.results()
        finally:
            loop.kill_all()


class _Loop(Generic[T, R]):
    def __init__(
        self,
        start: Callable[[], Work[T, R]],
        items: Sequence[T],
        size: Callable[[T], int],
        options: RayOptions,
        on_count: Callable[[int, int], None],
    ) -> None:
        self._start = start
        self._waiting = deque(sorted(items, key=size, reverse=True))
        self._attempts = {id(item): _Attempts() for item in items}
        self._options = options
        self._on_count = on_count
        self._num_workers = min(worker_count(options), len(items))
        self._actor_class: Any = ray.remote(_Actor)
        self._slots: list[_Slot] = []
        self._deaths_at_start = 0
        self._last_sign_of_life = time.monotonic()

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
            self._poll_counters()
            self._check_for_workers()

    def kill_all(self) -> None:
        for slot in self._slots:
            with suppress(RayError, ValueError):
                ray.kill(slot.actor)
        self._slots.clear()

    def _fill(self) -> None:
        """Start missing actors and give idle ones work."""
        busy = sum(slot.item is not None for slot in self._slots)
        while len(self._slots) < min(self._num_workers, busy + len(self._waiting)):
            actor = self._actor_class.options(
                num_cpus=1,
                num_gpus=self._options.gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=2,  # so that counters can be asked for while an item is being done
                scheduling_strategy="SPREAD",
            ).remote(self._start)
            self._slots.append(_Slot(actor, actor.start.remote()))
        for slot in self._slots:
            if slot.started and slot.item is None and self._waiting:
                slot.item = self._waiting.popleft()
                slot.call = slot.actor.work.remote(slot.item)

    def _settle(self, slot: _Slot) -> tuple[R] | None:
        """Take the outcome of a finished call; return the result of an item in a tuple."""
        try:
            outcome = ray.get(slot.call)
        except RayTaskError as error:
            self._requeue_or_raise(slot, error)
            return None
        except (ActorDiedError, OutOfMemoryError, RayError) as error:
            self._replace(slot, error)
            return None
        self._last_sign_of_life = time.monotonic()
        self._deaths_at_start = 0
        slot.call = None
        if not slot.started:
            slot.started = True
            return None
        self._count(slot)
        slot.item = None
        return (outcome,)

    def _requeue_or_raise(self, slot: _Slot, error: RayTaskError) -> None:
        """Storage failures of an item are tried again, a bounded number of times; all else is raised as itself."""
        cause = error.cause
        if slot.item is not None and isinstance(cause, StorageError):
            attempts = self._attempts[id(slot.item)]
            attempts.storage += 1
            if attempts.storage < MAX_STORAGE_FAILURES:
                self._waiting.appendleft(slot.item)
                slot.item = slot.call = None
                return
        raise cause if isinstance(cause, StockflowError) else error

    def _replace(self, slot: _Slot, error: RayError) -> None:
        """Forget a dead actor and put its item back; pre-empted nodes do not count against the item."""
        self._slots.remove(slot)
        if not slot.started:
            self._deaths_at_start += 1
            if self._deaths_at_start >= MAX_DEATHS_AT_START:
                raise ComputeLostError(
                    f"{self._deaths_at_start} workers in a row died before they were ready: {_first_line(error)}; "
                    "look at the workers' logs (`ray logs`), the image or the node is at fault"
                )
            return
        if slot.item is None:
            return
        attempts = self._attempts[id(slot.item)]
        attempts.losses += not getattr(error, "preempted", False)
        if attempts.losses >= MAX_LOSSES:
            raise ComputeLostError(
                f"{attempts.losses} workers died doing the same item: {_first_line(error)}; "
                "give workers more memory (--memory bounds each), then run again to resume"
            )
        self._waiting.appendleft(slot.item)

    def _poll_counters(self) -> None:
        for slot in [slot for slot in self._slots if slot.item is not None]:
            self._count(slot)

    def _count(self, slot: _Slot) -> None:
        with suppress(RayError):  # a dead actor shows in its call
            read, written = ray.get(slot.actor.counters.remote(), timeout=POLL_S)
            self._on_count(read - slot.counted[0], written - slot.counted[1])
            slot.counted = (read, written)

    def _check_for_workers(self) -> None:
        if any(slot.started for slot in self._slots):
            self._last_sign_of_life = time.monotonic()
        elif time.monotonic() - self._last_sign_of_life > self._options.no_worker_timeout_s:
            raise ComputeLostError(
                f"no worker came within {self._options.no_worker_timeout_s:.0f} s: the cluster has {_resources()}, "
                f"a worker needs 1 CPU and {self._options.gpus_per_worker:g} GPU; "
                "free or add resources, or ask for fewer GPUs, then run again to resume"
            )


def worker_count(options: RayOptions) -> int:
    """Return how many workers to start in the connected cluster."""
    if options.num_workers:
        return options.num_workers
    resources = _cluster_resources()
    slots = resources.get("CPU", 1.0)
    if options.gpus_per_worker:
        slots = min(slots, resources.get("GPU", 0.0) / options.gpus_per_worker)
    return max(int(slots), 1)


@contextmanager
def connected(options: RayOptions, num_items: int) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine; our signal handlers stay in force."""
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _init(options, num_items)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = options.address or "the cluster that RAY_ADDRESS names"
        raise ComputeLostError(
            f"cannot connect to Ray at {where}: {_first_line(error)}; check that the head is up, that the address "
            f"is right and that its Ray and Python versions are those of this environment (Ray {ray.__version__})"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _init(options: RayOptions, num_items: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = options.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
        return
    workers = options.num_workers or min(os.cpu_count() or 1, num_items)
    ray.init(
        num_cpus=workers,
        num_gpus=math.ceil(options.gpus_per_worker * workers) or None,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _cluster_resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _resources() -> str:
    resources = _cluster_resources()
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
