"""Heads and copies held against their embeddings in whole, before anything is merged of them.

Opening looks at eight ranges of each: a few rows that were trained alone may lie between them.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from stockflow.ahead import map_ahead
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.values import KnownValues, Located, last_difference, read_run
from stockflow.storage import Store

MAX_COMPARED_BYTES = 2**30
"""Of each model, copies and originals together, where nothing is merged yet."""
PIECE_ELEMS, NUM_READERS = 2**20, 8
"""Of one tensor, 2 MiB in BF16, and how many pieces of two tensors are read at a time."""


def compared(stores: Sequence[Store], checkpoints: Sequence[Checkpoint], most_bytes: int | None) -> list[Checkpoint]:
    """Return checkpoints of whose heads and copies all values are known to be those of their embeddings, or not to be.

    Args:
        stores: where the checkpoints lie.
        checkpoints: as they were opened.
        most_bytes: read of each; of what is beyond it stays unknown. None: all is read.

    Raises:
        StorageError: reading failed after retries.
        InputChangedError: a file is no longer the one whose header was read.
    """
    done: dict[int, KnownValues] = {}  # adapters of one model share what is known of it
    for store, each in zip(stores, checkpoints, strict=True):
        if id(each.values) not in done:
            done[id(each.values)] = _compared(store, each, most_bytes)
    return [replace(each, values=done[id(each.values)]) for each in checkpoints]


def _compared(store: Store, checkpoint: Checkpoint, most_bytes: int | None) -> KnownValues:
    known, num_bytes = checkpoint.values, 0
    copies, partly = dict(known.copies), dict(known.partly)
    for extent, copy in known.copies.items():
        num_bytes += 0 if copy.is_whole else copy.copy.spec.num_bytes + copy.original.spec.num_bytes
        if copy.is_whole or (most_bytes is not None and num_bytes > most_bytes):
            continue
        last = _last_difference(store, checkpoint, (copy.copy, copy.original))
        if last is None:
            copies[extent] = replace(copy, is_whole=True)
        else:
            del copies[extent]
            partly[extent] = last // (copy.copy.spec.num_elems // copy.copy.spec.shape[0])
    return replace(known, copies=copies, partly=partly)


def _last_difference(store: Store, checkpoint: Checkpoint, places: tuple[Located, Located]) -> int | None:
    """Return the last element in which two tensors of one shape differ, None if in none; new tokens have last rows."""
    num_elems = places[0].spec.num_elems
    starts = range(0, num_elems, PIECE_ELEMS)

    def last_in(start: int) -> int | None:
        run = range(start, min(start + PIECE_ELEMS, num_elems))
        one, other = (read_run(store, checkpoint.files, place, run) for place in places)
        last = last_difference(one, other, (places[0].spec.dtype, places[1].spec.dtype))
        return None if last is None else start + last

    with ThreadPoolExecutor(NUM_READERS) as pool:
        found: Iterable[int | None] = map_ahead(pool, NUM_READERS, last_in, reversed(starts))
        return next((last for last in found if last is not None), None)
