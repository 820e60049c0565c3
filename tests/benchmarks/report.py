"""Rounds, medians, tables, and the dated record of a benchmark."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

import stockflow

Facts = dict[str, float]
"""Measured numbers by name; names of seconds end in ``s``, of memory in ``mib``."""
Key = TypeVar("Key", bound=Hashable)

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "numba", "torch", "pyarrow", "obstore", "s3fs")
LOAD_AVERAGE_BEFORE = round(os.getloadavg()[0], 2)
"""of the last minute, taken when the benchmark starts"""
PLAIN_WIDTH = 160
"""columns of a table that goes to a file"""


def add_run_options(parser: argparse.ArgumentParser, target: str) -> None:
    """Add how often to measure, where to work and where the result goes."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stockflow-bench"), help="for inputs and outputs")
    parser.add_argument("--keep", action="store_true", help="leave the inputs there for the next run")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{target}.jsonl", help="the record is appended here")
    parser.add_argument("--note", default="", help="goes into the record, such as what else the machine was doing")


def interleaved(measures: Mapping[Key, Callable[[], Facts]], num_rounds: int) -> dict[Key, list[Facts]]:
    """Measure everything once per round, in order, and return what each gave, by round."""
    runs: dict[Key, list[Facts]] = {key: [] for key in measures}
    for number in range(1, num_rounds + 1):
        for key, measure in measures.items():
            runs[key].append(measure())
            name = ": ".join(key) if isinstance(key, tuple) else key
            print(f"round {number} of {num_rounds}: {runs[key][-1]['s']:8.2f} s  {name}", file=sys.stderr, flush=True)
    return runs


def medians(runs: Sequence[Facts]) -> Facts:
    """Return the median of every number."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def spread(runs: Sequence[Facts], name: str) -> str:
    """Return median, smallest and largest of a number of seconds."""
    values = sorted(run[name] for run in runs)
    return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Print a table: the first columns are words, the others are numbers."""
    table = Table(show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", no_wrap=index < words)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)
    console.print()


def record(arguments: argparse.Namespace, facts: Mapping[str, Any]) -> None:
    """Append one line to the results: when, what, where, with which versions, and what was measured."""
    line = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "note": arguments.note,
        "versions": versions(),
        "machine": machine(),
        "rounds": arguments.rounds,
        **facts,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        file.write(json.dumps(_rounded(line)) + "\n")
    print(f"appended to {arguments.results}")


def versions() -> dict[str, str]:
    """Return the commit that was measured, ``-dirty`` with changes, and what it ran on."""
    package = Path(stockflow.__file__).parent
    found = {"stockflow": stockflow.__version__, "commit": _git(package, "rev-parse", "--short", "HEAD")}
    if _git(package, "status", "--porcelain", "--", "."):
        found["commit"] += "-dirty"
    found["python"] = platform.python_version()
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


def machine() -> dict[str, Any]:
    """Return what the machine is, and how busy it was before."""
    memory_kib = next(int(line.split()[1]) for line in _proc("meminfo") if line.startswith("MemTotal:"))
    models = [line.partition(":")[2].strip() for line in _proc("cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "load_average_before": LOAD_AVERAGE_BEFORE,
    }


def _proc(name: str) -> list[str]:
    return Path("/proc", name).read_text().splitlines()


def _git(folder: Path, *words: str) -> str:
    finished = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else "unknown"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
