"""Progress: events as they come, shown as a live display, as plain lines, or as JSON for machines.

    driver, verify, comparing  --events-->  State (sums, rates, time left)  -->  LiveDisplay | PlainLines | JsonLines

The state is summed up as events come, which costs a microsecond each; what is shown of it is drawn on a thread of its
own, a few times a second at most.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from stockflow.events import Done, Moved, Note, OnEvent, Stage, ignore
from stockflow.plan import MergePlan
from stockflow.receipts import Receipt
from stockflow.reporting.lines import JsonLines, PlainLines

__all__ = ["DELAY_S", "AsEvents", "ProgressStyle", "Silent", "reporting"]

DELAY_S = 2.0
"""What takes less needs no progress."""

ProgressStyle = Literal["auto", "plain", "rich", "lanes", "json", "none"]
"""``auto``: rich on a terminal, else plain. ``lanes``: rich with a line per worker."""


class AsEvents:
    """What a merge tells its observer, as events."""

    def __init__(self, on_event: OnEvent) -> None:
        """Tell ``on_event``."""
        self._on_event = on_event

    def on_stage(self, text: str) -> None:
        """Tell that a stage begins."""
        self._on_event(Stage(text))

    def on_note(self, text: str) -> None:
        """Tell it."""
        self._on_event(Note(text))

    def on_start(self, plan: MergePlan, resumed: Sequence[Receipt]) -> None:
        """Tell that merging begins, and what is there already."""
        tensor_bytes = {shard.file: shard.num_bytes - len(shard.header) for shard in plan.shards}  # as workers count
        self._on_event(
            Stage(
                "merging",
                total_bytes=sum(tensor_bytes.values()),
                done_bytes=sum(tensor_bytes[receipt.file] for receipt in resumed),
                num_items=len(plan.shards),
                num_done=len(resumed),
                unit="shards",
                counts_written=True,
            )
        )

    def on_bytes(self, num_read: int, num_written: int, worker: str = "") -> None:
        """Tell that bytes went by."""
        self._on_event(Moved(num_read, num_written, worker))

    def on_shard(self, receipt: Receipt) -> None:
        """Tell that a shard is done."""
        self._on_event(Done(receipt.file))


class Silent(AsEvents):
    """Tells nobody. It holds nothing, so who extends it to hear of a few things has nothing to begin."""

    _on_event = staticmethod(ignore)

    def __init__(self) -> None:
        """Begin."""


@contextmanager
def reporting(style: ProgressStyle, *, delay_s: float = 0.0) -> Iterator[OnEvent]:
    """Provide who is told of events and shows them on standard error.

    Args:
        style: how.
        delay_s: nothing is shown of what ends before, notes excepted.
    """
    if style == "auto":
        style = "rich" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    with ExitStack() as stack:
        if style == "none":
            yield ignore
        elif style == "json":
            yield stack.enter_context(JsonLines(sys.stderr))
        elif style == "plain":
            yield stack.enter_context(PlainLines(sys.stderr, delay_s=delay_s))
        else:
            from stockflow.reporting.live import LiveDisplay

            yield stack.enter_context(LiveDisplay(delay_s=delay_s, has_lanes=style == "lanes"))
