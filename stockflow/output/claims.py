"""Who is at work in an output prefix: runs that say they are alive, and the numerics class that they keep to.

Each run writes under names of its own, or exclusively under a next number. So nothing here is read, changed and
written back, and no run can undo what another one did.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from stockflow.errors import (
    AlreadyExistsError,
    CheckpointError,
    NotFoundError,
    OutputConflictError,
    PlanError,
    StockflowError,
)
from stockflow.interruption import finishing, last_act
from stockflow.output.manifest import RECORDS, numerics_folder, read_claim, receipt_folder, run_folder
from stockflow.storage import Store, read_small, redact

HEARTBEAT_S = 10.0
FIRST_BEAT_S = 1.0
"""after a run began, then after twice that time, and so on: whoever looks at it then finds a report that is not old"""
ABANDONED_S = 900.0
"""A run that was not seen for so long is taken for dead; an outage of the store keeps one from beating for minutes."""
JOIN_S = 2.0
"""how long the end of a run waits for a beat that is on its way"""
MAX_RECORD_BYTES = 10_000


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


def run_key(plan_id: str, run: str) -> str:
    """Return where a run says that it is alive."""
    return f"{run_folder(plan_id)}{run}.json"


def last_seen(store: Store) -> float:
    """Return when a run in this prefix was last known to be alive, in seconds since the epoch; 0.0: never.

    Runs of every plan count; the claim itself counts as a sign of life.
    """
    seen = [_beat_of(store, key) for key in _runs_of_all_plans(store)]
    with suppress(NotFoundError, CheckpointError):
        seen.append(read_claim(store).heartbeat)
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
        claim = read_claim(store)
        if claim.plan_id != plan_id:
            seen.append(claim.heartbeat)
    return time.time() - max(seen, default=0.0) < ABANDONED_S


def agree_on_numerics(store: Store, plan_id: str, run: str, found: str, *, replace: bool) -> None:
    """Make ``found`` the numerics class that all shards of the output keep to, unless another one is that already.

    Args:
        store: the output.
        plan_id: whose shards.
        run: which run asks; all workers of a run must agree.
        found: the class of this worker.
        replace: whether the class of earlier runs gives way; their shards are then merged again.

    Raises:
        PlanError: a worker of the same run computes otherwise.
        OutputConflictError: an earlier run, or one at work beside this one, computes otherwise.
    """
    while True:
        records = sorted(store.list(numerics_folder(plan_id)))
        number = 0
        if records:
            agreed = _read_class(store, records[-1])
            if agreed.numerics_class == found:
                return
            if agreed.run == run:
                raise PlanError(
                    f"this worker computes as {found}, another one of this run as {agreed.numerics_class}: only within "
                    "one class do equal plans give equal bytes. Run it on machines of one kind"
                )
            may_replace = replace or not store.list(receipt_folder(plan_id))
            if are_others_alive(store, plan_id, run) or not may_replace:
                raise OutputConflictError(
                    f"{redact(store.url)} is merged on machines of class {agreed.numerics_class}, and this one "
                    f"computes as {found}: their shards would not fit together bit for bit. Run it on a machine like "
                    "those, choose another output, or end every run and --overwrite to merge all of it anew"
                )
            number = _number_of(records[-1]) + 1
        with suppress(AlreadyExistsError):  # somebody was faster: look again
            store.put_new(f"{numerics_folder(plan_id)}{number:06d}.json", _NumericsRecord(found, run).to_json())


def agreed_numerics(store: Store, plan_id: str) -> str | None:
    """Return the numerics class that the shards of a plan keep to, None if no worker has come yet."""
    records = sorted(store.list(numerics_folder(plan_id)))
    return _read_class(store, records[-1]).numerics_class if records else None


@dataclass(frozen=True, slots=True)
class _NumericsRecord:
    numerics_class: str
    run: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def _read_class(store: Store, key: str) -> _NumericsRecord:
    try:
        fields = json.loads(read_small(store, key, max_bytes=MAX_RECORD_BYTES))
        return _NumericsRecord(str(fields["numerics_class"]), str(fields["run"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{redact(store.url)}/{key} is not a record of stockflow: {error!r}") from None


def _number_of(key: str) -> int:
    name = PurePosixPath(key).stem
    return int(name) if name.isascii() and name.isdigit() else 0


def _runs_of_all_plans(store: Store) -> list[str]:
    return [key for key in store.list(RECORDS) if PurePosixPath(key).parent.name == "runs"]


def _beat_now() -> bytes:
    return json.dumps({"heartbeat": time.time()}).encode()


def _beat_of(store: Store, key: str) -> float:
    """When a run was last seen; one whose record vanished or cannot be read is not."""
    try:
        return float(json.loads(read_small(store, key, max_bytes=MAX_RECORD_BYTES))["heartbeat"])
    except (NotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return 0.0
