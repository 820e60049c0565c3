"""What ``stockflow calibrate`` does: small merges and transfers on this machine, from which its constants follow.

Everything is measured through the product itself: the worker's own stages for the arithmetic, the storage layer for
places, ``stockflow merge`` as a process for start-up. So a faster kernel needs nothing here but measuring again.
"""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stockflow.checkpoints.files.header import TensorSpec, encode_header, width_of
from stockflow.errors import ComputeLostError, StockflowError, StorageError
from stockflow.forecast.constants import Calibration, KernelCost, MachineCosts, PlaceCosts
from stockflow.forecast.transfers import machine_cpu_s, our_cpu_s, place_costs
from stockflow.interruption import finishing
from stockflow.planning.budget import default_memory
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import StorageConfig, Store, open_store, redact
from stockflow.text.redaction import without_secrets
from stockflow.version import __version__

SEED = 5
KERNEL_BYTES = 128 * 2**20
"""of all sources of one tensor: more than caches hold between its two sweeps, as in a real merge"""
MODEL_SHAPES = ((4096, 1024), (2816, 1024), (1024, 1024), (1024,)) * 6
"""of the tensors that all threads merge together: large and small ones, so that threads wait as in a real merge"""
MODEL_SOURCES = 5
ROUNDS = 5
"""Of several rounds the fastest counts: what else the machine does can only slow one down."""
WRITING_DECIDES = 0.8
"""of a merge's time: with so many threads they wait for the one that writes"""
TINY_ROUNDS = 3
TINY_TENSORS = 2000
TINY_SHARDS = 9
BUSY_SHARE = 0.1
"""of the cores' time that others may take before we say so"""
RAY_START_S = 6.0
"""not measured: starting a cluster takes longer than all the rest of a calibration"""
NUMPY_NAMES = {"F16": "f2", "F32": "f4", "F64": "f8", "I64": "i8"}

Shapes = Sequence[tuple[int, ...]]


def calibrate(folder: Path, urls: Sequence[str], say: Callable[[str], None]) -> Calibration:
    """Measure this machine, a folder of its disk, and what the URLs name; leaves nothing behind.

    Args:
        folder: on the disk that merges will use; up to 1 GB of it at a time is written.
        urls: buckets or prefixes of object stores where we may write.
        say: told what is measured next.

    Raises:
        StockflowError: a place cannot be written or read.
    """
    with _workplace(folder) as name:
        work, before = Path(name), _clocks()
        bench = _Bench(work, open_store(str(work), StorageConfig(), writable=True), str(work))
        say("measuring start-up")
        tensor_us, piece_us = _per_tensor(bench)
        say("measuring the arithmetic")
        kernels = tuple(_kernels(bench))
        say(f"measuring the disk of {folder}")
        places = [place_costs(str(folder), bench.store, *_start_and_shard_s(bench), work)]
        say("measuring all threads together")
        efficiency = _efficiency(bench)
        note = f"the start of Ray's workers is assumed to take {RAY_START_S} s{_disturbance(before)}"
        for url in urls:
            say(f"measuring {redact(url)}")
            places.append(_store_costs(url.rstrip("/"), work))
    cores = len(os.sched_getaffinity(0))
    machine = MachineCosts(_processor(), cores, kernels, efficiency, tensor_us, piece_us, RAY_START_S)
    return Calibration(datetime.now(UTC).isoformat(timespec="seconds"), __version__, note, machine, tuple(places))


def _clocks() -> tuple[float, float]:
    """Seconds by the clock, and of CPU that others took."""
    return time.perf_counter(), machine_cpu_s() - our_cpu_s()


def _disturbance(before: tuple[float, float]) -> str:
    took_s, others_s = (after - start for start, after in zip(before, _clocks(), strict=True))
    share = others_s / (took_s * (os.cpu_count() or 1))
    if share < BUSY_SHARE:
        return ""
    return f"; meanwhile others took {share:.0%} of the processor: measure again while nothing else runs"


def _processor() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()


def _workplace(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".stockflow-calibration-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --folder") from None


@dataclass(frozen=True, slots=True)
class _Bench:
    """A place where models are put, to be merged."""

    work: Path
    """a folder, for recipes"""
    store: Store
    url: str
    """of the store"""

    @contextmanager
    def models(self, method: str, dtype: str, shapes: Shapes, num_sources: int) -> Iterator[Path]:
        """Checkpoints, and a recipe that merges them."""
        name = secrets.token_hex(4)
        keys = [f"{name}/{index}/model.safetensors" for index in range(num_sources)]
        for index, key in enumerate(keys):
            self.store.put(key, _checkpoint(shapes, dtype, index))
        base, *tuned = (f"{self.url}/{os.path.dirname(key)}" for key in keys)
        said: dict[str, Any] = {"merge_method": method, "base_model": base, "models": [{"model": url} for url in tuned]}
        said |= {"parameters": {"weight": 0.5, "density": 0.5}} if method == "ties" else {}
        recipe = self.work / f"{name}.yaml"
        recipe.write_text(json.dumps(said))  # JSON is YAML
        yield recipe
        self.store.delete(keys)

    def merged(self, recipe: Path, num_threads: int) -> Mapping[str, float]:
        """Merge in this process into a folder, several times; return the least of each figure of the summaries."""
        output, options = self.work / "output", MergeOptions(default_memory(), num_threads, "cpu")

        def once() -> Mapping[str, float]:
            started = time.process_time()
            result = merge(Inputs.open(load_recipe(str(recipe))), str(output), options, in_this_process)
            cpu_s = time.process_time() - started
            shutil.rmtree(output)
            return {"seconds_combine": 0.0, "seconds_statistics": 0.0, **result.manifest.summary, "cpu_s": cpu_s}

        return _least(once, ROUNDS)

    def tiny(self, num_tensors: int, num_sources: int, shard_size: str = "1GB") -> Mapping[str, float]:
        """Merge next to nothing as users do, several times: what every merge pays, in seconds and of CPU."""
        with self.models("model_stock", "BF16", [(64,)] * num_tensors, num_sources) as recipe:
            return _least(lambda: self._tiny_once(recipe, shard_size), TINY_ROUNDS)

    def _tiny_once(self, recipe: Path, shard_size: str) -> Mapping[str, float]:
        output = f"{self.url}/output-{secrets.token_hex(4)}"
        words = ["merge", str(recipe), output, "--quiet", "--json", "--device", "cpu", "--executor", "local"]
        command = [sys.executable, "-m", "stockflow", *words, "--shard-size", shard_size]
        started, cpu = time.perf_counter(), our_cpu_s()
        finished = subprocess.run(command, capture_output=True, check=False)
        took = {"wall_s": time.perf_counter() - started, "cpu_s": our_cpu_s() - cpu}
        if finished.returncode:
            told = without_secrets(finished.stderr.decode(errors="replace")).strip()[-2000:]
            raise ComputeLostError(f"a small merge ended with exit code {finished.returncode}: {told}")
        return took


def _least(measure: Callable[[], Mapping[str, float]], rounds: int) -> Mapping[str, float]:
    runs = [measure() for _ in range(rounds)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def _checkpoint(shapes: Shapes, dtype: str, index: int) -> bytes:
    """A file whose header differs from that of its neighbours, as of checkpoints that were sharded differently."""
    specs = [TensorSpec(f"layers.{number}.weight", dtype, shape) for number, shape in enumerate(shapes)]
    header = encode_header(specs, {"format": "pt", "number": str(index)})
    seed = SEED if dtype == "I64" else SEED + index  # integers are carried over, so they must be equal
    values = np.random.default_rng(seed).standard_normal(2**22, np.float32)
    narrow = values.view(np.uint16)[1::2].copy() if dtype == "BF16" else values.astype(NUMPY_NAMES[dtype])
    return header + np.resize(narrow.view(np.uint8), sum(spec.num_bytes for spec in specs)).tobytes()


def _per_tensor(bench: _Bench) -> tuple[float, float]:
    """Microseconds of CPU per tensor, and per source of a tensor, from merges of 3 and of 9 sources."""
    bench.tiny(1, 3)  # compiles the kernels, once per machine
    single_s, many_s, wide_s = (bench.tiny(*size)["cpu_s"] for size in ((1, 3), (TINY_TENSORS, 3), (TINY_TENSORS, 9)))
    piece_us = max(wide_s - many_s, 0.0) / (TINY_TENSORS * 6) * 1e6
    return max((many_s - single_s) / TINY_TENSORS * 1e6 - 3 * piece_us, 0.0), piece_us


def _start_and_shard_s(bench: _Bench) -> tuple[float, float]:
    """Seconds of a merge of one shard, and of each further shard."""
    single_s, several_s = bench.tiny(1, 3)["wall_s"], bench.tiny(TINY_SHARDS, 3, "128")["wall_s"]
    return single_s, max(several_s - single_s, 0.0) / (TINY_SHARDS - 1)


def _kernels(bench: _Bench) -> Iterator[KernelCost]:
    """Products of all with all grow with the square of the sources: two numbers of them tell both parts."""
    narrow_ns, narrow_combine_ns = _stages(bench, "model_stock", "BF16", 3)
    wide_ns, wide_combine_ns = _stages(bench, "model_stock", "BF16", 9)
    pair_ns = max((wide_ns / 9 - narrow_ns / 3) / 6, 0.0)
    source_ns = max(narrow_ns / 3 - 3 * pair_ns, 0.0)
    reference = KernelCost("linear", "BF16", source_ns, pair_ns, (narrow_combine_ns + wide_combine_ns) / 12)
    yield reference
    for dtype in ("F16", "F32", "F64"):
        pass_ns, combine_ns = _stages(bench, "model_stock", dtype, 5)
        slower = pass_ns / reference.pass_ns(5)
        yield KernelCost("linear", dtype, source_ns * slower, pair_ns * slower, combine_ns / 5)
    pass_ns, combine_ns = _stages(bench, "ties", "BF16", 5)
    yield KernelCost("elementwise", "BF16", pass_ns / 5, 0.0, combine_ns / 5)
    yield KernelCost("copy", "U8", 0.0, 0.0, _stages(bench, "model_stock", "I64", 3)[1] / width_of("I64") / 3)


def _stages(bench: _Bench, method: str, dtype: str, num_sources: int) -> tuple[float, float]:
    """Nanoseconds of one thread per element of a large tensor: of one statistics pass, and of the combine."""
    num_rows = KERNEL_BYTES // (num_sources * width_of(dtype)) // 1024
    with bench.models(method, dtype, [(num_rows, 1024)], num_sources) as recipe:
        least = bench.merged(recipe, 1)
    num_passes = 3 if method == "ties" else 1
    combine_s = least["seconds_combine"] or least["seconds_total"] - least["seconds_publish"]
    elem_ns = 1e9 / (num_rows * 1024)
    return least["seconds_statistics"] / num_passes * elem_ns, combine_s * elem_ns


def _efficiency(bench: _Bench) -> float:
    """Merge a small model by one thread, then by all: the time of threads that computing needs, over what it takes."""
    num_threads = len(os.sched_getaffinity(0))
    if num_threads == 1:
        return 1.0
    with bench.models("model_stock", "BF16", MODEL_SHAPES, MODEL_SOURCES) as recipe:
        alone, together = bench.merged(recipe, 1), bench.merged(recipe, num_threads)
    writing_s = alone["seconds_hash"] + alone["seconds_write"]
    took_s = together["seconds_total"] - together["seconds_publish"]
    if writing_s > WRITING_DECIDES * took_s:
        return min(alone["cpu_s"] / together["cpu_s"], 1.0)
    computing_s = alone["seconds_read"] + alone["seconds_statistics"] + alone["seconds_combine"]
    return min(computing_s / (took_s * num_threads - writing_s), 1.0)


def _store_costs(url: str, work: Path) -> PlaceCosts:
    """Move bytes to and from an object store, and merge next to nothing there."""
    prefix = f"{url}/stockflow-calibration-{secrets.token_hex(4)}"
    store = open_store(prefix, StorageConfig(), writable=True)
    try:
        return place_costs(url, store, *_start_and_shard_s(_Bench(work, store, prefix)))
    finally:
        with suppress(StockflowError), finishing():
            store.delete(list(store.list()))
