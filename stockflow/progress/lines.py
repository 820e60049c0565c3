"""Progress as lines: plain ones for people and logs, JSON for machines."""

import json
import threading
import time
from types import TracebackType
from typing import IO

from stockflow.errors import StockflowError, exit_code_of
from stockflow.events import Event, Note, Stage
from stockflow.progress.state import Snapshot, State
from stockflow.progress.wording import LogLevel, heading, in_a_line, in_words, is_told
from stockflow.text.escaping import printable
from stockflow.text.redaction import without_secrets

LINE_INTERVAL_S = 5.0
JSON_INTERVAL_S = 1.0


class Ticking:
    """Calls ``tick`` from time to time on a thread of its own until the block ends."""

    def __init__(self, interval_s: float, delay_s: float) -> None:
        """Call it every ``interval_s``, the first time after ``delay_s``."""
        self._interval_s = interval_s
        self._delay_s = delay_s
        self._is_over = threading.Event()
        self._ticker = threading.Thread(target=self._run, name="progress", daemon=True)

    def tick(self) -> None:
        """Show how things stand."""

    def _start(self) -> None:
        self._ticker.start()

    def _stop(self) -> None:
        self._is_over.set()
        self._ticker.join()

    def _run(self) -> None:
        wait_s = self._delay_s or self._interval_s
        while not self._is_over.wait(wait_s):
            self.tick()
            wait_s = self._interval_s


class PlainLines(Ticking):
    """A line when a stage begins, and how it stands every few seconds, whether bytes move or not."""

    def __init__(
        self,
        stream: IO[str],
        *,
        delay_s: float = 0.0,
        interval_s: float = LINE_INTERVAL_S,
        level: LogLevel = "info",
    ) -> None:
        """Write to ``stream``.

        Args:
            stream: where lines go.
            delay_s: nothing is said of what ends before, notes excepted.
            interval_s: between lines of one stage.
            level: what matters less is not said; with ``debug`` each shard is, too.
        """
        super().__init__(interval_s, delay_s)
        self._stream = stream
        self._level = level
        self._state = State()
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()

    def __enter__(self) -> "PlainLines":
        """Begin."""
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; what the outcome was is not for here to say."""
        self._stop()

    def __call__(self, event: Event) -> None:
        """Count an event, and say what is worth a line."""
        self._state.take(event)
        if isinstance(event, Note):
            if is_told("warning", self._level):
                self._say(f"{event.kind}: {event.text}")
        elif isinstance(event, Stage):
            if is_told("info", self._level) and time.monotonic() - self._began >= self._delay_s:
                self._say(heading(event))
        elif self._level == "debug" and (text := in_a_line(event)):
            self._say(text)

    def tick(self) -> None:
        """Say how things stand, unless something was said just now."""
        if not is_told("info", self._level):
            return
        if self._said + 0.9 * min(self._interval_s, self._delay_s or self._interval_s) > time.monotonic():
            return
        now = self._state.snapshot()
        if now.stage.name:
            self._say(f"{now.stage.name}: {in_words(now)}".removesuffix(": "))

    def _say(self, text: str) -> None:
        with self._lock:
            self._said = time.monotonic()
            print(printable(text), file=self._stream, flush=True)


class JsonLines(Ticking):
    """One JSON object per line; `docs/insight.md#json` has the fields."""

    def __init__(self, stream: IO[str], *, interval_s: float = JSON_INTERVAL_S) -> None:
        """Write to ``stream``, how things stand every ``interval_s``."""
        super().__init__(interval_s, 0.0)
        self._stream = stream
        self._state = State()
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def __enter__(self) -> "JsonLines":
        """Begin."""
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say how the last stage stood, and how everything ended."""
        self._stop()
        self.tick()
        self._write(
            {"event": "end", "outcome": "done" if error is None else "failed", **outcome_facts(error)},
            elapsed_s=time.monotonic() - self._began,
        )

    def __call__(self, event: Event) -> None:
        """Count an event, and write a stage or a note."""
        ended = self._state.take(event)
        if ended is not None:
            self._write({"event": "progress", **progress_facts(ended)})
        if isinstance(event, Note):
            self._write({"event": "note", "text": event.text})
        elif isinstance(event, Stage):
            self._write({"event": "stage", **stage_facts(event)})

    def tick(self) -> None:
        """Write how things stand."""
        now = self._state.snapshot()
        if now.stage.name:
            self._write({"event": "progress", **progress_facts(now)})

    def _write(self, facts: dict[str, object], **more: object) -> None:
        line = json.dumps({**facts, **more, "time": round(time.time(), 3)})
        with self._lock:
            print(line, file=self._stream, flush=True)


def stage_facts(stage: Stage) -> dict[str, object]:
    """Return what a stage will go through, by the names of `docs/insight.md#json`."""
    return {
        "stage": stage.name,
        "total_bytes": stage.total_bytes,
        "done_bytes": stage.done_bytes,
        "items": stage.num_items,
        "items_done": stage.num_done,
        "unit": stage.unit or None,
    }


def progress_facts(state: Snapshot) -> dict[str, object]:
    """Return how a stage stands, by the names of `docs/insight.md#json`."""
    return {
        **stage_facts(state.stage),
        "done_bytes": state.done_bytes,
        "items_done": state.num_done,
        "read_bytes": state.num_read,
        "written_bytes": state.num_written,
        "bytes_per_s": round(state.bytes_per_s),
        "left_s": None if state.left_s is None else round(state.left_s, 1),
        "elapsed_s": round(state.elapsed_s, 3),
        "last_item": state.last_item or None,
    }


def outcome_facts(error: BaseException | None) -> dict[str, object]:
    """Return the exit code that an error leads to, and its message without secrets."""
    if error is None:
        return {"exit_code": 0, "message": None}
    message = str(error) if isinstance(error, StockflowError) else without_secrets(f"{type(error).__name__}: {error}")
    return {"exit_code": exit_code_of(error), "message": message}
