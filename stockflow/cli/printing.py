"""What commands say: text that strangers' names are part of goes to a terminal without what would command it."""

import sys

from stockflow.text.escaping import printable


def say(text: object, *, end: str = "\n", flush: bool = False) -> None:
    """Print to standard output."""
    print(printable(text), end=end, flush=flush)


def tell(text: object) -> None:
    """Print a line to standard error."""
    print(printable(text), file=sys.stderr, flush=True)
