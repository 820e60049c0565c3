"""Layout of a checkpoint: which tensor lies in which file at which byte, read from the headers of its files."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stockflow.checkpoints.header import PlacedTensor, TensorSpec, header_bytes, parse_header
from stockflow.errors import CheckpointError, NotFoundError
from stockflow.storage import Stamp, Store, redact
from stockflow.text.strictjson import shown

FIRST_READ_BYTES = 128 * 1024
"""Guess for length field plus header, so that most files take one round trip: a shard of a 405B model has
a header of about 100 KB, one of a 92,000-tensor expert model about 70 KB."""


class Extent(NamedTuple):
    """Where a tensor's bytes lie."""

    file: str
    start: int
    """absolute byte offset in the file"""


OnFile = Callable[[str], None]
"""Told of each file whose header was read, from several threads."""
Layout = tuple[dict[str, TensorSpec], dict[str, Extent]]
"""Specs and extents by name."""


class HeaderCache:
    """What was parsed before: fine-tuned models are mostly cut like their base, header for header.

    It saves time, and equal specs and extents of all checkpoints are then the same objects. Headers are parsed
    one at a time: Python would not parse two at once anyway, and a large one takes twenty times its size meanwhile.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._parsed: dict[tuple[bytes, int, str], list[PlacedTensor]] = {}
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}

    def collect(self, where: str, files: Sequence[str], headers: Sequence[list[PlacedTensor]]) -> Layout:
        """Return the tensors of all files together; equal files of equal headers give the same objects."""
        key = tuple((file, id(placed)) for file, placed in zip(files, headers, strict=True))
        if key not in self._layouts:
            self._layouts[key] = _collect(where, files, headers)
        return self._layouts[key]

    def parse(self, head: bytes, file_size: int, where: str, folder: str) -> list[PlacedTensor]:
        """Return what ``parse_header`` returns, named as tensors of a file in that folder are."""
        key = head, file_size, folder
        with self._lock:
            placed = self._parsed.get(key)
            if placed is None:
                placed = self._parsed[key] = in_folder(folder, parse_header(head, file_size, where))
            return placed


def folder_of(key: str) -> str:
    """Return the folder of a file, empty for those directly in the model's."""
    return key.rpartition("/")[0]


def in_folder(folder: str, placed: list[PlacedTensor]) -> list[PlacedTensor]:
    """Return the tensors of a file in a subfolder, which has names of its own: ``2_Dense/linear.weight``."""
    if not folder:
        return placed
    return [each._replace(spec=each.spec._replace(name=f"{folder}/{each.spec.name}")) for each in placed]


def unheard(file: str) -> None:
    """Do nothing."""


def read_header(store: Store, file: str, cache: HeaderCache, on_file: OnFile) -> tuple[list[PlacedTensor], Stamp]:
    """Return the tensors of one file, in the order of their bytes, and its stamp.

    Raises:
        CheckpointError: the file is not there, or its header is malformed.
    """
    where = f"{redact(store.url)}/{file}"
    try:
        head, stamp = store.read_head(file, FIRST_READ_BYTES)
    except NotFoundError:
        raise CheckpointError(f"{redact(store.url)}: the index names {file}, which is not there") from None
    needed = header_bytes(head, stamp.size, where)
    if needed > len(head):
        rest = bytearray(needed - len(head))
        store.read_into(file, len(head), memoryview(rest), stamp)
        head += bytes(rest)
    placed = cache.parse(head[:needed], stamp.size, where, folder_of(file))
    on_file(where)
    return placed, stamp


def _collect(where: str, files: Sequence[str], headers: Sequence[list[PlacedTensor]]) -> Layout:
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, Extent] = {}
    for file, placed in zip(files, headers, strict=True):
        for tensor in placed:
            name = tensor.spec.name
            if name in specs:
                raise CheckpointError(f"{where}: tensor {shown(name)} is in both {extents[name].file} and {file}")
            specs[name] = tensor.spec
            extents[name] = Extent(file, tensor.start)
    return specs, extents
