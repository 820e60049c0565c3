"""Publishing an adapter: tensors kept in a file of this machine until all are known, then weights, card and config.

Loaders look for adapter_config.json, which is the last to appear.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import TracebackType
from typing import NamedTuple
from uuid import uuid4

from stockflow.adapters.peft import WEIGHTS_FILE
from stockflow.checkpoints.adapters.config import CONFIG_KEY
from stockflow.checkpoints.files.header import TensorSpec, encode_header
from stockflow.errors import OutputConflictError, PlanError
from stockflow.events import Moved, OnEvent, Stage
from stockflow.kernels.arrays import Bytes
from stockflow.output.keys import CARD_FILE
from stockflow.output.manifest import PublishedFile
from stockflow.output.target import check_keys, check_space
from stockflow.storage import LocalStore, Stamp, Store, check_stamp, halves_of, is_within, redact
from stockflow.text.strictjson import shown

FILES = (WEIGHTS_FILE, CARD_FILE, CONFIG_KEY)
"""Of an adapter, in the order in which they appear."""
_BLOCK_BYTES = 8 * 2**20


class _Kept(NamedTuple):
    spec: TensorSpec
    start: int


class Spool:
    """Tensors in a temporary file, which nobody else sees."""

    def __init__(self) -> None:
        """Begin with none."""
        self._file = tempfile.TemporaryFile(prefix="stockflow-adapter-")  # noqa: SIM115  # closed by __exit__
        self._kept: dict[str, _Kept] = {}
        self.num_bytes = 0

    def __enter__(self) -> "Spool":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the file back."""
        self._file.close()

    def add(self, spec: TensorSpec, values: Bytes) -> None:
        """Keep a tensor."""
        assert len(values) == spec.num_bytes, spec
        self._kept[spec.name] = _Kept(spec, self.num_bytes)
        self._file.write(values.data)
        self.num_bytes += len(values)

    def rename(self, name: str, new: str) -> None:
        """Give a tensor another name."""
        spec, start = self._kept.pop(name)
        self._kept[new] = _Kept(spec._replace(name=new), start)

    @property
    def header(self) -> bytes:
        """The header of a file of safetensors that holds the tensors by name."""
        return encode_header([kept.spec for _, kept in sorted(self._kept.items())], {"format": "pt"})

    def blocks(self) -> Iterator[bytes]:
        """Yield what follows the header."""
        for _, (spec, start) in sorted(self._kept.items()):
            self._file.seek(start)
            for size in _sizes(spec.num_bytes):
                yield self._file.read(size)


def _sizes(num_bytes: int) -> Iterator[int]:
    for start in range(0, num_bytes, _BLOCK_BYTES):
        yield min(_BLOCK_BYTES, num_bytes - start)


def check_apart(output: Store, inputs: Iterable[str]) -> None:
    """Refuse an output that is, or lies in, one of the inputs at these URLs.

    Raises:
        PlanError: it does.
    """
    for url in inputs:
        if any(is_within(output.url, half) for half in halves_of(url)):
            raise PlanError(f"the output {redact(output.url)} is, or lies in, the input {redact(url)}; move it")


def admit(store: Store, num_bytes: int, *, overwrite: bool) -> None:
    """Hold an output's place against what will be written there, before anything long is begun.

    Args:
        store: the place.
        num_bytes: of the adapter, at most.
        overwrite: whether an adapter that is there is replaced.

    Raises:
        UserError: nothing can be written there, something else is there, or it is too small.
        StorageError: it does not answer.
    """
    check_keys(store, FILES)
    check_space(store, num_bytes)
    listing = store.listing()
    held = [*listing.files, *listing.folders]
    if held and not overwrite:
        raise OutputConflictError(
            f"{redact(store.url)} is not empty (it has {shown(held[0])}); choose another output, or --overwrite to "
            "replace an adapter that is there"
        )
    if held and not {WEIGHTS_FILE, CONFIG_KEY} & set(held):
        raise OutputConflictError(
            f"{redact(store.url)} is not empty and holds no adapter (it has {shown(held[0])}), so --overwrite replaces "
            "nothing there; choose another output"
        )
    if not isinstance(store, LocalStore):
        probe = f".stockflow-{uuid4().hex}"
        store.put(probe, b"may an adapter be written here?\n")
        store.delete([probe])


def publish(store: Store, spool: Spool, config: bytes, card: str, on_event: OnEvent) -> Mapping[str, PublishedFile]:
    """Write the files of an adapter and return their digests; what loaders look for disappears first and appears last.

    Raises:
        OutputConflictError: another one writes there, too.
        StorageError: writing failed.
    """
    on_event(Stage("publishing", total_bytes=spool.num_bytes, counts_written=True))
    store.delete([CONFIG_KEY])
    weights, stamp = _write_weights(store, spool, on_event)
    published = {WEIGHTS_FILE: weights}
    for key, payload in ((CARD_FILE, card.encode()), (CONFIG_KEY, config)):
        check_stamp(store, WEIGHTS_FILE, stamp)
        store.put(key, payload)
        published[key] = PublishedFile(len(payload), hashlib.sha256(payload).hexdigest())
    return published


def _write_weights(store: Store, spool: Spool, on_event: OnEvent) -> tuple[PublishedFile, Stamp]:
    header, digest = spool.header, hashlib.sha256()
    size = len(header) + spool.num_bytes
    with store.create(WEIGHTS_FILE, size=size) as sink:
        for block in chain([header], spool.blocks()):
            sink.write(block)
            digest.update(block)
            on_event(Moved(0, len(block)))
    return PublishedFile(size, digest.hexdigest()), store.stamp(WEIGHTS_FILE)
