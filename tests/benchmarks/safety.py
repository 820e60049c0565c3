"""What durability and pinning cost a local merge: ``python -m tests.benchmarks.safety --gb 0.8 --tuned 2``.

Interleaved rounds in processes of their own: the merge as it is, the same without fsync, and the same without
comparing stamps around reads. Hashing is in all of them. Medians of the merge's own time, start-up left out.
On a busy machine the differences drown; what the merge as it is spends within the calls themselves does not.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stockflow import worker
from stockflow.driver import Inputs, MergeOptions, merge
from stockflow.execution import in_this_process
from stockflow.recipe import load_recipe
from stockflow.reporting import Silent
from stockflow.storage import Stamp, Store, local
from tests.benchmarks import synthetic

VARIANTS = ("as it is", "without fsync", "without pinning", "without both")


def leave_out_fsync() -> None:
    """Let files be written as if nothing could lose power."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment, misc]


def leave_out_pinning() -> None:
    """Let files be read as if nobody could replace them."""

    def check_stamp(store: Store, key: str, expected: Stamp) -> None:
        del store, key, expected

    local.PinnedFile.check = lambda file: None  # type: ignore[method-assign]
    worker.check_stamp = check_stamp  # type: ignore[attr-defined]


class Timed:
    """A function that adds up the seconds spent in it, over all threads."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merge once in this process."""
    if arguments.variant in ("without fsync", "without both"):
        leave_out_fsync()
    if arguments.variant in ("without pinning", "without both"):
        leave_out_pinning()
    flushing, looking = Timed(os.fsync), Timed(os.fstat)
    os.fsync, os.fstat = flushing, looking  # type: ignore[assignment]
    import stockflow.commit  # noqa: F401  # else its imports were counted

    options = MergeOptions(int(arguments.memory_gib * 2**30), arguments.threads, "cpu", arguments.shard_size)
    inputs = Inputs.open(load_recipe(str(arguments.folder / "recipe.yaml")))
    result = merge(inputs, str(arguments.folder / "out"), options, in_this_process, Silent())
    return {"s": result.seconds, "fsync_s": flushing.seconds, "fstat_s": looking.seconds}


def in_child(variant: str) -> dict[str, Any]:
    """Measure in a new process and remove what it wrote, with nothing left to be flushed."""
    command = [sys.executable, "-m", "tests.benchmarks.safety", *sys.argv[1:], "--variant", variant]
    os.sync()
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    measured: dict[str, Any] = json.loads(finished.stdout)
    told = (f"{name} {seconds:.3f}" for name, seconds in measured.items())
    print(f"{variant:16}", *told, file=sys.stderr)
    return measured


def main() -> None:
    """Make the inputs, run the rounds, print the medians and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.8, help="size of each checkpoint")
    parser.add_argument("--tuned", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-size", type=int, default=256_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stockflow-bench-safety"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    shutil.rmtree(arguments.folder, ignore_errors=True)
    synthetic.make(arguments.folder, num_tuned=arguments.tuned, num_bytes=int(arguments.gb * 1e9))
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            runs[variant].append(in_child(variant))
            shutil.rmtree(arguments.folder / "out")
    shutil.rmtree(arguments.folder)
    medians = {variant: statistics.median(run["s"] for run in found) for variant, found in runs.items()}
    whole = medians["as it is"]
    shares = {f"less {variant}": 1 - medians[variant] / whole for variant in VARIANTS[1:]}
    within = {
        f"within {name.removesuffix('_s')}": statistics.median(run[name] / run["s"] for run in runs["as it is"])
        for name in ("fsync_s", "fstat_s")
    }
    print(json.dumps({"medians_s": medians, **shares, **within}, indent=1))


if __name__ == "__main__":
    main()
