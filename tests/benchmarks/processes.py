"""Runs one command to its end and measures it: time, CPU, memory of its process tree, what it read from the disk.

The caller's process must stay small: the kernel's peak of a child begins at the peak of the process that started it.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SAMPLE_S = 0.02
DISK_BLOCK_BYTES = 512
MIB = 2**20
SET_BY_DEVELOPERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_NUM_THREADS")
"""variables users do not have, which would change what is measured"""


@dataclass(frozen=True)
class Finished:
    """What one command took, from its start to its end."""

    stdout: str
    seconds: float
    cpu_seconds: float
    """user and system, of it and of its children"""
    peak_rss_mib: float
    """largest resident memory of one process, shared and mapped pages included"""
    others_cpu_seconds: float
    """what everything else on the machine computed meanwhile"""
    disk_read_mb: float
    """what did not come from the page cache"""
    peak_pss_mib: float | None
    """of the process tree, sampled; None if it was not"""
    peak_anonymous_mib: float | None
    """the part of the same that is no mapped file"""


def run(command: Sequence[str], *, sampled: bool = False, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command and return what it took.

    Args:
        command: program and arguments.
        sampled: whether to sample memory 50 times a second, which costs the command some time.
        environment: added to ours.

    Raises:
        SystemExit: it failed; the message has the end of its standard error.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_DEVELOPERS}
    with tempfile.TemporaryFile() as errors:
        started, machine_before = time.perf_counter(), machine_cpu_seconds()
        whole = {**inherited, **(environment or {})}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=whole)
        assert process.stdout is not None
        with process.stdout, MemorySampler(process.pid if sampled else None) as sampler:
            stdout = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
        seconds, machine_after = time.perf_counter() - started, machine_cpu_seconds()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            end = errors.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{end}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Finished(
        stdout=stdout,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        others_cpu_seconds=max(machine_after - machine_before - cpu_seconds, 0.0),
        peak_rss_mib=usage.ru_maxrss / 1024,
        disk_read_mb=usage.ru_inblock * DISK_BLOCK_BYTES / 1e6,
        peak_pss_mib=sampler.peak_pss_kib / 1024 if sampled else None,
        peak_anonymous_mib=sampler.peak_anonymous_kib / 1024 if sampled else None,
    )


def machine_cpu_seconds() -> float:
    """Return the seconds that all cores together have not been idle since the machine started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = ticks
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


class MemorySampler:
    """Adds up the proportional memory of a process tree (PSS: shared pages count once), many times a second."""

    def __init__(self, root: int | None) -> None:
        """Sample the tree under ``root``; nothing if None."""
        self._root = root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_pss_kib = self.peak_anonymous_kib = 0

    def __enter__(self) -> "MemorySampler":
        """Begin."""
        if self._root is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._ended.set()
        if self._root is not None:
            self._thread.join()

    def _sample(self) -> None:
        assert self._root is not None
        while not self._ended.wait(SAMPLE_S):
            pss = anonymous = 0
            for pid in process_tree(self._root):
                with suppress(OSError):  # it may have ended meanwhile
                    lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
                    fields = dict(line.split(maxsplit=1) for line in lines)
                    pss += int(fields["Pss:"].split()[0])
                    anonymous += int(fields["Pss_Anon:"].split()[0])
            self.peak_pss_kib = max(self.peak_pss_kib, pss)
            self.peak_anonymous_kib = max(self.peak_anonymous_kib, anonymous)


def process_tree(root: int) -> list[int]:
    """Return ``root`` and all processes below it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                # pid (name, which may contain anything) state ppid ...
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def warm(folders: Sequence[Path]) -> None:
    """Read every file below ``folders`` once, so that what is measured next finds it in the page cache."""
    buffer = memoryview(bytearray(4 * MIB))
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
