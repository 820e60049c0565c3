"""Publishing an adapter: its place is claimed, what is done of it kept there, then weights, card, config and manifest.

Loaders look for adapter_config.json, which appears when all that it speaks of is there; the manifest is the last.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from stockflow.adapters.pieces import AdapterPieces
from stockflow.checkpoints.adapters.config import CONFIG_KEY, WEIGHTS_KEY
from stockflow.errors import OutputConflictError
from stockflow.events import Moved, Note, OnEvent, Stage
from stockflow.output import claims
from stockflow.output.claims import Claim
from stockflow.output.keys import CARD_FILE, CLAIM_FILE, MANIFEST_FILE, RECORDS, run_key, tensors_key
from stockflow.output.manifest import Manifest, PublishedFile
from stockflow.output.ownership import Occupancy, check_owner, claim, on_record
from stockflow.output.publish import put_manifest, versions
from stockflow.output.receipts import TensorFacts
from stockflow.output.tables import encode_tensors
from stockflow.output.target import check_keys, check_space
from stockflow.planning.plan import NUMERICS, CheckpointRef, canonical_checkpoint, canonical_digest
from stockflow.run.presence import at_work
from stockflow.storage import Stamp, Store, check_stamp, redact
from stockflow.text.strictjson import shown

FILES = (WEIGHTS_KEY, CARD_FILE, CONFIG_KEY, MANIFEST_FILE)
"""Of an adapter, in the order in which they appear."""
CLASS = "cpu"
FINISHED = "this adapter is there already, finished: nothing was done"


@dataclass(frozen=True)
class AdapterPlan:
    """What decides the bytes of an adapter that is made here."""

    checkpoints: tuple[CheckpointRef, ...]
    """that are read"""
    pins: tuple[str, ...]
    """per checkpoint, how reads are held to the stamps"""
    settings: Mapping[str, object]
    """plain values; what is done with the checkpoints"""
    made_by: str
    """the recipe, or the command"""
    shards = ()
    num_output_bytes = 0
    """not known before"""

    @cached_property
    def plan_id(self) -> str:
        """sha256 of all that decides the bytes."""
        places = [canonical_checkpoint(each) for each in self.checkpoints]
        return canonical_digest({"inputs": places, **self._settings})

    @cached_property
    def merge_id(self) -> str:
        """The same without the inputs."""
        return canonical_digest(self._settings)

    @property
    def _settings(self) -> dict[str, object]:
        return {"makes": "adapter", "numerics": NUMERICS, "settings": self.settings}


def admit(store: Store, plan: AdapterPlan, num_bytes: int, *, overwrite: bool) -> Occupancy:
    """Return what is at an adapter's place, if a run of this plan may work there; nothing is written.

    Args:
        store: the place.
        plan: of the adapter.
        num_bytes: of it, at most.
        overwrite: whether an adapter that is there is replaced.

    Raises:
        UserError: nothing can be written there, something else is there, or it is too small.
        StorageError: it does not answer.
    """
    check_keys(store, [*FILES, CLAIM_FILE, run_key(plan.plan_id, "0" * 16)])
    found = on_record(store, plan) or _strangers(store)
    if found.conflict and not overwrite:
        raise OutputConflictError(f"{found.conflict}; choose another output, or --overwrite to replace an adapter")
    held = store.listing().files
    if found.conflict and held and not {WEIGHTS_KEY, CONFIG_KEY} & held.keys():
        raise OutputConflictError(
            f"{redact(store.url)} is not empty and holds no adapter (it has {shown(next(iter(held)))}), so --overwrite "
            "replaces nothing there; choose another output"
        )
    if not found.finished:
        check_space(store, 2 * num_bytes)
    return found


def _strangers(store: Store) -> Occupancy:
    listing = store.listing()
    held = next((name for name in (*listing.files, *listing.folders) if name != RECORDS.rstrip("/")), None)
    return Occupancy(conflict=held and f"{redact(store.url)} is not empty (it has {shown(held)})")


@contextmanager
def claimed(
    store: Store, plan: AdapterPlan, found: Occupancy, began: float, on_event: OnEvent
) -> Iterator[tuple[AdapterPieces, OnEvent]]:
    """Hold an adapter's place while it is made there: yields what is done of it, and what to tell of the rest.

    Args:
        store: the place.
        plan: of the adapter.
        found: what ``admit`` returned.
        began: when this run did, in seconds since the epoch.
        on_event: told how it goes.

    Raises:
        OutputConflictError: another plan claimed it at the same moment.
        StorageError: storage failed; the same again goes on.
    """
    with at_work(store, plan, {WEIGHTS_KEY}, on_event) as (run, tell, is_exclusive):
        _take(store, plan, run, found, is_exclusive=is_exclusive)
        tell(Stage("looking for finished factors"))
        pieces = AdapterPieces(store, plan.plan_id, run, began)
        if pieces.num_resumed:
            tell(Note(f"{pieces.num_resumed:,} tensors are done by an earlier run, and stay"))
        yield pieces, tell


def _take(store: Store, plan: AdapterPlan, run: str, found: Occupancy, *, is_exclusive: bool) -> None:
    """Claim an adapter's place, without what makes a loader or a reader of records find an adapter there."""
    if found.is_ours:
        return
    if not (found.conflict or found.finished):
        claim(store, plan, run, is_exclusive=is_exclusive)
        return
    for key in (MANIFEST_FILE, CONFIG_KEY):
        store.delete([key])
    store.put(CLAIM_FILE, claims.encode(Claim.now(plan.plan_id, run)))
    own = run_key(plan.plan_id, run)
    store.delete(key for key in store.list(RECORDS) if key not in (CLAIM_FILE, own))


def publish(
    store: Store,
    plan: AdapterPlan,
    pieces: AdapterPieces,
    config: bytes,
    card: str,
    summary: Mapping[str, float],
    on_event: OnEvent,
) -> Manifest:
    """Write the files of an adapter and its manifest; what loaders look for disappears first and appears late.

    Raises:
        OutputConflictError: another one writes there, too.
        StorageError: writing failed; the same again goes on.
    """
    on_event(Stage("publishing", total_bytes=pieces.num_bytes, counts_written=True))
    check_owner(store, plan.plan_id, CLASS)
    store.delete([CONFIG_KEY])
    weights, stamp = _write_weights(store, pieces, on_event)
    table = encode_tensors(changed_rows(pieces.rows.values()))
    published = {WEIGHTS_KEY: weights}
    for key, payload in (
        (CARD_FILE, card.encode()), (tensors_key(plan.plan_id), table), (CONFIG_KEY, config)
    ):  # fmt: skip
        _check_ours(store, plan, stamp)
        store.put(key, payload)
        published[key] = PublishedFile.of(payload)
    manifest = Manifest(
        plan_id=plan.plan_id,
        merge_id=plan.merge_id,
        recipe=plan.made_by,
        inputs=plan.checkpoints,
        pins=plan.pins,
        files=dict(sorted(published.items())),
        numerics=NUMERICS,
        numerics_classes=(CLASS,),
        versions=versions(),
        summary={
            **summary,
            "bytes_read": pieces.num_read,
            "bytes_written": sum(file.size for file in published.values()),
        },
        gram=(),
    )
    _check_ours(store, plan, stamp)
    manifest = put_manifest(store, manifest)
    pieces.remove()
    return manifest


def changed_rows(rows: Iterable[TensorFacts]) -> Sequence[TensorFacts]:
    """Return the rows of what an adapter changes."""
    return [row for row in rows if "zero_delta" not in row.flags]


def _check_ours(store: Store, plan: AdapterPlan, stamp: Stamp) -> None:
    check_owner(store, plan.plan_id, CLASS)
    check_stamp(store, WEIGHTS_KEY, stamp)


def _write_weights(store: Store, pieces: AdapterPieces, on_event: OnEvent) -> tuple[PublishedFile, Stamp]:
    header, digest = pieces.header, hashlib.sha256()
    size = len(header) + pieces.num_bytes
    with store.create(WEIGHTS_KEY, size=size) as sink:
        for block in chain([header], pieces.blocks()):
            sink.write(block)
            digest.update(block)
            on_event(Moved(0, len(block)))
    return PublishedFile(size, digest.hexdigest()), store.stamp(WEIGHTS_KEY)
