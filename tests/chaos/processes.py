"""Merges as processes that can be killed: a forked one with the imports done, or a command with all its children."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.runs import REPOSITORY, command

_PRELOADED = [
    "stockflow.cli",
    "stockflow.run.places",
    "stockflow.output.publish",
    "stockflow.storage.objects",
    "pyarrow.parquet",
]
"""what takes a merge a second and more to import; a process forked from one that has it starts at once"""
_DIES_WITHIN_S = 30.0


class Running(Protocol):
    """A merge that runs."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; -9 if it was killed."""


class Forked:
    """``stockflow`` in a process of its own, forked from a server that has imported it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, part_bytes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._process = context.Process(
            target=_be_stockflow, args=(list(arguments), dict(environment), log, part_bytes)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        self._process.join(0)
        return self._process.exitcode


def _be_stockflow(arguments: Sequence[str], environment: Mapping[str, str], log: Path, part_bytes: int) -> None:
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    from stockflow.cli import app
    from stockflow.storage import parts

    parts.DEFAULT_PART_BYTES = part_bytes
    app(list(arguments))


class Commanded:
    """``stockflow`` as its users start it, Ray with it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command(*arguments), cwd=REPOSITORY, env=os.environ | dict(environment), stdout=file, stderr=file
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def ray_workers(pid: int) -> list[int]:
    """Return the processes of Ray actors below a driver that are doing an item."""
    return [worker for worker in descendants(pid) if _title(worker).startswith("ray::Actor.work")]


def kill(*pids: int) -> None:
    """Kill processes, as a machine that loses power does: none of them sees it coming."""
    _signal(signal.SIGKILL, *pids)


def _signal(number: int, *pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(*pids: int) -> None:
    """Stop processes where they are, and return when they are."""
    _signal(signal.SIGSTOP, *pids)
    while any(_state(pid) not in "TZX" for pid in pids):
        time.sleep(0.001)


def go_on(*pids: int) -> None:
    """Let stopped processes go on."""
    _signal(signal.SIGCONT, *pids)


def await_end(running: Running, others: Sequence[int]) -> None:
    """Return when a killed merge and its children are gone; those that outlive it for long are killed too."""
    deadline = time.monotonic() + _DIES_WITHIN_S
    while running.poll() is None or any(_is_alive(pid) for pid in others):
        if time.monotonic() > deadline:
            kill(*others)
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    return _state(pid) not in "ZX"


def _state(pid: int) -> str:
    """Return the letter of ``ps``; X of what is gone."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
