"""Examples in messages: a few of many names, quoted, and how many there are."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

T = TypeVar("T")

MAX_NAMED = 20


def some(names: Sequence[T], most: int = MAX_NAMED, quote: Callable[[T], str] = shown) -> str:
    """Return the first names of a list, and how many more there are: ``'a', 'b' and 3 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(quote, names[:most]))}{more}"


def such(names: Sequence[T], noun: str = "tensor", quote: Callable[[T], str] = shown, *, most: int = 1) -> str:
    """Return how many there are, and the first of them: ``3 tensors such as 'a'``."""
    return f"{counted(len(names), noun)} such as {', '.join(map(quote, names[:most]))}"
