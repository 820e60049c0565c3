"""The embedded executor: this process, one item after the other. Threads are the worker's own affair."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield the result of each item, in order; the first error ends the run and is raised as itself."""
    for item in items:
        yield work(item)
