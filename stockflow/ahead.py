"""Work handed to a pool of threads, results in order, never more begun than there is room for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(pool: ThreadPoolExecutor, num_ahead: int, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield results in order like ``pool.map``, with at most ``num_ahead`` of them waiting to be taken."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(pending) == num_ahead:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
