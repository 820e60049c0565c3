"""Display of progress: events as they come, shown as a live display, as plain lines, or as JSON for machines.

    driver, verify, comparing  --events-->  State (sums, rates, time left)  -->  LiveDisplay | PlainLines | JsonLines
                                                                             -->  LogLines, for what collects logs

The state is summed up as events come, which costs a microsecond each; what is shown of it is drawn on a thread of its
own, a few times a second at most.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from stockflow.events import Note, OnEvent, ignore
from stockflow.progress.lines import JsonLines, PlainLines
from stockflow.progress.wording import LogLevel, is_told, level_of

__all__ = ["DELAY_S", "LogFormat", "LogLevel", "ProgressStyle", "reporting"]

DELAY_S = 2.0
"""What takes less needs no progress."""

ProgressStyle = Literal["auto", "plain", "rich", "lanes", "json", "none"]
"""``auto``: rich on a terminal, else plain. ``lanes``: rich with a line per worker."""
LogFormat = Literal["text", "json"]


@contextmanager
def reporting(
    style: ProgressStyle, *, delay_s: float = 0.0, log_format: LogFormat = "text", level: LogLevel = "info"
) -> Iterator[OnEvent]:
    """Provide who is told of events and shows them on standard error.

    Args:
        style: how.
        delay_s: nothing is shown of what ends before, notes excepted.
        log_format: ``json``: log lines for what collects logs, instead of what ``style`` says; with ``none`` without
            those that say how things stand.
        level: what is less than this is not told, neither by log lines nor by plain ones.
    """
    if style == "auto":
        style = "rich" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    with ExitStack() as stack:
        if log_format == "json":
            from stockflow.progress.logs import LogLines

            yield stack.enter_context(LogLines(sys.stderr, level=level, has_progress=style != "none"))
        elif style == "none":
            yield ignore
        elif style == "json":
            yield stack.enter_context(JsonLines(sys.stderr))
        elif style == "plain":
            yield stack.enter_context(PlainLines(sys.stderr, delay_s=delay_s, level=level))
        else:
            from stockflow.progress.live import LiveDisplay

            display = stack.enter_context(LiveDisplay(delay_s=delay_s, has_lanes=style == "lanes"))
            is_note_told = is_told(level_of(Note("")), level)
            yield display if is_note_told else lambda event: None if isinstance(event, Note) else display(event)
