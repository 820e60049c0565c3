"""What a merge counts, for Prometheus: events added up, and served to whoever scrapes.

The driver knows everything, from its workers' counters and receipts; so its endpoint is the only one to scrape.
`docs/operations.md` says what each metric means; a test holds `deploy/grafana/stockflow.json` against them.
"""

import socket
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stockflow.errors import UserError
from stockflow.events import Begun, Cost, Done, Dropped, Event, Moved, Retry, Run, Stage
from stockflow.version import __version__

CAUSES = ("read", "storage", "lost", "late", "out of memory", "error", "preempted")
"""Of retries; they begin at zero, so that a first one shows as a rise."""
STAGES = ("read", "wait_read", "statistics", "combine", "hash", "write", "wait_write", "publish")
"""Of a shard, over the threads of its worker; likewise."""
TOTAL = "total"
"""of a receipt's seconds: the time by the clock"""
BUCKETS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""From shards of a small model on one machine to 5 GB through a slow network."""


class Metrics(Collector):
    """Counts the events of a merge; from any thread."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._lock = threading.Lock()
        self._run = Run("", "")
        self._stage = Stage("")
        self._read = self._written = self._tensors = self._peak = 0
        self._num_shards = self._num_bytes = 0
        self._num_resumed = self._resumed_bytes = 0
        self._done: dict[str, int] = {}
        """bytes of the shards that this run has done"""
        self._in_flight: dict[str, Begun] = {}
        self._retries = Counter(dict.fromkeys(CAUSES, 0))
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._durations = [0] * (len(BUCKETS_S) + 1)
        self._duration_sum = 0.0

    def __call__(self, event: Event) -> None:
        """Count an event."""
        with self._lock:
            match event:
                case Moved():
                    self._read += event.num_read
                    self._written += event.num_written
                case Begun():
                    self._in_flight[event.item] = event
                case Done() if event.cost:
                    self._in_flight.pop(event.item, None)
                    self._done[event.item] = event.cost.num_bytes
                    self._add(event.cost)
                case Retry():
                    self._retries[event.cause] += 1
                    self._in_flight.pop(event.item or "", None)
                case Dropped():
                    self._drop(event)
                case Stage():
                    self._stage = event
                    if event.counts_written:
                        self._num_shards, self._num_bytes = event.num_items or 0, event.total_bytes or 0
                        self._num_resumed, self._resumed_bytes = event.num_done, event.done_bytes
                case Run():
                    self._run = event

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is counted, as of one moment."""
        with self._lock:
            yield from list(self._collect())

    def _add(self, cost: Cost) -> None:
        self._tensors += cost.num_tensors
        self._peak = max(self._peak, cost.peak_memory_bytes)
        self._retries.update(cost.retries)
        for stage, seconds in cost.seconds.items():
            if stage != TOTAL:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        duration = cost.seconds.get(TOTAL, 0.0)
        self._durations[bisect_left(BUCKETS_S, duration)] += 1
        self._duration_sum += duration

    def _drop(self, event: Dropped) -> None:
        """Take back a shard: of this run, or one that an earlier run had done."""
        if self._done.pop(event.item, None) is None:
            self._num_resumed -= 1
            self._resumed_bytes -= event.num_bytes

    def _collect(self) -> Iterator[Metric]:
        num_done = self._num_resumed + len(self._done)
        run = InfoMetricFamily("stockflow_run", "Which run of which plan this is, once that is known.")
        if self._run.run:
            run.add_metric([], {"run": self._run.run, "plan": self._run.plan_id, "version": __version__})
        yield run
        stage = GaugeMetricFamily("stockflow_run_stage", "1 for what the run is at.", labels=["stage"])
        if self._stage.name:
            stage.add_metric([self._stage.name], 1)
        yield stage
        yield CounterMetricFamily(
            "stockflow_read_bytes", "Bytes read from the inputs, by all workers; those of lost work too.", self._read
        )
        yield CounterMetricFamily(
            "stockflow_written_bytes", "Tensor bytes written, by all workers; those of lost work too.", self._written
        )
        yield GaugeMetricFamily("stockflow_output_bytes", "Tensor bytes of the whole output.", self._num_bytes)
        yield GaugeMetricFamily(
            "stockflow_output_done_bytes",
            "Of these, in shards that are done, by earlier runs too.",
            self._resumed_bytes + sum(self._done.values()),
        )
        shards = GaugeMetricFamily("stockflow_shards", "Shards of the output by state.", labels=["state"])
        for state, count in {
            "waiting": max(self._num_shards - num_done - len(self._in_flight), 0),
            "in_flight": len(self._in_flight),
            "done": num_done,
        }.items():
            shards.add_metric([state], count)
        yield shards
        yield GaugeMetricFamily(
            "stockflow_resumed_shards", "Of those that are done, the ones of earlier runs.", self._num_resumed
        )
        yield GaugeMetricFamily(
            "stockflow_in_flight_bytes",
            "Output bytes of the shards that workers are at.",
            sum(begun.num_bytes for begun in self._in_flight.values()),
        )
        yield GaugeMetricFamily(
            "stockflow_busy_workers",
            "Worker processes that are at a shard.",
            len({begun.worker for begun in self._in_flight.values()}),
        )
        yield CounterMetricFamily("stockflow_tensors", "Tensors in the shards this run has done.", self._tensors)
        retries = CounterMetricFamily(
            "stockflow_retries", "Requests (cause read), shards and starts of workers tried again.", labels=["cause"]
        )
        for cause, count in self._retries.items():
            retries.add_metric([cause], count)
        yield retries
        seconds = CounterMetricFamily(
            "stockflow_stage_seconds",
            "Time of the shards done, by stage, over all threads of workers.",
            labels=["stage"],
        )
        for name, spent in self._seconds.items():
            seconds.add_metric([name], spent)
        yield seconds
        bounds = [*map(floatToGoString, BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "stockflow_shard_duration_seconds",
            "Time of a shard from its first read until it is durable.",
            list(zip(bounds, accumulate(self._durations), strict=True)),
            self._duration_sum,
        )
        yield GaugeMetricFamily(
            "stockflow_worker_peak_memory_bytes", "The most memory that any worker has held.", self._peak
        )


@contextmanager
def served(metrics: Metrics, port: int) -> Iterator[int]:
    """Serve metrics at /metrics, on every address of this machine, until the block ends; provide the port.

    Args:
        metrics: what is served, and beside it what the process itself takes (``process_...``).
        port: 0 for any that is free.

    Raises:
        UserError: the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, "::" if _has_ipv6() else "0.0.0.0", registry)
    except OSError as error:
        raise UserError(
            f"--metrics-port {port}: cannot listen there: {error.strerror}; name another one, or 0 for any that is free"
        ) from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _has_ipv6() -> bool:
    """Return whether one socket hears both protocols here."""
    if not socket.has_dualstack_ipv6():
        return False
    try:
        with socket.create_server(("::", 0), family=socket.AF_INET6):
            return True
    except OSError:  # switched off
        return False
