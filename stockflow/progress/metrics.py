"""What a merge counts, for Prometheus: events added up, and served to whoever scrapes.

The driver knows everything, from its workers' counters and receipts; so its endpoint is the only one to scrape.
`docs/clusters.md#metrics` says what each metric means; a test holds `deploy/grafana/stockflow.json` against them.
"""

import socket
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
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
from stockflow.events import Cost, Done, Event
from stockflow.progress.state import Overview, Snapshot, State
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
        self._state = State()
        self._lock = threading.Lock()
        """a shard and its cost are counted at one moment"""
        self._costs = _Costs()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, Done) and event.cost:
            with self._lock:
                self._state.take(event)
                self._costs.add(event.cost)
        else:
            self._state.take(event)

    def collect(self) -> Iterator[Metric]:
        """Yield everything that is counted, as of one moment."""
        with self._lock:
            now = self._state.overview()
            costs = list(self._costs.collect())
        yield from _run(now)
        yield from _bytes(now)
        yield from _shards(now.output)
        yield _labelled(
            CounterMetricFamily,
            "stockflow_retries",
            "Requests (cause read), shards and starts of workers tried again.",
            "cause",
            {**dict.fromkeys(CAUSES, 0), **now.retries},
        )
        yield from costs


class _Costs:
    """The sum of what shards took; whoever calls holds the lock."""

    def __init__(self) -> None:
        self._num_tensors = self._peak = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._durations = [0] * (len(BUCKETS_S) + 1)
        self._duration_sum = 0.0

    def add(self, cost: Cost) -> None:
        self._num_tensors += cost.num_tensors
        self._peak = max(self._peak, cost.peak_memory_bytes)
        for stage, seconds in cost.seconds.items():
            if stage != TOTAL:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        total_s = cost.seconds.get(TOTAL, 0.0)
        self._durations[bisect_left(BUCKETS_S, total_s)] += 1
        self._duration_sum += total_s

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("stockflow_tensors", "Tensors in the shards this run has done.", self._num_tensors)
        yield _labelled(
            CounterMetricFamily,
            "stockflow_stage_seconds",
            "Time of the shards done, by stage, over all threads of workers.",
            "stage",
            self._seconds,
        )
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


def _run(now: Overview) -> Iterator[Metric]:
    run = InfoMetricFamily("stockflow_run", "Which run of which plan this is, once that is known.")
    if now.run:
        run.add_metric([], {"run": now.run.run, "plan": now.run.plan_id, "version": __version__})
    yield run
    stages = {now.stage.name: 1} if now.stage.name else {}
    yield _labelled(GaugeMetricFamily, "stockflow_run_stage", "1 for what the run is at.", "stage", stages)


def _bytes(now: Overview) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "stockflow_read_bytes", "Bytes read from the inputs, by all workers; those of lost work too.", now.num_read
    )
    yield CounterMetricFamily(
        "stockflow_written_bytes", "Tensor bytes written, by all workers; those of lost work too.", now.num_written
    )
    yield GaugeMetricFamily(
        "stockflow_output_bytes", "Tensor bytes of the whole output.", now.output.stage.total_bytes or 0
    )
    yield GaugeMetricFamily(
        "stockflow_output_done_bytes",
        "Of these, in shards that are done, by earlier runs too.",
        now.output.finished_bytes,
    )


def _shards(output: Snapshot) -> Iterator[Metric]:
    begun = [one.begun for one in output.in_work]
    waiting = max((output.stage.num_items or 0) - output.num_done - len(begun), 0)
    states = {"waiting": waiting, "in_flight": len(begun), "done": output.num_done}
    yield _labelled(GaugeMetricFamily, "stockflow_shards", "Shards of the output by state.", "state", states)
    yield GaugeMetricFamily(
        "stockflow_resumed_shards", "Of those that are done, the ones of earlier runs.", output.num_resumed
    )
    yield GaugeMetricFamily(
        "stockflow_in_flight_bytes",
        "Output bytes of the shards that workers are at.",
        sum(each.num_bytes for each in begun),
    )
    yield GaugeMetricFamily(
        "stockflow_busy_workers", "Worker processes that are at a shard.", len({each.worker for each in begun})
    )


def _labelled(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    """Return a metric with a value for each value of its label."""
    metric = family(name, text, labels=[label])
    for key, value in values.items():
        metric.add_metric([key], value)
    return metric


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
