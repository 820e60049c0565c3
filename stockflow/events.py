"""What happens while something takes long: typed events, told as they come, from any thread.

    Run       which run of which plan all that follows is
    Workers   how many processes share a merge, where no number was asked for
    Stage     opening checkpoints | planning | merging | verifying | comparing ...   one ends where the next begins
      Begun     a worker begins with an item of the stage
      Moved     bytes went by
      Retry     an item is to be done again
      Done      an item of the stage is done: a file, a tensor, a shard
      Dropped   an item that was done is not good after all
    Note      something the reader should know, and need not act on

They are the only way in which a merge is heard of: progress.json, what is shown, log lines and metrics listen to them
and add them up alike (``progress.state``); the Python API hands them to a callback. An event is told once, in no more
than a few microseconds; who is told must not take long, and ends what goes on by raising.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Run:
    """A merge begins to work on its plan; several runs may do so, one after the other or at once."""

    run: str
    plan_id: str


@dataclass(frozen=True, slots=True)
class Workers:
    """A cluster has room for so many processes that share the shards of a merge; more may join."""

    num_workers: int


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
    resumed: tuple[str, ...] = ()
    """which items an earlier run has done: shards"""


@dataclass(frozen=True, slots=True)
class Begun:
    """A worker begins with an item of the stage; it may have begun, and been lost, before."""

    item: str
    worker: str
    """as ``node:pid``"""
    num_bytes: int
    """what it adds to ``done_bytes`` of the stage"""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes went by."""

    num_read: int
    num_written: int = 0
    worker: str = ""
    """who moved them, where there are several"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a shard took, as its worker says."""

    num_bytes: int
    """what it adds to ``done_bytes`` of the stage"""
    num_tensors: int
    seconds: Mapping[str, float]
    """by stage of its worker, over all threads; and ``total``, by the clock"""
    retries: Mapping[str, int]
    """by cause: requests that were repeated while it was in work"""
    peak_memory_bytes: int
    """the most that its worker ever held"""


@dataclass(frozen=True, slots=True)
class Done:
    """An item of the stage is done."""

    item: str
    worker: str = ""
    """who did it, where there are several"""
    cost: Cost | None = None
    """of shards"""


@dataclass(frozen=True, slots=True)
class Retry:
    """An item, or the start of a worker, is to be done again."""

    cause: str
    """``storage``, ``lost``, ``late``, ``out of memory``, ``error``, ``preempted``"""
    item: str | None = None
    """None: a worker did not come up"""


@dataclass(frozen=True, slots=True)
class Dropped:
    """An item that was done, by this run or an earlier one, is not good after all and is to be done again."""

    item: str
    num_bytes: int
    """what it had added to ``done_bytes`` of the stage"""


@dataclass(frozen=True, slots=True)
class Note:
    """Something the reader should know, or as a warning what was probably not meant."""

    text: str
    kind: Literal["note", "warning"] = "note"


Event = Run | Workers | Stage | Begun | Moved | Done | Retry | Dropped | Note
OnEvent = Callable[[Event], None]
"""Told of events, from several threads."""


def ignore(event: Event) -> None:
    """Do nothing."""


def all_of(*listeners: OnEvent) -> OnEvent:
    """Return what tells every listener, in this order; after one that raises the next are not told."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
