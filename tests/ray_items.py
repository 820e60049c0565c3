"""What the tests let workers of a Ray cluster do. Workers import it, so it imports little."""

import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockflow.errors import PlanError, StockflowError, StorageError

Count = Callable[[int, int], None]
WAIT_S = 240.0
"""longer than anything here takes on a machine of any speed"""


@dataclass(frozen=True)
class Doing:
    """A start: the worker then does ``work(folder, item, count)``."""

    work: Callable[[Path, Any, Count], Any]
    folder: Path

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        return lambda item, count, memory_halvings: self.work(self.folder, item, count)


@dataclass(frozen=True)
class FailingStart:
    """A start that fails by storage ``times`` times, as counted by files in a folder."""

    folder: Path
    times: int

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        if note(self.folder, "start") <= self.times:
            raise StorageError("the claim cannot be read")
        return lambda item, count, memory_halvings: item


@dataclass(frozen=True)
class Starving:
    """A start whose items may take four times what is there; they give their memory_halvings and their process."""

    kind: str
    """of what: ``numpy``, ``mmap`` or ``torch``, or the start itself by ``start``"""

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        if self.kind == "start":
            raise MemoryError
        return self._starve

    def _starve(self, item: Any, count: Count, memory_halvings: int) -> tuple[Any, int, int]:
        if memory_halvings < 2 and self.kind == "torch":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if memory_halvings < 2 and self.kind == "mmap":
            mmap.mmap(-1, 1 << 62)
        if memory_halvings < 2:
            import numpy as np

            np.empty(1 << 62, np.uint8)
        return item, memory_halvings, os.getpid()


@dataclass(frozen=True)
class RaisingStart:
    """A start that raises."""

    error: Exception

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        raise self.error


@dataclass(frozen=True)
class RefusedLater:
    """A start that is refused to every worker but the first, once that has an item; others wait until it is told."""

    folder: Path

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        if note(self.folder, "start") > 1:
            await_note(self.folder, "worked")
            raise PlanError("this node is not like the others")
        return self._work

    def _work(self, item: Any, count: Count, memory_halvings: int) -> Any:
        if note(self.folder, "worked") > 1:
            await_note(self.folder, "told")
        return item


@dataclass(frozen=True)
class HangingOnce:
    """A start of another: the first item that writes anything says which process it is in, and hangs there."""

    start: Callable[[], Callable[[Any, Count, int], Any]]
    folder: Path
    is_stopped: bool = False
    """whether all of its process hangs, as by SIGSTOP or a dead mount, so that it hears no wish to end"""

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        work = self.start()

        def hanging(item: Any, count: Count, memory_halvings: int) -> Any:
            def hang_once(num_read: int, num_written: int) -> None:
                count(num_read, num_written)
                if num_written and note(self.folder, "hanging") == 1:
                    os.kill(os.getpid(), signal.SIGSTOP if self.is_stopped else 0)
                    time.sleep(WAIT_S)

            note(self.folder, "begun")
            return work(item, hang_once, memory_halvings)

        return hanging


@dataclass(frozen=True)
class Slowly:
    """A start of another: each item takes longer by some seconds, and is noted with its node, begin and end."""

    start: Callable[[], Callable[[Any, Count, int], Any]]
    folder: Path
    seconds: float
    stuck: int = 0
    """the number of the item that never ends; 0: all do"""
    hungry_bytes: int = 0
    """what the first item takes of memory, unless it is told to halve its memory"""

    def __call__(self) -> Callable[[Any, Count, int], Any]:
        import ray

        work = self.start()
        node = str(ray.get_runtime_context().get_node_id())

        def slowly(item: Any, count: Count, memory_halvings: int) -> Any:
            self._note("begun", item.file, node, memory_halvings)
            if note(self.folder, "item") == self.stuck:
                note(self.folder, "stuck")
                time.sleep(WAIT_S)
            eaten = []
            if self.hungry_bytes and not memory_halvings and note(self.folder, "hungry") == 1:
                for _ in range(self.hungry_bytes >> 26):
                    eaten.append(b"x" * (1 << 26))
                    time.sleep(0.02)
                time.sleep(WAIT_S)
            time.sleep(self.seconds)
            result = work(item, count, memory_halvings)
            self._note("ended", item.file, node, memory_halvings)
            return result

        return slowly

    def _note(self, event: str, file: str, node: str, memory_halvings: int) -> None:
        line = {"event": event, "file": file, "node": node, "memory_halvings": memory_halvings, "when": time.time()}
        with open(self.folder / "events.jsonl", "a") as opened:
            opened.write(json.dumps(line) + "\n")


def die() -> Callable[[Any, Count, int], Any]:
    """End the process where a worker should start."""
    os._exit(17)


def echo(folder: Path, item: int, count: Count) -> tuple[int, int]:
    """Count the item as read and twice as much as written."""
    del folder
    count(item, 2 * item)
    return item, os.getpid()


def fail_on_storage(folder: Path, item: tuple[str, int], count: Count) -> str:
    """Fail as often as the item says."""
    del count
    name, times = item
    if note(folder, name) <= times:
        raise StorageError(f"{name} cannot be written")
    return name


def raise_it(folder: Path, item: Exception, count: Count) -> None:
    """Raise the item."""
    del folder, count
    raise item


def raise_first_time(folder: Path, item: Exception, count: Count) -> int:
    """Raise the item; the second time return this process."""
    del count
    if note(folder, "raised") == 1:
        raise item
    return os.getpid()


def wait_first_time(folder: Path, item: str, count: Count) -> tuple[str, int]:
    """Return the item and this process; the first time it is ``last``, say so and wait."""
    del count
    if item == "last" and note(folder, item) == 1:
        time.sleep(WAIT_S)
    return item, os.getpid()


def hang_first_time(folder: Path, item: str, count: Count) -> str:
    """Count nothing and never end; the second time end at once."""
    del count
    if item == "slow" and note(folder, "slow") == 1:
        time.sleep(WAIT_S)
    return item


def slow_first_time(folder: Path, item: str, count: Count) -> str:
    """Count on and on; the second time end at once."""
    if note(folder, item) == 1:
        for _ in range(int(WAIT_S / 0.05)):
            count(1, 0)
            time.sleep(0.05)
    return item


def count_until_stopped(folder: Path, item: str, count: Count) -> str:
    """Count on and on; clean up when that raises."""
    try:
        for _ in range(int(WAIT_S / 0.05)):
            count(1, 0)
            time.sleep(0.05)
    except StockflowError:
        note(folder, "cleaned")
        raise
    return item


def node_of(folder: Path, item: int, count: Count) -> tuple[int, str]:
    """Say on which node the item was done, after half a second."""
    import ray

    node = str(ray.get_runtime_context().get_node_id())
    note(folder, f"on-{node}")
    count(1, 0)
    time.sleep(0.5)
    return item, node


def note(folder: Path, name: str) -> int:
    """Leave a file with this process's id, and return how many of the name there are now."""
    for number in range(1, 1000):
        try:
            with open(folder / f"{name}-{number}", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            continue
        return number
    raise AssertionError("noted too often")


def await_note(folder: Path, name: str, number: int = 1) -> Path:
    """Wait until a file of ``note`` is there and written."""
    path = folder / f"{name}-{number}"
    deadline = time.monotonic() + WAIT_S
    while not (path.exists() and path.read_text()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.02)
    return path
