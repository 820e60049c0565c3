"""What lives in a worker process on some node."""

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray import cloudpickle

from stockflow.errors import ComputeLostError, InterruptedRunError
from stockflow.version import __version__

T = TypeVar("T")
R = TypeVar("R")

Counters = tuple[int, int]
Work = Callable[[T, Callable[[int, int], None], int], R]
"""Does one item, telling its second argument what it counts; the third says how often it ran out of memory before."""


class Actor:
    """Does items, one at a time; counters and a wish to stop get through while it is at one."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._work: Work[Any, Any] | None = None
        self._lock = threading.Lock()
        self._read = self._written = 0
        self._is_stopping = False

    def start(self, driver_version: str, pickled_start: bytes) -> tuple[str, str]:
        """Make ready; return the id of the node, and ``node:pid``.

        An error of the start is raised as itself.

        Raises:
            ComputeLostError: this environment is not the driver's.
        """
        node = os.uname().nodename
        if driver_version != __version__:
            raise ComputeLostError(
                f"a worker on {node} has stockflow {__version__}, the driver has {driver_version}; "
                "install the same version on every node"
            )
        try:
            start = cloudpickle.loads(pickled_start)
        except (ImportError, AttributeError) as error:
            raise ComputeLostError(
                f"the environment of a worker on {node} is not the driver's: {error}; "
                "install the same packages on every node"
            ) from error
        self._work = start()
        return str(ray.get_runtime_context().get_node_id()), f"{node}:{os.getpid()}"

    def work(self, item: Any, memory_halvings: int) -> tuple[Any, Counters]:
        """Do one item; return its result and what has been counted so far."""
        assert self._work is not None
        return self._work(item, self._count, memory_halvings), self.counters()

    def counters(self) -> Counters:
        """Return what has been counted so far."""
        return self._read, self._written

    def stop(self) -> None:
        """Make the item in work end by an error at its next count, so that it cleans up after itself."""
        self._is_stopping = True

    def _count(self, num_read: int, num_written: int) -> None:
        if self._is_stopping:
            raise InterruptedRunError("the driver stopped this worker")
        with self._lock:  # items count from several threads
            self._read += num_read
            self._written += num_written
