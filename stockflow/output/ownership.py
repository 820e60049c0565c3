"""Ownership of an output prefix: which plan has it, taking it and replacing what is there, losing it to another one."""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from stockflow.checkpoints.files.candidates import WRITTEN_STEMS, index_of
from stockflow.checkpoints.opening import CONFIG_FILE
from stockflow.errors import (
    AlreadyExistsError,
    CheckpointError,
    InterruptedRunError,
    NotFoundError,
    OutputConflictError,
    StockflowError,
    UserError,
)
from stockflow.interruption import finishing, pause
from stockflow.output import claims
from stockflow.output import manifest as manifest_file
from stockflow.output.claims import Claim, are_others_alive, last_seen
from stockflow.output.files import loaders_read, planned_files, strangers
from stockflow.output.keys import CLAIM_FILE, MANIFEST_FILE, RECORDS, plan_folder, plan_key, receipt_folder
from stockflow.output.manifest import Manifest
from stockflow.output.numerics import agreed_numerics
from stockflow.output.receipts import Receipt
from stockflow.output.shards import is_intact, present_files
from stockflow.planning import file as plan_file
from stockflow.planning.file import RecordedPlan
from stockflow.planning.plan import NUMERICS, CheckpointRef, MergePlan
from stockflow.storage import Stamp, Store, redact
from stockflow.text.examples import some

SETTLE_S = 5.0
"""where creation is not exclusive: how long a claim must stand before it counts"""
MAX_CHANGES = 3
"""Files that a message names of those that changed."""
"""files that a message names of those that go or stay"""
UNPUBLISHED_FIRST = (MANIFEST_FILE, *(index_of(f"{stem}.safetensors") for stem in WRITTEN_STEMS), CONFIG_FILE)
"""Without these, a loader finds no model."""

States = Mapping[str, Mapping[str, Stamp]]
"""of input files, by checkpoint URL and name"""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a plan finds at its output prefix; all fields empty: nothing."""

    finished: Manifest | None = None
    """this plan's own output"""
    is_ours: bool = False
    """claimed by an unfinished run of this plan"""
    conflict: str | None = None
    """what else is there, in words; only ``--overwrite`` takes such a prefix"""


class Claimant(Protocol):
    """A plan, as far as a prefix is claimed for it."""

    @property
    def plan_id(self) -> str:
        """What it is known by."""

    @property
    def checkpoints(self) -> tuple[CheckpointRef, ...]:
        """What it reads."""


def look(store: Store, plan: MergePlan) -> Occupancy:
    """Return what is at the output prefix; nothing is written."""
    found = on_record(store, plan)
    if found is not None:
        return found
    occupant = _occupant(store, plan)
    if occupant is None:
        return Occupancy()
    return Occupancy(conflict=f"{redact(store.url)} is not empty and not an output of stockflow (it has {occupant!r})")


def on_record(store: Store, plan: Claimant) -> Occupancy | None:
    """Return what manifest or claim say of an output prefix; None: there is neither."""
    where = redact(store.url)
    try:
        with suppress(NotFoundError):
            published = manifest_file.read(store)
            if published.plan_id == plan.plan_id:
                return Occupancy(finished=published)
            differing = _differing(published.inputs, published.numerics, plan)
            return Occupancy(
                conflict=f"{where} holds the finished output of another plan{_ids(published, plan)}{differing}"
            )
        with suppress(NotFoundError):
            owner = claims.read(store)
            if owner.plan_id == plan.plan_id:
                return Occupancy(is_ours=True)
            age = max(time.time() - max(last_seen(store), owner.heartbeat), 0.0)
            earlier = earlier_plan(store, owner.plan_id)
            differing = _differing(earlier.plan.checkpoints, earlier.numerics, plan) if earlier else ""
            return Occupancy(
                conflict=f"{where} is claimed by an unfinished run of another plan{_ids(owner, plan)}, "
                f"last seen {age:,.0f} s ago{differing}"
            )
    except CheckpointError as error:
        return Occupancy(conflict=str(error))
    return None


def _occupant(store: Store, plan: MergePlan) -> str | None:
    """Return a file of strangers, or a folder in which the output would have files: others may lie beside an output."""
    listing = store.listing()
    keys = (key for key in planned_files(plan, plan.plan_id) if not key.startswith(RECORDS))
    folders = {key.partition("/")[0] for key in keys if "/" in key}
    return next((name for name in (*listing.files, *listing.folders) if name in listing.files or name in folders), None)


def _differing(inputs: Iterable[CheckpointRef], numerics: int, plan: Claimant) -> str:
    """Return the end of a message: what sets an earlier plan apart from ``plan``, changed inputs and other numerics."""
    return _since_then(_states(inputs), _states(plan.checkpoints)) + _other_numerics(numerics)


def _states(checkpoints: Iterable[CheckpointRef]) -> States:
    """Return the state of every input file."""
    return {redact(checkpoint.url): checkpoint.files for checkpoint in checkpoints}


def earlier_plan(store: Store, plan_id: str) -> RecordedPlan | None:
    """Return a plan recorded in an output, None if it cannot be read."""
    try:
        return plan_file.read(store, plan_key(plan_id))
    except InterruptedRunError:
        raise
    except StockflowError:
        return None


def _since_then(earlier: States, now: States) -> str:
    """Return the end of a message: each file that both plans read and that is another now, with both stamps."""
    changed = [
        f"{url}/{file} changed: it was {before}, it is {now[url][file]}"
        for url, files in earlier.items()
        for file, before in files.items()
        if now.get(url, {}).get(file, before) != before
    ]
    return f"; since then {_listed(changed)}" if changed else ""


def _other_numerics(earlier: int) -> str:
    """Return the end of a message: that the earlier plan rounds otherwise."""
    if earlier == NUMERICS:
        return ""
    return f"; it was made with numerics {earlier}, this version of stockflow has {NUMERICS} and gives other bytes"


def _listed(changed: Sequence[str]) -> str:
    more = len(changed) - MAX_CHANGES
    return "; ".join(changed[:MAX_CHANGES]) + (f"; and {more} files more" if more > 0 else "")


def admit(store: Store, plan: MergePlan, *, overwrite: bool) -> Occupancy:
    """Return what is at the output prefix, if a run of this plan may work there; nothing is written.

    Raises:
        OutputConflictError: something else is there and ``overwrite`` is false.
    """
    found = look(store, plan)
    if found.conflict and not overwrite:
        raise OutputConflictError(f"{found.conflict}; choose another output, or --overwrite to replace what is there")
    return found


def take(store: Store, plan: MergePlan, run: str, found: Occupancy, *, is_exclusive: bool) -> Sequence[str]:
    """Claim the output prefix for this plan, replacing what was ``found`` there if that is not ours to resume.

    Returns what to say of it: which files went, and which stay.

    A finished output of this plan is published anew: shards that are still what their receipts say are kept,
    damaged ones are merged again.

    Args:
        store: the output.
        plan: what is to be merged.
        run: this run, which beats already.
        found: what ``admit`` returned.
        is_exclusive: whether the store creates objects exclusively; where not, the last claim to arrive wins.

    Raises:
        OutputConflictError: another plan claimed it at the same moment.
    """
    if found.conflict or found.finished:
        notes = list(overwriting_notes(store, plan, is_done=True))
        _replace(store, plan, run)
        return notes
    if not found.is_ours:
        claim(store, plan, run, is_exclusive=is_exclusive)
    return ()


def _ids(owner: Manifest | Claim, plan: Claimant) -> str:
    return f" ({owner.plan_id[:12]}, this one is {plan.plan_id[:12]})"


def claim(store: Store, plan: Claimant, run: str, *, is_exclusive: bool) -> None:
    """Claim an output prefix that is nobody's.

    Raises:
        OutputConflictError: another plan claimed it at the same moment.
    """
    if not is_exclusive:
        _refuse_rival(store, plan)
    with suppress(AlreadyExistsError):
        store.put_new(CLAIM_FILE, claims.encode(Claim.now(plan.plan_id, run)))
    if not is_exclusive:
        pause(SETTLE_S)
    _refuse_rival(store, plan)


def _refuse_rival(store: Store, plan: Claimant) -> None:
    with suppress(NotFoundError):
        other = claims.read(store)
        if other.plan_id != plan.plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was claimed by another plan ({other.plan_id[:12]}) at the same moment; "
                "choose another output"
            )


def store_warnings(output: Store, inputs: Sequence[Store], plan: MergePlan, *, is_exclusive: bool) -> Iterator[str]:
    """Say what the stores do not promise; inputs are asked, with one request for each place."""
    if not is_exclusive:
        yield (
            f"{redact(output.url)}: this store does not create objects exclusively (If-None-Match). Of two merges "
            f"started into one prefix at the same moment, the one whose claim stands after {SETTLE_S:.0f} s goes on "
            "and the other is refused; a request delayed for longer is noticed only before a shard appears and before "
            "publishing. Better start one at a time"
        )
    asked: set[str] = set()
    for source, checkpoint in zip(inputs, plan.checkpoints, strict=True):
        place = "/".join(source.url.split("/")[:3])
        if "://" in place and place not in asked and not source.pins_reads(next(iter(checkpoint.files))):
            yield (
                f"{redact(source.url)}: this store ignores If-Match, so each answer's ETag is compared here; "
                "a file that is replaced is still noticed, but only after its bytes were sent"
            )
        asked.add(place)


def _replace(store: Store, plan: MergePlan, run: str) -> None:
    """Unpublish what is there: manifest, index and config first, then whatever the new output will not replace.

    Of an output of ours every published file goes; of foreign files only weights, which loaders might pick up.
    """
    published = _published(store)
    for key in UNPUBLISHED_FIRST:
        store.delete([key])
    _delete_others(store, plan, published)
    store.put(CLAIM_FILE, claims.encode(Claim.now(plan.plan_id, run)))
    # A run of the old plan that is still at work writes nothing more once it sees the claim.
    _delete_others(store, plan, published)


def _delete_others(store: Store, plan: MergePlan, published: Set[str]) -> None:
    present = store.list()
    kept = {shard.file for shard in plan.shards}
    stale = [key for key in present if _goes(key, published) and key not in kept]
    current = plan_folder(plan.plan_id)
    records = [key for key in present if key.startswith(RECORDS) and not key.startswith(current) and key != CLAIM_FILE]
    store.delete([*stale, *records])


def _published(store: Store) -> Set[str]:
    with suppress(NotFoundError, CheckpointError):
        return manifest_file.read(store).files.keys()
    return frozenset()


def _goes(key: str, published: Set[str]) -> bool:
    is_weights = "/" not in key and key.endswith(".safetensors")
    return (key in published and not key.startswith(RECORDS)) or is_weights or key in UNPUBLISHED_FIRST


def overwriting_notes(store: Store, plan: MergePlan, *, is_done: bool) -> Iterator[str]:
    """Yield which files ``--overwrite`` removes for good, and which it leaves as it did not write them."""
    present, published = store.list(), _published(store)
    planned = {*planned_files(plan, plan.plan_id), MANIFEST_FILE}
    others = strangers(present, planned)
    gone = [key for key in others if _goes(key, published)]
    left = [key for key in others if not _goes(key, published)]
    if gone:
        yield f"--overwrite {'removes' if is_done else 'would remove'} {some(gone)}"
    if left:
        read = [key for key in left if loaders_read(key)]
        warned = f"; loaders of the output may read {some(read)}: remove what is not wanted" if read else ""
        leaves = "leaves" if is_done else "would leave"
        yield f"--overwrite {leaves} what stockflow did not write: {some(left)}{warned}"


def check_owner(store: Store, plan_id: str, numerics_class: str) -> None:
    """Hold the claim, and the numerics class that was agreed on, against a run that is about to write a shard.

    Raises:
        OutputConflictError: another plan took the prefix, or it is merged anew on machines of another class.
    """
    with suppress(NotFoundError, CheckpointError):
        owner = claims.read(store)
        if owner.plan_id != plan_id:
            raise OutputConflictError(
                f"{redact(store.url)} was taken by another plan ({owner.plan_id[:12]}, this one is {plan_id[:12]}) "
                "while this one ran; nothing was published"
            )
    agreed = agreed_numerics(store, plan_id)
    if agreed not in (None, numerics_class):
        raise OutputConflictError(
            f"{redact(store.url)} is being merged anew on machines of class {agreed}, while this run computes as "
            f"{numerics_class}; nothing was published"
        )


@contextmanager
def given_up_unbegun(store: Store, plan_id: str, run: str, files: Collection[str]) -> Iterator[None]:
    """Leave no claim if a run ends for what the user must change before any of ``files`` is there.

    The plan will be another. A shard may be there without its receipt: unclaimed it would be a stranger's file.
    """
    try:
        yield
    except OutputConflictError:
        raise
    except UserError:
        with suppress(StockflowError), finishing():
            _give_up(store, plan_id, run, files)
        raise


def _give_up(store: Store, plan_id: str, run: str, files: Collection[str]) -> None:
    with suppress(NotFoundError, CheckpointError):
        if claims.read(store).run != run or are_others_alive(store, plan_id, run):
            return
        present = store.list(plan_folder(plan_id))
        is_begun = any(key.startswith(receipt_folder(plan_id)) for key in present)
        if not is_begun and present_files(store, files).keys().isdisjoint(files):
            store.delete([*present, CLAIM_FILE])


def _unlisted(store: Store, key: str) -> Stamp | None:
    """Return the state of a file that a listing lacks: it may lag behind what was written."""
    with suppress(NotFoundError):
        return store.stamp(key)
    return None


def check_still_ours(store: Store, plan: MergePlan, receipts: Sequence[Receipt]) -> None:
    """Hold claim and shards against this run, right before its manifest makes them official.

    Raises:
        OutputConflictError: another run took the prefix, or replaced a shard, while this one worked.
    """
    for numerics_class in sorted({receipt.numerics_class for receipt in receipts}):
        check_owner(store, plan.plan_id, numerics_class)
    present = present_files(store, [receipt.file for receipt in receipts])
    for receipt in receipts:
        found = present.get(receipt.file) or _unlisted(store, receipt.file)
        if found is None or not is_intact(store, receipt, found):
            raise OutputConflictError(
                f"{redact(store.url)}/{receipt.file} is no longer what this run wrote: another one writes there; "
                "nothing was published. End it, then run again"
            )
