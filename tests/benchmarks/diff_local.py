"""Time and CPU of `stockflow diff` on two local checkpoints against reading both.

    python -m tests.benchmarks.diff_local A B [--rounds 5] [--cold]

Each round runs, each in a process of its own, with the files in the page cache if they fit; --cold: taken
out of it before:

    read 1      reads every weight file of both, one thread, 1 MiB at a time into one reused buffer: the floor of merges
    read N      the same with as many threads as the machine has cores, each on a part of every file
    diff        compares

Seconds are those of the work itself, start of the interpreter and loading of kernels left out; ``process`` is all of
a `stockflow diff --quiet`, these included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from stockflow.insight.comparison import compare_checkpoints
from stockflow.insight.surveys import SurveyOptions
from stockflow.run.places import survey_in_this_process
from stockflow.storage import StorageConfig
from tests.checkpoints import write_checkpoint
from tests.runs import REPOSITORY, command

READ_BYTES = 2**20
MEMORY_BYTES = 2**31


def weight_files(folders: list[Path]) -> list[Path]:
    """Return the weight files of both."""
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def read(folders: list[Path], num_threads: int) -> None:
    """Read every weight file of both."""

    def read_part(number: int) -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        for path in weight_files(folders):
            size = path.stat().st_size
            start, stop = (size * edge // num_threads for edge in (number, number + 1))
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while start < stop and (got := file.readinto(buffer[: stop - start])):
                    start += got

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read_part, range(num_threads)))


def compare(folders: list[Path]) -> None:
    """Compare both."""
    a, b = map(str, folders)
    options = SurveyOptions(MEMORY_BYTES, len(os.sched_getaffinity(0)), "cpu")
    compare_checkpoints(a, b, StorageConfig(), options, survey_in_this_process)


WORK: dict[str, Callable[[list[Path]], None]] = {
    "read 1": lambda folders: read(folders, 1),
    "read N": lambda folders: read(folders, len(os.sched_getaffinity(0))),
    "diff": compare,
}


def measure_here(name: str, folders: list[Path]) -> None:
    """Do one piece of work twice, the first time to load what is lazy, and print what the second one took."""
    if name == "diff":
        compare([Path(os.environ["WARM"])] * 2)
    started, cpu = time.perf_counter(), time.process_time()
    WORK[name](folders)
    print(json.dumps([time.perf_counter() - started, time.process_time() - cpu]))


def forget(folders: list[Path]) -> None:
    """Take the weight files of both out of the page cache."""
    for path in weight_files(folders):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(name: str, folders: list[Path], warm: Path) -> tuple[float, float]:
    """Return seconds and CPU seconds of a piece of work in a process of its own."""
    if name == "process":
        before, started = os.times(), time.perf_counter()
        subprocess.run(command("diff", *folders, "--quiet"), check=False, cwd=REPOSITORY)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return time.perf_counter() - started, cpu
    arguments = [sys.executable, "-m", "tests.benchmarks.diff_local", *map(str, folders), "--one", name]
    environment = os.environ | {"WARM": str(warm)}
    finished = subprocess.run(arguments, check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    seconds, cpu = json.loads(finished.stdout)
    return seconds, cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs=2, metavar="A B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="take the files out of the page cache before each run")
    parser.add_argument("--one", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure_here(options.one, options.folders)
        return
    total = sum(path.stat().st_size for path in weight_files(options.folders))
    print(f"{total / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        tiny = {str(dtype): torch.ones(8, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
        warm = write_checkpoint(Path(folder), tiny)
        rounds = []
        for _ in range(options.rounds):
            rounds.append({})
            for name in (*WORK, "process"):
                if options.cold:
                    forget(options.folders)
                rounds[-1][name] = measured(name, options.folders, warm)
    floor = median(each["read 1"][0] for each in rounds)
    for name in (*WORK, "process"):
        wall, cpu = (median(each[name][place] for each in rounds) for place in (0, 1))
        print(f"{name:9} {wall:6.2f} s ({wall / floor:.2f} x), {total / 1e9 / wall:6.2f} GB/s, {cpu:6.2f} s of CPU")


if __name__ == "__main__":
    main()
