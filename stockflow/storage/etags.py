"""What an upload's ETag must be: S3's is the MD5 of an object, or of the MD5s of its parts and how many there are."""

import hashlib


def md5_etag(payload: memoryview | bytes) -> str:
    """Return the ETag of an object written by one request."""
    return hashlib.md5(payload, usedforsecurity=False).hexdigest()


class PartDigests:
    """MD5s of the parts of an upload, taken before the bytes leave."""

    def __init__(self, part_bytes: int) -> None:
        """Cut what follows into parts of ``part_bytes``; the last may be shorter."""
        self.part_bytes = part_bytes
        self.num_bytes = 0
        self._digest = hashlib.md5(usedforsecurity=False)
        self._finished: list[bytes] = []

    def update(self, payload: memoryview | bytes) -> None:
        """Append bytes."""
        view = memoryview(payload).cast("B")
        while view.nbytes:
            room = self.part_bytes - self.num_bytes % self.part_bytes
            self._digest.update(view[:room])
            self.num_bytes += min(room, view.nbytes)
            view = view[room:]
            if self.num_bytes % self.part_bytes == 0:
                self._finished.append(self._digest.digest())
                self._digest = hashlib.md5(usedforsecurity=False)

    def etags(self) -> tuple[str, ...]:
        """Return what a store may call these bytes: the name of an upload in parts, and of a single one if it is."""
        parts = list(self._finished)
        if self.num_bytes % self.part_bytes or not parts:
            parts.append(self._digest.digest())
        whole = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
        in_parts = f"{whole}-{len(parts)}"
        return (in_parts, parts[0].hex()) if len(parts) == 1 else (in_parts,)


def names_same(etag: str, expected: tuple[str, ...]) -> bool:
    """Return whether an ETag, quoted or not, is one of those expected."""
    return etag.strip('"').lower() in expected
