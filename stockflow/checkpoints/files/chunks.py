"""Chunks of a distributed checkpoint: where, in the files of ``torch.save`` that hold them, their elements begin."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

from stockflow.checkpoints.decodes.joined import Joined
from stockflow.checkpoints.files.archives import Archive
from stockflow.checkpoints.files.distributed import (
    MAX_METADATA_BYTES,
    METADATA_FILE,
    SUFFIX,
    Chunk,
    Contents,
    Sharded,
    parse_metadata,
)
from stockflow.checkpoints.files.layout import Extent, Pieces
from stockflow.checkpoints.files.torch_files import lone_tensor
from stockflow.checkpoints.weights import NUM_NAMED, Folder, Weights, chosen, others_remark
from stockflow.errors import CheckpointError
from stockflow.storage import Stamp
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

HEAD_BYTES, TAIL_BYTES = 2048, 1536
"""Of a chunk: the pickle and the header of its data, the directory; other sizes take another request."""
NEAR_BYTES = 16 * 1024
"""Between what is read of chunks, that is read with it: they lie one after the other."""
MAX_WINDOW_BYTES = 2**20
NUM_READERS = 32


def is_distributed(files: Iterable[str]) -> bool:
    """Return whether a folder holds a distributed checkpoint."""
    names = list(files)
    return METADATA_FILE in names and any(name.endswith(SUFFIX) for name in names)


def read_distributed(folder: Folder) -> Weights:
    """Return the tensors of a distributed checkpoint.

    Raises:
        CheckpointError: metadata or files are malformed, are missing, or do not fit together.
    """
    where = folder.store.where(METADATA_FILE)
    payload, stamp = folder.store.read_head(METADATA_FILE, MAX_METADATA_BYTES)
    if stamp.size > MAX_METADATA_BYTES:
        raise CheckpointError(f"{where} is {stamp.size:,} bytes long; at most {MAX_METADATA_BYTES:,} are read")
    contents = parse_metadata(payload, where, folder.is_settled)
    _refuse_missing(folder, contents)
    starts, stamps = _data_starts(folder, contents)
    found = [(each, [Extent(piece.file, starts[piece]) for piece in each.pieces]) for each in contents.tensors]
    found.sort(key=lambda pair: pair[1][:1])
    nowhere = Extent(METADATA_FILE, 0)
    return Weights(
        {each.spec.name: each.spec for each, _ in found},
        {each.spec.name: extents[0] if extents else nowhere for each, extents in found},
        {METADATA_FILE: stamp, **stamps},
        (
            chosen(folder, f"{folder.where} is a checkpoint of torch.distributed: its shards are read", "note"),
            *others_remark(folder, contents.others),
        ),
        {
            each.spec.name: Pieces(Joined(each.spec.dtype, _ends(each)), tuple(extents))
            for each, extents in found
            if len(extents) > 1
        },
    )


def _ends(sharded: Sharded) -> tuple[int, ...]:
    return tuple(accumulate(math.prod(piece.shape) for piece in sharded.pieces))


def _refuse_missing(folder: Folder, contents: Contents) -> None:
    files = {piece.file: each.spec.name for each in contents.tensors for piece in each.pieces}
    missing = sorted(files.keys() - folder.listing.keys())
    if missing:
        names = some(missing, NUM_NAMED, in_a_line)
        raise CheckpointError(
            f"{folder.where}: the metadata names {names}, which {are(len(missing))} not there; with parts of tensors "
            f"such as {shown(files[missing[0]])}. The download did not finish: fetch {counted(len(missing), 'file')}"
        )


class _Wanted(NamedTuple):
    piece: Chunk
    name: str
    dtype: str


def _data_starts(folder: Folder, contents: Contents) -> tuple[dict[Chunk, int], dict[str, Stamp]]:
    """Return where the elements of each piece begin in its file, and the stamps of the files."""
    by_file: dict[str, list[_Wanted]] = {}
    for each in contents.tensors:
        for piece in each.pieces:
            by_file.setdefault(piece.file, []).append(_Wanted(piece, each.spec.name, each.spec.dtype))
    starts, stamps = dict[Chunk, int](), dict[str, Stamp]()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for file, wanted in sorted(by_file.items()):
            _, stamps[file] = folder.store.read_head(file, 1)
            _refuse_beyond(folder.store.where(file), stamps[file].size, wanted)
            wanted.sort(key=lambda each: each.piece.start)
            windows = _Windows(folder, file, stamps[file], pool, [each.piece for each in wanted])
            starts |= {each.piece: _data_start(each, windows, folder.store.where(file)) for each in wanted}
            folder.on_file(folder.store.where(file))
    return starts, stamps


def _refuse_beyond(where: str, size: int, wanted: Iterable[_Wanted]) -> None:
    for piece, name, _ in wanted:
        if piece.start + piece.size > size:
            raise CheckpointError(
                f"{where} is {size:,} bytes long, and the metadata says that {shown(name)} has {piece.size:,} bytes at "
                f"byte {piece.start:,}; it was cut: fetch it again"
            )


def _data_start(wanted: _Wanted, windows: "_Windows", where: str) -> int:
    piece, name, dtype = wanted
    what = f"{where} at byte {piece.start:,}"
    archive = Archive(what, piece.size, lambda start, num_bytes: windows.read(piece.start + start, num_bytes))
    head = archive.read(0, min(HEAD_BYTES, piece.size))
    found = lone_tensor(archive, head, TAIL_BYTES, name)
    if (found.spec.dtype, found.spec.shape) != (dtype, piece.shape):
        raise CheckpointError(
            f"{what} holds {found.spec.dtype} {list(found.spec.shape)}, where the metadata says that it is {dtype} "
            f"{list(piece.shape)} of {shown(name)}; fetch the folder again"
        )
    return piece.start + found.start


class _Windows:
    """What is read of a file to find the data of its chunks, in few requests."""

    def __init__(
        self, folder: Folder, file: str, stamp: Stamp, pool: ThreadPoolExecutor, pieces: Sequence[Chunk]
    ) -> None:
        def read(start: int, num_bytes: int) -> bytes:
            buffer = bytearray(num_bytes)
            folder.store.read_into(file, start, memoryview(buffer), stamp)
            return bytes(buffer)

        self._read: Callable[[int, int], bytes] = read
        spans = list(_spans(pieces))
        self._starts = [start for start, _ in spans]
        self._payloads = list(pool.map(lambda span: read(span[0], span[1] - span[0]), spans))

    def read(self, start: int, num_bytes: int) -> bytes:
        """Return bytes of the file, those that were not read by another request."""
        number = bisect_right(self._starts, start) - 1
        if number >= 0:
            at = start - self._starts[number]
            if at + num_bytes <= len(self._payloads[number]):
                return self._payloads[number][at : at + num_bytes]
        return self._read(start, num_bytes)


def _spans(pieces: Sequence[Chunk]) -> Iterator[tuple[int, int]]:
    """Yield beginnings and ends of chunks, in order, what lies close together as one."""
    ends = []
    for piece in pieces:
        stop = piece.start + piece.size
        ends += [(piece.start, min(piece.start + HEAD_BYTES, stop)), (max(stop - TAIL_BYTES, piece.start), stop)]
    start = stop = -1
    for first, last in sorted(ends):
        if start >= 0 and first - stop <= NEAR_BYTES and last - start <= MAX_WINDOW_BYTES:
            stop = max(stop, last)
            continue
        if start >= 0:
            yield start, stop
        start, stop = first, last
    if start >= 0:
        yield start, stop
