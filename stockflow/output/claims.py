"""Claims: which plan owns an output prefix, and which runs say there that they are alive.

Each run writes under names of its own; nothing here is read, changed and written back, and no run can undo what
another one did.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from stockflow.errors import CheckpointError, NotFoundError, StockflowError
from stockflow.interruption import finishing, last_act
from stockflow.output.keys import CLAIM_FILE, RECORDS, run_folder, run_key
from stockflow.storage import Store
from stockflow.text.records import Place, RecordKind, parse_record

HEARTBEAT_S = 10.0
FIRST_BEAT_S = 1.0
"""after a run began, then after twice that time, and so on: whoever looks at it then finds a report that is not old"""
ABANDONED_S = 900.0
"""A run that was not seen for so long is taken for dead; an outage of the store keeps one from beating for minutes."""
JOIN_S = 2.0
"""how long the end of a run waits for a beat that is on its way"""
MAX_BYTES, MAX_VALUES = 10_000, 100
"""of a claim or a beat"""


@dataclass(frozen=True, slots=True)
class Claim:
    """Which plan owns a prefix; written once, so that nobody refreshing it can undo another's taking it over."""

    plan_id: str
    heartbeat: float
    """seconds since the epoch when it was made; its runs beat in records of their own (``Heartbeat``)"""
    run: str
    """who made it; tells equal claims of two runs apart"""

    @classmethod
    def now(cls, plan_id: str, run: str) -> "Claim":
        """Return a claim of this moment."""
        return cls(plan_id, time.time(), run)


@dataclass(frozen=True, slots=True)
class Beat:
    """A run's sign of life."""

    heartbeat: float
    """seconds since the epoch"""


KIND = RecordKind("a claim", partial(parse_record, Claim), MAX_BYTES, MAX_VALUES)
_BEAT = RecordKind("a heartbeat", partial(parse_record, Beat), MAX_BYTES, MAX_VALUES)
encode, parse = KIND.encode, KIND.parse


def read(store: Place) -> Claim:
    """Return the claim on a prefix.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one.
    """
    return KIND.read(store, CLAIM_FILE)


def new_run() -> str:
    """Return a name for a run that no other run has."""
    return secrets.token_hex(8)


class Heartbeat:
    """Says in the prefix that a run is alive, from entering the context until leaving it."""

    def __init__(self, store: Store, plan_id: str, run: str, also: Callable[[], None] = lambda: None) -> None:
        """Beat for ``run``, a run of ``plan_id``, in ``store``; ``also`` is called at each later beat."""
        self._store = store
        self._key = run_key(plan_id, run)
        self._also = also
        self._stop = threading.Event()
        self._last = ExitStack()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        """Write the first beat, and go on beating.

        Raises:
            StockflowError: the store cannot be written.
        """
        self._store.put(self._key, _beat_now())
        self._thread.start()
        self._last.enter_context(last_act(self._take_away))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and take the record away."""
        with self._last, finishing(), suppress(StockflowError):  # it grows old by itself
            self._take_away()

    def _take_away(self) -> None:
        self._stop.set()
        self._thread.join(JOIN_S)
        self._store.delete([self._key])

    def is_exclusive(self) -> bool:
        """Return whether the store creates objects exclusively; asked with one request, about this run's record."""
        return self._store.creates_exclusively(self._key, _beat_now())

    def _beat(self) -> None:
        wait_s = FIRST_BEAT_S
        while not self._stop.wait(wait_s):
            wait_s = min(2 * wait_s, HEARTBEAT_S)
            # A missed beat harms nobody; a store that is really gone fails the merge itself.
            with suppress(StockflowError):
                self._store.put(self._key, _beat_now())
                self._also()


def last_seen(store: Store) -> float:
    """Return when a run here that has not ended was last seen, in seconds since the epoch; 0.0: there is none.

    Runs of every plan count. One that ends takes its record away, so a claim without the record of its run is no sign
    of life; that record is asked for by its name, as a listing may lag behind.
    """
    seen = [_beat_of(store, key) for key in _runs_of_all_plans(store)]
    with suppress(NotFoundError, CheckpointError):
        claim = read(store)
        seen.append(_beat_of(store, run_key(claim.plan_id, claim.run)))
    return max(seen, default=0.0)


def beats(store: Store, keys: Iterable[str], plan_id: str) -> list[float]:
    """Return when each run of this plan that has not ended was last seen, in seconds since the epoch.

    Args:
        store: the output.
        keys: the records that are there, as listed.
        plan_id: whose runs.
    """
    folder = run_folder(plan_id)
    return [beat for key in keys if key.startswith(folder) and (beat := _beat_of(store, key))]


def are_others_alive(store: Store, plan_id: str, run: str) -> bool:
    """Return whether another run of this plan was seen lately."""
    others = set(store.list(run_folder(plan_id))) - {run_key(plan_id, run)}
    return any(time.time() - _beat_of(store, key) < ABANDONED_S for key in others)


def is_anyone_else_alive(store: Store, plan_id: str, run: str) -> bool:
    """Return whether another run in this prefix, of whatever plan, was seen lately.

    The claim of another plan counts, too: whoever takes a prefix removes the records of the runs that he finds there.
    """
    seen = [_beat_of(store, key) for key in _runs_of_all_plans(store) if key != run_key(plan_id, run)]
    with suppress(NotFoundError, CheckpointError):
        claim = read(store)
        if claim.plan_id != plan_id:
            seen.append(claim.heartbeat)
    return time.time() - max(seen, default=0.0) < ABANDONED_S


def _runs_of_all_plans(store: Store) -> list[str]:
    return [key for key in store.list(RECORDS) if PurePosixPath(key).parent.name == "runs"]


def _beat_now() -> bytes:
    return _BEAT.encode(Beat(time.time()))


def _beat_of(store: Store, key: str) -> float:
    """When a run was last seen; one whose record vanished or cannot be read is not."""
    try:
        return _BEAT.read(store, key).heartbeat
    except (NotFoundError, CheckpointError):
        return 0.0
