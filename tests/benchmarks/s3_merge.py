"""Time and CPU of a merge from S3 to S3 against moving the same bytes: ``make bench-s3 ARGS='--gb 0.19'``.

The server is Ceph's gateway with objects in memory (tests/ceph_server.py), on the same cores as the client: compare
ratios, and CPU seconds, which are the client's alone. Every measurement runs in a new process and leaves its imports
out. Moving reads every range of the weights with the engine's requests in flight into reused buffers while the
output's bytes are written, shard by shard, by the same client; nothing is computed or hashed. Interleaved rounds,
medians.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from threading import local
from typing import Any

import boto3
import yaml

from stockflow.budget import OPTIMAL_READ_BYTES
from stockflow.driver import Inputs, MergeOptions, merge
from stockflow.execution import in_this_process
from stockflow.recipe import Recipe, load_recipe
from stockflow.reporting import Silent
from stockflow.storage import StorageConfig, Store, StoreOptions, open_store
from stockflow.worker import NUM_OBJECT_READERS
from tests.benchmarks import synthetic
from tests.ceph_server import PACKAGES, ceph_gateway, missing_binaries
from tests.s3_server import CREDENTIALS, FORBIDDEN

BUCKET = "bench"
CLIENTS = ("obstore", "fsspec")
IMPORTED_LATE = ("obstore.store", "pyarrow.parquet", "s3fs", "stockflow.commit", "stockflow.storage.s3fs_client")
"""what stockflow imports when it is needed, a second and more of CPU"""
PIECE_BYTES = 1 << 20
"""what one write gives to an upload"""


def main() -> None:
    """Run the rounds and print the result, or one measurement of one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.19, help="size of each checkpoint")
    parser.add_argument("--tuned", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-size", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stockflow-bench-s3"))
    parser.add_argument("--results", type=Path, help="append the result as JSON to this file")
    parser.add_argument("--measure", choices=sorted(MEASURED), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    if missing := missing_binaries():
        parser.error(f"no {', '.join(missing)}; apt-get install --no-install-recommends {PACKAGES}")
    for name in FORBIDDEN:
        os.environ.pop(name, None)
    os.environ |= CREDENTIALS
    with ceph_gateway() as endpoint:
        result = run_rounds(arguments, endpoint)
    print(json.dumps(result, indent=1))
    if arguments.results:
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")


# One measurement, in a process of its own


def merge_shards(recipe: Recipe, output: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Merge, and return what was read and what the shards are."""
    memory_bytes = int(arguments.memory_gib * 2**30)
    options = MergeOptions(memory_bytes, arguments.threads, "cpu", arguments.shard_size)
    result = merge(Inputs.open(recipe), output, options, in_this_process, Silent())
    files = {shard.file: result.manifest.files[shard.file] for shard in result.plan.shards}
    summary = result.manifest.summary
    return {
        "read_bytes": summary["bytes_read"],
        "peak_mib": summary["peak_memory_bytes"] / 2**20,
        "stages": {name: value for name, value in summary.items() if name.startswith("seconds_")},
        "shards": {file: [published.size, published.sha256] for file, published in files.items()},
    }


def move(recipe: Recipe, output: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the weights once while as many bytes as the merge's shards have are written."""
    shards = json.loads((arguments.folder / "shards.json").read_text())
    stores = [open_store(location, recipe.storage) for location in recipe.checkpoints]
    target = open_store(output, recipe.storage, writable=True)
    own, piece = local(), memoryview(os.urandom(PIECE_BYTES))

    def read(span: tuple[Store, str, int, int, Any]) -> int:
        store, file, start, stop, stamp = span
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(OPTIMAL_READ_BYTES))
        store.read_into(file, start, own.buffer[: stop - start], stamp)
        return stop - start

    spans = [
        (store, file, start, min(start + OPTIMAL_READ_BYTES, stamp.size), stamp)
        for store in stores
        for file, stamp in store.list_top().items()
        if file.endswith(".safetensors")
        for start in range(0, stamp.size, OPTIMAL_READ_BYTES)
    ]
    with ThreadPoolExecutor(NUM_OBJECT_READERS) as pool:
        reading = pool.map(read, spans)
        for file, (size, _) in shards.items():
            with target.create(file, size=size) as sink:
                for start in range(0, size, PIECE_BYTES):
                    sink.write(piece[: min(PIECE_BYTES, size - start)])
        return {"read_bytes": sum(reading)}


MEASURED: dict[str, Callable[[Recipe, str, argparse.Namespace], dict[str, Any]]] = {"merge": merge_shards, "move": move}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what one merge or one move took, imports left out."""
    for module in IMPORTED_LATE:
        import_module(module)
    recipe = load_recipe(str(arguments.recipe))
    started, cpu = time.perf_counter(), time.process_time()
    facts = MEASURED[arguments.measure](recipe, arguments.output, arguments)
    return {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, **facts}


# The rounds


def run_rounds(arguments: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    """Make and upload the checkpoints, measure every client in every round, and return the medians."""
    shutil.rmtree(arguments.folder, ignore_errors=True)
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    folders = synthetic.make(arguments.folder, num_tuned=arguments.tuned, num_bytes=int(arguments.gb * 1e9))
    checkpoint_bytes = sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    recipes = upload(folders)
    # The first merge of each client is no round: it tells the shards, and warms the server.
    shards = [in_child("merge", client, recipe, arguments)["shards"] for client, recipe in recipes.items()]
    (arguments.folder / "shards.json").write_text(json.dumps(shards[0]))
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for client, recipe in recipes.items():
            for kind in ("move", "merge"):
                runs.setdefault((client, kind), []).append(in_child(kind, client, recipe, arguments))
    shards += [run["shards"] for (_, kind), found in runs.items() if kind == "merge" for run in found]
    assert all(found == shards[0] for found in shards), "the merges differ"
    shutil.rmtree(arguments.folder)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "server": "Ceph RGW, memstore, plain HTTP on loopback, same cores",
        "checkpoint_bytes": checkpoint_bytes,
        "num_checkpoints": len(folders),
        "num_shards": len(shards[0]),
        **{client: compared(runs[client, "move"], runs[client, "merge"]) for client in CLIENTS},
    }


def upload(folders: list[Path]) -> dict[str, Path]:
    """Copy the checkpoints to S3 and return a recipe over them for each client."""
    for folder in folders:
        store = open_store(f"s3://{BUCKET}/{folder.name}", StorageConfig(), writable=True)
        for path in folder.iterdir():
            with store.create(path.name, size=path.stat().st_size) as sink:
                sink.write(path.read_bytes())
        shutil.rmtree(folder)
    base, *tuned = (f"s3://{BUCKET}/{folder.name}" for folder in folders)
    recipes = {}
    for client in CLIENTS:
        content = {
            "merge_method": "model_stock",
            "base_model": base,
            "models": [{"model": model} for model in tuned],
            "stockflow": {"storage": {f"s3://{BUCKET}/": {"client": client}}},
        }
        recipes[client] = folders[0].parent / f"{client}.yaml"
        recipes[client].write_text(yaml.safe_dump(content))
    return recipes


def in_child(kind: str, client: str, recipe: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process, and remove what it wrote."""
    output = f"s3://{BUCKET}/{client}-{kind}-{time.monotonic_ns()}"
    passed = ("memory_gib", "threads", "shard_size", "folder")
    options = [word for name in passed for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    command = [sys.executable, "-m", "tests.benchmarks.s3_merge", "--measure", kind, "--recipe", str(recipe)]
    finished = subprocess.run([*command, "--output", output, *options], stdout=subprocess.PIPE, check=True)
    store = open_store(output, StorageConfig({"s3://": StoreOptions()}), writable=True)
    store.delete(list(store.list()))
    facts: dict[str, Any] = json.loads(finished.stdout)
    print(f"{client:8} {kind:6} {facts['s']:6.2f} s, CPU {facts['cpu_s']:6.2f} s", file=sys.stderr)
    return facts


def compared(moves: list[dict[str, Any]], merges: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of both, and how they relate."""
    medians = {
        f"{kind}_{name}": statistics.median(run[name] for run in runs)
        for kind, runs in (("move", moves), ("merge", merges))
        for name in ("s", "cpu_s", "read_bytes")
    }
    return {
        "merge_to_move": medians["merge_s"] / medians["move_s"],
        "merge_to_move_cpu": medians["merge_cpu_s"] / medians["move_cpu_s"],
        **medians,
        # Planning, claim, probes, receipts, table and manifest are what the shards' seconds_total leaves.
        **{name: statistics.median(run["stages"][name] for run in merges) for name in merges[0]["stages"]},
        "peak_mib_max": max(run["peak_mib"] for run in merges),
    }


if __name__ == "__main__":
    main()
