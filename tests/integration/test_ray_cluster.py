"""Ray clusters of several processes, as a user starts them: jobs, exit codes, nodes that go. `make test-cluster`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import boto3
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from stockflow.run.executors.ray import RayOptions
from stockflow.run.executors.ray import run as run_on_ray
from tests import ray_items, runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.s3_server import free_port

pytestmark = pytest.mark.cluster

SCRIPTS = Path(sys.executable).parent
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
DONE = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@contextmanager
def started_head(environment: Mapping[str, str]) -> Iterator[str]:
    """Run ``ray start --head`` on free ports of loopback and give the URL of its job API."""
    folder = tempfile.mkdtemp(prefix="sf-ray-", dir="/tmp")  # short: sockets lie in it
    dashboard = free_port()
    command = [
        *(str(SCRIPTS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=80000000"),
        *(f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
        *(f"--metrics-export-port={free_port()}", f"--temp-dir={folder}", "--disable-usage-stats"),
    ]
    with open(Path(folder, "head.log"), "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.terminate()
        process.wait(timeout=60)
        rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(s3_endpoint: str) -> Iterator[JobSubmissionClient]:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | SETTINGS | {"PATH": path, "AWS_ENDPOINT_URL_S3": s3_endpoint}
    with pytest.MonkeyPatch.context() as patch, started_head(environment) as url:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield _client(url)


def _client(url: str) -> JobSubmissionClient:
    deadline = time.monotonic() + 60
    while True:
        try:
            return JobSubmissionClient(url)
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def run_job(jobs: JobSubmissionClient, entrypoint: str) -> Any:
    """Submit a job, wait for its end and return its details."""
    job = jobs.submit_job(entrypoint=entrypoint)
    deadline = time.monotonic() + 120
    while jobs.get_job_status(job) not in DONE:
        assert time.monotonic() < deadline, jobs.get_job_logs(job)
        time.sleep(0.3)
    return jobs.get_job_info(job)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 2)


def test_a_submitted_job_merges_from_s3_to_s3(
    jobs: JobSubmissionClient, family: Family, s3_endpoint: str, s3_bucket: str, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            client.upload_file(str(path), s3_bucket, f"in/{folder.name}/{path.name}")
    models = [{"model": f"s3://{s3_bucket}/in/{folder.name}"} for folder in family.tuned]
    document = {"merge_method": "model_stock", "base_model": f"s3://{s3_bucket}/in/base", "models": models}
    client.put_object(Bucket=s3_bucket, Key="recipe.yaml", Body=yaml.safe_dump(document).encode())
    url = f"s3://{s3_bucket}"

    job = run_job(jobs, f"stockflow merge {url}/recipe.yaml {url}/out --executor ray --workers 2 --memory 1GiB")

    assert job.status == JobStatus.SUCCEEDED, jobs.get_job_logs(job.submission_id)
    local = runs.merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", family), tmp_path / "out")
    shard = client.get_object(Bucket=s3_bucket, Key="out/model.safetensors")["Body"].read()
    assert shard == (tmp_path / "out" / local.plan.shards[0].file).read_bytes()
    assert run_job(jobs, f"stockflow verify {url}/out").status == JobStatus.SUCCEEDED


def test_a_job_runs_on_ray_without_being_told(jobs: JobSubmissionClient, family: Family, tmp_path: Path) -> None:
    """Ray sets RAY_ADDRESS for a job; paths are fine where every worker sees them."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    job = run_job(jobs, f"stockflow merge {recipe} {tmp_path}/out --memory 1GiB --workers 1 --gpus-per-worker 0")

    assert job.status == JobStatus.SUCCEEDED, jobs.get_job_logs(job.submission_id)
    assert runs.run("verify", tmp_path / "out").returncode == 0


def test_a_broken_recipe_makes_the_job_fail_with_2(jobs: JobSubmissionClient, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: no_such_method\nmodels: []\n")

    job = run_job(jobs, f"stockflow merge {recipe} {tmp_path}/out --executor ray")

    assert (job.status, job.driver_exit_code) == (JobStatus.FAILED, 2)
    assert "Traceback" not in jobs.get_job_logs(job.submission_id)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


ON_RAY = ("--executor", "ray", "--workers", 2, "--gpus-per-worker", 0.5, "--memory", "1GiB", "--shard-size", 300_000)


@pytest.mark.usefixtures("no_cluster")
def test_the_command_line_starts_a_cluster_if_there_is_none(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    result = runs.merge_elsewhere(recipe, tmp_path / "ray", *ON_RAY)

    local = runs.merge_here(recipe, tmp_path / "local", shard_size=300_000)
    assert [result["shards"]] == runs.expected_digests([local])


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("after_s", [0.0, 2.0, 6.0])
def test_an_interrupted_merge_says_so_and_resumes(family: Family, tmp_path: Path, after_s: float) -> None:
    """Ray has handlers of its own while it connects: they exit with 15."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    command = runs.command("merge", recipe, tmp_path / "out", *ON_RAY)
    process = subprocess.Popen(command, cwd=runs.REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("merging"):
        assert process.poll() is None

    time.sleep(after_s)
    process.terminate()
    _, said = process.communicate(timeout=60)

    assert (process.returncode, said.strip().splitlines()[-1:]) in [
        (143, ["stockflow: stopped by SIGTERM; run the same command again to resume"]),
        (0, ["publishing"]),
    ]
    assert "Traceback" not in said
    assert runs.merge_elsewhere(recipe, tmp_path / "out", *ON_RAY)["outcome"] in ("merged", "already_finished")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A connected cluster of a head without CPUs and two nodes with one each; a lost node is noticed soon."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


def done_on(items: Sequence[int], folder: Path) -> Iterator[tuple[int, str]]:
    """Run half-second items on two workers; yield each with the node it was done on."""
    return run_on_ray(
        ray_items.Doing(ray_items.node_of, folder),
        items,
        size=lambda item: 1,
        options=RayOptions(num_workers=2),
    )


def test_a_lost_node_costs_only_the_item_it_was_at(nodes: Cluster, tmp_path: Path) -> None:
    results = done_on(range(12), tmp_path)
    done = [next(results) for _ in range(4)]
    lost = next(node for node in nodes.worker_nodes if node.node_id == done[-1][1])

    nodes.remove_node(lost, allow_graceful=False)
    done += results

    assert sorted(item for item, _ in done) == list(range(12))
    assert lost.node_id not in {node for _, node in done[6:]}


def test_a_node_that_is_going_away_gets_no_more_work(nodes: Cluster, tmp_path: Path) -> None:
    results = done_on(range(16), tmp_path)
    done = [next(results) for _ in range(4)]
    going = done[-1][1]
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    drain = [SCRIPTS / "ray", "drain-node", "--address", nodes.address, "--node-id", going, *reason]

    subprocess.run([*drain, "--deadline-remaining-seconds", "60"], check=True, capture_output=True, timeout=60)
    done += results

    assert sorted(item for item, _ in done) == list(range(16))
    assert {node for _, node in done[-6:]} == {node for _, node in done} - {going}
