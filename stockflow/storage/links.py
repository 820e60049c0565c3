"""Links in a folder: which are followed, and how a file is opened so that it is the one that was looked at.

Whoever packed a folder chose where its links lead, and what is read of a checkpoint may be published. So a link counts
as what it leads to only inside the folder, or in the ``blobs`` beside a snapshot of the hub's cache; weights may lead
into folders that the user named, too. A hard link is the file itself: nothing tells it apart.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from stockflow.errors import LinkError, RecipeError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".distcp")
"""Of files that may lie where ``--follow-links`` says: they must parse as weights, and are merged, never copied."""
_CACHES = ("models--", "datasets--", "spaces--")
"""how the hub's cache begins the name of a repository's folder; it holds ``snapshots/<revision>`` and ``blobs``"""
_ON_A_LINK = (errno.ELOOP, errno.ENOTDIR)
"""what opening a link with O_NOFOLLOW ends with; ENOTDIR also where a file stands for a folder"""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

T = TypeVar("T")
_Act = Callable[[str, int], T]
"""Does something with a name in an open folder."""


def trusted_folders(folders: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Return the folders that links of weights may lead into, resolved.

    Raises:
        RecipeError: one is no folder.
    """
    return tuple(dict.fromkeys(map(_trusted, folders)))


def _trusted(folder: str | os.PathLike[str]) -> str:
    given = os.fspath(folder)
    real = os.path.realpath(os.path.expanduser(given))
    if not os.path.isdir(real):
        raise RecipeError(f"follow links: expected a folder that links may lead into, found {given!r}, which is none")
    return real


class Links:
    """The links of one folder."""

    def __init__(self, root: str, trusted: Sequence[str] = ()) -> None:
        """Take the folder, and resolved folders that links of weights may lead into."""
        self._root = os.path.realpath(root)
        self._blobs = _blobs_beside(self._root)
        self._trusted = tuple(trusted)

    def open(self, key: str) -> int:
        """Return a descriptor of a plain file, open for reading.

        Raises:
            LinkError: a link on the way is not followed, or leads nowhere; or there is no plain file.
            OSError: as ``os.open``.
        """
        return self._reach(key, partial(_open_plain, self._path(key)))

    def stat(self, key: str) -> os.stat_result:
        """Return what the system tells of a file.

        Raises:
            LinkError: a link on the way is not followed, or leads nowhere.
            OSError: as ``os.stat``.
        """
        return self._reach(key, _stat_unlinked)

    def stray(self, key: str) -> str | None:
        """Return where a file lies that is read outside of the folder and its cache, because that was allowed."""
        if not self._trusted:
            return None
        real = os.path.realpath(self._path(key))
        return None if any(_is_inside(real, base) for base in (self._root, *self._blobs)) else real

    def check_folder(self, folder: str) -> None:
        """Refuse a folder below this one that a link leads elsewhere: nothing is listed, written or removed there.

        Raises:
            LinkError: it does.
        """
        path = self._path(folder)
        real = os.path.realpath(path)
        if real != self._root and not _is_inside(real, self._root):
            self._refuse(path, real, "nothing is listed or written there; put a folder in its place")

    def _reach(self, key: str, act: _Act[T]) -> T:
        try:
            return _at(self._root, key, act)
        except OSError as error:
            if error.errno not in _ON_A_LINK:
                raise
            base, inner = self._resolved(key, error)
        try:
            return _at(base, inner, act)
        except FileNotFoundError:
            self._refuse(self._path(key), f"{base}/{inner}", "there is no such file; restore it, or remove the link")
        except OSError as error:
            if error.errno in _ON_A_LINK:
                raise LinkError(
                    f"{self._path(key)} lies behind a link that leads in a circle, or changed while it was followed; "
                    "put the file itself there"
                ) from None
            raise

    def _resolved(self, key: str, found: OSError) -> tuple[str, str]:
        """Return the folder a link leads into, and the file's way from there, without links; or refuse it."""
        path = self._path(key)
        real = os.path.realpath(path)
        if os.path.islink(real):
            self._refuse(path, real, "it leads back to itself; put the file itself there, or remove the link")
        if real == path:
            raise found  # no link: a file where a folder should be
        base = self.base_of(key, real)
        if base is None:
            self._refuse(path, real, _what_to_do(key, real))
        return base, os.path.relpath(real, base)

    def base_of(self, key: str, real: str) -> str | None:
        """Return the folder by which a file that a link leads to is read; None: it is not."""
        return next((base for base in self._bases(key, real) if _is_inside(real, base)), None)

    def _bases(self, key: str, real: str) -> Iterator[str]:
        """Yield the folders that a file's links may lead into."""
        is_weights = key.endswith(WEIGHT_SUFFIXES)
        # A clone's .git/config or an .env beside the model may hold a token; git-annex keeps weights in .git.
        if is_weights or not _is_hidden(real, self._root):
            yield self._root
        yield from self._blobs
        if is_weights:
            yield from self._trusted

    def _refuse(self, path: str, real: str, what_to_do: str) -> NoReturn:
        leads = f"{path} is, or lies behind, a link to {real!r}"
        inside = "" if _is_inside(real, self._root) else ", outside of its folder"
        raise LinkError(f"{leads}{inside}: {what_to_do}")

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)


def _what_to_do(key: str, real: str) -> str:
    if key.endswith(WEIGHT_SUFFIXES):
        return (
            "it is not followed. If those are the weights you want, allow their folder "
            f"(--follow-links {os.path.dirname(real)!r}); else put the file itself there"
        )
    return "it is not followed, lest it is published. Put a copy of the file there, or remove the link"


def _at(base: str, inner: str, act: _Act[T]) -> T:
    """Walk down from a folder without following any link, and do something with the last name."""
    *folders, name = inner.split("/")
    folder = os.open(base, _FOLDER)
    try:
        for part in folders:
            deeper = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = deeper
        return act(name, folder)
    finally:
        os.close(folder)


def _stat_unlinked(name: str, folder: int) -> os.stat_result:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


def _open_plain(where: str, name: str, folder: int) -> int:
    _check_plain(where, _stat_unlinked(name, folder).st_mode)  # opening a device or a pipe may itself do something
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        _check_plain(where, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain(where: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise LinkError(f"{where} is no plain file but a pipe, a socket or a device; put a file there, or remove it")


def _blobs_beside(root: str) -> tuple[str, ...]:
    """Return where the files of a snapshot in the hub's cache lie; nothing for any other folder."""
    parts = root.split("/")
    return tuple(
        "/".join((*parts[:number], "blobs"))
        for number, part in enumerate(parts[:-1])
        if part == "snapshots" and number and parts[number - 1].startswith(_CACHES)
    )


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _is_hidden(real: str, root: str) -> bool:
    return any(part.startswith(".") for part in os.path.relpath(real, root).split("/"))
