"""How commands speak and end: text that commands no terminal, one message per error, the exit code of its kind."""

import errno
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOBase, TextIOWrapper

import typer

from stockflow.errors import EXIT_BUG, EXIT_USER, StockflowError, UserError
from stockflow.text.escaping import printable
from stockflow.text.redaction import without_secrets

_NO_MEMORY = ("can't start new thread", "failed to map segment", "cannot allocate memory")
"""what libraries say, in other errors than MemoryError, where `ulimit -v` or the machine gives no more; lower case"""
MAX_SAID = 200
"""characters of a library's own words"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UnheardError(UserError):
    """Standard output cannot be written to."""


def say(text: object, *, end: str = "\n") -> None:
    """Print to standard output; strangers' names may be part of it."""
    write((printable(text), end))


def write(parts: Iterable[str]) -> None:
    """Write to standard output as it is, and at once.

    Raises:
        UnheardError: it is closed, or full.
        BrokenPipeError: nobody reads it.
    """
    try:
        sys.stdout.writelines(parts)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnheardError(f"cannot write to standard output: {error.strerror or error}") from None


def tell(text: object) -> None:
    """Print a line to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


class _Closed(TextIOBase):
    """Standard output that was closed before the process began; libraries say nothing to None, in silence."""

    def write(self, _: str, /) -> int:
        raise OSError(errno.EBADF, "it is closed")


def prepare_streams() -> None:
    """Let a process say what its streams cannot encode, and without standard error its errors to nobody."""
    sys.stdout = sys.stdout or _Closed()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def environment_at_fault(error: Exception) -> str | None:
    """Return in a sentence what this machine does not give, None if an error may be our bug."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in said.lower() for words in _NO_MEMORY):
        return f"this machine gives no more memory or threads ({said}): raise `ulimit -v`, or end other programs"
    if _is_of_library(error, said):
        return f"a library cannot be loaded ({said[:MAX_SAID]}): raise `ulimit -v`, free space or install it anew"
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and not _has_folder():
        return "the current folder was removed: change to one that is there"
    if error.errno in _NO_ROOM:
        return f"a file cannot be written ({said}): free space, or name another place by TMPDIR"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({said}): raise `ulimit -n`"
    return None


def _is_of_library(error: Exception, said: str) -> bool:
    is_import = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError)
    return is_import or (isinstance(error, OSError) and "shared object" in said)


def _has_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors into one clear message and the exit code of their kind."""
    try:
        yield
    except StockflowError as error:
        tell(f"stockflow: {error}")
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_USER) from None
    except Exception as error:
        sentence = environment_at_fault(error)
        if sentence:
            tell(f"stockflow: {without_secrets(sentence)}")
            raise typer.Exit(EXIT_USER) from None
        tell(without_secrets(traceback.format_exc()).rstrip("\n"))
        tell("stockflow: this is a bug in stockflow; please report the lines above")
        raise typer.Exit(EXIT_BUG) from None
