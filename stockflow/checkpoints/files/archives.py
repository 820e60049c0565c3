"""Zip archives on storage: where the bytes of their members lie, read by a few ranges.

Only members that are stored as they are can be read by range. A checksum covers all of a member, and none is compared
here. Source: APPNOTE.TXT 6.3.10 of PKWARE, sections 4.3 and 4.5.3.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from stockflow.errors import CheckpointError
from stockflow.storage import Stamp, Store
from stockflow.text.strictjson import shown

MAX_DIRECTORY_BYTES = 32_000_000
TAIL_BYTES = 64 * 1024
"""Read of the end at first: the directory of some hundred members with its trailer."""
NEAR_BYTES = 128 * 1024
"""Members that begin so close to each other are found by one request."""
NUM_READERS = 16

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1
_ZIP_64 = 1
"""id of the extra field with sizes of 64 bits"""


class Member(NamedTuple):
    """A file in an archive."""

    start: int
    """absolute byte offset of its data"""
    size: int
    """in bytes"""
    is_stored: bool = True
    """whether the bytes are its contents, neither compressed nor encrypted"""


class _Entry(NamedTuple):
    name: bytes
    size: int
    method: int
    is_stored: bool
    header: int
    """where its own header begins"""


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip archive: a file, or a part of one."""

    where: str
    """names it in messages"""
    size: int
    """in bytes"""
    read: Callable[[int, int], bytes]
    """returns so many bytes from a place in it"""

    def damaged(self, what: str) -> CheckpointError:
        """Return what to raise."""
        return CheckpointError(f"{self.where} is a damaged zip archive: {what}; fetch it again, or write it again")


def file_archive(store: Store, key: str, stamp: Stamp) -> Archive:
    """Return a whole file as an archive."""

    def read(start: int, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        store.read_into(key, start, memoryview(buffer), stamp)
        return bytes(buffer)

    return Archive(store.where(key), stamp.size, read)


def members_of(archive: Archive, tail_bytes: int = TAIL_BYTES) -> Mapping[str, Member]:
    """Return the members of an archive by name, in the order of their bytes.

    Args:
        archive: what to read.
        tail_bytes: of its end, that are read at first.

    Raises:
        CheckpointError: it is damaged.
    """
    entries, end = _read_directory(archive, tail_bytes)
    entries.sort(key=lambda entry: entry.header)
    starts = [each for found in _on_threads(partial(_starts, archive), list(_near(entries))) for each in found]
    _check_apart(archive, entries, starts, end)
    members = {
        _text(archive, entry): Member(at, entry.size, entry.is_stored)
        for entry, at in zip(entries, starts, strict=True)
    }
    if len(members) < len(entries):
        raise archive.damaged("two members have one name")
    return members


def _on_threads(read: Callable[[list[_Entry]], list[int]], groups: list[list[_Entry]]) -> Iterable[list[int]]:
    if len(groups) < 2:
        return map(read, groups)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(read, groups))


def _read_directory(archive: Archive, tail_bytes: int) -> tuple[list[_Entry], int]:
    """Return what the directory lists, and where it begins."""
    num_read = min(tail_bytes, archive.size)
    tail = archive.read(archive.size - num_read, num_read)
    count, num_bytes, start = _find_directory(archive, tail)
    if num_bytes > MAX_DIRECTORY_BYTES:
        raise archive.damaged(f"its directory claims {num_bytes:,} bytes, and {MAX_DIRECTORY_BYTES:,} are read")
    if start + num_bytes > archive.size:
        raise archive.damaged("its directory lies beyond its end")
    behind = archive.size - start
    payload = tail[-behind:][:num_bytes] if behind <= len(tail) else archive.read(start, num_bytes)
    entries = list(_entries(archive, payload))
    if len(entries) != count:
        raise archive.damaged(f"its directory lists {len(entries):,} members, and claims {count:,}")
    return entries, start


def _find_directory(archive: Archive, tail: bytes) -> tuple[int, int, int]:
    """Return how many members the directory lists, its size, and where it begins."""
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise archive.damaged("its end is missing, the download or copy did not finish")
    *_, count, num_bytes, start, comment = _END.unpack_from(tail, place)
    if place + _END.size + comment != len(tail):
        raise archive.damaged("bytes follow its end")
    locator = place - _LOCATOR.size
    if locator < 0 or tail[locator : locator + 4] != b"PK\6\7":
        return count, num_bytes, start
    at = _LOCATOR.unpack_from(tail, locator)[2]
    if at + _END_64.size > archive.size:
        raise archive.damaged("the end of its directory is said to lie beyond its end")
    signature, *_, wide_count, wide_bytes, wide_start = _END_64.unpack(archive.read(at, _END_64.size))
    if signature != b"PK\6\6":
        raise archive.damaged("the end of its directory is not where it is said to be")
    are_one = count in (_MAX_16, wide_count) and num_bytes in (_MAX_32, wide_bytes) and start in (_MAX_32, wide_start)
    if not are_one:
        raise archive.damaged("its two ends say different things")
    return wide_count, wide_bytes, wide_start


def _entries(archive: Archive, directory: bytes) -> Iterator[_Entry]:
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\1\2" or at + _ENTRY.size > len(directory):
            raise archive.damaged("its directory is cut or overwritten")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, packed, size, header = fields[3], fields[4], fields[8], fields[9], fields[16]
        name_end = at + _ENTRY.size + fields[10]
        name, extra = directory[at + _ENTRY.size : name_end], directory[name_end : name_end + fields[11]]
        at = name_end + fields[11] + fields[12]
        if at > len(directory):
            raise archive.damaged("its directory is cut or overwritten")
        if _MAX_32 in (packed, size, header):
            size, packed, header = _of_64_bits(archive, extra, (size, packed, header))
        is_stored = not method and not flags & _ENCRYPTED and packed == size
        yield _Entry(name, packed, method, is_stored, header)


def _of_64_bits(archive: Archive, extra: bytes, fields: Sequence[int]) -> list[int]:
    """Return fields with those that do not fit in 32 bits taken from the extra field, where they lie in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP_64:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            found = [next(wide, -1) if field == _MAX_32 else field for field in fields]
            if min(found) >= 0:
                return found
        at += 4 + length
    raise archive.damaged("a large member has no size")


def _near(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Yield runs of entries whose headers lie close together."""
    group: list[_Entry] = []
    for entry in entries:
        if group and entry.header - group[0].header > NEAR_BYTES:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _starts(archive: Archive, group: Sequence[_Entry]) -> list[int]:
    """Return where the data of members begin: behind their own headers, whose padding the directory does not tell."""
    first, last = group[0].header, group[-1]
    stop = last.header + _LOCAL.size + len(last.name)
    if stop > archive.size:
        raise archive.damaged("a member lies beyond its end")
    payload = archive.read(first, stop - first)
    return [_start(archive, entry, payload[entry.header - first :][: _LOCAL.size + len(entry.name)]) for entry in group]


def _start(archive: Archive, entry: _Entry, header: bytes) -> int:
    fields = _LOCAL.unpack_from(header)
    name_bytes, extra_bytes = int(fields[9]), int(fields[10])
    if fields[0] != b"PK\3\4" or fields[3] != entry.method or header[_LOCAL.size :][:name_bytes] != entry.name:
        raise archive.damaged(f"the member {shown(entry.name.decode(errors='replace'))} is not where it should be")
    return entry.header + _LOCAL.size + name_bytes + extra_bytes


def _check_apart(archive: Archive, entries: Sequence[_Entry], starts: Sequence[int], end: int) -> None:
    """Refuse members that overlap, or reach into the directory."""
    limits = [*(entry.header for entry in entries[1:]), end]
    for entry, start, limit in zip(entries, starts, limits, strict=True):
        if start + entry.size > limit:
            raise archive.damaged(f"the member {shown(entry.name.decode(errors='replace'))} overlaps what follows it")


def _text(archive: Archive, entry: _Entry) -> str:
    try:
        return entry.name.decode()
    except UnicodeDecodeError:
        raise archive.damaged("the name of a member is no UTF-8") from None
