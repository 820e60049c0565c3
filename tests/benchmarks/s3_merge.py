"""Time and CPU of a merge from S3 to S3 against moving the same bytes: ``make bench-s3 ARGS='--gb 0.19'``.

The server is Ceph's gateway with objects in memory (tests/ceph_server.py), on the same cores as the client: compare
ratios, and CPU seconds, which are the client's alone. Reading the inputs from nginx instead is the ceiling. Every
measurement is made with obstore and with s3fs, at the same range size and concurrency, once per round, interleaved;
what each is: tests/benchmarks/s3_work.py and docs/benchmarks.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import boto3

from stockflow.storage import StorageConfig, open_store
from tests.benchmarks import nginx_server
from tests.benchmarks.cases import Case, add_case_options, case_from, planned, recipe_of, workplace, write_recipe
from tests.benchmarks.processes import MIB, run, warm
from tests.benchmarks.report import Facts, add_run_options, interleaved, medians, print_table, record, spread
from tests.ceph_server import PACKAGES, ceph_gateway, missing_binaries
from tests.s3_server import CREDENTIALS, FORBIDDEN

BUCKET = "bench"
CLIENTS = {"obstore": "obstore", "s3fs": "fsspec"}
"""what a recipe calls them"""
MEASURED = (("nginx", "read"), ("Ceph", "read"), ("Ceph", "move"), ("Ceph", "merge"))
PIECE_BYTES = 8 * MIB
Key = tuple[str, str, str]
"""client, server, what is measured"""


def main() -> None:
    """Start the servers, upload the inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser, gb=0.19, tuned=2, memory="2GiB")
    parser.add_argument("--shard-size", default="100MB")
    add_run_options(parser, "s3")
    arguments = parser.parse_args()
    case = case_from(arguments)
    if missing := missing_binaries():
        parser.error(f"no {', '.join(missing)}; apt-get install --no-install-recommends {PACKAGES}")
    if nginx_server.is_missing():
        parser.error(f"no nginx; apt-get install --no-install-recommends {nginx_server.PACKAGE}")
    for name in FORBIDDEN:
        os.environ.pop(name, None)
    os.environ |= CREDENTIALS
    input_bytes = int(case.gb * 1e9) * (1 + case.tuned)
    with (
        workplace([case], arguments.folder, keep=arguments.keep) as work,
        ceph_gateway(memory_bytes=2 * input_bytes + (4 << 30)) as ceph,
        nginx_server.nginx(work, work / "nginx") as nginx,
    ):
        (work / BUCKET).symlink_to(case.family.folder(arguments.folder).absolute())
        endpoints = {"Ceph": ceph, "nginx": nginx}
        bench = S3Bench(case, case.folders(arguments.folder), work, endpoints, arguments.shard_size)
        measures: dict[Key, Callable[[], Facts]] = {
            (client, server, kind): partial(bench.measure, client, server, kind)
            for server, kind in MEASURED
            for client in CLIENTS
        }
        runs = interleaved(measures, arguments.rounds)
    found = {" ".join(key): medians(these) for key, these in runs.items()}
    ratios = ratios_of(runs)
    show(case, bench, runs, ratios)
    record(
        arguments,
        {
            "server": "Ceph RGW, memstore, and nginx; plain HTTP on loopback, on the client's cores",
            "case": asdict(case),
            "input_bytes": bench.input_bytes,
            "shards": len(bench.shards),
            "medians": found,
            "ratios": ratios,
            "runs": {" ".join(key): these for key, these in runs.items()},
        },
    )


class S3Bench:
    """One case on object storage."""

    def __init__(
        self, case: Case, folders: Sequence[Path], work: Path, endpoints: dict[str, str], shard_size: str
    ) -> None:
        """Upload the inputs, and merge once with each client: that tells the shards, and warms the server."""
        self._case = case
        self._work = work
        self._endpoints = endpoints
        self._options = [*case.options, "--shard-size", shard_size]
        self._inputs = folders
        upload(folders, endpoints["Ceph"])
        names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
        (work / "files.json").write_text(json.dumps(names))
        plan = planned(self._recipe("obstore"), f"s3://{BUCKET}/output", self._options)
        (work / "shards.json").write_text(json.dumps({shard["file"]: shard["bytes"] for shard in plan["shards"]}))
        self.input_bytes = plan["source_bytes"]
        self.shards: dict[str, str] = {}
        for client in CLIENTS:
            self.measure(client, "Ceph", "merge")

    def measure(self, client: str, server: str, kind: str) -> Facts:
        """Measure once, and remove what was written."""
        warm(self._inputs)
        endpoint = self._endpoints[server]
        output = f"s3://{BUCKET}/{client}-{kind}-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "tests.benchmarks.s3_work", kind, str(self._recipe(client))]
        lists = ["--files", str(self._work / "files.json"), "--shards", str(self._work / "shards.json")]
        options = self._options if kind == "merge" else []
        finished = run([*command, "--output", output, *lists, *options], environment={"AWS_ENDPOINT_URL": endpoint})
        facts = json.loads(finished.stdout)
        report = facts.pop("report", None)
        if kind != "read":
            remove(output, self._endpoints["Ceph"])
        return {
            **facts,
            "others_cpu_s": finished.others_cpu_seconds,
            "peak_rss_mib": finished.peak_rss_mib,
            **(self._reported(report) if report else {}),
        }

    def _reported(self, report: dict[str, Any]) -> Facts:
        """Return the numbers of a merge's report; every merge must have given the same bytes."""
        self.shards = self.shards or report["shards"]
        if report["shards"] != self.shards:
            raise SystemExit(f"two merges of the same inputs differ: {self.shards} and {report['shards']}")
        summary: Facts = report["summary"]
        seconds = {name: value for name, value in summary.items() if name.startswith("seconds_")}
        return {
            "read_bytes": summary["bytes_read"],
            "peak_receipts_mib": summary["peak_memory_bytes"] / MIB,
            **seconds,
        }

    def _recipe(self, client: str) -> Path:
        locations = [f"s3://{BUCKET}/{folder.name}" for folder in self._inputs]
        storage = {f"s3://{BUCKET}/": {"client": CLIENTS[client]}}
        return write_recipe(self._work / f"{client}.yaml", recipe_of(self._case, locations, storage))


def upload(folders: Sequence[Path], endpoint: str) -> None:
    """Copy checkpoints into a new bucket."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    for folder in folders:
        store = open_store(f"s3://{BUCKET}/{folder.name}", StorageConfig(), writable=True)
        for path in folder.iterdir():
            with path.open("rb") as file, store.create(path.name, size=path.stat().st_size) as sink:
                while piece := file.read(PIECE_BYTES):
                    sink.write(piece)


def remove(output: str, endpoint: str) -> None:
    """Remove the objects of an output."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    store = open_store(output, StorageConfig(), writable=True)
    store.delete(list(store.list()))


def ratios_of(runs: dict[Key, list[Facts]]) -> dict[str, Facts]:
    """Return how merges relate to moves, and s3fs to obstore, in seconds and in CPU seconds."""
    middle = {key: medians(these) for key, these in runs.items()}

    def ratio(above: Key, below: Key) -> Facts:
        return {name: middle[above][name] / middle[below][name] for name in ("s", "cpu_s")}

    merge_to_move = {
        f"merge : move, {client}": ratio((client, "Ceph", "merge"), (client, "Ceph", "move")) for client in CLIENTS
    }
    s3fs_to_obstore = {
        f"s3fs : obstore, {kind}, {server}": ratio(("s3fs", server, kind), ("obstore", server, kind))
        for server, kind in MEASURED
    }
    return merge_to_move | s3fs_to_obstore


def show(case: Case, bench: S3Bench, runs: dict[Key, list[Facts]], ratios: dict[str, Facts]) -> None:
    """Print one row per measurement, then the ratios."""
    rows = []
    for (client, server, kind), these in runs.items():
        middle = medians(these)
        rows.append(
            (
                f"{kind}, {server}, {client}",
                spread(these, "s"),
                spread(these, "cpu_s"),
                f"{middle['read_bytes'] / 1e9 / middle['s']:.2f}",
                f"{middle['peak_rss_mib']:.0f}",
            )
        )
    inputs = f"{bench.input_bytes / 1e9:.2f} GB read, {len(bench.shards)} shards"
    columns = ("", "s", "client's CPU s", "GB/s read", "peak RSS MiB")
    print_table(f"{case.label}, {inputs}: medians (smallest-largest)", columns, rows)
    both = [(name, f"{of['s']:.2f}", f"{of['cpu_s']:.2f}") for name, of in ratios.items()]
    print_table("ratios of medians", ("", "s", "CPU s"), both)


if __name__ == "__main__":
    main()
