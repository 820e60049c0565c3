"""Local folders: positioned reads into reused buffers, temporary sibling plus rename for writes."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import BinaryIO

from stockflow.errors import (
    AlreadyExistsError,
    InputChangedError,
    LinkError,
)
from stockflow.storage.base import HalfWritten, Listing, NewObject, Pin, Stamp, changed, check_key
from stockflow.storage.links import Links
from stockflow.storage.local_faults import named
from stockflow.storage.partials import PARTIAL_SUFFIX, is_partial, key_of_partial, partial_file, unheld
from stockflow.storage.sightings import Sightings


class LocalStore:
    """The files under one folder. Links are followed as ``Links`` says, and files written where no link leads."""

    pin: Pin = "stat"
    num_retries = 0
    over_http = False

    def __init__(
        self, root: str, trusted: Sequence[str] = (), only: str = "", sightings: Sightings | None = None
    ) -> None:
        """Take a folder.

        Args:
            root: absolute path; it need not exist yet.
            trusted: folders that links of weights may lead into.
            only: the one file of weights there that is meant; empty: whatever the folder holds.
            sightings: of a run that only reads here.
        """
        self.folder = root
        self.only = only
        self.url = os.path.join(root, only) if only else root
        self.links = Links(root, trusted)
        self._sightings = sightings

    def stamp(self, key: str) -> Stamp:
        """Return size and modification time of a file."""
        path = self._path(key)
        with named(path, "stat"):
            return self._sighted(key, self.links.stat(check_key(key)))

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes and the stamp, taken from one open file."""
        path = self._path(key)
        with named(path, "read"), self.opened(key) as descriptor:
            stamp = self._sighted(key, os.fstat(descriptor))
            wanted = min(num_bytes, stamp.size)
            payload = bytearray(wanted)
            if (num_read := _read_up_to(descriptor, memoryview(payload), 0)) < wanted:
                raise _truncated(path, num_read)
            return bytes(payload), stamp

    def read_into(self, key: str, start: int, buffer: memoryview, stamp: Stamp) -> None:
        """Fill ``buffer``; the file's stamp is compared before and after the bytes are read."""
        with self.open_pinned(key, stamp) as file:
            file.read_into(start, buffer)

    @contextmanager
    def open_pinned(self, key: str, stamp: Stamp) -> Iterator["PinnedFile"]:
        """Keep a file open, from which nothing is read but the state that ``stamp`` describes."""
        path = self._path(key)
        with named(path, "read"), self.opened(key) as descriptor:
            file = PinnedFile(path, descriptor, stamp, self._sightings)
            file.check()
            yield file

    @contextmanager
    def opened(self, key: str) -> Iterator[int]:
        """Provide a descriptor of a file; errors are the system's, and LinkError."""
        descriptor = self.links.open(check_key(key))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def check_links(self, keys: Iterable[str]) -> None:
        """Refuse a link that is not followed, or leads nowhere; it was listed as the link that it is."""
        for key in keys:
            with named(self._path(key), "stat"), suppress(FileNotFoundError):  # removed by a neighbour meanwhile
                self.links.stat(key)

    def list(self, prefix: str = "", *, at_most: int | None = None) -> dict[str, Stamp]:
        """Return all files below ``prefix``, or the first ones found; files being written left out."""
        top = self._path(check_key(prefix.rstrip("/"))) if prefix else self.folder
        found: dict[str, Stamp] = {}
        with named(top, "list"):
            self.links.check_folder(prefix)
            for path in islice(_files_below(top), at_most):
                key = os.path.relpath(path, self.folder)
                with suppress(FileNotFoundError):  # removed by a neighbour meanwhile
                    found[key] = self._sighted(key, self._listed(key))
        return dict(sorted(found.items()))

    def list_top(self) -> dict[str, Stamp]:
        """Return the files directly in the folder."""
        return self.listing().files

    def listing(self) -> Listing:
        """Return the files and the folders directly in the folder; a pipe counts as a file, and cannot be read."""
        files: dict[str, Stamp] = {}
        folders: list[str] = []
        with named(self.folder, "list"):
            for name in sorted(os.listdir(self.folder)) if os.path.exists(self.folder) else ():
                with suppress(FileNotFoundError):  # removed by a neighbour meanwhile
                    path, listed = f"{self.folder}/{name}", self._listed(name)
                    if stat.S_ISDIR(listed.st_mode) and not os.path.islink(path):
                        folders.append(name)
                    elif not os.path.isdir(path) and not name.endswith(PARTIAL_SUFFIX):
                        files[name] = self._sighted(name, listed)
        return Listing(files, tuple(folders))

    def _sighted(self, key: str, found: os.stat_result) -> Stamp:
        if self._sightings:
            self._sightings.hold(f"{self.folder}/{key}", found)
        return _stamp_of(found)

    def _listed(self, key: str) -> os.stat_result:
        """Return what the system tells of a file, or of a link that is not followed: it is there all the same."""
        try:
            return self.links.stat(key)
        except LinkError:
            return os.lstat(os.path.join(self.folder, key))

    @contextmanager
    def create(self, key: str, *, size: int | None = None) -> Iterator[NewObject]:
        """Write a temporary sibling; flush it to the disk and rename it when the block ends well."""
        del size  # a file grows as it is written
        path = self._path(key)
        with named(path, "write"):
            self.links.check_folder(os.path.dirname(key))
            _make_folder(os.path.dirname(path))
            with partial_file(path) as (file, partial):
                being_written = _NewFile(file)
                yield being_written
                being_written.sync()
                os.replace(partial, path)  # while it is locked, or a neighbour might discard it
                _sync_folder(os.path.dirname(path))

    def put(self, key: str, payload: bytes) -> None:
        """Write a small file, replacing what was there."""
        with self.create(key) as file:
            file.write(payload)

    def put_new(self, key: str, payload: bytes) -> None:
        """Write a small file that must not exist: a hard link is exclusive and appears whole."""
        path = self._path(key)
        with named(path, "create"):
            self.links.check_folder(os.path.dirname(key))
            _make_folder(os.path.dirname(path))
            with partial_file(path) as (file, partial):
                being_written = _NewFile(file)
                being_written.write(payload)
                being_written.sync()
                try:
                    os.link(partial, path)
                except FileExistsError:
                    raise AlreadyExistsError(f"{path} already exists") from None
                _sync_folder(os.path.dirname(path))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files; they are gone for good before anything else is written."""
        folders: dict[str, None] = {}
        for key in keys:
            path = self._path(key)
            with named(path, "delete"), suppress(FileNotFoundError):
                self.links.check_folder(os.path.dirname(key))
                os.unlink(path)
                folders[os.path.dirname(path)] = None
        for folder in folders:
            with named(folder, "delete"):
                _sync_folder(folder)

    def half_written(self, *, also_held: bool = False) -> Sequence[HalfWritten]:
        """Return the files that writers who died were writing: those that nobody holds a lock on, or all."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                partial = os.path.join(folder, name)
                if not is_partial(name):
                    continue
                with named(partial, "read"), unheld(partial) as is_abandoned:
                    if is_abandoned or (also_held and is_abandoned is not None):
                        key = os.path.join(os.path.relpath(folder, self.folder), key_of_partial(name))
                        found.append(HalfWritten(os.path.normpath(key), name, bool(is_abandoned)))
        return sorted(found, key=lambda piece: (piece.key, piece.name))

    def discard(self, leftovers: Iterable[HalfWritten]) -> None:
        """Remove temporary files, but for those of which a writer woke up meanwhile."""
        for leftover in leftovers:
            key = os.path.join(os.path.dirname(leftover.key), leftover.name)
            with named(self._path(key), "delete"), unheld(self._path(key)) as is_abandoned:
                if is_abandoned or not leftover.is_abandoned:
                    self.delete([key])

    def creates_exclusively(self, key: str, payload: bytes) -> bool:
        """Return True: a hard link is exclusive."""
        del key, payload
        return True

    def pins_reads(self, key: str) -> bool:
        """Return True: stamps are compared around every read."""
        del key
        return True

    def where(self, key: str = "") -> str:
        """Return what a file is called in messages, or the folder."""
        return f"{self.folder}/{key}" if key else self.folder

    def _path(self, key: str) -> str:
        return f"{self.folder}/{check_key(key)}"


class PinnedFile:
    """An open file in the state of its stamp."""

    def __init__(self, path: str, descriptor: int, stamp: Stamp, sightings: Sightings | None = None) -> None:
        """Take an open descriptor; who opened it closes it."""
        self._sightings = sightings
        self._path = path
        self._descriptor = descriptor
        self._stamp = stamp
        self._held: tuple[int, ...] = ()
        """state in which it was found unchanged"""

    def check(self) -> None:
        """Compare the file with its stamp.

        Raises:
            InputChangedError: it was written to.
        """
        opened = os.fstat(self._descriptor)
        state = opened.st_size, opened.st_mtime_ns, opened.st_ctime_ns
        if state == self._held:
            return
        found = _stamp_of(opened)
        if found == self._stamp and self._sightings:
            self._sightings.hold(self._path, opened)
        if found != self._stamp:
            raise changed(str(self._path), self._stamp, found)
        self._held = state

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer``; the file is compared with its stamp afterwards, so that no changed byte is used.

        Raises:
            InputChangedError: it was written to.
            StorageError: the disk failed.
        """
        with named(self._path, "read"):
            num_read = _read_up_to(self._descriptor, buffer, start)
            self.check()
        if num_read < buffer.nbytes:
            raise _truncated(self._path, start + num_read)

    def read_soon(self, start: int, num_bytes: int) -> None:
        """Let the system fetch a range from the disk, without waiting for it; reading it is where errors show."""
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, start, num_bytes, os.POSIX_FADV_WILLNEED)


class _NewFile:
    """A file that is written under another name."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._started = 0
        """bytes the disk was told to begin with"""
        self._is_durable = False

    def write(self, payload: memoryview | bytes, /) -> object:
        self._is_durable = False
        written = self._file.write(payload)
        # Dirty pages are not dropped: the disk begins with them now, so that fsync finds little left to wait for
        # (0.22 s less for 0.8 GB).
        os.posix_fadvise(self._file.fileno(), self._started, 0, os.POSIX_FADV_DONTNEED)
        self._started += len(payload)
        return written

    def sync(self) -> None:
        # Once: between looking at who owns the prefix and the shard's appearing there must be no wait for the disk.
        if not self._is_durable:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._is_durable = True


def _stamp_of(stat: os.stat_result) -> Stamp:
    return Stamp(size=stat.st_size, version=f"mtime_ns={stat.st_mtime_ns}")


def _files_below(top: str) -> Iterator[str]:
    for folder, _, names in os.walk(top):
        for name in names:
            if not name.endswith(PARTIAL_SUFFIX):
                yield os.path.join(folder, name)


def _read_up_to(descriptor: int, buffer: memoryview, start: int) -> int:
    """Fill ``buffer``, and return how many bytes there were: fewer if the file ends before."""
    done = 0
    while done < buffer.nbytes and (count := os.preadv(descriptor, [buffer[done:]], start + done)):
        done += count
    return done


def _truncated(path: str, num_bytes: int) -> InputChangedError:
    return InputChangedError(f"{path} ended at byte {num_bytes} while it was read: it was truncated")


def _make_folder(folder: str) -> None:
    """Make a folder and those above it that are missing, each flushed to the disk."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with suppress(FileExistsError):  # made by a neighbour meanwhile
            os.mkdir(path)
        _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
