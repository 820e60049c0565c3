"""Reading an output that is not trusted: plain files only, in bounded portions, many at a time."""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

from stockflow.errors import CheckpointError, LinkError, StorageError
from stockflow.storage import LocalStore, Stamp, Store, check_key

NUM_LOCAL_READERS = 4
"""A core hashes 1.5 GB/s here, a disk is faster; one file after the other would leave the other cores idle."""
NUM_OBJECT_READERS = 16
CHUNK_BYTES = 2**23
"""What object storage serves best."""
LOCAL_CHUNK_BYTES = 2**20
"""Hashed while it is still in the cache."""
MAX_KEY_BYTES = 1024
"""The longest key of S3."""
MAX_NAME_BYTES = 255
"""The longest name in a folder."""


class Range(NamedTuple):
    """A run of bytes of one object."""

    key: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """An output to be read with suspicion; records are read from it as from its store."""

    store: Store
    on_bytes: Callable[[int], None] = lambda _: None
    """told of what small files were read, from several threads"""

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.store.url

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return "://" not in self.store.url

    def path(self, key: str) -> str:
        """Return the local path of a file."""
        return os.path.join(self.store.url, key)

    def check(self, key: str) -> None:
        """Refuse what is no plain file of this output.

        A pipe would keep a reader waiting; a link that leads out of the folder makes the output depend on what
        is elsewhere, and a verifier read files its caller never named. Links that stay inside are followed, and those
        of shards that lead where the caller allowed.

        Raises:
            UserError: the key leaves the output, is too long, or leads to something else than a file in it.
        """
        try:
            parts = [part.encode() for part in check_key(key).split("/")]
        except UnicodeEncodeError:
            raise CheckpointError(f"the name {key!a} is not valid Unicode") from None
        if max(map(len, parts)) > MAX_NAME_BYTES or len(key.encode()) > MAX_KEY_BYTES:
            raise CheckpointError("the name is too long for a file")
        if self.is_local:
            real = os.path.realpath(self.path(key))
            if not real.startswith(os.path.join(self.store.url, "")) and not self._is_trusted(key, real):
                raise CheckpointError(f"is a link to {real}, outside of the output; put the file itself there")
            if os.path.islink(real) or (os.path.exists(real) and not stat.S_ISREG(os.stat(real).st_mode)):
                raise CheckpointError("is no plain file")

    def _is_trusted(self, key: str, real: str) -> bool:
        """Whether a shard may lie there because whoever verifies said so."""
        return isinstance(self.store, LocalStore) and self.store.links.base_of(key, real) is not None

    def read_head(self, key: str, num_bytes: int) -> tuple[bytes, Stamp]:
        """Return the first bytes of a file, and its state.

        Raises:
            UserError: see ``check``.
        """
        self.check(key)
        payload, stamp = self.store.read_head(key, num_bytes)
        self.on_bytes(len(payload))
        return payload, stamp

    def read(self, key: str, max_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            UserError: see ``check``; or it is larger than ``max_bytes``.
        """
        payload, _ = self.read_head(key, max_bytes + 1)
        if len(payload) > max_bytes:
            raise CheckpointError(f"is larger than {max_bytes:,} bytes, the most that is read of such a file")
        return payload

    def list(self, prefix: str = "") -> Iterable[str]:
        """Return the keys below a folder, or in all of the output.

        Raises:
            CheckpointError: it is a folder that cannot be listed, for example for a link that leads to itself.
        """
        try:
            return self.store.list(prefix)
        except (LinkError, StorageError) as error:
            if not self.is_local:
                raise
            raise CheckpointError(str(error)) from None

    def read_ahead(
        self, ranges: Iterable[Range], stamps: Callable[[str], Stamp], pool: ThreadPoolExecutor, num_ahead: int
    ) -> Iterator[memoryview]:
        """Yield the bytes of ``ranges`` in order, portion by portion, each valid until the next is asked for.

        Args:
            ranges: what to read.
            stamps: the state of each object it is held to.
            pool: reads the portions to come, at most ``num_ahead`` of them.
            num_ahead: at least 1.
        """
        pending: deque[tuple[Future[None], memoryview]] = deque()
        buffers = deque(memoryview(bytearray(CHUNK_BYTES)) for _ in range(num_ahead))
        try:
            for key, start, num_bytes in _portions(ranges):
                view = buffers.popleft()
                buffers.append(view)
                part = view[:num_bytes]
                pending.append((pool.submit(self.store.read_into, key, start, part, stamps(key)), part))
                if len(pending) == num_ahead:
                    yield _read(*pending.popleft())
            while pending:
                yield _read(*pending.popleft())
        finally:
            wait(future for future, _ in pending)

    def sha256(
        self, key: str, stamp: Stamp, pool: ThreadPoolExecutor, num_ahead: int, on_bytes: Callable[[int], None]
    ) -> str:
        """Return the sha256 of a file, in hex; ``on_bytes`` is told of what was read."""
        digest = hashlib.sha256()
        if self.is_local:  # the system reads ahead by itself
            buffer = memoryview(bytearray(min(LOCAL_CHUNK_BYTES, stamp.size)))
            for start in range(0, stamp.size, LOCAL_CHUNK_BYTES):
                part = buffer[: stamp.size - start]
                self.store.read_into(key, start, part, stamp)
                digest.update(part)
                on_bytes(part.nbytes)
        else:
            for part in self.read_ahead([Range(key, 0, stamp.size)], lambda _: stamp, pool, num_ahead):
                digest.update(part)
                on_bytes(part.nbytes)
        return digest.hexdigest()


def _portions(ranges: Iterable[Range]) -> Iterator[Range]:
    for key, start, num_bytes in ranges:
        for done in range(0, num_bytes, CHUNK_BYTES):
            yield Range(key, start + done, min(CHUNK_BYTES, num_bytes - done))


def _read(future: Future[None], part: memoryview) -> memoryview:
    future.result()
    return part
