"""`make cluster-demo`: a merge on a Ray cluster as an operator sees it, told step by step. Two minutes, two cores.

Everything is real and on this machine: an S3 server, a Ray cluster of three nodes that asks for a token, a submitted
job, a node that loses its power in the middle. The script ends with an error if anything it says is not so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests import ray_nodes, runs
from tests.checkpoints import make_family
from tests.fault_proxy import FaultyProxy
from tests.ray_nodes import SCRIPTS, Cluster
from tests.s3_server import free_port, moto_server, s3_credentials

BUCKET = "models"
OUTPUT = f"s3://{BUCKET}/merged"
RECIPE = f"s3://{BUCKET}/recipe.yaml"
OPTIONS = "--shard-size 300000 --memory 1GiB"
METRICS_PORT = free_port()
SUBMIT = (
    f"stockflow submit {RECIPE} {OUTPUT} --address {{url}} --no-follow {OPTIONS} --workers 2 --metrics-port {{port}}"
)
"""how the merge is submitted, here and nowhere else; the job is then the only one that the cluster knows"""
SHAPES = {f"model.layers.{number}.mlp.up_proj.weight": (256, 256) for number in range(48)}
NUM_SHARDS = 24
"""two tensors a shard, by the --shard-size of ``OPTIONS``"""
DISTANCE_S = 0.3
"""added to every read: this S3 would otherwise be nearer than any real one, and the merge over before a node is lost"""
ENOUGH_S = 150.0


@dataclass
class Bucket:
    """What is in the bucket, as any machine with rights on it sees it."""

    client: Any

    def keys(self, prefix: str) -> list[str]:
        """Return the names below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def json(self, key: str) -> Any:
        """Return a JSON object."""
        return json.loads(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def num_done(self) -> int:
        """Return for how many shards of the output there is a receipt."""
        return sum("/receipts/" in key for key in self.keys("merged/_stockflow/"))

    def shards(self, prefix: str) -> dict[str, str]:
        """Return the digests of an output's weight files, as its manifest states them."""
        files = self.json(f"{prefix}/manifest.json")["files"]
        return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


def main() -> int:
    """Tell the story; return an exit code."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything is stopped then too
    began = time.monotonic()
    with s3_credentials(), places() as (folder, proxy), ray_nodes.cluster(os.environ) as cluster:
        bucket = put_checkpoints_on_s3(folder, proxy.url)
        start_the_cluster(cluster)
        plan_on_the_laptop()
        proxy.delays_s = {"get": DISTANCE_S}
        submit_the_merge(cluster)
        look_at_progress(cluster, bucket)
        read_the_metrics()
        lose_a_node(cluster, bucket)
        wait_for_the_end(cluster, bucket)
        proxy.delays_s = {}
        verify_from_s3()
        compare_with_one_machine(bucket)
        marks = [node.mark for node in cluster.nodes]
    left = [process for mark in marks for process in ray_nodes.marked(mark)]
    expect(not left, f"processes were left behind: {left}")
    say(f"\nEverything is stopped and removed again; {time.monotonic() - began:.0f} s.")
    return 0


@contextmanager
def places() -> Iterator[tuple[Path, FaultyProxy]]:
    """Provide a folder and an S3 server behind a proxy; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="sf-demo-"))
    try:
        with moto_server() as url, FaultyProxy(url) as proxy, _variable("AWS_ENDPOINT_URL_S3", proxy.url):
            yield folder, proxy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_checkpoints_on_s3(folder: Path, url: str) -> Bucket:
    """Make a base and three models tuned from it and upload them, with a recipe."""
    step("A base model and three models tuned from it, on S3")
    family = make_family(folder / "models", 3, SHAPES, num_shards=3, buffers=False)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    for model in (family.base, *family.tuned):
        for path in sorted(model.iterdir()):
            client.upload_file(str(path), BUCKET, f"{model.name}/{path.name}")
    models = [{"model": f"s3://{BUCKET}/{model.name}"} for model in family.tuned]
    recipe = {"merge_method": "model_stock", "base_model": f"s3://{BUCKET}/base", "models": models}
    client.put_object(Bucket=BUCKET, Key="recipe.yaml", Body=yaml.safe_dump(recipe, sort_keys=False).encode())
    say(f"{len(SHAPES)} tensors, {len(models) + 1} checkpoints, {RECIPE}:")
    say(yaml.safe_dump(recipe, sort_keys=False))
    return Bucket(client)


def start_the_cluster(cluster: Cluster) -> None:
    """Start a head and two nodes; see that a wrong token is refused."""
    step("A Ray cluster: a head that computes nothing, two nodes with one slot each, and a token")
    cluster.start_head()
    say(f"$ ray start --head --num-cpus=0 ...          job API at {cluster.url}")
    for _ in range(2):
        node = cluster.add_node()
        say(f"$ ray start --address=... --num-cpus=1 ...   metrics at port {node.metrics_port}")
    with_token, without = cluster.ask("/api/jobs/")[0], cluster.ask("/api/jobs/", token="a-wrong-one")[0]
    say(f"Listing the jobs: HTTP {with_token} with the token, HTTP {without} with a wrong one.")
    expect((with_token, without // 100) == (200, 4), "the token makes no difference")


def plan_on_the_laptop() -> None:
    """Show the plan: nothing is written, no cluster is needed."""
    step("The plan, from anywhere, before anything costs money")
    stockflow("plan", RECIPE, OUTPUT, *OPTIONS.split())


def submit_the_merge(cluster: Cluster) -> None:
    """Submit the merge as a job. The credentials are the nodes' own: the job carries none."""
    step("Submit the merge; it runs on the head, and asks for two workers")
    submit = SUBMIT.format(url=cluster.url, port=METRICS_PORT)
    say(f"$ {submit}")
    program, *arguments = submit.split()
    done = subprocess.run(
        [str(SCRIPTS / program), *arguments],
        env=cluster.client_environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    expect(done.returncode == 0, f"the job was not taken: {done.stdout}{done.stderr}")
    say(f"The cluster knows it as {status_of(cluster)['submission_id']}.")


def look_at_progress(cluster: Cluster, bucket: Bucket) -> None:
    """Wait until some shards are done, and say so from what is in the bucket."""
    step("How far is it? The bucket tells, to whoever may read it")
    wait_until(lambda: bucket.num_done() >= 4, cluster, "four shards")
    stockflow("status", OUTPUT)


def read_the_metrics() -> None:
    """Read the merge's metrics as Prometheus does."""
    step("Metrics of the merge, as Prometheus reads them from the driver")
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("stockflow_")]
    for line in lines:
        if "_bucket{" not in line:
            say(f"  {line}")
    read = [float(line.split()[-1]) for line in lines if line.startswith("stockflow_read_bytes_total")]
    expect(sum(read) > 0, "the merge has read something, and the metrics do not say so")


def lose_a_node(cluster: Cluster, bucket: Bucket) -> None:
    """Kill every process of a node at once, and let another one join."""
    step("A node loses its power in the middle of a shard")
    lost = cluster.nodes[-1]
    before, killed = bucket.num_done(), lost.kill()
    say(f"SIGKILL to all its {killed} processes, with {before} of {NUM_SHARDS} shards done. Nobody was told.")
    expect(before < NUM_SHARDS, "the merge was over before the node was lost")
    expect(status_of(cluster)["status"] == "RUNNING", "the job did not survive that")
    cluster.add_node()
    say("Another node joins; on Kubernetes the autoscaler brings it, because a worker is asked for.\n")
    stockflow("status", OUTPUT)


def wait_for_the_end(cluster: Cluster, bucket: Bucket) -> None:
    """Wait for the job, show what it said, and see that nothing was lost."""
    step("The job goes on with what it has, and ends")
    wait_until(lambda: status_of(cluster)["status"] not in ("PENDING", "RUNNING"), cluster, "the end")
    job = status_of(cluster)
    log = log_of(cluster)
    say("\n".join(f"  | {line}" for line in log.strip().splitlines()))
    say(f"status {job['status']}, exit code of stockflow {job['driver_exit_code']}, {bucket.num_done()} receipts")
    expect((job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0), "the merge failed")
    expect("note:" in log, "the driver did not notice the lost node")


def verify_from_s3() -> None:
    """Read every byte again and hold it against the manifest, and the inputs against what was planned."""
    step("Verify, from anywhere: every byte is read again, and some tensors are merged again")
    stockflow("verify", OUTPUT, "--sample", "10%")


def compare_with_one_machine(bucket: Bucket) -> None:
    """Merge the same here, without Ray, and compare."""
    step("The same merge on one machine, without Ray: are the bytes the same?")
    single = f"s3://{BUCKET}/single"
    stockflow("merge", RECIPE, single, *OPTIONS.split(), "--executor", "local")
    expect(bucket.shards("merged") == bucket.shards("single"), "the bytes differ")
    say("Yes: the same sha256 for every shard.")


def stockflow(*arguments: object) -> None:
    """Run a command as a user does, and show what it prints."""
    say(f"$ stockflow {' '.join(map(str, arguments))}")
    done = runs.run(*arguments)
    say("\n".join(f"  | {line}" for line in (done.stderr + done.stdout).strip().splitlines()))
    expect(done.returncode == 0, f"exit code {done.returncode}")


def status_of(cluster: Cluster) -> Any:
    """Return what the head says of the only job there is."""
    jobs = [job for job in json.loads(cluster.ask("/api/jobs/")[1]) if job["type"] == "SUBMISSION"]
    expect(len(jobs) == 1, f"the cluster knows {len(jobs)} jobs")
    return jobs[0]


def log_of(cluster: Cluster) -> str:
    """Return what the job has said."""
    return str(json.loads(cluster.ask(f"/api/jobs/{status_of(cluster)['submission_id']}/logs")[1])["logs"])


def wait_until(is_so: Callable[[], bool], cluster: Cluster, what: str) -> None:
    """Look every half second; a job that failed, or that takes too long, ends the story."""
    deadline = time.monotonic() + ENOUGH_S
    while not is_so():
        job = status_of(cluster)
        is_over = job["status"] in ("FAILED", "STOPPED")
        if is_over or time.monotonic() > deadline:
            raise SystemExit(f"cluster-demo: waiting for {what}, the job is {job['status']}: {log_of(cluster)[-3000:]}")
        time.sleep(0.5)


def expect(is_so: bool, otherwise: str) -> None:
    """End with an error where the story is not true."""
    if not is_so:
        raise SystemExit(f"cluster-demo: {otherwise}")


def step(text: str) -> None:
    """Begin the next part."""
    _number.append(len(_number) + 1)
    say(f"\n{_number[-1]}. {text}\n")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


_number: list[int] = []


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(main())
