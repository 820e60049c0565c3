"""Progress: a live display on a terminal, a plain line every few seconds elsewhere, nothing if quiet."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stockflow.budget import gb
from stockflow.driver import Observer
from stockflow.plan import MergePlan
from stockflow.receipts import Receipt

LINE_INTERVAL_S = 5.0


class Silent:
    """Reports nothing."""

    def on_stage(self, text: str) -> None:
        """Ignore."""

    def on_note(self, text: str) -> None:
        """Ignore."""

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Ignore."""

    def on_bytes(self, num_read: int, num_written: int) -> None:
        """Ignore."""

    def on_shard(self, receipt: Receipt) -> None:
        """Ignore."""


class Meter:
    """Counts what has been read and written, and since when."""

    def __init__(self) -> None:
        """Start counting."""
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.total = self.read = self.written = self.resumed = 0
        self.shards = self.shards_done = 0

    def start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Take the totals of a plan."""
        self._started = time.monotonic()
        self.total, self.shards = plan.num_output_bytes, len(plan.shards)
        self.resumed = sum(receipt.size for receipt in resumed)
        self.shards_done = len(resumed)

    def add(self, num_read: int, num_written: int) -> None:
        """Count bytes."""
        with self._lock:
            self.read += num_read
            self.written += num_written

    @property
    def done(self) -> int:
        """Output bytes that are written, those of earlier runs included."""
        return min(self.resumed + self.written, self.total)

    def line(self) -> str:
        """Return the state as one line."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        left = (self.total - self.done) * elapsed / self.written if self.written else 0.0
        return (
            f"{100 * self.done / max(self.total, 1):.0f} %  {gb(self.done)} of {gb(self.total)} written  "
            f"{gb((self.read + self.written) / elapsed)}/s  {self.shards_done}/{self.shards} shards  "
            f"about {left:.0f} s left"
        )


class PlainLines:
    """One line every few seconds on standard error."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._meter = Meter()
        self._last = time.monotonic()

    def on_stage(self, text: str) -> None:
        """Say which stage begins."""
        self._say(text)

    def on_note(self, text: str) -> None:
        """Say it."""
        self._say(f"note: {text}")

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Say what is to be done."""
        self._meter.start(plan, resumed)
        self._say(
            f"merging {len(plan.shards)} shards, {gb(plan.num_output_bytes)}"
            + (f"; {len(resumed)} are there already" if resumed else "")
        )

    def on_bytes(self, num_read: int, num_written: int) -> None:
        """Count, and say so every few seconds."""
        self._meter.add(num_read, num_written)
        if time.monotonic() - self._last >= LINE_INTERVAL_S:
            self._say(self._meter.line())

    def on_shard(self, receipt: Receipt) -> None:
        """Count."""
        self._meter.shards_done += 1

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class LiveDisplay(PlainLines):
    """A progress bar that redraws itself."""

    def __init__(self, progress: Any) -> None:
        """Draw on ``progress``, a started ``rich.progress.Progress``."""
        super().__init__()
        self._progress = progress
        self._task = progress.add_task("opening checkpoints", total=None, state="")

    def on_note(self, text: str) -> None:
        """Leave it standing above the bar."""
        self._progress.console.print(f"note: {text}", markup=False, highlight=False)

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Take the totals."""
        self._meter.start(plan, resumed)
        self._progress.update(self._task, description="merging", total=plan.num_output_bytes)

    def on_bytes(self, num_read: int, num_written: int) -> None:
        """Move the bar."""
        self._meter.add(num_read, num_written)
        self._progress.update(self._task, completed=self._meter.done, state=self._meter.line())

    def _say(self, text: str) -> None:
        self._progress.update(self._task, description=text)


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Observer]:
    """Provide the observer that suits where standard error goes."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield PlainLines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield LiveDisplay(progress)


@contextmanager
def counting(verb: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Provide a counter of bytes that says on standard error, every few seconds, how many there were."""
    meter, last = Meter(), time.monotonic()

    def count(num_bytes: int) -> None:
        nonlocal last
        meter.add(num_bytes, 0)
        if not quiet and time.monotonic() - last >= LINE_INTERVAL_S:
            last = time.monotonic()
            print(f"{verb} {gb(meter.read)}", file=sys.stderr, flush=True)

    yield count
