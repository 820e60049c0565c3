"""Whole merges, in this process or as a user starts them, and what they left behind."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockflow.engine.process import current_memory_bytes
from stockflow.engine.session import GROWTH_BYTES
from stockflow.events import OnEvent, ignore
from stockflow.planning.budget import BASELINE_BYTES
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process

if TYPE_CHECKING:
    from click.testing import Result

REPOSITORY = Path(__file__).parent.parent
MIB = 2**20
_STOPS_ITSELF = """
import glob, itertools, os, signal, time
from stockflow.storage.local import LocalStore

put, receipts = LocalStore.put, itertools.count(1)

def put_and_stop(store, key, payload):
    put(store, key, payload)
    if "/receipts/" in key and next(receipts) == {count}:
        while not glob.glob(os.path.join(glob.escape(store.url), ".model-*partial")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)

LocalStore.put = put_and_stop
"""
"""A run that stops as it has written its so manieth receipt and is at a further shard: seen from outside it may have
ended by then."""


def grown_bytes() -> int:
    """Return what this process holds beyond a fresh worker, or will with kernels loaded: a worker in it has less."""
    return max(current_memory_bytes() + GROWTH_BYTES["cpu"] - BASELINE_BYTES["cpu"], 0) + 64 * MIB


def merge_here(
    recipe: Path,
    output: Path | str,
    *,
    memory_bytes: int = 1024 * MIB,
    num_threads: int = 2,
    shard_size: int | None = None,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> Merged:
    """Merge in this process, as if it were a fresh one, and return the result."""
    from stockflow.recipe import load_recipe

    options = MergeOptions(memory_bytes + grown_bytes(), num_threads, "cpu", shard_size, overwrite)
    return merge(Inputs.open(load_recipe(str(recipe))), str(output), options, in_this_process, on_event)


def command(*arguments: object) -> list[str]:
    """Return the command line of ``stockflow`` in this interpreter."""
    return [sys.executable, "-m", "stockflow", *map(str, arguments)]


def invoke(*words: object, stdin: str | None = None) -> "Result":
    """Run ``stockflow`` in this process, as if these words were typed; what it does not catch is raised."""
    from typer.testing import CliRunner

    from stockflow.cli import app

    return CliRunner().invoke(app, [str(word) for word in words], input=stdin, catch_exceptions=False)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``stockflow`` to its end as a process of its own."""
    return subprocess.run(command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, check=False)


def merge_elsewhere(recipe: Path, output: Path, *options: object) -> dict[str, Any]:
    """Merge in a process of its own and return what ``--json`` prints."""
    finished = run("merge", recipe, output, "--json", "--quiet", "--device", "cpu", *options)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def merge_and_watch(*arguments: object) -> tuple[dict[str, Any], int]:
    """Run a merge to its end; return what it prints and its largest resident memory as the kernel saw it."""
    # Not resource.getrusage: a child's ru_maxrss starts with what its parent held when it forked.
    peak = 0
    with subprocess.Popen(command(*arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _high_water_mark(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        assert process.returncode == 0, arguments
        return json.load(process.stdout), peak


def _high_water_mark(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), default=0)


def receipts(output: Path) -> list[dict[str, Any]]:
    """Return the receipts below an output, by file."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("_stockflow/*/receipts/*.json"))]


def tensor_facts(output: Path) -> dict[str, dict[str, Any]]:
    """Return the row of facts of every tensor, by name."""
    return {row["name"]: row for receipt in receipts(output) for row in receipt["tensors"]}


def coefficients(row: Mapping[str, Any]) -> list[list[float]]:
    """Return the recorded coefficients of a tensor, exactly: one list per group."""
    return [[float.fromhex(text) for text in group] for group in row["coefficients"]]


def shard_digests(output: Path) -> dict[str, str]:
    """Return the sha256 of every weight file of an output, read again from the disk."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("*.safetensors"))}


def leftovers(output: Path) -> list[str]:
    """Return what is not part of a finished output: files that were being written."""
    return sorted(path.name for path in output.rglob("*partial*"))


def expected_digests(results: Sequence[Merged]) -> list[dict[str, str]]:
    """Return, per merge, the sha256 of every shard as its manifest states it."""
    return [
        {shard.file: result.manifest.files[shard.file].sha256 for shard in result.plan.shards} for result in results
    ]


def start(*arguments: object, script: str = "") -> "subprocess.Popen[str]":
    """Start a command, after a script in the same process."""
    script += "\nfrom stockflow import cli; cli.main()"
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def start_and_stop(*arguments: object, script: str = "", num_receipts: int = 1) -> "subprocess.Popen[str]":
    """Start a command and return it stopped, with so many receipts written and shards on their way."""
    process = start(*arguments, script=script + _STOPS_ITSELF.format(count=num_receipts))
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state
    assert state.si_code == os.CLD_STOPPED, process.communicate()
    return process
