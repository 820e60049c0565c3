"""The numerics class that all shards of an output keep to: agreed on by the first worker, held by every later one.

Each agreement is written exclusively under a next number; nothing is read, changed and written back.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count

from stockflow.errors import AlreadyExistsError, NotFoundError, OutputConflictError, PlanError
from stockflow.output.claims import are_others_alive
from stockflow.output.keys import numerics_key, receipt_folder
from stockflow.storage import Store, redact
from stockflow.text.records import RecordKind, parse_record


@dataclass(frozen=True, slots=True)
class Agreement:
    """A class, and the run whose worker proposed it."""

    numerics_class: str
    run: str


KIND = RecordKind("a numerics class", partial(parse_record, Agreement), max_bytes=10_000, max_values=100)


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
        agreements = _agreements(store, plan_id)
        if agreements:
            agreed = agreements[-1]
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
        with suppress(AlreadyExistsError):  # somebody was faster: look again
            store.put_new(numerics_key(plan_id, len(agreements)), KIND.encode(Agreement(found, run)))


def agreed_numerics(store: Store, plan_id: str) -> str | None:
    """Return the numerics class that the shards of a plan keep to, None if no worker has come yet."""
    agreements = _agreements(store, plan_id)
    return agreements[-1].numerics_class if agreements else None


def _agreements(store: Store, plan_id: str) -> list[Agreement]:
    """Return what was agreed on, the last one valid; each asked for by its name, as a listing may lag behind."""
    found: list[Agreement] = []
    with suppress(NotFoundError):
        for number in count():
            found.append(KIND.read(store, numerics_key(plan_id, number)))
    return found
