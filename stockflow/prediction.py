"""How long a merge will take, and what it will wait for: a workload and a calibration made into seconds. Pure.

Within a shard, stages run side by side on resources of their own, so the slowest decides; what fills the pipeline
before it, and drains it behind, is added. Around the shards lie the start, opening, and publishing. Each formula is
explained in docs/planning.md.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stockflow.budget import OPTIMAL_READ_BYTES
from stockflow.calibration import Calibration, MachineCosts, PlaceCosts
from stockflow.workload import ShardWork, Workload

RANGES_IN_FLIGHT = 16
"""of one process, from object stores"""
HEADERS_IN_FLIGHT = 16
REQUESTS_TO_OPEN = 4
"""one after the other, per checkpoint: listing, index, a header, config.json"""
CALIBRATED_ROUNDS = 6
"""requests one after the other that open the checkpoints of a calibration: they have no index"""

STAGES = {
    "compute": "the threads that compute",
    "cpu": "CPU: all cores are busy",
    "hash": "the thread that hashes and writes",
    "network_read": "network: reading",
    "disk_read": "disk: reading",
    "network_write": "network: writing",
    "disk_write": "disk: writing",
    "store": "the store: reads and writes take turns",
    "request_rate": "the store's request rate",
    "start": "start-up, opening and publishing: the merge is small",
    "workers": "idle workers: there are too few shards",
}
"""What may decide how long a merge takes, in words."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how the merge is to run."""

    num_workers: int = 1
    """processes, each with memory of its own"""
    num_threads: int = 1
    """that compute, per worker"""
    cores_per_worker: float = 1.0
    read_rate: float | None = None
    """bytes per second and worker, of the network to the inputs; None: as calibrated"""
    write_rate: float | None = None
    """likewise to the output"""
    request_s: float | None = None
    """of one small request to a store; None: as calibrated"""
    request_rate: float | None = None
    """requests per second that the store takes from all workers together; None: unlimited"""
    cold_share: float = 0.0
    """of the local inputs: what is not in memory yet"""
    on_ray: bool = False

    def cold(self, share: float) -> "Conditions":
        """Return the same with another share of the inputs on the disk alone."""
        return replace(self, cold_share=share)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a merge that begins when the one before ends."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a merge will take."""

    phases: tuple[Phase, ...]
    """start, opening, merging, publishing, tail; their sum is the whole"""
    stages: Mapping[str, float]
    """seconds by stage, of all shards, if each had a worker's resources for itself: they overlap"""
    bottleneck: str
    """key of ``STAGES``"""
    worker_seconds: float
    """all workers together, from start to end"""

    @property
    def seconds(self) -> float:
        """From the start of the process to its end."""
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True, slots=True)
class ShardTime:
    """One shard on one worker."""

    stages: Mapping[str, float]
    edges_s: float
    """what does not overlap: the first load, the last bytes, what is done once per shard"""

    @property
    def seconds(self) -> float:
        """From its first request to its receipt."""
        return max(self.stages.values(), default=0.0) + self.edges_s


@dataclass(frozen=True)
class Model:
    """One merge's places, machine and conditions."""

    calibration: Calibration
    inputs: Sequence[str]
    """URL of each checkpoint"""
    output: str
    conditions: Conditions
    direct: bool
    """whether the threads that compute read, see ``Workspace``"""
    _places: dict[str, PlaceCosts] = field(default_factory=dict, init=False)

    def predict(self, work: Workload) -> Prediction:
        """Return the time a merge takes."""
        times = [self.shard_time(shard) for shard in work.shards]
        stages: Counter[str] = Counter()
        for time in times:
            stages.update(time.stages)
        durations = [time.seconds for time in times]
        start, opening, publishing = self._start_s(), self._opening_s(work), self._publishing_s(work)
        merging, tail = self._merging(durations)
        phases = (
            Phase("start", start),
            Phase("opening", opening),
            Phase("merging", merging),
            Phase("publishing", publishing),
            Phase("tail", tail),
        )
        total = sum(phase.seconds for phase in phases)
        around = start + opening + publishing
        deciding = max(stages, key=lambda stage: stages[stage], default="start")
        bottleneck = "start" if around > merging else "workers" if tail > merging / 2 else deciding
        return Prediction(phases, dict(stages), bottleneck, total * self.conditions.num_workers)

    def shard_time(self, shard: ShardWork) -> ShardTime:
        """Return the stages of one shard on one worker while all workers are at work."""
        conditions, machine, output = self.conditions, self.calibration.machine, self._place(self.output)
        read_s, cold_s, read_cpu_s, first_s = self._reading(shard)
        kernel_s = sum(machine.statistics_ns(kernel) * elems for kernel, elems in shard.statistics.items()) / 1e9
        kernel_s += sum(machine.combine_ns(kernel) * elems for kernel, elems in shard.combined.items()) / 1e9
        python_s = (machine.merge_tensor_us * shard.num_tensors + machine.merge_piece_us * shard.num_pieces) / 1e6
        in_threads_s = kernel_s + (read_cpu_s if self.direct else 0.0)
        crowded = _crowding(machine, min(conditions.num_threads, conditions.cores_per_worker))
        threads = min(conditions.num_threads, conditions.cores_per_worker) * (1.0 - shard.idle_share)
        write_ns = output.write_thread_ns + machine.hash_ns
        write_rate = _slower(output.write_rate, None if output.is_local else conditions.write_rate)
        write_s = shard.num_bytes / write_rate
        cpu_s = kernel_s + python_s + read_cpu_s + shard.num_bytes * (machine.hash_ns + output.write_cpu_ns) / 1e9
        stages = {
            "compute": in_threads_s * crowded / threads + python_s,
            "hash": shard.num_bytes * write_ns / 1e9,
            "cpu": (cpu_s * _crowding(machine, conditions.cores_per_worker) + self._server_cpu_s(shard))
            / conditions.cores_per_worker,
            "disk_write" if output.is_local else "network_write": write_s,
        }
        if read_s:
            stages["network_read"] = read_s
        if cold_s:
            stages["disk_read"] = cold_s * conditions.num_workers  # one disk for all
        if together := self._taking_turns(read_s + cold_s, write_s):
            stages["store"] = together
        if conditions.request_rate:
            stages["request_rate"] = self._num_requests(shard) * conditions.num_workers / conditions.request_rate
        last_s = shard.last_bytes * (write_ns / 1e9 + 1 / write_rate)
        return ShardTime(stages, first_s + min(last_s, stages["hash"] + write_s) + self._shard_s(output))

    def _reading(self, shard: ShardWork) -> tuple[float, float, float, float]:
        """Seconds of the network, of the disk, of CPU, and until the first load has come."""
        network_s = disk_s = cpu_s = 0.0
        for index, reading in shard.readings.items():
            place = self._place(self.inputs[index])
            cpu_s += reading.num_bytes * place.read_cpu_ns / 1e9
            if place.is_local:
                disk_s += self.conditions.cold_share * reading.num_bytes_once / place.cold_rate
            else:
                whole = reading.num_bytes / OPTIMAL_READ_BYTES  # what the calibrated rate has in it already
                waits = max(reading.num_requests - whole, 0.0) * self._request_s(place)
                waits += whole * max(self._request_s(place) - place.get_s, 0.0)
                network_s += reading.num_bytes / _slower(place.read_rate, self.conditions.read_rate)
                network_s += waits / RANGES_IN_FLIGHT
        total = max(shard.num_bytes_read, 1)
        share = min(shard.first_bytes / total, 1.0)
        waits_s = max((self._request_s(self._place(self.inputs[index])) for index in shard.readings), default=0.0)
        return network_s, disk_s, cpu_s, (network_s + disk_s) * share + (waits_s if network_s else 0.0)

    def _taking_turns(self, read_s: float, write_s: float) -> float:
        """Seconds of a store that serves reads and writes, if it is one and the same; else 0."""
        output = self._place(self.output)
        if all(self._place(url) is not output for url in self.inputs):
            return 0.0
        return max(read_s, write_s) + output.turns * min(read_s, write_s) if output.turns else 0.0

    def _server_cpu_s(self, shard: ShardWork) -> float:
        """CPU that servers on this very machine take."""
        reading = sum(
            reading.num_bytes * self._place(self.inputs[index]).server_read_ns
            for index, reading in shard.readings.items()
        )
        return (reading + shard.num_bytes * self._place(self.output).server_write_ns) / 1e9

    def _num_requests(self, shard: ShardWork) -> int:
        remote = [index for index in shard.readings if not self._place(self.inputs[index]).is_local]
        parts = 0 if self._place(self.output).is_local else shard.num_parts
        return sum(shard.readings[index].num_requests for index in remote) + parts

    def _shard_s(self, output: PlaceCosts) -> float:
        return output.shard_s + (0.0 if output.is_local else 4 * (self._request_s(output) - output.get_s))

    def _start_s(self) -> float:
        places = [self._place(url) for url in (*self.inputs, self.output)]
        ray_s = self.calibration.machine.ray_start_s if self.conditions.on_ray else 0.0
        return max(place.start_s for place in places) + ray_s

    def _opening_s(self, work: Workload) -> float:
        """The first checkpoint by itself, then the others at once; headers are parsed one after the other."""
        waits = [
            (REQUESTS_TO_OPEN - 1 + -(-num_files // HEADERS_IN_FLIGHT)) * self._request_s(self._place(url))
            for url, num_files in zip(self.inputs, work.num_checkpoint_files, strict=True)
        ]
        pieces = sum(shard.num_pieces for shard in work.shards)
        return waits[0] + max(waits[1:], default=0.0) + pieces * self.calibration.machine.open_piece_us / 1e6

    def _publishing_s(self, work: Workload) -> float:
        output = self._place(self.output)
        slower = 0.0 if output.is_local else PUBLISHING_REQUESTS * (self._request_s(output) - output.get_s)
        side_s = -(-work.num_side_files // NUM_PUBLISHERS) * (
            output.put_s + self._request_s(self._place(self.inputs[0]))
        )
        return output.publish_s + slower + side_s + work.num_tensors * self.calibration.machine.plan_tensor_us / 1e6

    def _merging(self, durations: Sequence[float]) -> tuple[float, float]:
        """Seconds while every worker has work, and from then on until the last shard is there."""
        if self.conditions.num_workers == 1:
            return sum(durations), 0.0
        free = [0.0] * self.conditions.num_workers
        for duration in sorted(durations, reverse=True):
            first = min(range(len(free)), key=free.__getitem__)
            free[first] += duration
        return min(free), max(free) - min(free)

    def _request_s(self, place: PlaceCosts) -> float:
        """One small request."""
        given = self.conditions.request_s
        return place.get_s if place.is_local or given is None else given

    def _place(self, url: str) -> PlaceCosts:
        if url not in self._places:
            self._places[url] = self.calibration.place(url)[0]
        return self._places[url]


NUM_PUBLISHERS = 8
PUBLISHING_REQUESTS = 25
"""one after the other, around the shards of a merge"""


def _slower(calibrated: float, given: float | None) -> float:
    """A network is as fast as it is said to be; without a word, as calibrated."""
    return calibrated if given is None else given


def _crowding(machine: MachineCosts, busy: float) -> float:
    """How much more CPU work takes while so many cores are busy."""
    if machine.cores <= 1:
        return 1.0
    return 1.0 + (machine.crowding - 1.0) * (min(max(busy, 1.0), machine.cores) - 1.0) / (machine.cores - 1.0)
