"""Checksums: what a store says of the bytes of a whole object, held against the bytes that came."""

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

from stockflow.storage.base import Stamp
from stockflow.storage.client import Client
from stockflow.storage.etags import PartDigests, md5_etag
from stockflow.storage.faults import WrongAnswerError

_MIB = 1 << 20
_PART_SIZES = tuple(size * _MIB for size in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128))
"""of uploads by the tools in use"""


class WholeObjects:
    """Holds objects that were read whole against what their store says of their bytes."""

    def __init__(self, client: Client) -> None:
        """Take who asks for checksums."""
        self._client = client
        self._has_other_etags = False
        """whether one was met that only looks like a digest of the bytes: with keys of a KMS, of some stores"""

    def check(self, key: str, payload: memoryview | bytes, stamp: Stamp, earlier: set[bytes]) -> None:
        """Return if the bytes are what the store says, or it says nothing.

        Args:
            key: of the object.
            payload: all of its bytes, as they came.
            stamp: its state.
            earlier: digests of what came before; bytes that come twice are the store's, whatever their ETag is.

        Raises:
            WrongAnswerError: they are not; asking again may help.
        """
        said = None if self._has_other_etags else etag_confirms(stamp.version, payload)
        if said or not stamp.size:
            return
        kept = checksums_confirm(self._checksums(key), payload)
        if kept is False:
            raise WrongAnswerError("its bytes are not those of the checksum that the store keeps of it")
        if kept or said is None:
            return
        digest = hashlib.sha256(payload).digest()
        if digest not in earlier:
            earlier.add(digest)
            raise WrongAnswerError(f"its bytes are not those of its ETag, {stamp.version}")
        self._has_other_etags = True

    def _checksums(self, key: str) -> Mapping[str, str]:
        """What the store keeps; nothing where it cannot be asked, as without the right to."""
        with suppress(*self._client.errors):
            return self._client.checksums(key)
        return {}


def etag_confirms(etag: str, payload: memoryview | bytes) -> bool | None:
    """Return whether an ETag is a digest of these bytes; None: it is none, or one of parts whose size is not known."""
    name = etag.strip('"').lower()
    if re.fullmatch("[0-9a-f]{32}", name):
        return md5_etag(payload) == name
    if re.fullmatch("[0-9a-f]{64}", name):
        return hashlib.sha256(payload).hexdigest() == name
    parts = re.fullmatch(r"[0-9a-f]{32}-(\d{1,5})", name)
    sizes = _part_sizes(memoryview(payload).nbytes, int(parts[1])) if parts else ()
    return any(name in _etags_in_parts(payload, size) for size in sizes) if sizes else None


def _part_sizes(num_bytes: int, num_parts: int) -> Sequence[int]:
    """Sizes of which so many parts may have made an object."""
    if num_parts == 1:
        return [max(num_bytes, 1)]
    return [size for size in _PART_SIZES if -(-num_bytes // size) == num_parts]


def _etags_in_parts(payload: memoryview | bytes, part_bytes: int) -> tuple[str, ...]:
    digests = PartDigests(part_bytes)
    digests.update(payload)
    return digests.etags()


def checksums_confirm(told: Mapping[str, str], payload: memoryview | bytes) -> bool | None:
    """Return whether checksums by S3's names, in base64, are of these bytes; None: none is told that can be."""
    for name, digest in _DIGESTS.items():
        if name in told:
            return base64.b64encode(digest(payload)).decode() == told[name]
    return None


def crc32c(payload: memoryview | bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes. Source: RFC 3720, appendix B.4."""
    return _crc(payload, 0x82F63B78, 0xFFFFFFFF)


def crc64nvme(payload: memoryview | bytes) -> int:
    """Return the CRC-64/NVME of bytes. Source: NVM Express, NVM command set specification 1.0, 5.2.1.3.4."""
    return _crc(payload, 0x9A6C9329AC4BC9B5, 0xFFFFFFFFFFFFFFFF)


def _crc(payload: memoryview | bytes, polynomial: int, ones: int) -> int:
    table, whole = _table(polynomial), memoryview(payload).cast("B")
    if whole.nbytes > _MIB:  # as long as numba takes to be there: a byte takes 0.1 µs here, 2 ns there
        from stockflow.kernels.crc import remainder
    else:
        remainder = _remainder
    return remainder(whole, table, ones) ^ ones


def _remainder(payload: memoryview, table: Sequence[int], value: int) -> int:
    for byte in payload:
        value = (value >> 8) ^ table[(value ^ byte) & 0xFF]
    return value


@lru_cache
def _table(polynomial: int) -> Sequence[int]:
    """What each byte does to a reflected CRC."""
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
        table.append(value)
    return table


_DIGESTS: Mapping[str, Callable[[memoryview | bytes], bytes]] = {
    "SHA256": lambda payload: hashlib.sha256(payload).digest(),
    "SHA1": lambda payload: hashlib.sha1(payload, usedforsecurity=False).digest(),
    "CRC32": lambda payload: zlib.crc32(payload).to_bytes(4, "big"),
    "CRC32C": lambda payload: crc32c(payload).to_bytes(4, "big"),
    "CRC64NVME": lambda payload: crc64nvme(payload).to_bytes(8, "big"),
}
