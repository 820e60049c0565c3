"""What the system says when a file cannot be read or written, and who can do something about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stockflow.errors import AccessDeniedError, NotFoundError, RecipeError, StockflowError, StorageError

_FOR_GOOD = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system, or `ulimit -f`, takes no such file; choose another, or a smaller --shard-size",
}
"""what running again does not change"""
_LATER = {
    errno.ENOSPC: "free space on the disk and run again",
    errno.EDQUOT: "raise the disk quota and run again",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EMFILE: "raise `ulimit -n` and run again",
}


@contextmanager
def named(path: str | Path, action: str) -> Iterator[None]:
    """Turn an OSError into an error that says which file, what was tried and what to do."""
    try:
        yield
    except StockflowError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot {action} {path}: no such file or folder") from error
    except NotADirectoryError as error:
        raise NotFoundError(f"cannot {action} {path}: a file is where a folder should be") from error
    except IsADirectoryError as error:
        raise NotFoundError(f"cannot {action} {path}: a folder is where a file should be") from error
    except PermissionError as error:
        raise AccessDeniedError(f"cannot {action} {path}: permission denied") from error
    except OSError as error:
        said, number = error.strerror or error, error.errno or 0
        if number in _FOR_GOOD:
            raise RecipeError(f"cannot {action} {path}: {said}; {_FOR_GOOD[number]}") from error
        hint = _LATER.get(number, "run again")
        raise StorageError(f"cannot {action} {path}: {said}; {hint}") from error
