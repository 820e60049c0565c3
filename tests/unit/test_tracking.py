"""What progress.json says, at times that the test chooses; the arithmetic is done again here."""

import signal
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stockflow.errors import (
    CheckpointError,
    InterruptedRunError,
    NumericsError,
    OutputConflictError,
    StorageError,
)
from stockflow.events import Done, Moved, OnEvent, Retry, Stage
from stockflow.output import claims
from stockflow.output.claims import Claim
from stockflow.output.keys import CLAIM_FILE
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import MergePlan
from stockflow.progress import file as progress_record
from stockflow.progress.file import Progress, Tracker, progress_file
from stockflow.recipe import load_recipe
from stockflow.run import shard_events
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import Stamp, StorageConfig, Store, open_store
from tests.checkpoints import make_family, write_recipe
from tests.pages import section

MIB = 2**20


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    """Four shards of one tensor each."""
    root = tmp_path_factory.mktemp("plan")
    shapes = {f"layer.{number}": (100, 100) for number in range(4)}
    recipe = write_recipe(root / "recipe.yaml", "model_stock", make_family(root, 2, shapes, buffers=False))
    inputs = Inputs.open(load_recipe(str(recipe)))
    made, _ = plan_merge(inputs, str(root / "out"), MergeOptions(1024 * MIB, 1, shard_size=25_000))
    assert len(made.shards) == 4
    return made


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def done(plan: MergePlan, number: int, retries: dict[str, int] | None = None) -> Done:
    shard = plan.shards[number]
    stamp = Stamp(shard.num_bytes, "x")
    receipt = Receipt(
        plan.plan_id, shard.file, shard.num_bytes, "0" * 64, stamp, "cpu", 0, {}, retries or {},
        0, (), 0, (), 1.0, 2.0, "n:1",
    )  # fmt: skip
    return shard_events.done(shard, receipt)


def tensor_bytes(plan: MergePlan, number: int) -> int:
    return sum(job.output.num_bytes for job in plan.shards[number].jobs)


def merging(plan: MergePlan, clock: Clock, resumed: Collection[int] = ()) -> Tracker:
    tracker = Tracker(plan, "run", clock)
    tracker(shard_events.merging(plan, [plan.shards[number].file for number in resumed]))
    return tracker


def begin(tracker: OnEvent, plan: MergePlan, number: int, worker: str) -> None:
    tracker(shard_events.begun(plan.shards[number], worker))


def test_a_merge_in_the_middle(plan: MergePlan) -> None:
    clock, files = Clock(), [shard.file for shard in plan.shards]
    tracker = merging(plan, clock, resumed=[0])
    begin(tracker, plan, 1, "node-a:1")
    begin(tracker, plan, 2, "node-b:2")
    clock.now += 10
    tracker(Moved(60_000, tensor_bytes(plan, 1)))
    tracker(done(plan, 1, retries={"read": 3}))
    tracker(Retry("lost", files[2]))
    clock.now += 10
    begin(tracker, plan, 2, "node-c:3")
    tracker(Moved(30_000, 10_000))

    now = tracker.progress()

    written = tensor_bytes(plan, 1) + 10_000
    num_done = plan.shards[0].num_bytes + plan.shards[1].num_bytes + 10_000
    left = tensor_bytes(plan, 2) + tensor_bytes(plan, 3) - 10_000
    assert (now.stage, now.started, now.updated) == ("merging", 1000.0, 1020.0)
    assert (now.shards, now.shards_done, now.shards_resumed) == (4, 2, 1)
    assert (now.bytes_read, now.bytes_written, now.bytes_done) == (90_000, written, num_done)
    assert now.bytes_per_s == pytest.approx((90_000 + written) / 20)
    assert now.seconds_left == pytest.approx(left / (written / 20))
    assert [(one.shard, one.worker, one.since) for one in now.in_flight] == [(files[2], "node-c:3", 1020.0)]
    assert now.retries == {"lost": 1, "read": 3}


def test_what_lost_workers_wrote_is_not_done(plan: MergePlan) -> None:
    tracker = merging(plan, Clock())
    for attempt in range(3):
        begin(tracker, plan, 0, f"node:{attempt}")
        tracker(Moved(0, tensor_bytes(plan, 0) - 1))
        tracker(Retry("lost", plan.shards[0].file))
    lost_all = tracker.progress().bytes_done
    begin(tracker, plan, 0, "node:3")
    tracker(Moved(0, tensor_bytes(plan, 0)))
    at_work = tracker.progress().bytes_done
    tracker(done(plan, 0))

    assert (lost_all, at_work) == (0, tensor_bytes(plan, 0))
    assert tracker.progress().bytes_done == plan.shards[0].num_bytes, "with its header"


def test_what_is_dropped_is_done_no_more(plan: MergePlan) -> None:
    """A shard of an earlier run, and one of this run that is merged again."""
    tracker = merging(plan, Clock(), resumed=[0, 1])
    begin(tracker, plan, 2, "node:1")
    tracker(Moved(0, tensor_bytes(plan, 2)))
    tracker(done(plan, 2))
    before = tracker.progress()
    for number in (0, 2):
        tracker(shard_events.dropped(plan.shards[number]))
    dropped = tracker.progress()

    assert (before.shards_done, before.shards_resumed) == (3, 2)
    assert before.bytes_done == sum(shard.num_bytes for shard in plan.shards[:3])
    assert (dropped.shards_done, dropped.shards_resumed) == (1, 1)
    assert dropped.bytes_done == plan.shards[1].num_bytes


def test_everything_is_done_at_the_end_and_stays_so_while_it_is_published(plan: MergePlan) -> None:
    clock = Clock()
    tracker = merging(plan, clock, resumed=[0])
    for number in range(1, 4):
        begin(tracker, plan, number, "node:1")
        clock.now += 10
        tracker(Moved(90_000, tensor_bytes(plan, number)))
        tracker(done(plan, number))
    merged = tracker.progress()
    tracker(Stage("publishing"))

    assert (merged.stage, merged.seconds_left, merged.bytes_done) == ("merging", 0, plan.num_output_bytes)
    assert replace(merged, stage="publishing") == tracker.progress()


def test_rates_are_of_the_last_minute_and_of_all(plan: MergePlan) -> None:
    clock = Clock()
    tracker = merging(plan, clock)
    for _ in range(100):
        clock.now += 1
        tracker(Moved(1000, 100))
    for _ in range(60):
        clock.now += 1
        tracker(Moved(10, 0))

    now = tracker.progress()

    assert now.bytes_per_s_lately == pytest.approx(10, rel=0.05)
    assert now.bytes_per_s == pytest.approx((100 * 1100 + 600) / 160)
    assert now.seconds_left is None, "nothing was written in the last minute"


def test_a_report_comes_back_as_it_was_written(plan: MergePlan) -> None:
    tracker = merging(plan, Clock())
    begin(tracker, plan, 0, "größe:7")

    written = tracker.progress()

    assert written == progress_record.parse(progress_record.encode(written), "progress.json")


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b'{"plan_id": "x", "shards": 3}', b"\xff" * 10])
def test_what_is_no_report_is_refused_in_words(payload: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"progress\.json is not a report of stockflow: "):
        progress_record.parse(payload, "progress.json")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"), StorageConfig(), writable=True)


@pytest.mark.parametrize(
    ("error", "stage", "exit_code", "message"),
    [
        (NumericsError("tensor 'a' holds NaN"), "failed", 2, "tensor 'a' holds NaN"),
        (InterruptedRunError("stopped by SIGINT"), "stopped", 130, "stopped by SIGINT"),
        (ZeroDivisionError("secret"), "failed", 70, "ZeroDivisionError"),
        (KeyboardInterrupt(), "stopped", 130, "KeyboardInterrupt"),
        (StorageError("s3://b: no answer"), "failed", 3, "s3://b: no answer"),
    ],
    ids=["a mistake", "a signal", "a bug", "Ctrl-C", "storage"],
)
def test_how_a_run_ended_is_reported(
    plan: MergePlan, store: Store, error: BaseException, stage: str, exit_code: int, message: str
) -> None:
    tracker = merging(plan, Clock())
    begin(tracker, plan, 0, "here:1")

    with pytest.raises(type(error)), progress_file(store, tracker):
        raise error

    last = progress_record.read(store, plan.plan_id)
    assert last is not None
    assert (last.stage, last.exit_code, last.message, last.in_flight) == (stage, exit_code, message, ())


def test_what_a_signal_became_on_its_way_through_ray_is_a_stop(
    plan: MergePlan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = merging(plan, Clock())
    begin(tracker, plan, 0, "here:1")
    monkeypatch.setattr("stockflow.interruption._received", [signal.SIGTERM])

    with pytest.raises(SystemError), progress_file(store, tracker):
        raise SystemError("returned a result with an exception set")

    last = progress_record.read(store, plan.plan_id)
    assert last is not None
    assert (last.stage, last.exit_code) == ("stopped", 143)
    assert last.message.startswith("stopped by SIGTERM; run the same command again")


@pytest.mark.parametrize("owner", [None, "another plan", "this plan"])
def test_a_conflict_is_reported_only_where_the_prefix_is_still_ours(
    plan: MergePlan, store: Store, owner: str | None
) -> None:
    if owner is not None:
        claim = Claim.now(plan.plan_id if owner == "this plan" else "0" * 64, "their run")
        store.put(CLAIM_FILE, claims.encode(claim))

    with pytest.raises(OutputConflictError), progress_file(store, merging(plan, Clock())):
        raise OutputConflictError("another class")

    last = progress_record.read(store, plan.plan_id)
    told = None if last is None else (last.stage, last.exit_code, last.message)
    assert told == (("failed", 2, "another class") if owner == "this plan" else None)


@pytest.mark.parametrize("answer", ["refuses", "hangs"])
def test_storage_that_is_gone_does_not_keep_a_run_from_ending(plan: MergePlan, answer: str) -> None:
    tried, ended, waited = threading.Event(), threading.Event(), threading.Event()

    class Gone:
        def put(self, key: str, payload: bytes) -> None:
            tried.set()
            if answer == "hangs" and not ended.wait(60):
                waited.set()
            raise StorageError("still gone")

    store: Any = Gone()
    with pytest.raises(StorageError, match=r"^gone$"), progress_file(store, merging(plan, Clock()), 0.1):
        raise StorageError("gone")
    ended.set()

    assert tried.wait(60)
    assert not waited.is_set()


def test_nothing_is_written_before_the_prefix_is_claimed(plan: MergePlan, store: Store) -> None:
    with progress_file(store, Tracker(plan, "run")) as report:
        report()

    assert progress_record.read(store, plan.plan_id) is None


@pytest.mark.parametrize("num_reports", [0, 1])
def test_a_finished_run_says_so_if_it_ever_said_anything(plan: MergePlan, store: Store, num_reports: int) -> None:
    with progress_file(store, merging(plan, Clock())) as report:
        for _ in range(num_reports):
            report()

    last = progress_record.read(store, plan.plan_id)
    told = [] if last is None else [(last.stage, last.exit_code)]
    assert told == [("finished", 0)] * num_reports


def test_every_field_is_documented() -> None:
    page = section("clusters.md", "Operations")
    fields = Progress.__dataclass_fields__

    assert [name for name in fields if f"`{name}`" not in page] == []
    assert "stockflow-progress-1" in page
