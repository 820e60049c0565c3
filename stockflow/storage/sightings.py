"""Sightings: which files a run has seen, by what the system changes whenever they are replaced or written to.

Size and modification time can be put back, and are all that a plan holds; inode and time of change are of one file on
one machine, so they are compared within a run and a process alone.
"""

import os
import threading
from typing import NamedTuple

from stockflow.errors import InputChangedError

_VERSION = "mtime_ns="
"""How the version of a stamp of a local file begins."""


class Identity(NamedTuple):
    """What no copy of a file has, and no rewriting keeps."""

    device: int
    inode: int
    changed_ns: int
    """when bytes, rights, owner or number of links were last changed; nobody can put it back"""


class Sightings:
    """The files that were seen, by path; safe to share between threads. Another process sees for itself."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, int], Identity] = {}

    def place_of(self, path: str, size: int, version: str) -> tuple[int, int] | None:
        """Return device and inode of a file that was seen in this state: of two links to one file they are the same."""
        found = self._seen.get((path, size, int(version.removeprefix(_VERSION))))
        return (found.device, found.inode) if found else None

    def __reduce__(self) -> tuple[type["Sightings"], tuple[()]]:
        return Sightings, ()

    def hold(self, path: str, found: os.stat_result) -> None:
        """Compare a file with what was seen there in the same state, or remember it.

        Raises:
            InputChangedError: it has the same size and time, and is not the same.
        """
        identity = Identity(found.st_dev, found.st_ino, found.st_ctime_ns)
        with self._lock:
            first = self._seen.setdefault((path, found.st_size, found.st_mtime_ns), identity)
        if first != identity:
            is_other = (first.device, first.inode) != (identity.device, identity.inode)
            raise InputChangedError(
                f"{path} changed since it was planned: its size and time are the same, but "
                f"{'another file is there' if is_other else 'it was written to, or its rights or links changed'} "
                f"(inode {first.inode} changed at {first.changed_ns} ns, found {identity.inode} at "
                f"{identity.changed_ns}). Restore the file and leave it alone, or run again"
            )
