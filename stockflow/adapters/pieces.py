"""Pieces of an adapter that is being made: tensors in files among the records of its output until all are known.

Each piece has a receipt, as a shard of a merge has, with a row per tensor or module: by these a run of the same plan
finds what an earlier one did.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

from stockflow.ahead import map_ahead
from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.checkpoints.files.layout import HeaderCache, read_header, unheard
from stockflow.engine.process import peak_memory_bytes, process_name
from stockflow.errors import CheckpointError
from stockflow.kernels.arrays import Bytes
from stockflow.output import receipts
from stockflow.output.keys import factors_folder, receipt_folder, receipt_key
from stockflow.output.receipts import Receipt, TensorFacts
from stockflow.output.shards import is_intact
from stockflow.storage import Stamp, Store

Held = tuple[TensorSpec, Bytes]
PIECE_BYTES = 8 * 2**20
"""Of tensors that wait for each other, so that small ones share a request."""
PIECE_S = 60.0
"""How much of the work of a run that is killed may be lost, about."""
BLOCK_BYTES = 8 * 2**20
NUM_READERS = 16


class _TensorPlace(NamedTuple):
    spec: TensorSpec
    key: str
    start: int
    stamp: Stamp


class AdapterPieces:
    """What is done of an adapter, by this run and by earlier ones of the same plan."""

    def __init__(self, store: Store, plan_id: str, run: str, began: float) -> None:
        """Begin with what earlier runs left; this one began at ``began``, in seconds since the epoch."""
        self.rows: dict[str, TensorFacts] = {}
        """of what is done, by name"""
        self.num_read = 0
        """bytes of inputs that all of it took; who reads adds them up"""
        self._store, self._plan_id, self._run = store, plan_id, run
        self._places: dict[str, _TensorPlace] = {}
        self._done: list[str] = []
        """keys of pieces"""
        self.seconds = 0.0
        """that all runs took until what they had done was written"""
        self._began = began
        self._waiting: list[tuple[TensorFacts, Sequence[Held]]] = []
        self._num_waiting = self._num_told = 0
        self._take_up()
        self.num_resumed = len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(place.spec.num_bytes for place in self._places.values())

    def add(self, row: TensorFacts, *held: Held) -> None:
        """Keep what was made of a tensor or a module: its tensors, if it has any."""
        self.rows[row.name] = row
        self._waiting.append((row, held))
        self._num_waiting += sum(spec.num_bytes for spec, _ in held)
        if self._num_waiting >= PIECE_BYTES or time.time() - self._began >= PIECE_S:
            self.flush()

    def rename(self, name: str, new: str) -> None:
        """Give a tensor that is kept another name."""
        place = self._places.pop(name)
        self._places[new] = place._replace(spec=place.spec._replace(name=new))

    @property
    def header(self) -> bytes:
        """The header of a file of safetensors that holds the tensors by name."""
        return encode_header([place.spec for _, place in sorted(self._places.items())], {"format": "pt"})

    def blocks(self) -> Iterator[bytes]:
        """Yield what follows the header."""
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pieces") as pool:
            yield from map_ahead(pool, NUM_READERS, self._read, _portions(self._places))

    def remove(self) -> None:
        """Remove them: an adapter that is whole needs none."""
        self._store.delete(chain.from_iterable((key, receipt_key(self._plan_id, key)) for key in self._done))

    def flush(self) -> None:
        """Write what waits, and its receipt."""
        if not self._waiting:
            return
        key = f"{factors_folder(self._plan_id)}{self._run}-{len(self._done):06d}.safetensors"
        held = [each for _, tensors in self._waiting for each in tensors]
        header = encode_header([spec for spec, _ in held], {})
        size, digest = len(header) + sum(spec.num_bytes for spec, _ in held), hashlib.sha256()
        payloads: list[bytes | memoryview] = [header, *(values.data for _, values in held)]
        with self._store.create(key, size=size) as sink:
            for payload in payloads:
                sink.write(payload)
                digest.update(payload)
        stamp = self._store.stamp(key)
        receipt = self._receipt(key, size, digest.hexdigest(), stamp)
        self._store.put(receipt_key(self._plan_id, key), receipts.encode(receipt))
        self._place(key, stamp, len(header), [spec for spec, _ in held])
        self._waiting, self._num_waiting = [], 0
        self._began, self._num_told = receipt.ended, self.num_read
        self.seconds += receipt.seconds["total"]

    def _receipt(self, key: str, size: int, sha256: str, stamp: Stamp) -> Receipt:
        ended = time.time()
        return Receipt(
            plan_id=self._plan_id,
            file=key,
            size=size,
            sha256=sha256,
            stamp=stamp,
            numerics_class="cpu",
            bytes_read=self.num_read - self._num_told,
            seconds={"total": ended - self._began},
            retries={},
            peak_memory_bytes=peak_memory_bytes(),
            tensors=tuple(row for row, _ in self._waiting),
            memory_bytes=0,
            gram=(),
            began=self._began,
            ended=ended,
            worker=process_name(),
        )

    def _place(self, key: str, stamp: Stamp, start: int, specs: Sequence[TensorSpec]) -> None:
        for spec in specs:
            self._places[spec.name] = _TensorPlace(spec, key, start, stamp)
            start += spec.num_bytes
        self._done.append(key)

    def _take_up(self) -> None:
        receipted = self._store.list(receipt_folder(self._plan_id))
        present = self._store.list(factors_folder(self._plan_id))
        keys = [key for key in present if receipt_key(self._plan_id, key) in receipted]
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="pieces") as pool:
            for key, receipt in zip(keys, map_ahead(pool, NUM_READERS, self._receipt_of, keys), strict=True):
                if receipt and is_intact(self._store, receipt, present[key]):
                    self._take(key, receipt)
        self.num_read = self._num_told

    def _receipt_of(self, key: str) -> Receipt | None:
        """Return the receipt of a piece; None if it proves nothing: what it tells of is done again."""
        with suppress(CheckpointError):
            return receipts.read(self._store, self._plan_id, key)
        return None

    def _take(self, key: str, receipt: Receipt) -> None:
        contents, stamp = read_header(self._store, key, HeaderCache(), unheard)
        for placed, start in contents.tensors:
            spec = placed._replace(name=placed.name.removeprefix(factors_folder(self._plan_id)))
            self._places[spec.name] = _TensorPlace(spec, key, start, stamp)
        self.rows |= {row.name: row for row in receipt.tensors}
        self._num_told += receipt.bytes_read
        self.seconds += receipt.seconds["total"]
        self._done.append(key)

    def _read(self, portion: "_Portion") -> bytes:
        place, start, size = portion
        buffer = bytearray(size)
        self._store.read_into(place.key, place.start + start, memoryview(buffer), place.stamp)
        return bytes(buffer)


class _Portion(NamedTuple):
    place: _TensorPlace
    start: int
    size: int


def _portions(places: Mapping[str, _TensorPlace]) -> Iterator[_Portion]:
    for _, place in sorted(places.items()):
        for start in range(0, place.spec.num_bytes, BLOCK_BYTES):
            yield _Portion(place, start, min(BLOCK_BYTES, place.spec.num_bytes - start))
