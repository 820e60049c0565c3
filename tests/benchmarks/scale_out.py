"""How well more workers share a merge: ``make bench-scale ARGS='--workers 16'``.

Every worker reaches the store through a proxy of its own that caps its rate, so that rates add up as they do in a
cluster and the cores of this machine do not decide. Each worker count gets as many shards per worker as any other
(weak scaling): with perfect sharing all take equally long. Measured is the whole merge on a cluster that is up:
planning, the start of workers, the tail, publishing. ``--table`` prints the newest result of every worker count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import numpy as np
import yaml

from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.events import Done, Event, Note
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.inputs import Inputs
from tests import ray_items
from tests.benchmarks.processes import machine_cpu_seconds
from tests.benchmarks.report import RESULTS, print_table, record
from tests.s3_server import CREDENTIALS, FORBIDDEN, moto_server

BUCKET = "bench"
SHAPE = (500, 500)
SHARD_BYTES = 2 * SHAPE[0] * SHAPE[1]
"""one BF16 tensor is one shard"""
TENSORS_PER_FILE = 16
NUM_TUNED = 2
TRAFFIC_PER_SHARD = (NUM_TUNED + 2) * SHARD_BYTES
MIB = 2**20


def main() -> None:
    """Run one worker count and append the result, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shards-per-worker", type=int, default=60)
    parser.add_argument("--rate", type=float, default=400_000, help="bytes a second of one worker, up and down")
    parser.add_argument("--table", action="store_true", help="only print what was measured before")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale_out.jsonl")
    parser.add_argument("--note", default="")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    if not arguments.table:
        for name in (*FORBIDDEN, "RAY_ADDRESS"):
            os.environ.pop(name, None)
        os.environ |= CREDENTIALS | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        record(arguments, measure(arguments.workers, arguments.shards_per_worker, arguments.rate))
    show(arguments.results)


def measure(num_workers: int, shards_per_worker: int, rate: float) -> dict[str, Any]:
    """Merge once and return what it took."""
    num_shards = num_workers * shards_per_worker
    with TemporaryDirectory() as folder, moto_server() as store, proxies(store, num_workers, rate) as ports:
        os.environ["AWS_ENDPOINT_URL_S3"] = store
        recipe = upload(store, num_shards, Path(folder))
        options = RayOptions(num_workers=num_workers)
        with connected(options, num_shards):
            watcher = Watcher()
            cpu_before, began = machine_cpu_seconds(), time.time()
            result = merge_through(ports, recipe, Path(folder), options, watcher)
            ended, cpu = time.time(), machine_cpu_seconds() - cpu_before
        starts = [path.stat().st_mtime - began for path in Path(folder).glob("worker-*")]
    seconds = ended - began
    return {
        "workers": num_workers,
        "shards": len(result.plan.shards),
        "shards_per_worker": shards_per_worker,
        "bytes_per_s_of_a_worker": rate,
        "seconds": seconds,
        "first_worker_began_s": min(starts),
        "last_worker_began_s": max(starts),
        "tail_s": watcher.ends[-1] - watcher.ends[-num_workers],
        "share_of_the_cap": TRAFFIC_PER_SHARD * num_shards / (num_workers * rate * seconds),
        "machine_cpu_s": cpu,
        "notes": watcher.notes,
    }


@dataclass
class Watcher:
    """Keeps when shards ended, and notes."""

    ends: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Done) and event.cost:
            self.ends.append(time.time())
        elif isinstance(event, Note):
            self.notes.append(event.text)


@dataclass(frozen=True)
class ThroughOwnProxy:
    """A start of another, in a process that reaches the store through one of the proxies alone."""

    start: Callable[[], Any]
    ports: Sequence[int]
    folder: Path

    def __call__(self) -> Any:
        number = ray_items.note(self.folder, "worker")
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{self.ports[(number - 1) % len(self.ports)]}"
        return self.start()


def merge_through(ports: Sequence[int], recipe: Path, folder: Path, options: RayOptions, watcher: Watcher) -> Merged:
    """Merge on the connected cluster, each worker through its proxy."""
    start = places.StartWorker
    how = MergeOptions(1024 * MIB, num_threads=1, device="cpu", shard_size=SHARD_BYTES)
    try:
        places.StartWorker = lambda spec: ThroughOwnProxy(start(spec), ports, folder)  # type: ignore[assignment,misc,return-value]
        return merge(
            Inputs.open(load_recipe(str(recipe))),
            f"s3://{BUCKET}/out",
            how,
            lambda spec, shards, told: places.on_ray(spec, shards, told, options),
            watcher,
        )
    finally:
        places.StartWorker = start  # type: ignore[misc]


@contextmanager
def proxies(store: str, num_proxies: int, rate: float) -> Iterator[list[int]]:
    """Run a proxy per worker in a process of their own and give their ports."""
    command = [sys.executable, "-m", "tests.benchmarks.rate_proxy", store.removeprefix("http://")]
    process = subprocess.Popen(
        [*command, f"--proxies={num_proxies}", f"--bytes-per-s={rate}"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield [int(word) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        process.wait(10)


def upload(store: str, num_shards: int, folder: Path) -> Path:
    """Put a base and its tuned models into the store and return a recipe."""
    client = boto3.client("s3", endpoint_url=store)
    client.create_bucket(Bucket=BUCKET)
    noise = np.random.default_rng(7).standard_normal(1 << 22).astype(np.float32)
    names = [f"layers.{index:05d}.weight" for index in range(num_shards)]
    for model in range(NUM_TUNED + 1):
        prefix = f"in/{model}"
        weight_map: dict[str, str] = {}
        for first in range(0, num_shards, TENSORS_PER_FILE):
            group = names[first : first + TENSORS_PER_FILE]
            file = f"model-{first:05d}.safetensors"
            body = encode_header([TensorSpec(name, "BF16", SHAPE) for name in group], {"format": "pt"})
            body += b"".join(tensor(noise, first + offset, model) for offset in range(len(group)))
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file}", Body=body)
            weight_map |= dict.fromkeys(group, file)
        for key, document in {
            "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
            "config.json": {"model_type": "synthetic", "torch_dtype": "bfloat16"},
        }.items():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=json.dumps(document).encode())
    models = [{"model": f"s3://{BUCKET}/in/{model}"} for model in range(1, NUM_TUNED + 1)]
    document = {"merge_method": "model_stock", "base_model": f"s3://{BUCKET}/in/0", "models": models}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    return recipe


def tensor(noise: np.ndarray[Any, np.dtype[np.float32]], index: int, model: int) -> bytes:
    """Return the BF16 bytes of a tensor of the base (0) or of a tuned model."""
    num_elems = SHAPE[0] * SHAPE[1]

    def drawn(start: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        begin = start % (len(noise) - num_elems)
        return noise[begin : begin + num_elems]

    values = drawn(index * 7919) * np.float32(0.02)
    if model:
        values = values + np.float32(1e-3) * drawn(index * 104_729 + model * 1_299_709)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def show(results: Path) -> None:
    """Print the newest result of every worker count, against one worker with as many shards."""
    newest: dict[int, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        found = json.loads(line)
        newest[found["workers"]] = found
    one = newest.get(1)
    rows = [
        (
            str(workers),
            str(of["shards"]),
            f"{of['seconds']:.1f}",
            f"{one['seconds'] / of['seconds']:.3f}" if one else "-",
            f"{of['share_of_the_cap']:.3f}",
            f"{of['first_worker_began_s']:.1f}-{of['last_worker_began_s']:.1f}",
            f"{of['tail_s']:.1f}",
            f"{of['machine_cpu_s'] / of['seconds']:.2f}",
        )
        for workers, of in sorted(newest.items())
    ]
    columns = ("workers", "shards", "s", "efficiency", "of the cap", "workers began s", "tail s", "cores in use")
    print_table("equal work per worker, each worker's rate capped", columns, rows)


if __name__ == "__main__":
    main()
