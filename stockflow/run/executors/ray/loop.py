"""The loop of the driver: does on Ray what the scheduler decides, and tells it what happens there."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from stockflow.errors import ComputeLostError, StockflowError, StorageError
from stockflow.events import Begun, Moved, Note, OnEvent, Retry, Workers, ignore
from stockflow.run.executors.ray.actor import Actor, Counters, Work
from stockflow.run.executors.ray.cluster import (
    RayOptions,
    brief,
    check_own_node,
    connected,
    describe_resources,
    draining_nodes,
    has_own_node,
    refuse_impossible,
    starts_here,
    worker_count,
)
from stockflow.run.executors.scheduling import Action, Give, Scheduler, Start
from stockflow.run.executors.tries import Cause
from stockflow.version import __version__

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 1.0
DEATH_S = 1.0
"""for killed processes to be gone: until then their half-written files are locked, and nobody removes them"""


def run(
    start: Callable[[], Work[T, R]],
    items: Sequence[T],
    *,
    size: Callable[[T], int],
    options: RayOptions,
    on_event: OnEvent = ignore,
    name: Callable[[T], str] = str,
    begun: Callable[[T, str], Begun] | None = None,
) -> Iterator[R]:
    """Yield results as items finish, largest items first.

    Args:
        start: called once in every worker; returns what does an item.
        items: picklable.
        size: of an item; the largest go first.
        options: workers, GPUs, cluster.
        on_event: told how many workers there are to be where no number was asked for, what they have counted
            (``Moved``), that one begins with an item, that an item or a start is to be done again, and, as notes, of
            what costs time: no worker yet, a lost one, storage that failed.
        name: of an item, for events and messages.
        begun: what is told of an item and the worker (``node:pid``) that begins with it; None: nothing.

    Raises:
        ComputeLostError: Ray cannot be reached, no worker comes, or workers keep dying.
        StorageError: an item failed on storage more often than the bound.
        StockflowError: any other error of an item, as itself.
    """
    if starts_here(options):
        on_event(Note("starting a Ray cluster on this machine; RAY_ADDRESS would name one that is there"))
    with connected(options, len(items)):
        refuse_impossible(options, lambda text: on_event(Note(text)))
        if options.num_workers is None:
            on_event(Workers(worker_count(options, len(items))))
        loop: _Loop[T, R] = _Loop(start, sorted(items, key=size, reverse=True), options, on_event, name, begun)
        try:
            yield from loop.results()
        finally:
            loop.close()


@dataclass
class _Handle:
    """One actor and what is in flight to it."""

    actor: Any
    call: Any
    """the start, or an item; None if idle"""
    is_up: bool = False
    name: str = ""
    """``node:pid``"""
    counted: Counters = (0, 0)
    counting: Any = None
    """a question for its counters"""


class _Loop(Generic[T, R]):
    def __init__(
        self,
        start: Callable[[], Work[T, R]],
        items: Sequence[T],
        options: RayOptions,
        on_event: OnEvent,
        name: Callable[[T], str],
        begun: Callable[[T, str], Begun] | None,
    ) -> None:
        # By value and once: every worker of a large plan reads the same object.
        self._start = ray.put(cloudpickle.dumps(start))  # type: ignore[no-untyped-call]
        self._options = options
        self._num_items = len(items)
        self._on_event = on_event
        self._begun = begun
        self._actor_class: Any = ray.remote(Actor)
        self._handles: dict[int, _Handle] = {}
        self._ending: list[_Handle] = []
        """workers that clean up after an item that another one has done"""
        self._polled = time.monotonic()
        self._scheduler = Scheduler(
            items,
            worker_count(options, len(items)),
            options,
            now=self._polled,
            name=name,
            need=self._need,
            on_note=lambda text: on_event(Note(text)),
            on_failure=lambda cause, item: on_event(Retry(cause, None if item is None else name(item))),
        )

    def results(self) -> Iterator[R]:
        while not self._scheduler.is_done:
            self._act(self._scheduler.decide(time.monotonic()))
            results = self._settle_all(POLL_S)
            if time.monotonic() - self._polled >= POLL_S:
                self._poll()
            self._act(self._scheduler.decide(time.monotonic()))  # nobody waits until the results are taken
            yield from results

    def _settle_all(self, timeout_s: float) -> list[R]:
        """Wait for the first call that is over, then take the outcome of all that are; return the results of items."""
        calls = {handle.call: number for number, handle in self._handles.items() if handle.call is not None}
        if not calls:
            time.sleep(timeout_s)  # for a pause to end
            return []
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        results: list[R] = []
        for call in ready:
            if calls[call] in self._handles:  # else another one was faster with its item
                results += self._settle(calls[call])
        return results

    def close(self) -> None:
        """Let items in work clean up for a moment, then end every actor; without a node nobody hears of it."""
        if not has_own_node():
            return
        handles = [*self._handles.values(), *self._ending]
        busy = [handle for handle in handles if handle.is_up and handle.call is not None]
        calls = [handle.call for handle in busy]
        ended: list[Any] = []
        try:
            for handle in busy:
                handle.actor.stop.remote()
            ended = self._await_end(calls, self._options.stop_grace_s)
        finally:
            self._handles.clear()
            self._ending.clear()
            for handle in handles:
                _kill(handle)
        if len(ended) < len(calls):
            time.sleep(DEATH_S)  # Ray calls an actor dead before its process is

    def _await_end(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """Return the calls that are over by then."""
        if not calls:
            return []
        ended: list[Any] = []
        with suppress(RayError):
            ended, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
            for call in ended:
                with suppress(RayError, StockflowError):  # taken, lest Ray prints it as unheard
                    ray.get(call)
        return ended

    def _act(self, actions: Sequence[Action[T]]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._handles[action.worker] = self._started()
            elif isinstance(action, Give):
                handle = self._handles[action.worker]
                handle.call = handle.actor.work.remote(action.item, action.memory_halvings)
                if self._begun:
                    self._on_event(self._begun(action.item, handle.name))
            else:
                handle = self._handles.pop(action.worker)
                if action.may_clean_up:
                    handle.actor.stop.remote()
                    self._ending.append(handle)
                else:
                    _kill(handle)

    def _started(self) -> _Handle:
        actor = self._actor_class.options(
            num_cpus=1,
            num_gpus=self._options.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            label_selector=dict(self._options.labels),
            max_concurrency=2,  # an item, and beside it what `Actor` promises
            scheduling_strategy="SPREAD",
        ).remote()
        return _Handle(actor, actor.start.remote(__version__, self._start))

    def _settle(self, number: int) -> list[R]:
        """Take the outcome of a finished call; return the result of an item in a list."""
        handle = self._handles[number]
        try:
            outcome = ray.get(handle.call)
        except RayTaskError as error:
            self._failed(number, handle, error)
            return []
        except RayError as error:
            self._died(number, handle, error)
            return []
        handle.call = None
        if not handle.is_up:
            handle.is_up = True
            node, handle.name = outcome
            self._scheduler.came_up(number, node, time.monotonic(), handle.name)
            return []
        result, counters = outcome
        self._take_counters(number, handle, counters)
        self._act(self._scheduler.finished(number, time.monotonic()))
        return [result]

    def _failed(self, number: int, handle: _Handle, error: RayTaskError) -> None:
        """Have an item, or a start, that raised something done again, unless that would raise it again."""
        cause, now = error.cause, time.monotonic()
        if _is_out_of_memory(cause):
            self._drop(number, Cause.out_of_memory, brief(cause))  # what it holds is free again, and in one piece
        elif not handle.is_up:
            _kill(self._handles.pop(number))
            raised = cause if isinstance(cause, StockflowError) else error
            self._scheduler.start_failed(number, raised, brief(cause), now)
        elif isinstance(cause, StorageError):
            handle.call = None
            self._scheduler.storage_failed(number, cause, brief(cause), now)
        elif isinstance(cause, StockflowError):
            raise cause
        else:  # of a GPU that fails, perhaps: its process can do nothing any more
            self._drop(number, Cause.error, brief(cause), error)

    def _died(self, number: int, handle: _Handle, error: RayError) -> None:
        if not handle.is_up and "ModuleNotFoundError" in str(error):  # before `Actor` itself could say it better
            _kill(self._handles.pop(number))
            missing = ComputeLostError(
                f"a worker cannot import what it needs: {brief(error)}; "
                f"install stockflow {__version__} and what it requires on every node, or in their image"
            )
            self._scheduler.start_failed(number, missing, str(missing), time.monotonic())
        else:
            self._drop(number, _cause_of(error), brief(error))

    def _drop(self, number: int, cause: Cause, text: str, error: Exception | None = None) -> None:
        _kill(self._handles.pop(number))  # an actor that is only unreachable would keep its CPU
        self._scheduler.lost(number, cause, text, time.monotonic(), error)

    def _poll(self) -> None:
        """Ask actors what they have counted, without waiting for answers; see what has been too long."""
        self._polled = time.monotonic()
        check_own_node()
        self._scheduler.drain(draining_nodes())
        if self._options.num_workers is None:  # nodes that have joined meanwhile
            self._scheduler.want(worker_count(self._options, self._num_items))
        self._hear()
        self._bury()
        for handle in self._handles.values():
            if handle.counting is None:
                handle.counting = handle.actor.counters.remote()
        self._act(self._scheduler.check(time.monotonic()))

    def _bury(self) -> None:
        """End the workers that have cleaned up."""
        ended = self._await_end([handle.call for handle in self._ending], 0.0)
        for handle in [handle for handle in self._ending if handle.call in ended]:
            _kill(handle)
            self._ending.remove(handle)

    def _hear(self) -> None:
        """Take the answers of those that were asked what they have counted."""
        asked = {handle.counting: number for number, handle in self._handles.items() if handle.counting is not None}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for question in answered:
            number = asked[question]
            handle = self._handles[number]
            handle.counting = None
            try:
                counters = ray.get(question)
            except RayError as error:
                if handle.call is None:  # else it shows there
                    self._drop(number, _cause_of(error), brief(error))
                continue
            if not handle.is_up:
                self._scheduler.placed(number, time.monotonic())
            self._take_counters(number, handle, counters)

    def _take_counters(self, number: int, handle: _Handle, counters: Counters) -> None:
        read, written = counters[0] - handle.counted[0], counters[1] - handle.counted[1]
        if read > 0 or written > 0:  # an answer to a question from before comes late and says less
            handle.counted = counters
            self._scheduler.counted(number, time.monotonic())
            self._on_event(Moved(read, written, handle.name))

    def _need(self) -> str:
        return f"the cluster has {describe_resources()}, a worker needs {self._options.need}"


def _cause_of(error: RayError) -> Cause:
    if isinstance(error, OutOfMemoryError):
        return Cause.out_of_memory
    return Cause.preempted if getattr(error, "preempted", False) else Cause.lost


def _is_out_of_memory(cause: BaseException) -> bool:
    """Whether a worker was refused memory, by its node or its GPU; a budget that is too small is another matter."""
    if isinstance(cause, StockflowError):
        return False
    is_refused_by_kernel = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
    # By its name: torch is not imported for this.
    return isinstance(cause, MemoryError) or is_refused_by_kernel or type(cause).__name__ == "OutOfMemoryError"


def _kill(handle: _Handle) -> None:
    if not ray.is_initialized():  # `ray.kill` would start a cluster to kill in (2.60)
        return
    with suppress(RayError, ValueError):
        ray.kill(handle.actor)
