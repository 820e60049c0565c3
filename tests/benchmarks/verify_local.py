"""Time and CPU of `stockflow verify` on a local output against hashing the same files with as many threads.

    python -m tests.benchmarks.verify_local OUTPUT [--rounds 3] [--sample 5%] [--cold [INPUT ...]]

Each round runs both, each in a process of its own; the files are in the page cache if they fit. With --cold those of
the output and of the inputs named are dropped from it before each, so that the disk sets the pace.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from stockflow.verification.verify import NUM_FILES_AT_ONCE
from tests.runs import command

FLOOR = """
import hashlib, json, sys
from concurrent.futures import ThreadPoolExecutor
folder, num_threads = sys.argv[1], int(sys.argv[2])
files = json.load(open(f"{folder}/manifest.json"))["files"]

def check(key):
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(f"{folder}/{key}", "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    assert digest.hexdigest() == files[key]["sha256"]

with ThreadPoolExecutor(num_threads) as pool:
    list(pool.map(check, sorted(files, key=lambda key: -files[key]["size"])))
"""
"""Hash every published file, the largest first, and import nothing else: the least that verifying can be."""


def drop(folders: Sequence[Path]) -> None:
    """Have the kernel forget the files of some folders."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def timed(arguments: Sequence[str]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of a process and its children."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", default="5%")
    parser.add_argument("--cold", type=Path, nargs="*", metavar="INPUT", help="drop these inputs and the output first")
    options = parser.parse_args()
    runs = {
        "sha256": [sys.executable, "-c", FLOOR, str(options.output), str(NUM_FILES_AT_ONCE)],
        "verify": command("verify", options.output, "--quiet"),
        f"verify --sample {options.sample}": command("verify", options.output, "--quiet", "--sample", options.sample),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, arguments in runs.items():
            if options.cold is not None:
                drop([options.output, *options.cold])
            measured[name].append(timed(arguments))
    floor = [median(column) for column in zip(*measured["sha256"], strict=True)]
    for name, pairs in measured.items():
        wall, cpu = (median(column) for column in zip(*pairs, strict=True))
        print(f"{name:20} {wall:6.2f} s ({wall / floor[0]:.2f} x), {cpu:6.2f} s of CPU ({cpu / floor[1]:.2f} x)")


if __name__ == "__main__":
    main()
