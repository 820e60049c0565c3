"""Heads and copies held against their embeddings in whole, before anything is merged of them.

Opening looks at eight ranges of each: a few rows that were trained alone may lie between them.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.heads import original_of, tie_flag, unties
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.values import KnownValues, Located, last_difference, probes, read_run
from stockflow.storage import Store, halves_of

MAX_COMPARED_BYTES = 2**30
"""Of each model, copies and originals together, where nothing is merged yet."""
PIECE_ELEMS, NUM_READERS = 2**20, 8
"""Of one tensor, 2 MiB in BF16, and how many pieces of two tensors are read at a time."""


def compared(stores: Sequence[Store], checkpoints: Sequence[Checkpoint], most_bytes: int | None) -> list[Checkpoint]:
    """Return checkpoints of whose heads and copies all values are known to be those of their embeddings, or not to be.

    Args:
        stores: where the checkpoints lie.
        checkpoints: as they were opened, the donor first.
        most_bytes: read of each; of what is beyond it stays unknown. None: all is read.

    Raises:
        StorageError: reading failed after retries.
        InputChangedError: a file is no longer the one whose header was read.
    """
    done: dict[int, KnownValues] = {}  # adapters of one model share what is known of it
    for store, each in zip(stores, checkpoints, strict=True):
        if id(each.values) not in done:
            done[id(each.values)] = _compared(store, each, most_bytes)
    models = [
        OpenedModel(store, replace(each, values=done[id(each.values)]))
        for store, each in zip(stores, checkpoints, strict=True)
    ]
    return [_with_likenesses(models, model, most_bytes) for model in models]


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint, and where it is read from."""

    store: Store
    opened: Checkpoint

    def located(self, name: str) -> Located:
        """Return where a tensor lies."""
        return Located(self.opened.specs[name], self.opened.extents[name])

    def ties(self, head: str) -> bool:
        """Return whether the embedding is the head, too, whether it is stored once or twice."""
        if head in self.opened.specs:
            return self.opened.extents[head] in self.opened.values.copies
        return tie_flag(self.opened.config) is not False and bool(self.opened.values.names.embeddings)


def _compared(store: Store, checkpoint: Checkpoint, most_bytes: int | None) -> KnownValues:
    known, num_bytes = checkpoint.values, 0
    copies, partly = dict(known.copies), dict(known.partly)
    for extent, copy in known.copies.items():
        num_bytes += 0 if copy.is_whole else _bytes_of(copy.copy, copy.original)
        if copy.is_whole or (most_bytes is not None and num_bytes > most_bytes):
            continue
        model = OpenedModel(store, checkpoint)
        last = _last_difference((model, copy.copy), (model, copy.original))
        if last is None:
            copies[extent] = replace(copy, is_whole=True)
        else:
            del copies[extent]
            partly[extent] = last // (copy.copy.spec.num_elems // copy.copy.spec.shape[0])
    return replace(known, copies=copies, partly=partly)


def _with_likenesses(models: Sequence[OpenedModel], model: OpenedModel, most_bytes: int | None) -> Checkpoint:
    """Return a checkpoint whose own heads are known as what they are, where other models tie theirs."""
    opened, donor = model.opened, models[0]
    is_untied = tie_flag(opened.config) is False
    found = set[Extent]()
    for name in opened.values.names.heads:
        other = model if is_untied else donor
        if len(halves_of(opened.url)) > 1 or model.ties(name) or (not is_untied and unties(opened.config)):
            continue
        if not any(each.ties(name) for each in (models if is_untied else [donor])):
            continue
        original = original_of(name, opened.specs[name].shape, other.opened.values.names, other.opened.specs)
        if original and _are_one((model, model.located(name)), (other, other.located(original)), most_bytes):
            found.add(opened.extents[name])
    values = opened.values
    if is_untied:
        return replace(opened, values=replace(values, untied_alike=frozenset(found)))
    return replace(opened, values=replace(values, left_behind=frozenset(found)))


Side = tuple[OpenedModel, Located]


def _are_one(one: Side, other: Side, most_bytes: int | None) -> bool:
    """Return whether all of two tensors is equal; not where that is more than is read of them."""
    if any(each.spec.name in model.opened.stored for model, each in (one, other)):
        return False
    if most_bytes is not None and _bytes_of(one[1], other[1]) > most_bytes:
        return False
    are_alike = all(_last_within(one, other, run) is None for run in probes(one[1].spec.num_elems))
    return are_alike and _last_difference(one, other) is None


def _bytes_of(one: Located, other: Located) -> int:
    return one.spec.num_bytes + other.spec.num_bytes


def _last_within(one: Side, other: Side, run: range) -> int | None:
    a, b = (read_run(model.store, model.opened.files, each, run) for model, each in (one, other))
    last = last_difference(a, b, (one[1].spec.dtype, other[1].spec.dtype))
    return None if last is None else run.start + last


def _last_difference(one: Side, other: Side) -> int | None:
    """Return the last element in which two tensors of one shape differ, None if in none; new tokens have last rows."""
    num_elems = one[1].spec.num_elems
    runs = (range(start, min(start + PIECE_ELEMS, num_elems)) for start in reversed(range(0, num_elems, PIECE_ELEMS)))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found: Iterable[int | None] = map_ahead(pool, NUM_READERS, partial(_last_within, one, other), runs)
        return next((last for last in found if last is not None), None)
