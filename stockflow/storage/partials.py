"""Partial files: temporary siblings of what is being written, locked until they are renamed or their writer is gone."""

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

PARTIAL_SUFFIX = ".stockflow-partial"
"""Ending of files that are being written; never part of an output."""
LOCKED_WITHIN_S = 2.0
"""A file being written is locked right after it appears; a younger one may not be yet."""


def is_partial(name: str) -> bool:
    """Return whether a file's name is that of a partial file."""
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


def key_of_partial(name: str) -> str:
    """Return the name of the file that a partial file would have become."""
    return name.removeprefix(".").removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]


@contextmanager
def partial_file(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """Create a partial file beside ``path``; yields it, locked, with its own path. What was not renamed is removed."""
    file, partial = _created(path)
    try:
        with file:
            yield file, partial
    finally:
        with suppress(OSError):
            os.unlink(partial)


def _created(path: str) -> tuple[BinaryIO, str]:
    """A process that slept before it had its lock may find that its file was taken for an abandoned one: once more."""
    folder, name = os.path.split(path)
    while True:
        partial = os.path.join(folder, f".{name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
        file = open(partial, "xb")  # noqa: SIM115, buffered: a raw file may take half of a write on a full disk
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.lexists(partial):
                return file, partial
        except BaseException:
            file.close()
            os.unlink(partial)
            raise
        file.close()


@contextmanager
def unheld(partial: str) -> Iterator[bool | None]:
    """Yield whether nobody holds a partial file, and keep it so; None: it is gone, or no plain file, thus not ours."""
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            raise
        yield None
        return
    try:
        found = os.fstat(descriptor)
        yield _locks(descriptor, found) if stat.S_ISREG(found.st_mode) else None
    finally:
        os.close(descriptor)


def _locks(descriptor: int, found: os.stat_result) -> bool:
    if time.time() - found.st_mtime <= LOCKED_WITHIN_S:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
