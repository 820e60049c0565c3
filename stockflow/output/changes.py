"""What sets an earlier plan apart from one that would resume it: changed inputs, other numerics. A run must say so."""

from collections.abc import Iterable, Mapping, Sequence

from stockflow.errors import InterruptedRunError, StockflowError
from stockflow.output.manifest import plan_key
from stockflow.output.sealed import check_num_values
from stockflow.planning.file import MAX_PLAN_BYTES, MAX_PLAN_VALUES, RecordedPlan, decode_plan
from stockflow.planning.plan import NUMERICS, CheckpointRef
from stockflow.storage import Stamp, Store, read_small, redact

_MAX_NAMED = 3

States = Mapping[str, Mapping[str, Stamp]]
"""stamps by file, by checkpoint URL"""


def states(checkpoints: Iterable[CheckpointRef]) -> States:
    """Return the state of every input file."""
    return {redact(checkpoint.url): checkpoint.files for checkpoint in checkpoints}


def earlier_plan(store: Store, plan_id: str) -> RecordedPlan | None:
    """Return a plan recorded in an output, None if it cannot be read."""
    try:
        payload = read_small(store, plan_key(plan_id), max_bytes=MAX_PLAN_BYTES)
        check_num_values(payload, MAX_PLAN_VALUES, plan_key(plan_id))
        return decode_plan(payload, plan_key(plan_id))
    except InterruptedRunError:
        raise
    except StockflowError:
        return None


def since_then(earlier: States, now: States) -> str:
    """Return the end of a message: each file that both plans read and that is another now, with both stamps."""
    changed = [
        f"{url}/{file} changed: it was {_words(before)}, it is {_words(now[url][file])}"
        for url, files in earlier.items()
        for file, before in files.items()
        if now.get(url, {}).get(file, before) != before
    ]
    return f"; since then {_listed(changed)}" if changed else ""


def other_numerics(earlier: int) -> str:
    """Return the end of a message: that the earlier plan rounds otherwise."""
    if earlier == NUMERICS:
        return ""
    return f"; it was made with numerics {earlier}, this version of stockflow has {NUMERICS} and gives other bytes"


def _listed(changed: Sequence[str]) -> str:
    more = len(changed) - _MAX_NAMED
    return "; ".join(changed[:_MAX_NAMED]) + (f"; and {more} files more" if more > 0 else "")


def _words(stamp: Stamp) -> str:
    return f"{stamp.size:,} bytes, {stamp.version or 'no version'}"
