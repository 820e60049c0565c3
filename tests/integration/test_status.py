"""`stockflow status`: how a merge stands, from its prefix alone, on disk and on S3; and with the rights it needs."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from stockflow.engine.process import process_name
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import (
    CheckpointError,
    NotFoundError,
    NumericsError,
    OutputConflictError,
    StockflowError,
    StorageError,
)
from stockflow.events import OnEvent, Retry
from stockflow.output import manifest as manifest_file
from stockflow.output.manifest import Manifest
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.progress.status import Status, exit_code, read_status, status_line, status_lines
from stockflow.recipe import load_recipe
from stockflow.run import shard_events
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import StorageConfig, Store, StoreOptions, open_store
from stockflow.text.records import Place
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.fault_proxy import FaultyProxy
from tests.waiting import HANG_S, wait_until

SHARD_SIZE = 300_000
"""four shards of the little models here"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 2)


@pytest.fixture(scope="module")
def recipe(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", "model_stock", family)


def output_of(url: str, endpoint: str | None = None) -> Store:
    options = {url: StoreOptions(endpoint=endpoint)} if endpoint else {}
    return open_store(url, StorageConfig(options))


def merge_with(recipe: Path, output: str, execute: Any) -> Merged:
    options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", SHARD_SIZE)
    return merge(Inputs.open(load_recipe(str(recipe))), output, options, execute)


@contextmanager
def paused_merge(recipe: Path, output: str) -> Iterator[None]:
    """Have a merge go on in a thread, with its first shard done and its second one in work; let it end at the end."""
    reached, go_on = threading.Event(), threading.Event()

    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards[:1], on_event)
        on_event(Retry("lost"))
        on_event(shard_events.begun(shards[1], process_name()))
        reached.set()
        assert go_on.wait(HANG_S)
        yield from in_this_process(spec, shards[1:], on_event)

    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(merge_with, recipe, output, execute)
        try:
            while not reached.wait(0.1):
                assert not merging.done(), merging.result()
            yield
        finally:
            go_on.set()
            merging.result()


def await_report(store: Store) -> Status:
    """Read the status until the paused run has reported what is in work; that takes a second or three."""

    def has_reported() -> bool:
        progress = read_status(store).progress
        return progress is not None and progress.shards_done == 1 and bool(progress.in_flight)

    wait_until(has_reported)
    return read_status(store)


def check_running(status: Status) -> None:
    assert (status.state, status.num_runs) == ("running", 1)
    assert status.seen_s_ago is not None
    assert (status.shards, status.shards_done) == (4, 1)
    assert status.progress is not None
    assert [one.worker for one in status.progress.in_flight] == [process_name()]
    assert status.progress.retries == {"lost": 1}
    said = "\n".join(status_lines(status))
    assert "running, last seen " in said
    assert "1 of 4 shards" in said
    assert "tried again: 1 x lost" in said
    assert f"{process_name()}: at model-0000" in said
    assert status_line(status).startswith("running  1/4 shards  ")


def test_a_merge_on_disk_while_it_runs_and_when_it_is_finished(recipe: Path, tmp_path: Path) -> None:
    store = output_of(str(tmp_path / "out"))

    with paused_merge(recipe, store.url):
        check_running(await_report(store))

    status = read_status(store)
    assert (status.state, status.shards, status.shards_done, exit_code(status)) == ("finished", 4, 4, 0)
    assert status.bytes_done == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert status.progress is not None
    assert (status.progress.stage, status.progress.bytes_done) == ("finished", status.bytes_done)


def test_a_merge_on_s3_needs_no_more_than_reading_its_output(
    family: Family, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    """Every request is one that a policy for looking allows."""
    url = f"s3://{s3_bucket}/models/out"
    document = {
        "merge_method": "model_stock",
        "base_model": str(family.base),
        "models": [{"model": str(folder)} for folder in family.tuned],
        "stockflow": {"storage": {f"s3://{s3_bucket}": {"endpoint": s3_endpoint}}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    with FaultyProxy(s3_endpoint) as proxy, paused_merge(recipe, url):
        check_running(await_report(output_of(url, proxy.url)))

    used = {"list": "s3:ListBucket", "get": "s3:GetObject", "head": "s3:GetObject"}
    assert set(proxy.steps) <= used.keys()
    for name in ("s3-policy.json", "s3-status-policy.json"):
        allowed = allowed_on(name, "models/out")
        for step, request in zip(proxy.steps, proxy.requests, strict=True):
            key = request.split("?")[0].split("/", 2)[-1]
            resource = "bucket" if step == "list" else "records" if "_stockflow/" in key else key.rpartition("/")[2]
            assert used[step] in allowed(resource), (name, request)


def allowed_on(policy: str, prefix: str) -> Any:
    """Return what tells which actions a policy allows on the bucket, the records or a file of an output."""
    statements = json.loads((runs.REPOSITORY / "deploy" / policy).read_text())["Statement"]

    def allowed(resource: str) -> set[str]:
        output = "/OUTPUT_PREFIX/merged"
        path = {"bucket": "", "records": f"{output}/_stockflow/x"}.get(resource, f"{output}/{resource}")
        actions: set[str] = set()
        for statement in statements:
            resources = statement["Resource"]
            for pattern in [resources] if isinstance(resources, str) else resources:
                place = pattern.removeprefix("arn:aws:s3:::OUTPUT_BUCKET")
                if fnmatchcase(path, place):
                    given = statement["Action"]
                    actions.update([given] if isinstance(given, str) else given)
        return actions

    return allowed


def test_a_policy_for_looking_allows_nothing_else() -> None:
    policy = json.loads((runs.REPOSITORY / "deploy" / "s3-status-policy.json").read_text())

    assert {statement["Action"] for statement in policy["Statement"]} == {"s3:ListBucket", "s3:GetObject"}


def test_no_claim_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    finished = runs.run("status", tmp_path / "out")

    assert finished.returncode == 2
    assert finished.stderr.startswith(f"stockflow: {tmp_path}/out has neither a manifest nor a claim of stockflow: ")
    assert len(finished.stderr.splitlines()) == 1


def test_an_output_that_cannot_be_read_is_said(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "_stockflow").mkdir(parents=True)
    (tmp_path / "out" / "_stockflow" / "claim.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"claim\.json is not a claim of stockflow"):
        read_status(output_of(str(tmp_path / "out")))


@pytest.mark.parametrize("options", [(), ("--watch",)], ids=["once", "watched"])
def test_a_bucket_that_is_not_there_is_said_and_not_waited_for(
    options: Sequence[str], s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)

    told = runs.invoke("status", f"s3://{s3_bucket}-x/out", *options)

    assert told.exit_code == 2
    assert "the bucket does not exist" in told.stderr
    assert "waiting" not in told.stderr


def failing_merge(recipe: Path, output: str, error: BaseException) -> None:
    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        yield from in_this_process(spec, shards[:2], on_event)
        raise error

    with pytest.raises(type(error)):
        merge_with(recipe, output, execute)


@pytest.mark.parametrize(
    "error", [NumericsError("tensor 'a' holds NaN"), StorageError("no answer"), OutputConflictError("another class")]
)
def test_a_merge_that_failed_says_why(recipe: Path, tmp_path: Path, error: StockflowError) -> None:
    failing_merge(recipe, str(tmp_path / "out"), error)

    status = read_status(output_of(str(tmp_path / "out")))

    assert (status.state, status.shards_done, exit_code(status)) == ("failed", 2, error.exit_code)
    assert f"  it said: {error}" in status_lines(status)


@pytest.mark.parametrize(
    ("error", "state", "code"), [(ZeroDivisionError("a bug"), "failed", 70), (KeyboardInterrupt(), "stopped", 130)]
)
def test_a_bug_is_not_taken_for_lost_workers(
    recipe: Path, tmp_path: Path, error: BaseException, state: str, code: int
) -> None:
    """Of lost workers (5) a scheduler tries again, of a bug it would in vain."""
    failing_merge(recipe, str(tmp_path / "out"), error)

    status = read_status(output_of(str(tmp_path / "out")))

    assert (status.state, exit_code(status)) == (state, code)


def test_a_merge_that_was_killed_is_silent_and_then_dead(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = output_of(str(tmp_path / "out"))
    with paused_merge(recipe, store.url):
        await_report(store)
        (record,) = (tmp_path / "out").glob("_stockflow/*/runs/*.json")
        now = time.time()
        states = {}
        for passed_s in (30, 90, 1200):
            monkeypatch.setattr("stockflow.progress.status.time.time", lambda passed_s=passed_s: now + passed_s)
            found = read_status(store)
            states[passed_s] = found.state, found.is_over and exit_code(found) == 5
        monkeypatch.undo()
        record.unlink()
        ended = read_status(store)

    assert states == {30: ("running", False), 90: ("silent", True), 1200: ("dead", True)}
    assert (ended.state, exit_code(ended)) == ("dead", 5)


def test_the_status_of_a_killed_merge_is_5_and_watching_it_ends(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    failing_merge(recipe, str(output), NumericsError("tensor 'a' holds NaN"))
    (report,) = output.glob("_stockflow/*/progress.json")
    said = json.loads(report.read_text())
    report.write_text(json.dumps(said | {"stage": "merging", "updated": time.time() - 90}))
    claim = output / "_stockflow" / "claim.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"heartbeat": time.time() - 90}))
    leave_record(output, 90)

    told, watched = runs.run("status", output), runs.run("status", output, "--watch")

    assert "killed, or cut off from storage: no sign of life for" in told.stdout
    assert (told.returncode, watched.returncode) == (5, 5)


@pytest.mark.parametrize("beaten_s_ago", [30, 1200])
def test_the_record_of_a_killed_run_does_not_hide_how_the_next_one_failed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beaten_s_ago: float
) -> None:
    """Nobody removes that record until `stockflow clean`."""
    failing_merge(recipe, str(tmp_path / "out"), NumericsError("tensor 'a' holds NaN"))
    killed = leave_record(tmp_path / "out", beaten_s_ago)
    now = time.time()

    states = []
    for passed_s in (0, 60):
        monkeypatch.setattr("stockflow.progress.status.time.time", lambda passed_s=passed_s: now + passed_s)
        status = read_status(output_of(str(tmp_path / "out")))
        states.append((status.state, exit_code(status)))
    monkeypatch.undo()
    killed.write_text(json.dumps({"heartbeat": time.time() + 1}))
    resumed = read_status(output_of(str(tmp_path / "out")))

    assert states == [("failed", 2), ("failed", 2)]
    assert (resumed.state, resumed.num_runs) == ("running", 1), "a beat after that end is a run at work"


def test_a_run_goes_on_though_another_one_has_just_failed(recipe: Path, tmp_path: Path) -> None:
    """It beats every ten seconds, so its last beat is before that end."""
    failing_merge(recipe, str(tmp_path / "out"), NumericsError("tensor 'a' holds NaN"))
    leave_record(tmp_path / "out", 5)

    assert read_status(output_of(str(tmp_path / "out"))).state == "running"


def leave_record(output: Path, beaten_s_ago: float) -> Path:
    """Leave what a run leaves that is killed with SIGKILL, and return it."""
    (report,) = output.glob("_stockflow/*/progress.json")
    record = report.parent / "runs" / "0123456789abcdef.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"heartbeat": time.time() - beaten_s_ago}))
    return record


def test_a_merge_that_publishes_while_it_is_looked_at_is_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = output_of(str(tmp_path / "out"))
    merge_with(recipe, store.url, in_this_process)
    answers: list[Exception] = [NotFoundError("not yet")]

    read = manifest_file.read

    def not_at_first(store: Place) -> Manifest:
        if answers:
            raise answers.pop()
        return read(store)

    monkeypatch.setattr("stockflow.output.manifest.read", not_at_first)
    status = read_status(store)

    assert not answers
    assert (status.state, exit_code(status)) == ("finished", 0)


def test_the_shards_of_a_run_that_reported_nothing_are_counted(recipe: Path, tmp_path: Path) -> None:
    failing_merge(recipe, str(tmp_path / "out"), NumericsError("no"))
    (report,) = (tmp_path / "out").glob("_stockflow/*/progress.json")
    report.write_text('{"plan_id": "x", "started": 1.0}')

    status = read_status(output_of(str(tmp_path / "out")))

    assert (status.shards, status.shards_done, status.progress) == (None, 2, None)
    assert "  plan" in "\n".join(status_lines(status))


@pytest.mark.parametrize("error", [None, NumericsError("tensor 'a' holds NaN")], ids=["finished", "failed"])
def test_watching_ends_with_the_merge_and_its_exit_code(
    recipe: Path, tmp_path: Path, error: StockflowError | None
) -> None:
    if error is None:
        merge_with(recipe, str(tmp_path / "out"), in_this_process)
    else:
        failing_merge(recipe, str(tmp_path / "out"), error)

    finished = runs.run("status", tmp_path / "out", "--watch", "--json", "--interval", "0.1")

    assert finished.returncode == (0 if error is None else 2)
    assert json.loads(finished.stdout)["state"] == ("finished" if error is None else "failed")
    assert finished.stderr == ""


def test_watching_waits_for_a_merge_to_begin(recipe: Path, tmp_path: Path) -> None:
    """Whoever submits a job and then watches is faster than the job."""
    watching = runs.start("status", tmp_path / "out", "--watch", "--interval", "0.1")
    assert watching.stderr is not None
    assert watching.stderr.readline() == "no merge has begun there; waiting up to 120 s for one\n"

    merge_with(recipe, str(tmp_path / "out"), in_this_process)

    assert watching.wait(HANG_S) == 0


def test_no_rate_is_told_before_anything_was_read(recipe: Path, tmp_path: Path) -> None:
    failing_merge(recipe, str(tmp_path / "out"), NumericsError("no"))
    status = read_status(output_of(str(tmp_path / "out")))
    assert status.progress is not None
    begun = replace(status, state="running", progress=replace(status.progress, bytes_read=0, bytes_written=0))

    assert any(line.startswith("  rate not known yet; ") for line in status_lines(begun))
