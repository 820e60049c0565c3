"""What a place is like: bytes moved to and from it through the product's own storage layer."""

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from socket import gethostbyname
from urllib.parse import urlsplit

import numpy as np

from stockflow.forecast.constants import PlaceCosts
from stockflow.forecast.seconds import RANGES_IN_FLIGHT
from stockflow.storage import Store
from stockflow.storage.parts import RANGE_BYTES

SEED = 5
ROUNDS = 2
"""of which the faster counts"""
SMALL_OBJECTS = 8
NUM_BYTES = 256 * 2**20
STORE_S = 3.0
"""how long to read from a store, at least, at the rate of writing to it"""
NUM_LOCAL_READERS = 2


def place_costs(url: str, store: Store, start_s: float, shard_s: float, folder: Path | None = None) -> PlaceCosts:
    """Write a large object, and read it by as many ranges at once as a merge does.

    Args:
        url: what is measured.
        store: a prefix below it, or ``folder``.
        start_s: of a merge of nothing there.
        shard_s: of each further shard.
        folder: of a disk, whose own rate counts, and the CPU that reading from memory takes.
    """
    cpu_s = machine_cpu_s if is_on_this_machine(url) else time.process_time
    latency_s = _latency_s(store)
    write_rate, write_cpu_ns = _fastest(lambda: _write(store), cpu_s)
    size = NUM_BYTES if folder else int(max(write_rate * STORE_S, NUM_BYTES))

    def read() -> int:
        return _read(store, size, NUM_LOCAL_READERS if folder else RANGES_IN_FLIGHT)

    def read_from_disk() -> int:
        with (Path(folder or "") / "large").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return read()

    read()  # opens the connections
    read_rate, read_cpu_ns = _fastest(read, cpu_s)
    if folder:
        read_rate, _ = _fastest(read_from_disk, cpu_s)
    return PlaceCosts(url, start_s, shard_s, latency_s, read_rate, write_rate, read_cpu_ns, write_cpu_ns)


def _fastest(move: Callable[[], int], cpu_s: Callable[[], float]) -> tuple[float, float]:
    """Move bytes a few times; return bytes per second and, by the clock ``cpu_s``, nanoseconds of CPU per byte."""

    def once() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), cpu_s()
        num_bytes = move()
        return num_bytes / (time.perf_counter() - wall), (cpu_s() - cpu) / num_bytes * 1e9

    return max(once() for _ in range(ROUNDS))


def _latency_s(store: Store) -> float:
    """Seconds to read a small object: the median."""

    def timed() -> float:
        started = time.perf_counter()
        store.read_head("small", 64)
        return time.perf_counter() - started

    store.put("small", b"stockflow")
    timed()  # opens the connection
    return statistics.median(timed() for _ in range(SMALL_OBJECTS))


def _write(store: Store) -> int:
    """Hash and write as a worker does, from a buffer that it uses again."""
    piece = np.random.default_rng(SEED).bytes(RANGE_BYTES)
    digest = hashlib.sha256()
    with store.create("large", size=NUM_BYTES) as sink:
        for _ in range(NUM_BYTES // RANGE_BYTES):
            digest.update(piece)
            sink.write(piece)
        sink.sync()
    return NUM_BYTES


def _read(store: Store, num_bytes: int, num_readers: int) -> int:
    """Read ranges of the object, again from its beginning if it is shorter, into buffers that are used again."""
    stamp = store.stamp("large")
    threads = threading.local()

    def read(number: int) -> int:
        if not hasattr(threads, "buffer"):
            threads.buffer = memoryview(bytearray(RANGE_BYTES))
        store.read_into("large", number * RANGE_BYTES % NUM_BYTES, threads.buffer, stamp)
        return RANGE_BYTES

    with ThreadPoolExecutor(num_readers) as pool:
        return sum(pool.map(read, range(num_bytes // RANGE_BYTES)))


def machine_cpu_s() -> float:
    """Return the seconds that all cores together have not been idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = ticks
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def our_cpu_s() -> float:
    """Return the CPU seconds of this process and of those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def is_on_this_machine(url: str) -> bool:
    """Return whether requests for a bucket go to loopback."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    host = urlsplit(endpoint).hostname if endpoint and url.startswith("s3://") else None
    with suppress(OSError, ValueError):
        return host is not None and ip_address(gethostbyname(host)).is_loopback
    return False
