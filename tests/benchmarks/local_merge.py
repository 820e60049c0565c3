"""Time and peak memory of a local merge against the I/O floor: ``make bench ARGS='--gb 0.8 --tuned 4'``.

Interleaved rounds in one run, medians. The floor reads every input byte into a reused buffer, hashes and
writes the output bytes, on one thread, with the same fsync.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import synthetic

BUFFER_BYTES = 1 << 20


def floor(folders: list[Path], output: Path) -> float:
    """Return the seconds to read all inputs, hash and write as many bytes as the base has."""
    started = time.perf_counter()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    digest, left = hashlib.sha256(), sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    with output.open("wb", buffering=0) as file:
        while left > 0:
            part = buffer[: min(left, BUFFER_BYTES)]
            digest.update(part)
            left -= file.write(part)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def merge(recipe: Path, output: Path, *, memory: str, workers: int) -> dict[str, float]:
    """Return what one merge in a process of its own took; memory by its own receipts (VmHWM)."""
    command = [sys.executable, "-m", "stockflow", "merge", str(recipe), str(output), "--memory", memory]
    # Not ru_maxrss: a child inherits its parent's peak when it is forked.
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers), "--quiet", "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return {
        "process_s": time.perf_counter() - started,
        "merge_s": report["seconds"],
        "peak_mib": report["summary"]["peak_memory_bytes"] / 2**20,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        **{name: value for name, value in report["summary"].items() if name.startswith("seconds_")},
    }


def main() -> None:
    """Make the inputs, run the rounds, print and append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=0.8, help="size of each checkpoint")
    parser.add_argument("--tuned", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stockflow-bench"))
    parser.add_argument("--results", type=Path, help="append the result as JSON to this file")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    folders = synthetic.make(arguments.folder, num_tuned=arguments.tuned, num_bytes=int(arguments.gb * 1e9))
    floors, merges = [], []
    for round_number in range(arguments.rounds):
        floors.append(floor(folders, arguments.folder / "floor.bin"))
        output = arguments.folder / f"out-{round_number}"
        merges.append(
            merge(arguments.folder / "recipe.yaml", output, memory=arguments.memory, workers=arguments.workers)
        )
        shutil.rmtree(output)
    medians = {name: statistics.median(run[name] for run in merges) for name in merges[0]}
    floor_s = statistics.median(floors)
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "floor_s": floor_s,
        "merge_to_floor": medians["merge_s"] / floor_s,
        "peak_mib_max": max(run["peak_mib"] for run in merges),
        **medians,
    }
    print(json.dumps(result, indent=1))
    if arguments.results:
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
