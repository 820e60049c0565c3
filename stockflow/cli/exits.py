"""How commands speak and end: text that commands no terminal, one message per error, the exit code of its kind."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from stockflow.errors import EXIT_BUG, EXIT_USER, StockflowError
from stockflow.text.escaping import printable
from stockflow.text.redaction import without_secrets


def say(text: object, *, end: str = "\n", flush: bool = False) -> None:
    """Print to standard output; strangers' names may be part of it."""
    print(printable(text), end=end, flush=flush)


def tell(text: object) -> None:
    """Print a line to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


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
    except Exception:
        tell(without_secrets(traceback.format_exc()).rstrip("\n"))
        tell("stockflow: this is a bug in stockflow; please report the lines above")
        raise typer.Exit(EXIT_BUG) from None
