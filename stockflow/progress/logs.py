"""Log lines for what collects logs: one JSON object each, with the ids of run, plan, shard and worker."""

import json
import logging
import threading
import time
import traceback as tracebacks
from datetime import UTC, datetime
from types import TracebackType
from typing import IO

from stockflow.errors import EXIT_BUG
from stockflow.events import Begun, Done, Dropped, Event, Note, Retry, Run, Stage
from stockflow.progress.levels import LogLevel, in_a_line, is_told, level_of
from stockflow.progress.lines import Ticking, outcome_facts, progress_facts, stage_facts
from stockflow.progress.state import State, in_words
from stockflow.text.redaction import without_secrets

LOG_INTERVAL_S = 10.0
"""Between lines that say how a stage stands; as often as progress.json is written."""


class LogLines(Ticking):
    """One JSON object per line; `docs/operations.md` has the fields.

    What libraries log as a warning or worse becomes a line too, while the block lasts.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        level: LogLevel = "info",
        has_progress: bool = True,
        interval_s: float = LOG_INTERVAL_S,
    ) -> None:
        """Write to ``stream``.

        Args:
            stream: where lines go.
            level: what matters less is left out.
            has_progress: whether to say from time to time how a stage stands.
            interval_s: how often.
        """
        super().__init__(interval_s, 0.0)
        self._stream = stream
        self._level = level
        self._has_progress = has_progress
        self._state = State()
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._ids: dict[str, object] = {}
        """of the run and its plan, once they are known"""
        self._workers: dict[str, str] = {}
        """who is at which shard"""
        self._handler = _Handler(self)

    def __enter__(self) -> "LogLines":
        """Begin."""
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self._handler)
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say how everything ended."""
        self._stop()
        logging.getLogger().removeHandler(self._handler)
        logging.captureWarnings(False)
        outcome = {**outcome_facts(error), "elapsed_s": round(time.monotonic() - self._began, 3)}
        message = str(outcome.pop("message") or "done")
        if outcome["exit_code"] == EXIT_BUG:
            outcome["traceback"] = "".join(tracebacks.format_exception(error))
            message = f"this is a bug in stockflow, please report it: {message}"
        self.write("info" if error is None else "error", message, **outcome)

    def __call__(self, event: Event) -> None:
        """Count an event, and write what is worth a line."""
        self._state.take(event)
        if isinstance(event, Run):
            self._ids = {"run": event.run, "plan": event.plan_id}
        elif isinstance(event, Begun):
            self._workers[event.item] = event.worker
        if text := in_a_line(event):
            self.write(level_of(event), text, **self._facts(event))

    def tick(self) -> None:
        """Write how things stand."""
        now = self._state.snapshot()
        if now.stage.name and self._has_progress:
            self.write("info", f"{now.stage.name}: {in_words(now)}", **progress_facts(now))

    def write(self, level: LogLevel, message: str, **facts: object) -> None:
        """Write one line; what is None is left out."""
        if not is_told(level, self._level):
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": moment, "level": level, "message": message, **self._ids, **facts}
        safe = {
            name: without_secrets(value) if isinstance(value, str) else value
            for name, value in line.items()
            if value is not None
        }
        with self._lock:
            print(json.dumps(safe), file=self._stream, flush=True)

    def _facts(self, event: Event) -> dict[str, object]:
        """Return what an event is about, as fields; forget the worker of a shard that it ends."""
        if isinstance(event, Stage):
            return stage_facts(event)
        if isinstance(event, Run | Note):
            return {}
        assert isinstance(event, Begun | Retry | Done | Dropped)
        worker = self._workers.get(event.item or "")
        if not isinstance(event, Begun):
            self._workers.pop(event.item or "", None)
        facts: dict[str, object] = {"shard": event.item, "worker": worker}
        if isinstance(event, Retry):
            facts["cause"] = event.cause
        if isinstance(event, Done) and event.cost:
            cost = event.cost
            facts |= {
                "bytes": cost.num_bytes,
                "tensors": cost.num_tensors,
                "seconds": dict(cost.seconds),
                "retries": dict(cost.retries),
                "peak_memory_bytes": cost.peak_memory_bytes,
            }
        return facts


class _Handler(logging.Handler):
    """What libraries log, as lines of ours."""

    def __init__(self, lines: LogLines) -> None:
        super().__init__(logging.WARNING)  # what they say below may quote whole requests
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        level: LogLevel = "error" if record.levelno >= logging.ERROR else "warning"
        try:
            self._lines.write(level, record.getMessage(), logger=record.name)
        except Exception:  # a library's mistake must not end the merge that it logs for
            self.handleError(record)
