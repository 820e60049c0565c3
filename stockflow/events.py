"""What happens while something takes long: typed events, told as they come, from any thread.

    Stage   opening checkpoints | planning | merging | verifying | comparing ...   one ends where the next begins
      Moved   bytes went by
      Done    an item of the stage is done: a file, a tensor, a shard
    Note    something the reader should know, and need not act on

``reporting`` shows them; the Python API hands them to a callback. An event is told once, in no more than a few
microseconds; the one who is told must not raise and must not take long.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage begins, and the one before it has ended."""

    name: str
    """such as ``merging``; in words for people, and stable for programs"""
    total_bytes: int | None = None
    """how many bytes it will go through: written ones in a merge, else read ones; None: not known"""
    done_bytes: int = 0
    """how many of them an earlier run has done"""
    num_items: int | None = None
    """how many items it has; None: not known, or it has none"""
    num_done: int = 0
    """how many of them an earlier run has done"""
    unit: str = ""
    """what items are, in the plural: files, tensors, shards"""
    counts_written: bool = False
    """whether written bytes count towards ``total_bytes``"""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes went by."""

    num_read: int
    num_written: int = 0
    worker: str = ""
    """who moved them, where there are several"""


@dataclass(frozen=True, slots=True)
class Done:
    """An item of the stage is done."""

    item: str
    worker: str = ""
    """who did it, where there are several"""


@dataclass(frozen=True, slots=True)
class Note:
    """Something the reader should know, and need not act on."""

    text: str


Event = Stage | Moved | Done | Note
OnEvent = Callable[[Event], None]
"""Told of events, from several threads."""


def ignore(event: Event) -> None:
    """Do nothing."""
