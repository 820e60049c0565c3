"""What ``stockflow calibrate`` does: small merges and transfers on this machine, from which its constants follow.

Everything is measured through the product itself: the worker's own stages for the arithmetic, the storage layer for
places, ``stockflow merge`` as a process for start-up. So a faster kernel needs nothing here but measuring again.
"""

import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from socket import gethostbyname
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from stockflow.checkpoints.header import TensorSpec, encode_header
from stockflow.errors import ComputeLostError, StockflowError, StorageError
from stockflow.forecast.amounts import survey
from stockflow.forecast.calibration import Calibration, KernelCost, MachineCosts, PlaceCosts
from stockflow.forecast.prediction import CALIBRATED_ROUNDS, RANGES_IN_FLIGHT, Conditions, Model
from stockflow.planning.budget import OPTIMAL_READ_BYTES, default_memory
from stockflow.recipe import load_recipe
from stockflow.run.driver import Inputs, MergeOptions, merge, plan_merge
from stockflow.run.places import in_this_process
from stockflow.storage import Stamp, StorageConfig, Store, open_store, redact
from stockflow.text.redaction import without_secrets
from stockflow.version import __version__

SEED = 5
POOL_ELEMS = 2**22
TOGETHER_BYTES = 512 * 2**20
"""of all sources of the tensor that all threads merge together: so many that the ends hardly count"""
TOGETHER_SOURCES = 5
KERNEL_BYTES = 128 * 2**20
"""of all sources of one tensor: more than caches hold between its two sweeps, as in a real merge"""
ROUNDS = 5
"""Of several rounds the fastest counts: what else the machine does can only slow one down."""
TINY_ROUNDS = 3
DISK_ROUNDS = 3
BUSY_SHARE = 0.1
"""of the cores' time that others may take before we say so"""
TINY_TENSORS = 2000
TINY_SHARDS = 9
LOCAL_BYTES = 256 * 2**20
FIRST_REMOTE_BYTES = 64 * 2**20
TRANSFER_S = 3.0
"""how long to move bytes to and from a store, about"""
SMALL_OBJECTS = 8
NUM_LOCAL_READERS = 2
KERNELS = (
    ("model_stock", "BF16", 3),
    ("model_stock", "BF16", 5),
    ("model_stock", "BF16", 9),
    ("model_stock", "BF16", 17),
    ("model_stock", "F16", 5),
    ("model_stock", "F32", 5),
    ("model_stock", "F64", 5),
    ("ties", "BF16", 5),
)
"""Method, dtype and number of sources; others are derived from these."""
PASSES = {"model_stock": 1, "ties": 2}
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Run:
    """One merge as a process of its own."""

    wall_s: float
    merge_s: float
    """by its own clock"""
    shards_s: float
    """of all shards, one after the other"""


def calibrate(folder: Path, urls: Sequence[str], say: Say) -> Calibration:
    """Measure this machine, a folder of its disk, and what the URLs name; leaves nothing behind.

    Args:
        folder: on the disk that merges will use; some 1.7 GB of it are written.
        urls: buckets or prefixes of object stores where we may write.
        say: told what is measured next.

    Raises:
        StockflowError: a place cannot be written or read.
    """
    with _workplace(folder) as work:
        alone = _Alone()
        say("measuring start-up")
        place_store = open_store(str(work), StorageConfig(), writable=True)
        tiny = _Tiny(work, str(work))
        tiny.make(place_store, "single", 1, 2)
        tiny.make(place_store, "several", TINY_SHARDS, 2)
        tiny.make(place_store, "many", TINY_TENSORS, 2)
        tiny.make(place_store, "wide", TINY_TENSORS, 8)
        tiny.run("single")  # compiles the kernels, once per machine
        single, several, many, wide = (
            tiny.fastest(name, TINY_ROUNDS) for name in ("single", "several", "many", "wide")
        )
        say("measuring the arithmetic")
        kernels, rates = _measure_kernels(work)
        say(f"measuring the disk of {folder}")
        disk = _measure_disk(place_store, work)
        local = _place(str(folder), single, several, disk, read_cpu_ns=rates["read_ns"])
        say("measuring all threads together")
        machine = MachineCosts(
            name=_processor(),
            cores=len(os.sched_getaffinity(0)),
            kernels=kernels,
            hash_ns=rates["hash_ns"],
            crowding=1.0,
            turn_us=0.0,
            ray_start_s=RAY_START_S,
            **_per_tensor(single, many, wide),
        )
        machine = _measure_together(work, machine, local)
        note = f"the start of Ray's workers is assumed to take {RAY_START_S} s"
        if disturbed := alone.disturbed():
            note += f"; {disturbed}"
        places = [local]
        for url in urls:
            places.append(_measure_store(url, work, say))
    return Calibration(
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        stockflow=__version__,
        note=note,
        machine=machine,
        places=tuple(places),
    )


class _Alone:
    """Watches what else the machine computes."""

    def __init__(self) -> None:
        self._started, self._ours, self._all = time.perf_counter(), _our_cpu_s(), _machine_cpu_s()

    def disturbed(self) -> str:
        """Return what is to be said of it, or nothing."""
        others_s = _machine_cpu_s() - self._all - (_our_cpu_s() - self._ours)
        share = others_s / ((time.perf_counter() - self._started) * (os.cpu_count() or 1))
        if share < BUSY_SHARE:
            return ""
        return f"meanwhile others took {share:.0%} of the processor: measure again while nothing else runs"


RAY_START_S = 6.0
"""not measured: starting a cluster takes longer than all the rest of a calibration"""


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    work = folder / f".stockflow-calibration-{secrets.token_hex(4)}"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --folder") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


# Start-up, claims, publishing, and what each tensor costs Python


class _Tiny:
    """Merges of next to nothing, whose time is what every merge pays."""

    def __init__(self, work: Path, url: str) -> None:
        self._work = work
        self._url = url

    def make(self, store: Store, name: str, num_tensors: int, num_tuned: int) -> None:
        """Write the checkpoints and the recipe."""
        locations = [f"{name}/{index}" for index in range(num_tuned + 1)]
        pool = _pool()
        for index, location in enumerate(locations):
            specs = [TensorSpec(f"layers.{i}.weight", "BF16", (64,)) for i in range(num_tensors)]
            # Headers that differ, as those of checkpoints do that were sharded differently.
            header = encode_header(specs, {"format": "pt", "number": str(index)})
            start = 64 * index
            body = _narrowed(np.resize(pool[start : start + 64 * 1024], 64 * num_tensors), "BF16")
            store.put(f"{location}/model.safetensors", header + body.tobytes())
        _write_recipe(self._work / f"{name}.yaml", "model_stock", [f"{self._url}/{place}" for place in locations])

    def run(self, name: str) -> _Run:
        """Merge once, as users do."""
        output = f"{self._url}/output-{secrets.token_hex(4)}"
        words = ["merge", str(self._work / f"{name}.yaml"), output, "--quiet", "--json", "--device", "cpu"]
        words += ["--executor", "local", "--shard-size", "128" if name == "several" else "1GB"]
        started = time.perf_counter()
        finished = subprocess.run([sys.executable, "-m", "stockflow", *words], capture_output=True, check=False)
        wall_s = time.perf_counter() - started
        if finished.returncode:
            told = without_secrets(finished.stderr.decode(errors="replace")).strip()[-2000:]
            raise ComputeLostError(f"a small merge ended with exit code {finished.returncode}: {told}")
        if "://" not in output:
            shutil.rmtree(output)
        result = json.loads(finished.stdout)
        return _Run(wall_s, result["seconds"], result["summary"]["seconds_total"])

    def fastest(self, name: str, num_rounds: int) -> _Run:
        """Merge several times; return the run that was disturbed least."""
        return min((self.run(name) for _ in range(num_rounds)), key=lambda run: run.wall_s)


def _per_tensor(single: _Run, many: _Run, wide: _Run) -> dict[str, float]:
    """Microseconds per tensor, and per source of a tensor, from merges of 3 and of 9 sources."""

    def growth(above: float, below: float, count: float) -> float:
        return max(above - below, 0.0) / count * 1e6

    merge_piece = growth(wide.shards_s, many.shards_s, TINY_TENSORS * 6)
    return {
        "open_piece_us": growth(wide.wall_s - wide.merge_s, many.wall_s - many.merge_s, TINY_TENSORS * 6),
        "plan_tensor_us": growth(many.merge_s - many.shards_s, single.merge_s - single.shards_s, TINY_TENSORS),
        "merge_tensor_us": max(growth(many.shards_s, single.shards_s, TINY_TENSORS) - 3 * merge_piece, 0.0),
        "merge_piece_us": merge_piece,
    }


# The arithmetic


def _measure_kernels(work: Path) -> tuple[tuple[KernelCost, ...], dict[str, float]]:
    """Merge a large tensor by one thread, and once by all, in this process; its receipts tell the stages."""
    costs, hashes, reads = [], [], []
    for method, dtype, num_sources in KERNELS:
        num_elems = KERNEL_BYTES // (num_sources * WIDTHS[dtype]) // 1024 * 1024
        inputs = _kernel_inputs(work, dtype, num_sources, num_elems)
        recipe = _write_recipe(work / "kernel.yaml", method, [str(path) for path in inputs])
        _merged_here(recipe, work, 1)  # loads the kernels, and brings the files into memory
        runs = [_merged_here(recipe, work, 1) for _ in range(ROUNDS)]
        least = {name: min(run[name] for run in runs) for name in runs[0]}
        passes = PASSES[method]
        costs.append(
            KernelCost(
                "linear" if method == "model_stock" else "elementwise",
                dtype,
                num_sources,
                statistics_ns=least["seconds_statistics"] / (num_elems * passes) * 1e9,
                combine_ns=least["seconds_combine"] / num_elems * 1e9,
            )
        )
        hashes.append(least["seconds_hash"] / least["bytes_written"] * 1e9)
        if method == "model_stock" and dtype == "BF16":
            reads.append(least["seconds_read"] / least["bytes_read"] * 1e9)
        for path in inputs:
            shutil.rmtree(path)
    rates = {
        "hash_ns": statistics.median(hashes),
        "read_ns": statistics.median(reads),
    }
    return tuple(costs), rates


def _measure_together(work: Path, machine: MachineCosts, place: PlaceCosts) -> MachineCosts:
    """Merge by one thread, then by all: how much more CPU that takes, and how long threads wait for one another.

    Waiting is what is left between the model and the clock when everything else is accounted for.
    """
    num_threads = len(os.sched_getaffinity(0))
    if num_threads == 1:
        return machine
    num_elems = TOGETHER_BYTES // (TOGETHER_SOURCES * WIDTHS["BF16"]) // 1024 * 1024
    inputs = _kernel_inputs(work, "BF16", TOGETHER_SOURCES, num_elems)
    recipe = _write_recipe(work / "kernel.yaml", "model_stock", [str(path) for path in inputs])
    _merged_here(recipe, work, 1)  # brings the files into memory
    alone = [_merged_here(recipe, work, 1) for _ in range(ROUNDS)]
    alone_s, writing_s = (min(run[name] for run in alone) for name in ("cpu_s", "seconds_write"))
    # Here memory that was just given back is written to, which is cheaper than elsewhere.
    write_ns = writing_s / alone[0]["bytes_written"] * 1e9
    place = replace(place, write_thread_ns=write_ns, write_cpu_ns=write_ns)
    together = [_merged_here(recipe, work, num_threads) for _ in range(ROUNDS)]
    shard_s = min(run["seconds_total"] for run in together)
    crowded = replace(machine, crowding=max(min(run["cpu_s"] for run in together) / alone_s, 1.0))
    options = MergeOptions(default_memory(), num_threads, "cpu")
    plan, workspace = plan_merge(Inputs.open(load_recipe(str(recipe))), str(work / "kernel-output"), options)
    asked = survey(plan, workspace, num_threads)
    conditions = Conditions(num_threads=num_threads, cores_per_worker=float(num_threads))
    urls = [str(path) for path in inputs]

    def predicted_s(turn_us: float) -> float:
        calibration = Calibration("", __version__, "", replace(crowded, turn_us=turn_us), (place,))
        model = Model(calibration, urls, str(work / "kernel-output"), conditions, workspace.direct)
        return sum(model.shard_time(shard, asked.num_slabs).seconds for shard in asked.shards)

    for path in inputs:
        shutil.rmtree(path)
    return replace(crowded, turn_us=solved(predicted_s, shard_s))


MAX_TURN_US = 10_000.0
BISECTIONS = 30


def solved(predicted_s: Callable[[float], float], measured_s: float) -> float:
    """Return the argument at which a rising function has a value; 0 if it lies above it everywhere."""
    low, high = 0.0, MAX_TURN_US
    if predicted_s(low) >= measured_s:
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_s(middle) < measured_s else (low, middle)
    return low


def _kernel_inputs(work: Path, dtype: str, num_sources: int, num_elems: int) -> list[Path]:
    """Checkpoints of one tensor each, so large that fixed costs do not show."""
    pool = _pool()
    header = encode_header([TensorSpec("weight", dtype, (num_elems // 1024, 1024))], {"format": "pt"})
    folders = []
    for index in range(num_sources):
        folder = work / f"kernel-{index}"
        folder.mkdir()
        body = _narrowed(np.resize(np.roll(pool, 1009 * index), num_elems), dtype)
        (folder / "model.safetensors").write_bytes(header + body.tobytes())
        folders.append(folder)
    return folders


def _merged_here(recipe: Path, work: Path, num_threads: int) -> dict[str, float]:
    output = work / "kernel-output"
    options = MergeOptions(default_memory(), num_threads, "cpu")
    started = time.process_time()
    result = merge(Inputs.open(load_recipe(str(recipe))), str(output), options, in_this_process)
    cpu_s = time.process_time() - started
    shutil.rmtree(output)
    stages = (
        "seconds_statistics", "seconds_combine", "seconds_read", "seconds_hash", "seconds_write", "seconds_total",
        "bytes_read", "bytes_written",
    )  # fmt: skip
    return {name: result.manifest.summary[name] for name in stages} | {"cpu_s": cpu_s}


def _pool() -> "np.typing.NDArray[np.float32]":
    return np.random.default_rng(SEED).standard_normal(POOL_ELEMS, np.float32)


def _narrowed(values: "np.typing.NDArray[np.float32]", dtype: str) -> "np.typing.NDArray[Any]":
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _write_recipe(path: Path, method: str, locations: Sequence[str]) -> Path:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": locations[0],
        "models": [{"model": location} for location in locations[1:]],
    }
    if method == "ties":
        recipe["parameters"] = {"weight": 0.5, "density": 0.5}
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


# Places


@dataclass(frozen=True, slots=True)
class _Transfer:
    """What moving bytes took."""

    num_bytes: int
    wall_s: float
    cpu_s: float
    """of this process"""
    thread_s: float
    """CPU of the calling thread"""
    others_s: float
    """CPU that the rest of the machine took meanwhile"""

    @property
    def rate(self) -> float:
        return self.num_bytes / max(self.wall_s, 1e-9)


def _measured(move: Callable[[], int]) -> _Transfer:
    wall, cpu, thread, machine = time.perf_counter(), time.process_time(), time.thread_time(), _machine_cpu_s()
    num_bytes = move()
    cpu_s = time.process_time() - cpu
    others_s = max(_machine_cpu_s() - machine - cpu_s, 0.0)
    return _Transfer(num_bytes, time.perf_counter() - wall, cpu_s, time.thread_time() - thread, others_s)


@dataclass(frozen=True, slots=True)
class _PlaceRates:
    get_s: float
    put_s: float
    read: _Transfer
    cold_rate: float
    cold_cpu_ns: float
    write: _Transfer
    turns: float


def _place(
    url: str, single: _Run, several: _Run, rates: _PlaceRates, *, read_cpu_ns: float, is_here: bool = False
) -> PlaceCosts:
    """Put together what was measured of a place."""
    shard_s = max(several.merge_s - single.merge_s, 0.0) / (TINY_SHARDS - 1)
    kernels_s = max(single.shards_s - max(several.shards_s - single.shards_s, 0.0) / (TINY_SHARDS - 1), 0.0)
    before_s = single.wall_s - single.merge_s + kernels_s
    start_s = max(before_s - CALIBRATED_ROUNDS * rates.get_s, 0.0)
    read, write = rates.read, rates.write
    return PlaceCosts(
        url=url,
        start_s=start_s,
        publish_s=max(single.wall_s - before_s - shard_s, 0.0),
        shard_s=shard_s,
        get_s=rates.get_s,
        put_s=rates.put_s,
        read_rate=read.rate,
        cold_rate=rates.cold_rate,
        write_rate=write.rate,
        read_cpu_ns=read_cpu_ns,
        write_cpu_ns=write.cpu_s / write.num_bytes * 1e9,
        write_thread_ns=write.thread_s / write.num_bytes * 1e9,
        server_read_ns=read.others_s / read.num_bytes * 1e9 if is_here else 0.0,
        server_write_ns=write.others_s / write.num_bytes * 1e9 if is_here else 0.0,
        turns=rates.turns,
        cold_cpu_ns=rates.cold_cpu_ns,
    )


def _measure_disk(store: Store, work: Path) -> _PlaceRates:
    """Write and read a large file: from memory, then from the disk itself, then both at once."""
    get_s, put_s = _small_objects(store)
    names = ["large", *(f"large-{number}" for number in range(1, DISK_ROUNDS))]  # pages given back would be used again
    write = min((_measured(partial(_write, store, name, LOCAL_BYTES)) for name in names), key=lambda each: each.wall_s)

    def read_large() -> _Transfer:
        return _measured(lambda: _read(store, "large", LOCAL_BYTES, NUM_LOCAL_READERS))

    read = min((read_large() for _ in range(DISK_ROUNDS)), key=lambda each: each.wall_s)
    _forget(work / "large")
    before = _bytes_from_disk()
    cold = read_large()
    came_from_disk = _bytes_from_disk() - before
    is_disk = came_from_disk > LOCAL_BYTES // 2  # not on tmpfs, nor where another keeps the file in memory
    turns = 0.0
    if is_disk:
        _forget(work / "large")
        turns = _turns(
            lambda: _read(store, "large", LOCAL_BYTES, NUM_LOCAL_READERS),
            lambda: _write(store, "second", LOCAL_BYTES),
            cold.wall_s,
            write.wall_s,
        )
    cold_rate = cold.rate if is_disk else read.rate
    cold_cpu_ns = max(cold.cpu_s - read.cpu_s, 0.0) / LOCAL_BYTES * 1e9 if is_disk else 0.0
    return _PlaceRates(get_s, put_s, read, cold_rate, cold_cpu_ns, write, turns)


def _measure_store(url: str, work: Path, say: Say) -> PlaceCosts:
    """Move bytes to and from an object store, then merge next to nothing there."""
    prefix = f"{url.rstrip('/')}/stockflow-calibration-{secrets.token_hex(4)}"
    say(f"measuring {redact(url)}")
    store = open_store(prefix, StorageConfig(), writable=True)
    try:
        get_s, put_s = _small_objects(store)
        first = _measured(lambda: _write(store, "large", FIRST_REMOTE_BYTES))
        size = FIRST_REMOTE_BYTES * int(min(max(first.rate * TRANSFER_S / FIRST_REMOTE_BYTES, 1), 16))
        write = min((_measured(lambda: _write(store, "second", size)) for _ in range(2)), key=lambda each: each.wall_s)
        ranges = int(max(write.rate * TRANSFER_S, FIRST_REMOTE_BYTES))
        _read(store, "large", FIRST_REMOTE_BYTES, RANGES_IN_FLIGHT)  # opens the connections
        read = min(
            (_measured(lambda: _read(store, "large", ranges, RANGES_IN_FLIGHT)) for _ in range(2)),
            key=lambda each: each.wall_s,
        )
        both = int(read.rate * write.wall_s)
        turns = _turns(
            lambda: _read(store, "large", both, RANGES_IN_FLIGHT),
            lambda: _write(store, "second", size),
            both / read.rate,
            write.wall_s,
        )
        tiny = _Tiny(work, prefix)
        tiny.make(store, "single", 1, 2)
        tiny.make(store, "several", TINY_SHARDS, 2)
        single, several = (tiny.fastest(name, TINY_ROUNDS) for name in ("single", "several"))
        rates = _PlaceRates(get_s, put_s, read, read.rate, 0.0, write, turns)
        read_cpu_ns = read.cpu_s / read.num_bytes * 1e9
        return _place(
            url.rstrip("/"), single, several, rates, read_cpu_ns=read_cpu_ns, is_here=_is_on_this_machine(url)
        )
    finally:
        with suppress(StockflowError):
            store.delete(list(store.list()))


def _turns(read: Callable[[], int], write: Callable[[], int], read_s: float, write_s: float) -> float:
    """0 if both at once take as long as the longer one, 1 if they take as long as one after the other."""
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        read()
        writing.result()
    together = time.perf_counter() - started
    return min(max((together - max(read_s, write_s)) / min(read_s, write_s), 0.0), 1.0)


def _small_objects(store: Store) -> tuple[float, float]:
    """Seconds to read and to write a small object: medians."""

    def timed(act: Callable[[], object]) -> float:
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

    store.put("small", b"first")  # opens the connection
    puts = [timed(lambda: store.put("small", b"stockflow")) for _ in range(SMALL_OBJECTS)]
    gets = [timed(lambda: store.read_head("small", 64)) for _ in range(SMALL_OBJECTS)]
    return statistics.median(gets), statistics.median(puts)


def _write(store: Store, key: str, num_bytes: int) -> int:
    """Write as a worker does, from a buffer that it uses again."""
    piece = np.random.default_rng(SEED).bytes(OPTIMAL_READ_BYTES)
    with store.create(key, size=num_bytes) as sink:
        for _ in range(num_bytes // OPTIMAL_READ_BYTES):
            sink.write(piece)
        sink.sync()
    return num_bytes // OPTIMAL_READ_BYTES * OPTIMAL_READ_BYTES


def _read(store: Store, key: str, num_bytes: int, num_readers: int) -> int:
    """Read ranges of an object, again from its beginning where it is shorter, into buffers that are used again."""
    stamp: Stamp = store.stamp(key)
    threads = threading.local()
    per_object = stamp.size // OPTIMAL_READ_BYTES
    count = max(num_bytes // OPTIMAL_READ_BYTES, 1)

    def read(number: int) -> int:
        if not hasattr(threads, "buffer"):
            threads.buffer = memoryview(bytearray(OPTIMAL_READ_BYTES))
        store.read_into(key, number % per_object * OPTIMAL_READ_BYTES, threads.buffer, stamp)
        return OPTIMAL_READ_BYTES

    with ThreadPoolExecutor(num_readers) as pool:
        return sum(pool.map(read, range(count)))


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_from_disk() -> int:
    fields: Mapping[str, str] = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _machine_cpu_s() -> float:
    """Seconds that all cores together have not been idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = ticks
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _our_cpu_s() -> float:
    """Of this process and of those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _is_on_this_machine(url: str) -> bool:
    """Whether requests for a bucket go to loopback."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    host = urlsplit(endpoint).hostname if endpoint and url.startswith("s3://") else None
    with suppress(OSError, ValueError):
        return host is not None and ip_address(gethostbyname(host)).is_loopback
    return False


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
