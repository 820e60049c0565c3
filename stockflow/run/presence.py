"""Presence of a run in an output: others see that it is at work, and nothing half-written stays when it ends."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from stockflow.events import OnEvent, Run, all_of
from stockflow.interruption import resumable
from stockflow.output.claims import Heartbeat, new_run
from stockflow.output.clean import swept
from stockflow.output.ownership import given_up_unbegun
from stockflow.progress.file import Tracked, Tracker, progress_file
from stockflow.storage import Store


class Presence(NamedTuple):
    """A run that is at work."""

    run: str
    tell: OnEvent
    """adds up for progress.json, and tells the caller's listener"""
    is_exclusive: bool
    """whether the store creates exclusively"""


@contextmanager
def at_work(store: Store, plan: Tracked, files: Collection[str], on_event: OnEvent) -> Iterator[Presence]:
    """Be present in an output: heartbeats, progress.json, and a sweep at the end, however that comes.

    Args:
        store: the output.
        plan: what is made there.
        files: what is uploaded in parts.
        on_event: told how it goes.
    """
    run = new_run()
    tracker = Tracker(plan, run)
    tell = all_of(tracker, on_event)
    tell(Run(run, plan.plan_id))
    with (
        resumable(),
        given_up_unbegun(store, plan.plan_id, run, files),
        progress_file(store, tracker) as report,
        Heartbeat(store, plan.plan_id, run, report) as heartbeat,
        swept(store, plan.plan_id, run, files, tell),
    ):
        yield Presence(run, tell, heartbeat.is_exclusive())
