"""Targets: what stands in the way of an output in a local folder, seen before the first byte is written."""

import errno
import os
from collections.abc import Iterable, Iterator

from stockflow.errors import PlanError
from stockflow.output.files import planned_files
from stockflow.output.keys import CLAIM_FILE, MANIFEST_FILE, run_key
from stockflow.planning.plan import MergePlan
from stockflow.storage import LocalStore, Store, halves_of, is_within, redact
from stockflow.text.sizes import counted, gb

MAX_NAMED = 5


def check_target(store: Store, plan: MergePlan) -> None:
    """Refuse a local folder that cannot become the output; objects have neither kinds nor a room that is known.

    Raises:
        PlanError: a folder is where a file will be, or a file where a folder; a name is too long; nothing can be
            written there.
    """
    check_keys(store, [*planned_files(plan, plan.plan_id), MANIFEST_FILE, CLAIM_FILE, run_key(plan.plan_id, "0" * 16)])


def check_apart(output_url: str, inputs: Iterable[Store]) -> None:
    """Refuse an output that is, or lies in, one of the inputs, or in which one lies.

    Raises:
        PlanError: it does.
    """
    for store in inputs:
        if any(is_within(output_url, half) for half in halves_of(store.url)) or output_url == store.where():
            raise PlanError(
                f"the output {redact(output_url)} is, or lies in, the input {redact(store.url)}; "
                "name a folder beside it"
            )
        if any(is_within(half, output_url) for half in halves_of(store.url)):
            raise PlanError(
                f"the input {redact(store.url)} lies in the output {redact(output_url)}, of which loaders and `verify` "
                "would take it for a part; name a folder beside it"
            )


def check_unshared(store: Store, inputs: Iterable[Store]) -> None:
    """Refuse to replace files that are hard links of an input's: removing one changes the state of the other.

    Raises:
        PlanError: some are.
    """
    shared = _hard_links(store.folder) if isinstance(store, LocalStore) else {}
    for source in inputs if shared else ():
        for half in halves_of(source.url):
            found = _hard_links(half if os.path.isdir(half) else os.path.dirname(half))
            if alike := found.keys() & shared.keys():
                ours, theirs = shared[next(iter(alike))], found[next(iter(alike))]
                raise PlanError(
                    f"{ours} is a hard link of {theirs}, a file of an input: to replace it while that is read would "
                    f"change it; remove the {counted(len(alike), 'link')} in {store.where()} first, or choose another "
                    "output"
                )


def _hard_links(folder: str) -> dict[tuple[int, int], str]:
    """Return the files below a folder that have several names, by device and inode; none of what is no local folder."""
    paths = (f"{where}/{name}" for where, _, names in os.walk(folder) for name in names)
    found = ((path, os.lstat(path)) for path in paths)
    return {(each.st_dev, each.st_ino): path for path, each in found if each.st_nlink > 1}


def check_keys(store: Store, keys: Iterable[str]) -> None:
    """Refuse a local folder in which these files cannot appear.

    Raises:
        PlanError: see ``check_target``.
    """
    if not isinstance(store, LocalStore):
        return
    found = list(dict.fromkeys(_obstacles(store.folder, keys)))
    if found:
        more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise PlanError(f"cannot write to {store.where()}: {'; '.join(found[:MAX_NAMED])}{more}. Choose another output")


def check_room(store: Store, plan: MergePlan) -> None:
    """Refuse a local target that is too small for a plan's files, less what it holds of them already.

    Raises:
        PlanError: it is.
    """
    if isinstance(store, LocalStore):
        sizes = planned_files(plan, plan.plan_id).items()
        check_space(store, sum(size - _size(f"{store.folder}/{key}") for key, size in sizes if size is not None))


def check_space(store: Store, num_bytes: int) -> None:
    """Refuse a local target in which so many bytes cannot be written.

    Raises:
        PlanError: it is too small.
    """
    missing = num_bytes - free_bytes(store.folder) if isinstance(store, LocalStore) else 0
    if missing > 0:
        raise PlanError(
            f"{store.where()} has no room for this output: {gb(missing)} more are needed than are free there: free "
            "them, or choose another output"
        )


def free_bytes(folder: str) -> int:
    """Return what may be written below a folder, which need not exist yet."""
    found = os.statvfs(_nearest(folder))
    return found.f_bavail * found.f_frsize


def _obstacles(folder: str, keys: Iterable[str]) -> Iterator[str]:
    try:
        nearest = _nearest(folder)
    except OSError as error:
        yield os.strerror(error.errno or errno.EIO).lower()
        return
    if not os.path.isdir(nearest):
        yield f"{nearest} is a file"
        return
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        yield "its file system is read-only"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"permission denied in {nearest}"
    if nearest == folder:
        yield from _clashes(folder, keys)


def _nearest(folder: str) -> str:
    """Return the folder, or what is there of the way to it.

    Raises:
        OSError: the system takes no such name.
    """
    while True:
        try:
            os.lstat(folder)
        except (FileNotFoundError, NotADirectoryError):
            folder = os.path.dirname(folder)
        else:
            return folder


def _clashes(folder: str, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if os.path.isdir(f"{folder}/{key}"):
            yield f"{key} is a folder there, and a file of the output"
        parents = key.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if os.path.lexists(f"{folder}/{parent}") and not os.path.isdir(f"{folder}/{parent}"):
                yield f"{parent} is a file there, and a folder of the output"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
