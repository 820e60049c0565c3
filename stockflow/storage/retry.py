"""The one retry loop for requests: bounded attempts, exponential backoff with full jitter, a counter."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from stockflow.errors import StockflowError
from stockflow.interruption import pause
from stockflow.storage.throttles import MAX_WAIT_S, Throttle

T = TypeVar("T")

Judge = Callable[[Exception, int, bool], Exception | None]
"""From (error, attempts so far, was it the last) to the error to raise, or None to try again."""
Asked = Callable[[Exception], float | None]
"""The seconds for which an error asks to be left alone."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a request is repeated; the defaults ride out about half a minute."""

    attempts: int = 8
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0
    deadline_s: float = 180.0
    """no attempt starts later than this after the first"""
    read_timeout_s: float = 30.0
    """silence after which an answer is given up"""
    write_timeout_s: float = 120.0
    """for one part of an upload and its answer: 16 MiB, six at a time, at a line's least 0.9 MB/s"""

    def delay_s(self, num_failed: int) -> float:
        """Return the pause after ``num_failed`` attempts: full jitter keeps workers from retrying in step."""
        return random.uniform(0.0, min(self.max_delay_s, self.first_delay_s * 2.0 ** (num_failed - 1)))


class RetryLoop:
    """Runs requests under one policy and counts what was repeated; safe to share between threads."""

    def __init__(self, policy: RetryPolicy) -> None:
        """Take the policy; nothing has been repeated yet."""
        self._policy = policy
        self._throttle = Throttle()
        self._lock = threading.Lock()
        self._num_retries = 0

    @property
    def num_retries(self) -> int:
        """Attempts that failed and were repeated."""
        return self._num_retries

    def run(
        self,
        attempt: Callable[[], T],
        *,
        catch: tuple[type[Exception], ...],
        judge: Judge,
        asked: Asked = lambda error: None,
        where: str = "",
    ) -> T:
        """Return what ``attempt`` returns, trying again as long as ``judge`` has no error to raise.

        Args:
            attempt: makes a request.
            catch: what it raises when that fails.
            judge: decides what a failure means.
            asked: tells what a throttle asks for; all who share this loop wait for it, at most ``MAX_WAIT_S``.
            where: what is asked, in words.

        Raises:
            InterruptedRunError: an attempt failed, and the process is asked to end.
        """
        deadline = time.monotonic() + self._policy.deadline_s
        for number in count(1):
            pause_s = self._policy.delay_s(number)
            self._throttle.wait()
            try:
                return attempt()
            except StockflowError:
                raise
            except catch as error:
                is_over = number >= self._policy.attempts or time.monotonic() + pause_s > deadline
                wait_s = 0.0 if is_over else asked(error) or 0.0
                is_last = is_over or wait_s > MAX_WAIT_S or time.monotonic() + wait_s > deadline
                refusal = judge(error, number, is_last)
                if refusal is not None:
                    # `from None`: what a client library says may quote a URL with its query, or a signature.
                    raise refusal from None
                if wait_s:
                    self._throttle.obey(wait_s, where)
            with self._lock:
                self._num_retries += 1
            pause(pause_s)
        raise AssertionError("count() never ends")
