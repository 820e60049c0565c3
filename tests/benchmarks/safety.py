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

from stockflow.engine import worker
from stockflow.recipe import load_recipe, parse_size
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import Stamp, Store, local
from tests.benchmarks.cases import Case, add_case_options, case_from, recipe_of, workplace, write_recipe

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


def measure(recipe: Path, output: Path, variant: str, case: Case, shard_size: int) -> dict[str, Any]:
    """Merge once in this process."""
    if variant in ("without fsync", "without both"):
        leave_out_fsync()
    if variant in ("without pinning", "without both"):
        leave_out_pinning()
    flushing, looking = Timed(os.fsync), Timed(os.fstat)
    os.fsync, os.fstat = flushing, looking  # type: ignore[assignment]
    import stockflow.output.publish  # noqa: F401  # else its imports were counted

    options = MergeOptions(parse_size(case.memory), case.threads, "cpu", shard_size)
    result = merge(Inputs.open(load_recipe(str(recipe))), str(output), options, in_this_process)
    return {"s": result.seconds, "fsync_s": flushing.seconds, "fstat_s": looking.seconds}


def in_child(variant: str, recipe: Path, output: Path) -> dict[str, Any]:
    """Measure in a new process and remove what it wrote, with nothing left to be flushed."""
    command = [sys.executable, "-m", "tests.benchmarks.safety", *sys.argv[1:]]
    os.sync()
    finished = subprocess.run(
        [*command, "--variant", variant, "--recipe", str(recipe), "--output", str(output)],
        stdout=subprocess.PIPE,
        check=True,
    )
    shutil.rmtree(output)
    measured: dict[str, Any] = json.loads(finished.stdout)
    told = (f"{name} {seconds:.3f}" for name, seconds in measured.items())
    print(f"{variant:16}", *told, file=sys.stderr)
    return measured


def main() -> None:
    """Make the inputs, run the rounds, print the medians and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_options(parser, tuned=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-size", type=int, default=256_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stockflow-bench-safety"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = case_from(arguments)
    if arguments.variant:
        print(json.dumps(measure(arguments.recipe, arguments.output, arguments.variant, case, arguments.shard_size)))
        return
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with workplace([case], arguments.folder, keep=False) as work:
        locations = [str(folder) for folder in case.folders(arguments.folder)]
        recipe = write_recipe(work / "recipe.yaml", recipe_of(case, locations))
        in_child(VARIANTS[0], recipe, work / "out")  # compiles what is not compiled yet; the inputs are in memory then
        for number in range(arguments.rounds):
            for variant in VARIANTS[number % 4 :] + VARIANTS[: number % 4]:
                runs[variant].append(in_child(variant, recipe, work / "out"))
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
