"""How long a merge will take, and what it will wait for: a workload and a calibration made into seconds. Pure.

    start + max(read / rate, compute / threads, CPU / cores, write / rate, requests x latency / in flight)

and what each tensor and each shard takes beside its bytes. docs/insight.md says what the formula leaves out.
"""

import heapq
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stockflow.forecast.amounts import InputAmounts, StoreRequests, Workload, requests_of, store_of
from stockflow.forecast.constants import Calibration, MachineCosts, PlaceCosts
from stockflow.planning.plan import MergePlan
from stockflow.storage import redact
from stockflow.text.redaction import command_line

RANGES_IN_FLIGHT = 16
"""of one process, from object stores"""
HEADERS_IN_FLIGHT = 16
MERGE_ROUNDS, SHARD_ROUNDS = 30, 4
"""requests one after the other, of a merge and of a shard: what another latency than the calibrated one makes longer"""

STAGES = {
    "compute": "computing",
    "cpu": "CPU of all cores",
    "read": "reading",
    "write": "hashing and writing",
    "requests": "latency of requests",
    "request_rate": "the store's request rate",
    "start": "start-up, and what each tensor and shard takes beside its bytes: the merge is small",
    "workers": "idle workers: there are too few shards",
}
"""What may decide how long a merge takes, in words; all but the last two go on side by side."""

Source = tuple[PlaceCosts, InputAmounts]
"""Where a checkpoint is, and what is read of it."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how the merge is to run."""

    num_workers: int = 1
    """processes, each with memory of its own"""
    num_threads: int = 1
    """that compute, per worker"""
    cores: float = 1.0
    """per worker"""
    read_rate: float | None = None
    """bytes per second and worker, of the network or disk to the inputs; None: as calibrated"""
    write_rate: float | None = None
    """likewise to the output"""
    latency_s: float | None = None
    """of one small request to a store; None: as calibrated"""
    request_rate: float | None = None
    """requests per second that the store takes from all workers together; None: unlimited"""
    memory_bytes: int = 0
    """of the machine: inputs in folders are in memory if they fit, and no rate is given"""
    on_ray: bool = False
    machine_cores: int = 1
    """of one machine: on Ray there are as many as have a core for every worker"""
    machine_price: float | None = None
    """of one machine per hour, in the user's currency"""

    @property
    def num_machines(self) -> int:
        """How many are paid for."""
        return math.ceil(self.num_workers / self.machine_cores) if self.on_ray else 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a merge will take."""

    phases: Mapping[str, float]
    """seconds of start, overhead and merging, one after the other"""
    stages: Mapping[str, float]
    """seconds of what goes on side by side while merging, each if nothing else took time; the longest decides"""
    bottleneck: str
    """key of ``STAGES``"""
    disk_s: float
    """reading what is in folders once, if it came from the disk"""
    in_memory: bool
    """whether it is taken to be in memory already"""

    @property
    def seconds(self) -> float:
        """From the start of the process to its end."""
        return sum(self.phases.values())


def predict(work: Workload, calibration: Calibration, output: str, conditions: Conditions) -> Prediction:
    """Return the time a merge to ``output`` takes."""
    machine, target = calibration.machine, _place(calibration, output, conditions)
    sources = [(_place(calibration, each.url, conditions), each) for each in work.inputs]
    share = busiest_share(work.shard_sizes, conditions.num_workers)
    in_folders = [(place, each.num_bytes_once) for place, each in sources if place.is_local]
    disk_s = sum(num_bytes / place.read_rate for place, num_bytes in in_folders)
    fits = sum(num_bytes for _, num_bytes in in_folders) <= conditions.memory_bytes
    in_memory = conditions.read_rate is None and fits
    stages = _stages(work, machine, sources, target, conditions, share)
    if disk_s and not in_memory:
        stages["read"] = stages.get("read", 0.0) + disk_s
    tensors_s = (work.num_tensors * machine.tensor_us + work.num_pieces * machine.piece_us) / 1e6
    shards_s = max(len(work.shard_sizes) - 1, 0) * target.shard_s
    phases = {
        "start": _start_s(work, sources, target) + (machine.ray_start_s if conditions.on_ray else 0.0),
        "overhead": (tensors_s + shards_s) * share,
        "merging": max(stages.values(), default=0.0),
    }
    return Prediction(phases, stages, _bottleneck(phases, stages, share * conditions.num_workers), disk_s, in_memory)


def _place(calibration: Calibration, url: str, conditions: Conditions) -> PlaceCosts:
    """A place as it was measured, but for what the conditions say of it and what follows from another latency."""
    place, _ = calibration.place(url)
    latency_s = place.latency_s if place.is_local or conditions.latency_s is None else conditions.latency_s
    later_s = latency_s - place.latency_s
    return replace(
        place,
        latency_s=latency_s,
        start_s=place.start_s + MERGE_ROUNDS * later_s,
        shard_s=place.shard_s + SHARD_ROUNDS * later_s,
        read_rate=conditions.read_rate or place.read_rate,
        write_rate=conditions.write_rate or place.write_rate,
    )


def busiest_share(sizes: Sequence[int], num_workers: int) -> float:
    """Return the part of all work that the busiest worker does; the largest shards are given out first."""
    if num_workers == 1 or not sum(sizes):
        return 1.0
    loads = [0] * num_workers
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads) / sum(sizes)


def _bottleneck(phases: Mapping[str, float], stages: Mapping[str, float], unevenness: float) -> str:
    if phases["start"] + phases["overhead"] > phases["merging"]:
        return "start"
    return "workers" if unevenness >= 2.0 else max(stages, key=lambda stage: stages[stage])


def _start_s(work: Workload, sources: Sequence[Source], target: PlaceCosts) -> float:
    """A merge of nothing; headers, of the first checkpoint by itself, then of the others at once."""
    opening = [
        (math.ceil(each.num_files / HEADERS_IN_FLIGHT) + (work.num_looks > 0)) * place.latency_s
        for place, each in sources
    ]
    slowest_s = max(place.start_s for place in (target, *(place for place, _ in sources)))
    return slowest_s + opening[0] + max(opening[1:], default=0.0)


def _stages(
    work: Workload,
    machine: MachineCosts,
    sources: Sequence[Source],
    target: PlaceCosts,
    conditions: Conditions,
    share: float,
) -> dict[str, float]:
    """Seconds of each stage on the worker that has most to do; a disk and a store's limits are common to all."""
    in_folders = [(place, each) for place, each in sources if place.is_local]
    in_stores = [(place, each) for place, each in sources if not place.is_local]
    compute_ns = sum(machine.elem_ns(kernel) * elems for kernel, elems in work.elems.items())
    compute_ns += sum(each.num_bytes * place.read_cpu_ns for place, each in in_folders)  # by the threads that compute
    compute_ns /= 1.0 if conditions.num_workers * conditions.num_threads == 1 else machine.efficiency
    client_ns = sum(each.num_bytes * place.read_cpu_ns for place, each in in_stores)
    client_ns += work.num_bytes_written * target.write_cpu_ns
    num_requests = sum(each.num_requests for _, each in in_stores) + (0 if target.is_local else work.num_parts)
    stages = {
        "compute": compute_ns / 1e9 / conditions.num_threads * share,
        "cpu": (compute_ns + client_ns) / 1e9 / conditions.cores * share,
        "read": sum(each.num_bytes / place.read_rate for place, each in in_stores) * share,
        "requests": sum(each.num_requests * place.latency_s for place, each in in_stores) / RANGES_IN_FLIGHT * share,
        "write": work.num_bytes_written / target.write_rate * (1.0 if target.is_local else share),
        "request_rate": num_requests / (conditions.request_rate or math.inf),
    }
    return {stage: seconds for stage, seconds in stages.items() if seconds}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Time, requests and money."""

    prediction: Prediction
    requests: tuple[StoreRequests, ...]
    """of the inputs, then the output"""
    conditions: Conditions
    sources: tuple[str, ...]
    """where the constants are from, and what was assumed"""

    @property
    def cost(self) -> float | None:
        """What the machines cost for the predicted time; None without a price."""
        price = self.conditions.machine_price
        return None if price is None else price * self.conditions.num_machines * self.prediction.seconds / 3600


def forecast(
    plan: MergePlan, work: Workload, calibration: tuple[Calibration, str], output: str, conditions: Conditions
) -> Forecast:
    """Return what a merge will take and cost; ``calibration`` comes with where it is from, in words."""
    constants, where = calibration
    prediction = predict(work, constants, output, conditions)
    requests = tuple(requests_of(plan, work, output, prediction.seconds))
    return Forecast(prediction, requests, conditions, (where, *_unmeasured(constants, [each.url for each in requests])))


def _unmeasured(calibration: Calibration, urls: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for url in urls:
        place, is_measured = calibration.place(url)
        root = redact(store_of(url)) if "://" in url else os.path.dirname(url)
        if is_measured or root in seen or (place.is_local and place.name):  # then the machine is another one anyway
            continue
        seen.add(root)
        measure = command_line("stockflow", "calibrate", "--folder" if place.is_local else "--url", root)
        yield f"{root} was not measured: taken to be like {place.name or redact(place.url)}; `{measure}` measures it"
