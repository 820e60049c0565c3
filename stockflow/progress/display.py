"""Progress: events as they come, shown as a live display, as plain lines, or as JSON for machines.

    driver, verify, comparing  --events-->  State (sums, rates, time left)  -->  LiveDisplay | PlainLines | JsonLines
                                                                             -->  LogLines, for what collects logs

The state is summed up as events come, which costs a microsecond each; what is shown of it is drawn on a thread of its
own, a few times a second at most.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Literal

from stockflow.events import Begun, Cost, Done, Dropped, Moved, Note, OnEvent, Retry, Run, Stage, ignore
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import MergePlan
from stockflow.progress.levels import LogLevel, is_told, level_of
from stockflow.progress.lines import JsonLines, PlainLines

__all__ = ["DELAY_S", "AsEvents", "LogFormat", "LogLevel", "ProgressStyle", "Silent", "reporting"]

DELAY_S = 2.0
"""What takes less needs no progress."""

ProgressStyle = Literal["auto", "plain", "rich", "lanes", "json", "none"]
"""``auto``: rich on a terminal, else plain. ``lanes``: rich with a line per worker."""
LogFormat = Literal["text", "json"]


class AsEvents:
    """What a merge tells its observer, as events."""

    _on_event: OnEvent = staticmethod(ignore)
    """of classes derived from ``Silent`` that make themselves"""
    _tensor_bytes: Mapping[str, int] = MappingProxyType({})
    """by shard, its header left out: as workers count"""

    def __init__(self, on_event: OnEvent) -> None:
        """Tell ``on_event``."""
        self._on_event = on_event

    def on_run(self, run: str, plan_id: str) -> None:
        """Tell which run of which plan this is."""
        self._on_event(Run(run, plan_id))

    def on_stage(self, text: str) -> None:
        """Tell that a stage begins."""
        self._on_event(Stage(text))

    def on_note(self, text: str) -> None:
        """Tell it."""
        self._on_event(Note(text))

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Tell that merging begins, and what is there already."""
        self._tensor_bytes = {shard.file: shard.num_bytes - len(shard.header) for shard in plan.shards}
        self._on_event(
            Stage(
                "merging",
                total_bytes=sum(self._tensor_bytes.values()),
                done_bytes=sum(self._tensor_bytes[receipt.file] for receipt in resumed),
                num_items=len(plan.shards),
                num_done=len(resumed),
                unit="shards",
                counts_written=True,
            )
        )

    def on_begin(self, shard: str, worker: str) -> None:
        """Tell that a worker begins with a shard."""
        self._on_event(Begun(shard, worker, self._tensor_bytes[shard]))

    def on_bytes(self, num_read: int, num_written: int, worker: str = "") -> None:
        """Tell that bytes went by."""
        self._on_event(Moved(num_read, num_written, worker))

    def on_failure(self, cause: str, shard: str | None = None) -> None:
        """Tell that a shard, or the start of a worker, is tried again."""
        self._on_event(Retry(cause, shard))

    def on_shard(self, receipt: Receipt) -> None:
        """Tell that a shard is done."""
        cost = Cost(
            num_bytes=self._tensor_bytes[receipt.file],
            num_tensors=len(receipt.tensors),
            seconds=receipt.seconds,
            retries=receipt.retries,
            peak_memory_bytes=receipt.peak_memory_bytes,
        )
        self._on_event(Done(receipt.file, receipt.worker, cost))

    def on_drop(self, shard: str) -> None:
        """Tell that a shard is merged again."""
        self._on_event(Dropped(shard, self._tensor_bytes[shard]))


class Silent(AsEvents):
    """Tells nobody. It holds nothing, so who extends it to hear of a few things has nothing to begin."""

    _on_event = staticmethod(ignore)

    def __init__(self) -> None:
        """Begin."""


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
