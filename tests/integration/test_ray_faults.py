"""Merges on clusters of several nodes that meet what clusters meet; each ends with the bytes of the local merge.

`make test-cluster`; with ARGS=-s it prints how long each recovery took. Nodes are raylets of this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from stockflow.engine.worker import WorkerSpec
from stockflow.errors import ComputeLostError
from stockflow.events import Event, Note, OnEvent
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.executors.ray import RayOptions
from stockflow.run.executors.ray import run as run_on_ray
from stockflow.run.inputs import Inputs
from stockflow.storage import open_store
from tests import ray_items, runs
from tests.benchmarks.processes import process_tree
from tests.checkpoints import make_family, write_recipe
from tests.s3_server import free_port

pytestmark = pytest.mark.cluster

SCRIPTS = Path(sys.executable).parent
SHARD_SIZE = 150_000
STORE_BYTES = 80_000_000
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
HEAD = {
    "num_cpus": 0,
    "include_dashboard": False,
    "object_store_memory": STORE_BYTES,
    "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
}
WAIT_S = 90.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, num_shards=2))


@pytest.fixture(scope="module")
def expected(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the shards, by the local executor."""
    result = runs.merge_here(recipe, tmp_path_factory.mktemp("local") / "out", shard_size=SHARD_SIZE)
    return runs.expected_digests([result])[0]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A connected cluster of a head without CPUs; tests add nodes."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = Cluster(initialize_head=True, head_node_args=HEAD)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()  # type: ignore[no-untyped-call]


def add_node(cluster: Cluster, **how: Any) -> Any:
    return cluster.add_node(**{"num_cpus": 1, "object_store_memory": STORE_BYTES} | how)


@dataclass
class Listener:
    """Keeps notes."""

    notes: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)


class SlowMerge:
    """A merge on the connected cluster, in another thread; its shards take long enough to be met by a fault."""

    def __init__(self, recipe: Path, folder: Path, options: RayOptions, *, stuck: int = 0, hungry: int = 0) -> None:
        self.output, self.listener = folder / "out", Listener()
        self._folder, self._options, self._stuck, self._hungry = folder, options, stuck, hungry
        how = MergeOptions(1024 * runs.MIB, num_threads=1, device="auto", shard_size=SHARD_SIZE)
        self._pool = ThreadPoolExecutor(1)
        inputs = Inputs.open(load_recipe(str(recipe)))
        self._merging = self._pool.submit(merge, inputs, str(self.output), how, self._execute, self.listener)

    def _execute(self, spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
        start = ray_items.Slowly(places.StartWorker(spec), self._folder, 1.0, self._stuck, self._hungry)
        answers = run_on_ray(
            start,
            shards,
            size=lambda shard: shard.source_bytes,
            options=self._options,
            on_event=on_event,
            name=lambda shard: shard.file,
        )
        for answer in answers:
            yield places.receipt_of(answer, open_store(str(self.output), spec.storage), spec.plan_id)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return what workers have noted so far."""
        path = self._folder / "events.jsonl"
        noted = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in noted if event["event"] == kind]

    def until(self, what: str, holds: Callable[[], Any]) -> Any:
        """Wait for something to hold while the merge goes on, and return it."""
        deadline = time.monotonic() + WAIT_S
        while not (found := holds()):
            assert time.monotonic() < deadline, what
            assert not self._merging.done(), (what, self._merging.exception())
            time.sleep(0.05)
        return found

    def at_work_on(self, node: str | None = None) -> dict[str, Any] | None:
        """Return a shard that is being merged, on a node; None if there is none."""
        ended = [(event["file"], event["node"]) for event in self.events("ended")]
        open_now = [event for event in self.events("begun") if (event["file"], event["node"]) not in ended]
        return next((event for event in open_now if node in (None, event["node"])), None)

    def digests(self) -> dict[str, str]:
        """Wait for the end."""
        self._merging.result(timeout=WAIT_S)
        self._pool.shutdown()
        return runs.shard_digests(self.output)


def say(fault: str, what: str, seconds: float) -> None:
    print(f"\nrecovery: {fault}: {what} after {seconds:.1f} s")


def test_a_node_killed_in_the_middle_of_a_shard(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    nodes = [add_node(cluster) for _ in range(2)]
    merging = SlowMerge(recipe, tmp_path, RayOptions(num_workers=2), stuck=3)
    merging.until("a shard that takes long", (tmp_path / "stuck-1").exists)
    lost = merging.events("begun")[2]

    killed = time.time()
    cluster.remove_node(next(node for node in nodes if node.node_id == lost["node"]), allow_graceful=False)

    assert expected == merging.digests()
    again = [event for event in merging.events("begun") if event["file"] == lost["file"] and event["when"] > killed]
    assert again
    assert again[0]["node"] != lost["node"]
    assert f" was lost, another does {lost['file']} again: " in " ".join(merging.listener.notes)
    say("node killed mid-shard", "its shard began elsewhere", again[0]["when"] - killed)


def test_a_node_that_joins_is_used(cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path) -> None:
    first = add_node(cluster)
    merging = SlowMerge(recipe, tmp_path, RayOptions())
    merging.until("a shard", merging.at_work_on)

    joined = add_node(cluster)
    came = time.time()

    assert expected == merging.digests()
    on_new = [event for event in merging.events("begun") if event["node"] == joined.node_id]
    assert on_new
    assert {event["node"] for event in merging.events("begun")} == {first.node_id, joined.node_id}
    say("node added", "it began its first shard", on_new[0]["when"] - came)


def test_a_run_that_is_asked_for_more_workers_than_there_is_room_for_waits_for_nodes(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The head alone has no room at all."""
    merging = SlowMerge(recipe, tmp_path, RayOptions(num_workers=3))
    merging.until("a note on the cluster", lambda: [note for note in merging.listener.notes if "no node" in note])

    node = add_node(cluster, num_cpus=3)

    assert expected == merging.digests()
    assert "no node of the cluster can hold a worker" in " ".join(merging.listener.notes)
    assert "waiting up to 900 s for one that can (--worker-timeout)" in " ".join(merging.listener.notes)
    assert {event["node"] for event in merging.events("begun")} == {node.node_id}


@contextmanager
def node_that_drains(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node as Kubernetes starts it: ``ray start --block``, which drains for so long when it is told to end."""
    command = [
        str(SCRIPTS / "ray"),
        "start",
        f"--address={address}",
        "--block",
        "--num-cpus=1",
        "--disable-usage-stats",
    ]
    environment = os.environ | SETTINGS | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"}
    process = subprocess.Popen(
        [*command, f"--object-store-memory={STORE_BYTES}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in process_tree(process.pid) if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(WAIT_S)


def _await_nodes(number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while sum(node["Alive"] for node in ray.nodes()) < number:  # type: ignore[no-untyped-call]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_node_that_is_told_to_end_finishes_its_shard_and_is_given_back(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    stays = add_node(cluster)
    with node_that_drains(cluster.address) as process:
        _await_nodes(3)
        merging = SlowMerge(recipe, tmp_path, RayOptions(num_workers=2))
        going = merging.until(
            "a shard on the node that goes",
            lambda: next((event for event in merging.events("begun") if event["node"] != stays.node_id), None),
        )["node"]
        merging.until("it is at a shard", lambda: merging.at_work_on(going))

        process.send_signal(signal.SIGTERM)
        told = time.time()
        process.wait(WAIT_S)
        gone = time.time()

    assert expected == merging.digests()
    assert not [note for note in merging.listener.notes if "lost" in note]
    begun = [event["file"] for event in merging.events("begun")]
    assert len(begun) == len(set(begun)), "a shard was begun twice"
    say("SIGTERM to a node with 60 s to drain", "it was given back, no shard lost,", gone - told)


OTHERS_BYTES, HUNGRY_BYTES = 4 << 30, 7 << 30
"""What others on the machine may begin to use meanwhile, and what the worker takes that is to be ended."""


def test_a_worker_that_ran_out_of_memory(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends it when the node has too little left; the shard comes again with half the budget."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    if memory["MemAvailable"] < HUNGRY_BYTES + OTHERS_BYTES:
        pytest.skip("others use the memory that this takes")
    used = memory["MemTotal"] - memory["MemAvailable"]
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(used + OTHERS_BYTES) / memory['MemTotal']}")
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False)
        merging = SlowMerge(recipe, tmp_path, RayOptions(num_workers=1), hungry=HUNGRY_BYTES)

        assert expected == merging.digests()

        (first, again) = [event for event in merging.events("begun") if event["file"] == _twice(merging)]
        assert (first["memory_halvings"], again["memory_halvings"]) == (0, 1)
        assert f"another does {first['file']} again, with half the memory" in " ".join(merging.listener.notes)
        say("out of memory", "its shard began again, with half the budget,", again["when"] - first["when"])
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def _twice(merging: SlowMerge) -> str:
    begun: list[str] = [event["file"] for event in merging.events("begun")]
    return next(file for file in begun if begun.count(file) == 2)


def test_a_driver_that_was_killed_is_run_again(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_node(cluster, num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    options = ("--workers", 2, "--memory", "1GiB", "--shard-size", SHARD_SIZE)
    process = subprocess.Popen(
        runs.command("merge", recipe, tmp_path / "out", *options), cwd=runs.REPOSITORY, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + WAIT_S
    while not list(tmp_path.glob("out/_stockflow/*/receipts/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)

    process.kill()
    process.wait(WAIT_S)
    assert not (tmp_path / "out" / "manifest.json").exists()
    killed = time.time()
    result = runs.merge_elsewhere(recipe, tmp_path / "out", *options)

    assert expected == result["shards"] == runs.shard_digests(tmp_path / "out")
    assert result["resumed_shards"] >= 1
    say("driver killed, run again", f"all done ({result['resumed_shards']} shards were there)", time.time() - killed)


@contextmanager
def head(environment: Mapping[str, str], folder: Path, *options: str, port: int, num_cpus: int) -> Iterator[str]:
    """Run ``ray start --head`` and give its address."""
    command = [
        *(
            str(SCRIPTS / "ray"),
            "start",
            "--head",
            "--block",
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={STORE_BYTES}",
        ),
        *(f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}"),
        *(f"--temp-dir={folder}", "--disable-usage-stats", *options),
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + WAIT_S
        while subprocess.run(
            [SCRIPTS / "ray", "status", f"--address=127.0.0.1:{port}"],
            env=environment,
            capture_output=True,
            check=False,
        ).returncode:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        below = process_tree(process.pid)
        process.terminate()
        process.wait(WAIT_S)
        for pid in below:  # nodes that the autoscaler has started
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_with_token_authentication(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    token = "a" * 40
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    address_option = "--node-ip-address=127.0.0.1"
    with head(dict(os.environ), short_folder, address_option, port=free_port(), num_cpus=2) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        options = ("--workers", 2, "--memory", "1GiB", "--shard-size", SHARD_SIZE)

        result = runs.merge_elsewhere(recipe, tmp_path / "out", *options)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 40)
        wrong = runs.run("merge", recipe, tmp_path / "wrong", *options)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        without = runs.run("merge", recipe, tmp_path / "without", *options)

    assert expected == result["shards"]
    for refused in (wrong, without):
        assert refused.returncode == 5
        assert f"stockflow: the cluster at {address} does not accept this token" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert "a" * 40 not in refused.stderr


def autoscaling(port: int, path: Path, **resources: float) -> Path:
    """Write the configuration of Ray's own imitation of a cloud: nodes are raylets that the head starts."""
    unused: dict[str, Any] = {name: {} for name in ("auth", "docker", "file_mounts")}
    names = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    unused |= {f"{name}_commands": [] for name in names}
    unused |= {name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
    head_type = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    worker_type = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2}
    provider = {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
    }
    document = {
        "cluster_name": "imitation",
        "max_workers": 2,
        "provider": provider,
        "available_node_types": {"ray.head.default": head_type, "worker": worker_type},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "file_mounts_sync_continuously": False,
    }
    path.write_text(json.dumps(document | unused))
    return path


def test_an_autoscaler_brings_the_nodes(
    recipe: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    """From a head that has no room at all to as many nodes as the autoscaler's bounds allow."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = free_port()
    option = f"--autoscaling-config={autoscaling(port, tmp_path / 'autoscaling.json', CPU=1)}"
    environment = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with head(environment, short_folder, option, port=port, num_cpus=0) as address:
        ray.init(address=address, log_to_driver=False)
        try:
            began = time.time()
            merging = SlowMerge(recipe, tmp_path, RayOptions())

            assert expected == merging.digests()
        finally:
            ray.shutdown()

    assert "no node of the cluster can hold a worker" in " ".join(merging.listener.notes)
    assert len({event["node"] for event in merging.events("begun")}) == 2
    say("no node at all, an autoscaler", "the first shard began", merging.events("begun")[0]["when"] - began)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets lie in it, so its name must be short."""
    folder = tempfile.mkdtemp(prefix="sf-ray-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_node_without_stockflow(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "sitecustomize.py").write_text(WITHOUT_STOCKFLOW)
    monkeypatch.setenv("PYTHONPATH", str(foreign))
    add_node(cluster)
    start = ray_items.Doing(ray_items.echo, tmp_path)

    with pytest.raises(ComputeLostError, match=r"No module named 'stockflow'.*install") as raised:
        list(run_on_ray(start, [1], size=int, options=RayOptions()))

    assert len(str(raised.value)) < 600


WITHOUT_STOCKFLOW = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stockflow":
            raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}", name="stockflow")
sys.meta_path.insert(0, Refuse())
"""
