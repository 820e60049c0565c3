"""The Ray executor on a real cluster, which these tests start: same bytes, lost workers replaced, clear errors."""

import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import boto3
import pytest
import ray
import yaml

from stockflow import __version__
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import (
    BudgetError,
    ComputeLostError,
    InterruptedRunError,
    NotFoundError,
    NumericsError,
    PlanError,
    StorageError,
    UserError,
)
from stockflow.events import Begun, Done, Event, Moved, Note, OnEvent, Retry, Workers, all_of, ignore
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.executors.ray import RayOptions, actor, connected, loop
from stockflow.run.executors.ray import cluster as cluster_module
from stockflow.run.executors.ray import run as run_on_ray
from stockflow.run.executors.tries import Limits
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig
from tests import ray_items, runs
from tests.checkpoints import LLAMA_CONFIG, Family, make_family, write_recipe
from tests.s3_server import free_port
from tests.selection import mostly_slow
from tests.waiting import HANG_S, wait_until

NUM_CPUS = 4
SHARD_SIZE = 300_000
PATIENT = {"no_worker_timeout_s": math.inf, "stall_timeout_s": math.inf}
QUICKLY = RayOptions(num_workers=2, no_worker_timeout_s=HANG_S, storage_pause_s=0.1)


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[str]:
    """The address of a cluster with logical CPUs and one logical GPU; its workers have the S3 credentials."""
    del s3_endpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(RayOptions(num_workers=NUM_CPUS, gpus_per_worker=1 / NUM_CPUS), NUM_CPUS):
            yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(
        tmp_path_factory.mktemp("family"), 2, num_shards=2, config=LLAMA_CONFIG | {"tie_word_embeddings": True}
    )


@pytest.fixture(scope="module")
def recipe(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", "model_stock", family)


@pytest.fixture(scope="module")
def expected(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the shards, by the local executor."""
    result = runs.merge_here(recipe, tmp_path_factory.mktemp("local") / "out", shard_size=SHARD_SIZE)
    return runs.expected_digests([result])[0]


E = TypeVar("E", bound=Event)


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of a kind."""
        return [event for event in self._events if isinstance(event, kind)]

    def notes(self) -> list[str]:
        """Return what was said, but for what is only said on a machine that is busy."""
        return [note.text for note in self.of(Note) if not note.text.startswith("no worker has come for")]


class Clock:
    """The clock of the driver's loop, which a test puts forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        self.sleep = time.sleep
        monkeypatch.setattr(loop, "time", self)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


class ClockOfHangs(Clock):
    """An hour passes as soon as an item says that it has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, said: Path) -> None:
        super().__init__(monkeypatch)
        self.said = said

    def monotonic(self) -> float:
        self.ahead_s = 3600.0 if self.said.exists() else 0.0
        return super().monotonic()


def merge_on_ray(recipe: Path, output: str, options: RayOptions, on_event: OnEvent = ignore) -> Merged:
    def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], told: Any) -> Iterator[Receipt]:
        return places.on_ray(spec, shards, told, options)

    how = MergeOptions(1024 * runs.MIB, num_threads=1, device="auto", shard_size=SHARD_SIZE)
    return merge(Inputs.open(load_recipe(str(recipe))), output, how, execute, on_event)


def run_items(
    start: Callable[[], Callable[[Any, Any, int], Any]],
    items: Sequence[Any],
    options: RayOptions = QUICKLY,
    on_event: OnEvent = ignore,
) -> list[Any]:
    """Run items that are all of one size."""
    return list(run_on_ray(start, items, size=lambda item: 1, options=options, on_event=on_event))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(RayOptions(num_workers=1), marks=pytest.mark.slow),
        RayOptions(num_workers=2),
        pytest.param(RayOptions(num_workers=4), marks=pytest.mark.slow),
        RayOptions(gpus_per_worker=0.5),
    ],
    ids=["1 worker", "2 workers", "4 workers", "2 workers on one logical GPU"],
)
def test_the_number_of_workers_does_not_change_a_byte(
    cluster: str, recipe: Path, expected: dict[str, str], tmp_path: Path, options: RayOptions
) -> None:
    listener = Listener()

    result = merge_on_ray(recipe, str(tmp_path / "out"), options, listener)

    assert len(expected) >= 4
    assert expected == runs.shard_digests(tmp_path / "out")
    num_bytes = sum(job.output.num_bytes for job in result.plan.jobs)
    begun, files = listener.of(Begun), {shard.file for shard in result.plan.shards}
    sizes = {event.item: event.num_bytes for event in begun}  # an idle worker may have begun a slow one's, too
    num_written = sum(event.num_written for event in listener.of(Moved))
    assert num_written == num_bytes if len(begun) == len(files) else num_written >= num_bytes
    assert num_bytes == sum(sizes.values())
    assert set(sizes) == {event.item for event in listener.of(Done)} == files
    assert {event.worker for event in begun} >= {event.worker for event in listener.of(Done)}
    assert listener.of(Workers) == ([] if options.num_workers else [Workers(2)])


def test_s3_to_s3_gives_the_bytes_of_disk_to_disk(
    cluster: str, family: Family, expected: dict[str, str], s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            client.upload_file(str(path), s3_bucket, f"in/{folder.name}/{path.name}")
    document = {
        "merge_method": "model_stock",
        "base_model": f"s3://{s3_bucket}/in/base",
        "models": [{"model": f"s3://{s3_bucket}/in/{folder.name}"} for folder in family.tuned],
        "stockflow": {"storage": {f"s3://{s3_bucket}": {"endpoint": s3_endpoint}}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))

    result = merge_on_ray(recipe, f"s3://{s3_bucket}/out", RayOptions(num_workers=2))

    assert expected == runs.expected_digests([result])[0]


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_worker_killed_in_the_middle_of_a_shard_is_replaced(
    cluster: str,
    recipe: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    listener = Listener()
    start = places.StartWorker
    monkeypatch.setattr(places, "StartWorker", lambda spec: ray_items.HangingOnce(start(spec), tmp_path))

    with ThreadPoolExecutor(1) as beside:
        beside.submit(_kill_when_noted, tmp_path, "hanging")
        merge_on_ray(
            recipe, str(tmp_path / "out"), RayOptions(num_workers=num_workers, least_slow_s=math.inf), listener
        )

    assert expected == runs.shard_digests(tmp_path / "out")
    assert len(list(tmp_path.glob("begun-*"))) == len(expected) + 1
    (note,) = listener.notes()
    assert re.match(rf"{os.uname().nodename}:\d+ was lost, another does model-\S+ again: ", note)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("is_stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shard_whose_worker_is_slow_is_merged_by_an_idle_one_and_nothing_is_left_of_the_first(
    cluster: str,
    recipe: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_stopped: bool,
) -> None:
    """The slow one has begun to write; it is ended when the other one is done, or with the run if it hears nothing."""
    listener = Listener()
    start = places.StartWorker
    monkeypatch.setattr(places, "StartWorker", lambda spec: ray_items.HangingOnce(start(spec), tmp_path, is_stopped))
    Clock(monkeypatch).sleep = lambda _: wait_until(lambda: not _is_there(tmp_path / "hanging-1"))

    merge_on_ray(recipe, str(tmp_path / "out"), RayOptions(num_workers=2, least_slow_s=0.5), listener)

    assert expected == runs.shard_digests(tmp_path / "out")
    assert len(list(tmp_path.glob("begun-*"))) == len(expected) + 1
    assert runs.leftovers(tmp_path / "out") == []
    assert listener.notes() == []


def _kill_when_noted(folder: Path, name: str) -> None:
    os.kill(int(ray_items.await_note(folder, name).read_text()), signal.SIGKILL)


def _is_there(note: Path) -> bool:
    """Return whether the process that left a note is alive; while any thread is, its files stay open and locked."""
    with suppress(OSError):
        process = Path(f"/proc/{note.read_text()}")
        has_ended = (process / "stat").read_text().rpartition(")")[2].startswith(" Z")  # its first thread has
        return not has_ended or len(list((process / "task").iterdir())) > 1
    return False


def test_the_largest_items_go_first(cluster: str, tmp_path: Path) -> None:
    results = run_on_ray(
        ray_items.Doing(ray_items.echo, tmp_path),
        [2, 9, 5],
        size=lambda item: item,
        options=RayOptions(num_workers=1),
    )

    assert [item for item, _ in results] == [9, 5, 2]


def test_what_workers_count_reaches_the_driver(cluster: str, tmp_path: Path) -> None:
    listener = Listener()

    run_items(ray_items.Doing(ray_items.echo, tmp_path), range(1, 21), on_event=listener)

    moved = listener.of(Moved)
    assert (sum(each.num_read for each in moved), sum(each.num_written for each in moved)) == (210, 420)
    assert {each.worker.partition(":")[0] for each in moved} == {os.uname().nodename}


def test_workers_live_as_long_as_the_run(cluster: str, tmp_path: Path) -> None:
    results = run_items(ray_items.Doing(ray_items.echo, tmp_path), range(1, 21))

    assert len({pid for _, pid in results}) <= 2


def test_an_item_that_fails_on_storage_is_tried_again(cluster: str, tmp_path: Path) -> None:
    items = [("never", 0), ("twice", Limits().storage_failures - 1)]

    assert sorted(run_items(ray_items.Doing(ray_items.fail_on_storage, tmp_path), items)) == ["never", "twice"]


def test_an_item_that_keeps_failing_on_storage_is_given_up(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"was tried 3 times, the last time: always cannot be written$"):
        run_items(ray_items.Doing(ray_items.fail_on_storage, tmp_path), [("always", 99)])

    assert len(list(tmp_path.glob("always-*"))) == Limits().storage_failures


def test_a_start_that_fails_on_storage_is_tried_again(cluster: str, tmp_path: Path) -> None:
    times = Limits().storage_failures - 1

    assert run_items(ray_items.FailingStart(tmp_path, times), [7], QUICKLY) == [7]


@pytest.mark.parametrize("kind", [NumericsError, NotFoundError])
def test_a_users_mistake_is_raised_as_itself(cluster: str, tmp_path: Path, kind: type[UserError]) -> None:
    message = "tensor 'a.b' holds NaN at 17; mend it"

    with pytest.raises(kind, match=f"^{message}$") as raised:
        run_items(ray_items.Doing(ray_items.raise_it, tmp_path), [kind(message)])

    assert kind is type(raised.value)


def test_a_bug_is_raised_with_the_traceback_of_the_worker(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="raise_it"):
        run_items(ray_items.Doing(ray_items.raise_it, tmp_path), [ZeroDivisionError("oh")])


def test_an_error_of_one_process_is_tried_in_another(cluster: str, tmp_path: Path) -> None:
    """A GPU that fell off the bus says so by a plain RuntimeError, and for ever."""
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered")

    (pid,) = run_items(ray_items.Doing(ray_items.raise_first_time, tmp_path), [error])

    assert str(pid) not in {path.read_text() for path in tmp_path.glob("raised-1")}


def test_a_start_that_is_refused_while_others_work_costs_only_that_worker(cluster: str, tmp_path: Path) -> None:
    listener = Listener()

    def tell_it(event: Event) -> None:
        if isinstance(event, Note) and "died before it was ready" in event.text:
            ray_items.note(tmp_path, "told")

    results = run_items(
        ray_items.RefusedLater(tmp_path), [1, 2, 3, 4, 5], RayOptions(num_workers=2), all_of(listener, tell_it)
    )

    assert sorted(results) == [1, 2, 3, 4, 5]
    assert Note("a worker died before it was ready: this node is not like the others") in listener.of(Note)


def test_a_mistake_found_at_the_start_is_raised_as_itself(cluster: str) -> None:
    with pytest.raises(PlanError, match=r"^no CUDA device$"):
        run_items(ray_items.RaisingStart(PlanError("no CUDA device")), [1])


@pytest.mark.parametrize("kind", mostly_slow(["numpy", "mmap", "torch"], ["numpy"]))
def test_an_item_whose_memory_is_refused_is_done_with_less_of_it(cluster: str, kind: str) -> None:
    """By itself, not by Ray, which ends a worker only when its node has too little left."""
    listener = Listener()

    results = run_on_ray(ray_items.Starving(kind), ["big"], size=len, options=QUICKLY, on_event=listener)

    assert [(item, memory_halvings) for item, memory_halvings, _ in results] == [("big", 2)]
    assert listener.of(Retry) == [Retry("out of memory", "big")] * 2


def test_a_budget_that_is_too_small_is_the_users_to_raise(cluster: str, tmp_path: Path) -> None:
    """A BudgetError is a MemoryError to Python; less memory would not help."""
    with pytest.raises(BudgetError, match=r"^needs 2 GiB$"):
        run_items(ray_items.Doing(ray_items.raise_it, tmp_path), [BudgetError("needs 2 GiB")])


def test_workers_whose_memory_is_refused_at_the_start_end_the_run(cluster: str) -> None:
    with pytest.raises(ComputeLostError, match=r"3 times in a row workers died before they were ready: .*MemoryError"):
        run_items(ray_items.Starving("start"), [1])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("draining_nodes", "ray._private.state.state"),
        ("_can_grow", "ray.autoscaler.v2.utils.is_autoscaler_v2"),
        ("_keep_standard_output_clean", "ray._private.worker"),
    ],
)
@pytest.mark.parametrize("is_ours", [True, False], ids=["as itself", "as Ray's"])
def test_a_signal_that_meets_an_optional_question_to_ray_ends_the_run(
    name: str, asked: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler raises wherever the main thread is; Ray may make that an error of its own."""

    class Interrupted:
        def __getattr__(self, _: str) -> Any:
            raise InterruptedRunError("stopped by SIGTERM") if is_ours else RuntimeError("a callback failed")

        def __setattr__(self, name: str, _: Any) -> None:
            self.__getattr__(name)

        def __call__(self, **_: Any) -> None:
            self.__getattr__("called")

    monkeypatch.setattr("stockflow.interruption._received", [] if is_ours else [signal.SIGTERM])
    monkeypatch.setattr(asked, Interrupted())

    with pytest.raises(InterruptedRunError if is_ours else RuntimeError):
        getattr(cluster_module, name)()


def test_workers_that_die_at_the_start_end_the_run(cluster: str) -> None:
    with pytest.raises(ComputeLostError, match="3 times in a row workers died before they were ready"):
        run_items(ray_items.die, [1, 2])


def test_a_worker_of_another_version_is_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "__version__", "0.0.1")

    with pytest.raises(ComputeLostError, match=rf"a worker on \S+ has stockflow {__version__}, the driver has 0.0.1"):
        run_items(ray_items.die, [1])


def test_an_item_that_hangs_is_run_again_elsewhere(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ClockOfHangs(monkeypatch, tmp_path / "slow-1")
    options = RayOptions(num_workers=2, no_worker_timeout_s=math.inf, stall_timeout_s=1800.0)

    results = run_items(ray_items.Doing(ray_items.hang_first_time, tmp_path), ["quick", "slow"], options)

    assert sorted(results) == ["quick", "slow"]


def test_an_item_that_takes_far_longer_than_others_is_given_to_an_idle_worker_too(cluster: str, tmp_path: Path) -> None:
    """Its worker is not known to hang: nothing is timed out, and nothing counts as a failure."""
    listener = Listener()
    start = ray_items.Doing(ray_items.hang_first_time, tmp_path)

    items = ["slow", "a", "b", "c"]
    results = run_items(start, items, RayOptions(num_workers=2, least_slow_s=0.5), listener)

    assert sorted(results) == sorted(items)
    assert listener.of(Retry) == []


def test_idle_workers_that_die_are_not_given_the_last_item_one_after_the_other(cluster: str, tmp_path: Path) -> None:
    listener = Listener()

    def kill_the_busy_one(event: Event) -> None:
        if isinstance(event, Retry) and event.item is None:
            _kill_when_noted(tmp_path, "last")

    results = run_on_ray(
        ray_items.Doing(ray_items.wait_first_time, tmp_path),
        ["last", "a", "b"],
        size=lambda item: 1,
        options=RayOptions(num_workers=3, least_slow_s=math.inf),
        on_event=all_of(listener, kill_the_busy_one),
    )
    for _, pid in (next(results), next(results)):
        with suppress(ProcessLookupError):  # of two idle workers only one is kept
            os.kill(pid, signal.SIGKILL)

    assert [item for item, _ in results] == ["last"]
    assert listener.of(Retry) == [Retry("lost", None), Retry("lost", "last")]


def test_whoever_takes_results_slowly_makes_no_item_late(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour passes at each result, in which what was given is done."""
    clock, loops = Clock(monkeypatch), []

    class Watched(loop._Loop[Any, Any]):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            loops.append(self)

    monkeypatch.setattr(loop, "_Loop", Watched)
    listener = Listener()
    results = run_on_ray(
        ray_items.Doing(ray_items.echo, tmp_path),
        [1, 2, 3, 4],
        size=lambda item: 1,
        options=RayOptions(num_workers=2, item_timeout_s=1800.0, **PATIENT),
        on_event=listener,
    )

    taken = []
    for item, _ in results:
        taken.append(item)
        given = [handle.call for handle in loops[0]._handles.values() if handle.call is not None]
        ray.wait(given, num_returns=len(given), timeout=HANG_S) if given else None
        clock.ahead_s += 3600.0

    assert (sorted(taken), listener.of(Retry)) == ([1, 2, 3, 4], [])


def test_items_in_work_clean_up_when_the_run_is_interrupted(cluster: str, tmp_path: Path) -> None:
    """A shard that is being uploaded must abort its upload; a killed process could not."""
    options = replace(QUICKLY, stop_grace_s=HANG_S)

    def interrupt(event: Event) -> None:
        if isinstance(event, Moved):
            raise InterruptedRunError("stopped by SIGTERM")

    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        run_items(ray_items.Doing(ray_items.count_until_stopped, tmp_path), ["slow"], options, interrupt)

    assert (tmp_path / "cleaned-1").exists()


@pytest.mark.parametrize(
    ("options", "need"),
    [
        (RayOptions(gpus_per_worker=1000), "1000 GPU, and the most GPUs on one node are 1"),
        (RayOptions(labels={"pool": "spot"}), "1 CPU and 0 GPU, label pool=spot; labels there: none"),
    ],
    ids=["GPUs", "label"],
)
def test_what_no_node_can_hold_is_said_at_once(cluster: str, tmp_path: Path, options: RayOptions, need: str) -> None:
    with pytest.raises(ComputeLostError, match=f"no node of the cluster can hold a worker: .*{need}; ask for less"):
        run_items(ray_items.Doing(ray_items.echo, tmp_path), [1], options)


def test_gpus_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(PlanError, match=r"--gpus-per-worker 1\.5: expected a fraction of one GPU, or a whole number"):
        RayOptions(gpus_per_worker=1.5)


def test_a_worker_without_gpus_keeps_off_those_of_its_node(recipe: Path, tmp_path: Path) -> None:
    """Ray hides none from it."""
    finished = runs.run("merge", recipe, tmp_path / "out", "--executor", "ray", "--device", "cuda", "--memory", "3GiB")

    assert finished.returncode == 2
    assert "--device cuda on Ray: say how many GPUs a worker gets (--gpus-per-worker 1)" in finished.stderr


def test_an_item_that_takes_too_long_is_run_again_elsewhere(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts on and on, so it does not hang."""
    ClockOfHangs(monkeypatch, tmp_path / "slow-1")
    options = RayOptions(num_workers=1, item_timeout_s=1800.0, **PATIENT)

    assert run_items(ray_items.Doing(ray_items.slow_first_time, tmp_path), ["slow"], options) == ["slow"]


def test_cpus_taken_by_others_are_said_while_waiting_and_in_the_end(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves on by two seconds whenever it is looked at."""
    clock, looks = Clock(monkeypatch), itertools.count()
    monkeypatch.setattr(clock, "monotonic", lambda: 2.0 * next(looks))
    neighbour: Any = ray.remote(actor.Actor)
    taken = neighbour.options(num_cpus=NUM_CPUS).remote()
    ray.get(taken.counters.remote())
    listener = Listener()
    run_one = partial(run_on_ray, ray_items.Doing(ray_items.echo, tmp_path), [1], size=int)

    with pytest.raises(ComputeLostError, match=r"the cluster has 4 CPU \(0 free\)"):
        list(run_one(options=RayOptions(no_worker_timeout_s=30.0, say_waiting_s=5.0), on_event=listener))

    assert listener.of(Note)
    assert all(note.text.startswith("no worker has come for") for note in listener.of(Note))
    ray.kill(taken)


def test_a_worker_that_does_not_see_the_output_is_refused(cluster: str, tmp_path: Path) -> None:
    spec = WorkerSpec(
        plan_id="a" * 64,
        checkpoints=(),
        output_url=str(tmp_path / "elsewhere"),
        storage=StorageConfig(),
        on_nonfinite="error",
        memory_bytes=runs.MIB,
        num_threads=1,
    )

    with pytest.raises(PlanError, match=r"a worker does not see the output .*elsewhere.* use object storage"):
        run_items(places.StartWorker(spec), [1])


CONNECT = """
import sys
from stockflow.errors import ComputeLostError
from stockflow.run.executors.ray import RayOptions, connected
for address in sys.argv[1:]:
    try:
        with connected(RayOptions(address=address), 1):
            print("connected")
    except ComputeLostError as error:
        print(error)
"""


def test_an_address_without_a_cluster_is_said_at_once(s3_endpoint: str) -> None:
    """Ray itself tries for minutes."""
    addresses = [f"127.0.0.1:{free_port()}", s3_endpoint.removeprefix("http://"), "http://127.0.0.1:8265", "head"]

    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", CONNECT, *addresses], capture_output=True, text=True, timeout=HANG_S
    )

    refused, foreign, dashboard, malformed = finished.stdout.splitlines()
    assert refused.startswith(f"cannot use Ray at {addresses[0]}: [Errno 111] Connection refused; check that the head")
    assert "is not the head of a Ray cluster" in foreign
    assert "stockflow submit" in dashboard
    assert "head" in malformed


def test_a_driver_whose_own_node_ended_says_so_before_ray_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, with a killed raylet: exit code 5 within 2 s, where Ray ends the process with 1 after 14 s."""
    from ray._private import worker

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as raylet:
        monkeypatch.setattr(worker, "_global_node", SimpleNamespace(raylet_socket_name=f"{folder}/raylet"))
        raylet.bind(f"{folder}/raylet")
        raylet.listen()
        cluster_module.check_own_node()
        raylet.close()

        with pytest.raises(ComputeLostError, match=r"the Ray node of this driver ended .*run again") as caught:
            cluster_module.check_own_node()
    assert caught.value.exit_code == 5


def test_a_node_that_does_not_come_up_is_lost_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception after 30 s on a machine that is too busy: no bug of ours."""

    def time_out(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)

    with (
        pytest.raises(ComputeLostError, match="cannot use Ray on this machine: The current node timed out"),
        connected(RayOptions(), 1),
    ):
        pass


def test_an_unreachable_cluster_exits_with_5(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")

    finished = runs.run("merge", recipe, tmp_path / "out", "--quiet", "--memory", "1GiB")

    assert finished.returncode == 5
    assert finished.stderr.startswith("stockflow: cannot use Ray at 127.0.0.1:")
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_line_uses_the_cluster_that_ray_address_names(
    cluster: str, recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)

    result = runs.merge_elsewhere(
        recipe, tmp_path / "out", "--workers", 1, "--memory", "1GiB", "--shard-size", SHARD_SIZE
    )

    assert expected == result["shards"]
