"""The worker's pipeline in virtual time: loads that arrive, threads that compute, one thread that hashes and writes.

What waits for what is as in ``worker``: statistics over all loads of a step before its combine, a free buffer before
an output is computed, a free slab before a load is read. Threads share the cores: with more of them than cores all
slow down alike. Pure.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Seconds of one load, each if nothing else used the machine."""

    read_s: float
    """until it has arrived, once it is its turn; of each time it is read"""
    statistics_s: float
    """of one pass, by all threads"""
    combine_s: float
    """by all threads"""
    serial_s: float
    """of the thread that leads the others"""
    write_s: float
    """hashing and writing its output, by one thread"""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Loads that are decided as one."""

    loads: tuple[LoadTime, ...]
    num_passes: int
    num_reads: int


@dataclass(frozen=True, slots=True)
class Elapsed:
    """What a run through the pipeline took."""

    seconds: float
    first_output_s: float
    """until the first bytes could be written"""


def run(steps: Sequence[StepTime], *, num_threads: int, cores: float, num_slabs: int, num_buffers: int) -> Elapsed:
    """Return how long a shard takes from its first request to its last byte.

    Args:
        steps: in order.
        num_threads: that compute.
        cores: which they share with the thread that writes.
        num_slabs: loads in memory at once.
        num_buffers: outputs that are computed, or wait to be written.
    """
    pipeline = _Pipeline(num_threads, cores, num_slabs, num_buffers)
    for step in steps:
        pipeline.merge(step)
    return Elapsed(pipeline.finish(), pipeline.first_output_s or 0.0)


class _Pipeline:
    def __init__(self, num_threads: int, cores: float, num_slabs: int, num_buffers: int) -> None:
        self._num_threads, self._cores = num_threads, cores
        self._num_buffers = num_buffers
        self._now = 0.0
        self._reader_done = 0.0
        self._released: deque[float] = deque([0.0] * num_slabs)
        """when the slabs that are free, or will be, became free; the oldest first"""
        self._writing: deque[float] = deque()
        """seconds of work left of each output that waits or is written"""
        self.first_output_s: float | None = None

    def merge(self, step: StepTime) -> None:
        """Statistics over all loads, then the combine; a step of one load has no pass of its own over memory."""
        sweeps = step.num_passes
        for sweep in range(sweeps):
            for load in step.loads:
                if sweep < step.num_reads:
                    self._await(load)
                self._compute(load.statistics_s)
                if step.num_reads > 1:
                    self._release()
        for load in step.loads:
            if step.num_reads > sweeps:
                self._await(load)
            self._compute_alone(load.serial_s)
            self._take_buffer()
            self._compute(load.combine_s)
            self._release()
            if load.write_s:
                self._writing.append(load.write_s)
            if self.first_output_s is None:
                self.first_output_s = self._now

    def finish(self) -> float:
        """Write what waits; return when everything is done."""
        return self._now + sum(self._writing) / min(1.0, self._cores)

    def _await(self, load: LoadTime) -> None:
        if load.read_s:
            free = self._released.popleft() if self._released else self._now
            self._reader_done = max(self._reader_done, free) + load.read_s
            self._wait(max(self._reader_done - self._now, 0.0))

    def _release(self) -> None:
        self._released.append(self._now)

    def _take_buffer(self) -> None:
        if len(self._writing) >= self._num_buffers:
            self._now += self._writing.popleft() / min(1.0, self._cores)

    def _compute(self, seconds: float) -> None:
        self._work(seconds, self._num_threads)

    def _compute_alone(self, seconds: float) -> None:
        self._work(seconds, 1)

    def _work(self, seconds: float, num_threads: int) -> None:
        """Compute so much; while something is being written, its thread gets on as fast as one of those that compute.

        Every turn but the last finishes an output, so there are no more turns than outputs that wait.
        """
        beside = min(1.0, self._cores / (num_threads + 1))
        while self._writing:
            written = self._writing[0]
            if written > seconds:
                self._writing[0] -= seconds
                self._now += seconds / beside
                return
            self._writing.popleft()
            self._now += written / beside
            seconds -= written
        self._now += seconds / min(1.0, self._cores / num_threads)

    def _wait(self, seconds: float) -> None:
        """Let time go by; the thread that writes has a core meanwhile."""
        self._now += seconds
        written = seconds * min(1.0, self._cores)
        while self._writing:
            if self._writing[0] > written:
                self._writing[0] -= written
                return
            written -= self._writing.popleft()
