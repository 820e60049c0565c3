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
from stockflow.events import Begun, Cost, Done, Dropped, Event, Retry, Stage
from stockflow.progress.lines import Ticking, outcome_facts, progress_facts, stage_facts
from stockflow.progress.state import State
from stockflow.progress.wording import LogLevel, in_a_line, in_words, is_told, level_of
from stockflow.text.redaction import without_secrets

LOG_INTERVAL_S = 10.0
"""Between lines that say how a stage stands; as often as progress.json is written."""


class LogLines(Ticking):
    """One JSON object per line; `docs/clusters.md#logs` has the fields.

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
        text = in_a_line(event)
        facts = self._facts(event) if text else {}  # before it is counted: it may end what a worker is at
        self._state.take(event)
        if text:
            self.write(level_of(event), text, **facts)

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
        run = self._state.run
        ids = {"run": run.run, "plan": run.plan_id} if run else {}
        line = {"time": moment, "level": level, "message": message, **ids, **facts}
        safe = {
            name: without_secrets(value) if isinstance(value, str) else value
            for name, value in line.items()
            if value is not None
        }
        with self._lock:
            print(json.dumps(safe), file=self._stream, flush=True)

    def _facts(self, event: Event) -> dict[str, object]:
        """Return what an event is about, as fields."""
        match event:
            case Stage():
                return stage_facts(event)
            case Begun():
                return {"shard": event.item, "worker": event.worker}
            case Retry():
                return {**self._shard_facts(event.item), "cause": event.cause}
            case Dropped():
                return self._shard_facts(event.item)
            case Done():
                return {**self._shard_facts(event.item), **(cost_facts(event.cost) if event.cost else {})}
        return {}

    def _shard_facts(self, shard: str | None) -> dict[str, object]:
        return {"shard": shard, "worker": None if shard is None else self._state.worker_at(shard)}


def cost_facts(cost: Cost) -> dict[str, object]:
    """Return what a shard took, by the names of `docs/clusters.md`."""
    return {
        "bytes": cost.num_bytes,
        "tensors": cost.num_tensors,
        "seconds": dict(cost.seconds),
        "retries": dict(cost.retries),
        "peak_memory_bytes": cost.peak_memory_bytes,
    }


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
