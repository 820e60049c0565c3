"""SIGINT and SIGTERM: one wish to stop, heard everywhere, and an end within seconds even where nothing answers.

A Python signal handler runs only when the main thread returns from native code, which a stalled request keeps
it from for a minute. So signals also reach a watching thread, at once, through a pipe.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from stockflow.errors import ComputeLostError, InterruptedRunError, StockflowError, StorageError

GRACE_S = 3.0
"""for a run to clean up on the ordinary way out"""
LAST_ACTS_S = 3.0
"""for what must still be done when that way is blocked"""
EXIT_S = 1.0
"""for the process to end by itself, once the run has"""
SAY_S = 0.5
"""for a last line to be taken by whoever reads standard error"""
ONE_STOP_S = 0.5
"""a signal repeated within this is the same wish: GNU ``timeout`` sends its own twice"""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END_OF_WATCH = 0
_NOT_DONE = (
    ". Storage did not answer, so what was being uploaded may still be there: `stockflow clean OUTPUT` shows and "
    "removes it"
)

_RUN_AGAIN = "run again"
"""how messages end of what may pass"""
_TO_RESUME = " to resume"

_received: list[int] = []
"""the signal that asked for the end; empty: none did"""
_stopping = threading.Event()
_has_left = threading.Event()
_last_acts: list[Callable[[], None]] = []
_resumable: list[None] = []
"""an item for each thing at work that goes on, when it is run again, where it ended"""
_thread = threading.local()


def stop_requested() -> bool:
    """Return whether this process was asked to end."""
    # Not `_stopping`: the main thread may be on its way out before the watcher has set it; and its handler cannot,
    # as a lock of its own could be in its way.
    return bool(_received)


def pause(seconds: float) -> None:
    """Wait.

    Raises:
        InterruptedRunError: this process was asked to end, before or meanwhile, and this thread is not ``finishing``.
    """
    if getattr(_thread, "is_finishing", False):
        time.sleep(seconds)
    elif _stopping.wait(seconds):
        raise interruption(_received[0])


def interruption(number: int) -> InterruptedRunError:
    """Return the error of a run that ends because of a signal."""
    again = f"run the same command again{_TO_RESUME if _resumable else ''}"
    error = InterruptedRunError(f"stopped by {signal.Signals(number).name}; {again}")
    error.exit_code = 128 + number  # type: ignore[misc]  # per instance: 130 or 143
    return error


def cause_of(error: BaseException) -> BaseException:
    """Return the interruption if one is behind an error: Ray turns what is raised within it into errors of its own."""
    is_other = isinstance(error, Exception) and not isinstance(error, InterruptedRunError)
    return interruption(_received[0]) if _received and is_other else error


@contextmanager
def finishing() -> Iterator[None]:
    """Let this thread go on trying: it cleans up. When the process must end is the watcher's business."""
    _thread.is_finishing = True
    try:
        yield
    finally:
        _thread.is_finishing = False


@contextmanager
def resumable() -> Iterator[None]:
    """Let what may pass and ends the block say that running again goes on where it ended, instead of beginning anew."""
    _resumable.append(None)
    try:
        yield
    except (ComputeLostError, StorageError) as error:
        if str(error).endswith(_RUN_AGAIN):
            error.args = (f"{error}{_TO_RESUME}",)
        raise
    finally:
        if not stop_requested():  # which is told of later
            _resumable.pop()


@contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """Have ``act`` called if this process must end while the block hangs; it runs in a thread of its own."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into InterruptedRunError in the main thread; see that the process ends.

    A second signal ends the process at once.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True)
    watcher.start()
    previous_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, _raise_once()) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if (cause := cause_of(error)) is error:
            raise
        raise cause from error
    finally:
        _has_left.set()
        if not _received:  # otherwise the watcher sees to it that threads that hang keep nobody waiting
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_descriptor)
            os.write(writing, bytes([_END_OF_WATCH]))
            watcher.join()
            os.close(reading)
            os.close(writing)
            _has_left.clear()


def _raise_once() -> Callable[[int, FrameType | None], None]:
    raised: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        _received.append(number)
        if not raised:  # a second one must not disturb the cleaning up
            raised.append(number)
            raise interruption(number)

    return interrupt


def _watch(descriptor: int) -> None:
    """Wait for a signal; then give the way out ``GRACE_S``, the last acts ``LAST_ACTS_S``, and end the process."""
    number = _next_byte(descriptor, None)
    while number not in (*SIGNALS, _END_OF_WATCH):
        number = _next_byte(descriptor, None)
    if not number:
        return
    _received.append(number)
    _stopping.set()
    try:
        _await_the_end(descriptor, number)
    finally:
        os._exit(128 + number)


def _await_the_end(descriptor: int, number: int) -> None:
    since = time.monotonic()
    _await(descriptor, since, GRACE_S, _has_left.is_set)
    if not _has_left.is_set():
        threading.Thread(target=_act, args=(done := threading.Event(),), name="last acts", daemon=True).start()
        _await(descriptor, since, GRACE_S + LAST_ACTS_S, _has_left.is_set)
        if not _has_left.is_set():
            _end(number, "" if done.is_set() else _NOT_DONE)
    _await(descriptor, time.monotonic(), EXIT_S, lambda: False)  # threads in requests that hang keep Python waiting


def _act(done: threading.Event) -> None:
    with finishing(), suppress(StockflowError):  # what is not done is said
        for act in reversed(tuple(_last_acts)):
            act()
        done.set()


def _await(descriptor: int, since: float, seconds: float, is_over: Callable[[], bool]) -> None:
    """Wait until something is over, at most ``seconds`` from ``since``; a repeated signal ends the process at once."""
    while (left := since + seconds - time.monotonic()) > 0 and not is_over():
        number = _next_byte(descriptor, min(left, 0.1))
        if number in SIGNALS and time.monotonic() - since > ONE_STOP_S:
            _end(number, ". Ended at once: `stockflow clean OUTPUT` shows what is left over")


def _next_byte(descriptor: int, timeout_s: float | None) -> int | None:
    ready, _, _ = select.select([descriptor], [], [], timeout_s)
    return os.read(descriptor, 1)[0] if ready else None


def _end(number: int, more: str) -> NoReturn:
    """End the process, and say so if anybody listens; a reader that is gone, or reads no more, keeps nobody waiting."""
    try:
        text = f"stockflow: {interruption(number)}{more}"
        speaker = threading.Thread(target=_say, args=(text,), name="last words", daemon=True)
        speaker.start()
        speaker.join(SAY_S)
    finally:
        os._exit(128 + number)


def _say(text: str) -> None:
    """Write one line to standard error, past whatever lock or display a hanging thread holds."""
    with suppress(OSError):
        show_cursor = "\x1b[?25h\r\n" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}{text}\n".encode())
