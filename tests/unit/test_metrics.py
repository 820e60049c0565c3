"""What events add up to for Prometheus; every expected number is written down here."""

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stockflow.events import Begun, Cost, Done, Dropped, Event, Moved, Note, Retry, Run, Stage
from stockflow.progress.metrics import CAUSES, Metrics
from stockflow.run.executors.tries import Cause

MERGING = Stage(
    "merging", total_bytes=1000, done_bytes=100, num_items=10, num_done=1, unit="shards", counts_written=True
)


def counted(events: Iterable[Event]) -> Metrics:
    metrics = Metrics()
    for event in events:
        metrics(event)
    return metrics


def scrape(metrics: Metrics) -> dict[str, float]:
    """Every sample, by name and labels as they stand in the text."""
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    return {
        "".join([sample.name, *(f"{{{value}}}" for value in sample.labels.values())]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def done(item: str, num_bytes: int = 100, total_s: float = 3.0, **seconds: float) -> Done:
    return Done(item, cost=Cost(num_bytes, 7, {"total": total_s, **seconds}, {"read": 2}, 5000 + num_bytes))


def test_a_merge_in_the_middle() -> None:
    now = scrape(
        counted(
            [
                Run("run-1", "plan-1"),
                Stage("opening checkpoints"),
                Done("a file"),
                MERGING,
                Begun("s1", "a:1", 100),
                Begun("s2", "b:2", 200),
                Begun("s3", "b:3", 50),
                Moved(300, 20),
                Moved(30, 2, "a:1"),
                done("s1", read=1.5, combine=0.5),
                Retry("lost", "s2"),
                Retry("lost"),
                Begun("s4", "a:1", 70),
                Note("anything"),
            ]
        )
    )

    assert (now["stockflow_read_bytes_total"], now["stockflow_written_bytes_total"]) == (330, 22)
    assert (now["stockflow_output_bytes"], now["stockflow_output_done_bytes"]) == (1000, 200)
    assert [now[f"stockflow_shards{{{state}}}"] for state in ("waiting", "in_flight", "done")] == [6, 2, 2]
    assert (now["stockflow_resumed_shards"], now["stockflow_tensors_total"]) == (1, 7)
    assert (now["stockflow_in_flight_bytes"], now["stockflow_busy_workers"]) == (120, 2)
    assert (now["stockflow_retries_total{lost}"], now["stockflow_retries_total{read}"]) == (2, 2)
    assert now["stockflow_stage_seconds_total{read}"] == 1.5
    assert now["stockflow_stage_seconds_total{combine}"] == 0.5
    assert "stockflow_stage_seconds_total{total}" not in now, "the sum over stages would count everything twice"
    assert now["stockflow_worker_peak_memory_bytes"] == 5100
    assert now["stockflow_run_stage{merging}"] == 1
    assert any(name.startswith("stockflow_run_info") and "{run-1}" in name and "{plan-1}" in name for name in now)


def test_a_shard_that_is_no_good_after_all_waits_again() -> None:
    metrics = counted([MERGING, Begun("s1", "a:1", 100), done("s1"), Dropped("s1", 100), Dropped("of before", 100)])

    now = scrape(metrics)

    assert [now[f"stockflow_shards{{{state}}}"] for state in ("waiting", "in_flight", "done")] == [10, 0, 0]
    assert (now["stockflow_output_done_bytes"], now["stockflow_resumed_shards"]) == (0, 0)
    assert now["stockflow_tensors_total"] == 7, "a counter never falls"


def test_times_of_shards_are_a_histogram() -> None:
    now = scrape(counted([MERGING, *(done(f"s{total_s}", total_s=total_s) for total_s in (0.5, 1.0, 1.1, 15.0, 9e3))]))

    buckets = {name: value for name, value in now.items() if "duration_seconds_bucket" in name}
    assert buckets["stockflow_shard_duration_seconds_bucket{1.0}"] == 2, "bounds belong to their bucket"
    assert buckets["stockflow_shard_duration_seconds_bucket{2.0}"] == 3
    assert buckets["stockflow_shard_duration_seconds_bucket{20.0}"] == 4
    assert buckets["stockflow_shard_duration_seconds_bucket{3600.0}"] == 4
    assert buckets["stockflow_shard_duration_seconds_bucket{+Inf}"] == 5
    assert now["stockflow_shard_duration_seconds_count"] == 5
    assert now["stockflow_shard_duration_seconds_sum"] == pytest.approx(9017.6)


def test_counters_begin_at_zero_for_every_cause_that_an_executor_tells() -> None:
    now = scrape(Metrics())

    assert set(CAUSES) == {"read", *Cause}
    assert all(now[f"stockflow_retries_total{{{cause}}}"] == 0 for cause in CAUSES)
    assert not any(name.startswith(("stockflow_run_info", "stockflow_run_stage")) for name in now)
