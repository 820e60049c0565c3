"""Words for events and stages, and how much an event matters: the same for people and for logs."""

from typing import Literal, get_args

from stockflow.events import Begun, Done, Dropped, Event, Note, Retry, Run, Stage
from stockflow.progress.state import Snapshot
from stockflow.text.sizes import counted, duration, gb

LogLevel = Literal["debug", "info", "warning", "error"]
_ORDER = get_args(LogLevel)


def is_told(level: LogLevel, least: LogLevel) -> bool:
    """Return whether what has ``level`` is told where ``least`` is the least to be told."""
    return _ORDER.index(level) >= _ORDER.index(least)


def level_of(event: Event) -> LogLevel:
    """Return how much an event matters to who operates a merge."""
    if isinstance(event, Note | Retry | Dropped):
        return "warning"
    return "info" if isinstance(event, Run | Stage) or (isinstance(event, Done) and event.cost) else "debug"


def in_a_line(event: Event) -> str:
    """Return an event in one line; an empty text: it is not worth one."""
    match event:
        case Run():
            return f"run {event.run} works on plan {event.plan_id[:12]}"
        case Stage():
            return heading(event)
        case Begun():
            return f"{event.item}: {event.worker} begins"
        case Retry():
            return f"{event.item or 'the start of a worker'}: tried again ({event.cause})"
        case Done() if event.cost:
            seconds = event.cost.seconds.get("total")
            return f"{event.item}: done" + ("" if seconds is None else f" in {seconds:.1f} s")
        case Dropped():
            return f"{event.item}: to be merged again"
        case Note():
            return event.text
    return ""


def heading(stage: Stage) -> str:
    """Name a stage and what it will go through."""
    size = "" if stage.num_items is None else f" {items(stage, stage.num_items)}"
    size += "" if stage.total_bytes is None else f", {gb(stage.total_bytes)}"
    resumed = f"; {stage.num_done:,} are there already" if stage.num_done else ""
    return f"{stage.name}{size}{resumed}"


def items(stage: Stage, number: int) -> str:
    """Return so many of what a stage goes through."""
    return counted(number, stage.unit.removesuffix("s"))


def in_words(state: Snapshot) -> str:
    """Return a stage at one moment as one line, its name left out."""
    stage, parts = state.stage, []
    if state.share is not None:
        parts.append(f"{100 * state.share:.0f} %")
    moved = "written" if stage.counts_written else "read"
    if stage.total_bytes is not None:
        parts.append(f"{gb(state.done_bytes)} of {gb(stage.total_bytes)} {moved}")
    if state.num_read + state.num_written:
        parts.append(f"{gb(state.bytes_per_s)}/s")
    if stage.num_items is not None:
        parts.append(f"{state.num_done:,}/{stage.num_items:,} {stage.unit}")
    elif state.num_done:
        parts.append(items(stage, state.num_done))
    if state.left_s is not None and state.done_bytes != stage.total_bytes:
        parts.append(f"about {duration(state.left_s)} left")
    elif state.elapsed_s >= 1.0:
        parts.append(f"for {duration(state.elapsed_s)}")
    return "  ".join(parts)
