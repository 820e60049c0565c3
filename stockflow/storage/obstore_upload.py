"""An upload in parts by obstore, which repeats requests itself once an upload has started."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from obstore import exceptions

from stockflow.interruption import pause
from stockflow.storage.faults import RequestError
from stockflow.storage.obstore_faults import STARTING, failure_of
from stockflow.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from obstore import WritableFile


class Upload:
    """Copies what it is given: obstore refers to the caller's buffer until the part is sent (measured)."""

    def __init__(self, start: "Callable[[], WritableFile]", part_bytes: int, policy: RetryPolicy) -> None:
        self._start = start
        self._part_bytes = part_bytes
        self._policy = policy
        self._stack = ExitStack()
        self._held: list[bytes] = []
        """what obstore holds too until a part is full, and it starts the upload"""
        self._is_started = False

    def __enter__(self) -> "Upload":
        self._writer = self._stack.enter_context(self._start())
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        return self._stack.__exit__(*raised)

    def write(self, payload: memoryview | bytes, /) -> int:
        """Append bytes; every part that is full is sent."""
        view = memoryview(payload).cast("B")
        for start in range(0, view.nbytes, self._part_bytes):
            piece = bytes(view[start : start + self._part_bytes])
            if self._is_started:
                self._writer.write(piece)
            else:
                self._write_first(piece)
        return view.nbytes

    def _write_first(self, piece: bytes) -> None:
        """Write into the first part; start anew, a bounded number of times, where obstore gave up the start at once."""
        self._held.append(piece)
        unsent = [piece]
        for number in count(1):
            try:
                for part in unsent:
                    self._writer.write(part)
                break
            except (exceptions.BaseError, OSError) as error:
                failure = failure_of(error)
                is_once = failure.attempts == 1 and failure.is_transient
                if not is_once:
                    raise
                if number == self._policy.attempts:
                    raise RequestError(replace(failure, attempts=number, step=STARTING)) from None
            pause(self._policy.delay_s(number))
            self._abandon()
            self._writer = self._stack.enter_context(self._start())
            unsent = self._held
        self._is_started = sum(map(len, self._held)) >= self._part_bytes
        if self._is_started:
            self._held = []

    def _abandon(self) -> None:
        """Leave a writer whose upload never started, as an exception leaves it."""
        with suppress(exceptions.BaseError, OSError, ValueError):
            self._stack.pop_all().__exit__(InterruptedError, InterruptedError(), None)
