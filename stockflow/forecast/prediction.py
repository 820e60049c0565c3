"""How long a merge will take, and what it will wait for: a workload and a calibration made into seconds. Pure.

A shard goes through the worker's pipeline in virtual time, and takes no less than any resource it needs for itself:
network, disk, cores, the store's requests. Shards go to workers by the executor's own policy. Around them lie the
start, opening, and publishing. Each formula is explained in docs/insight.md#the-model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from stockflow.forecast.amounts import Kernel, Reading, ShardWork, StepWork, Workload
from stockflow.forecast.calibration import Calibration, MachineCosts, PlaceCosts
from stockflow.forecast.pipeline import Elapsed, LoadTime, StepTime, run
from stockflow.planning.budget import NUM_OUT_BUFFERS, OPTIMAL_READ_BYTES
from stockflow.run.executors.simulation import simulate

RANGES_IN_FLIGHT = 16
"""of one process, from object stores"""
HEADERS_IN_FLIGHT = 16
SETTLING_ROUNDS = 4
"""runs of the pipeline until the share of the cores that others take has settled"""
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
    "disk": "disk: reading and writing take turns",
    "store": "the store: reading and writing take turns",
    "request_rate": "the store's request rate",
    "start": "start-up, opening and publishing: the merge is small",
    "workers": "idle workers: there are too few shards",
}
"""What may decide how long a merge takes, in words."""
SHORT_STAGES = {
    "compute": "computing",
    "cpu": "all cores",
    "hash": "hashing and writing",
    "network_read": "reading",
    "disk_read": "reading",
    "network_write": "uploading",
    "disk_write": "the disk's writing",
    "disk": "the disk",
    "store": "the store",
    "request_rate": "requests",
}
"""The stages of a shard, where several are listed."""
SHARED_STAGES = frozenset({"disk_read", "disk_write", "disk", "request_rate"})
"""What all workers have in common: more of them do not get through it faster."""


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
    """seconds by stage, of all shards, if nothing else took time; they overlap"""
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

    seconds: float
    """from its first request to its receipt"""
    stages: Mapping[str, float]
    """seconds of each resource, if it were the only one; the longest bounds the whole from below"""


class ReadTime(NamedTuple):
    """What reading takes, by what it occupies."""

    network_s: float
    disk_s: float
    cpu_s: float
    """each time"""
    cold_cpu_s: float
    """the first time"""


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
    _costs: dict[Kernel, tuple[float, float]] = field(default_factory=dict, init=False)

    def predict(self, work: Workload) -> Prediction:
        """Return the time a merge takes."""
        times = [self.shard_time(shard, work.num_slabs) for shard in work.shards]
        stages = self._stages(times)
        start, opening, publishing = self._start_s(), self._opening_s(work), self._publishing_s(work)
        merging, tail = self._merging([time.seconds for time in times])
        together = max((seconds for stage, seconds in stages.items() if stage in SHARED_STAGES), default=0.0)
        merging = max(merging, together - tail)
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
        return Prediction(phases, stages, bottleneck, total * self.conditions.num_workers)

    def _stages(self, times: Sequence[ShardTime]) -> dict[str, float]:
        """Seconds of each stage if nothing else took time: of all shards, divided among the workers that have any."""
        totals: Counter[str] = Counter()
        for time in times:
            totals.update(time.stages)
        num_workers = max(min(self.conditions.num_workers, len(times)), 1)
        return {stage: total if stage in SHARED_STAGES else total / num_workers for stage, total in totals.items()}

    def shard_time(self, shard: ShardWork, num_slabs: int) -> ShardTime:
        """Return what one shard takes one worker, if it has what all share for itself."""
        conditions, output = self.conditions, self._place(self.output)
        steps = [self._step_time(step) for step in shard.steps]
        reading = self._reading(shard.readings())
        write_rate = output.write_rate if output.is_local else conditions.write_rate or output.write_rate
        write_s = shard.num_bytes / write_rate
        stages = self._threads(steps)
        beside_s = self._beside_s(shard, 0.0 if self.direct else reading.cpu_s + reading.cold_cpu_s)
        cores = conditions.cores_per_worker
        stages["cpu"] = (stages["compute"] * min(conditions.num_threads, cores) + stages["hash"] + beside_s) / cores
        stages["disk_write" if output.is_local else "network_write"] = write_s
        if reading.network_s:
            stages["network_read"] = reading.network_s
        if reading.disk_s:
            stages["disk_read"] = reading.disk_s
        if together := self._taking_turns(reading.network_s + reading.disk_s, write_s):
            stages["disk" if output.is_local else "store"] = together
        if conditions.request_rate:
            stages["request_rate"] = self._num_requests(shard) / conditions.request_rate
        elapsed = self._elapsed(steps, beside_s, num_slabs)
        seconds = max(elapsed.seconds, elapsed.first_output_s + write_s, *stages.values())
        return ShardTime(seconds + self._shard_s(output), stages)

    def _elapsed(self, steps: Sequence[StepTime], beside_s: float, num_slabs: int) -> Elapsed:
        """Run the pipeline; clients and servers on this machine take their share of the cores meanwhile."""
        threads, cores = self.conditions.num_threads, self.conditions.cores_per_worker
        left = cores
        for _ in range(1 + SETTLING_ROUNDS * bool(beside_s)):
            elapsed = run(steps, num_threads=threads, cores=left, num_slabs=num_slabs, num_buffers=NUM_OUT_BUFFERS)
            left = max(cores - beside_s / max(elapsed.seconds, 1e-9), cores / 4)
        return elapsed

    def _step_time(self, step: StepWork) -> StepTime:
        """Return the seconds of each load on all threads, reading included where those do it."""
        machine, conditions = self.calibration.machine, self.conditions
        busy = min(conditions.num_threads, conditions.cores_per_worker)
        per_second = _crowding(machine, busy) / (conditions.num_threads * (1.0 - step.idle_share))
        turn_s = machine.turn_us / 1e6 * _fullness(machine, busy) / conditions.num_threads
        loads = []
        for load in step.loads:
            reading = self._reading(load.readings)
            arrives_s = reading.network_s + reading.disk_s
            statistics_s = sum(self._cost(kernel)[0] * elems for kernel, elems in load.elems.items()) / 1e9
            combine_s = sum(self._cost(kernel)[1] * elems for kernel, elems in load.elems.items()) / 1e9
            if self.direct:  # once per sweep, by the thread that computes
                arrives_s = 0.0
                if step.num_reads > 1:
                    statistics_s += reading.cpu_s + reading.cold_cpu_s / step.num_passes
                    combine_s += reading.cpu_s
                else:
                    combine_s += reading.cpu_s + reading.cold_cpu_s
            waits_s = load.num_turns * turn_s
            serial_s = (machine.merge_tensor_us * load.num_tensors + machine.merge_piece_us * load.num_pieces) / 1e6
            loads.append(
                LoadTime(
                    read_s=arrives_s,
                    statistics_s=statistics_s * per_second + waits_s * (step.num_reads > 1),
                    combine_s=combine_s * per_second + waits_s,
                    serial_s=serial_s,
                    write_s=load.num_bytes_out * self._write_ns() / 1e9,
                )
            )
        return StepTime(tuple(loads), step.num_passes, step.num_reads)

    def _write_ns(self) -> float:
        """Hashing and writing one byte, in the thread that does both."""
        machine = self.calibration.machine
        return (machine.hash_ns + self._place(self.output).write_thread_ns) * _crowding(
            machine, self.conditions.cores_per_worker
        )

    def _threads(self, steps: Sequence[StepTime]) -> dict[str, float]:
        """Seconds of the threads that compute, and of the one that hashes and writes."""
        slow = max(self.conditions.num_threads / self.conditions.cores_per_worker, 1.0)
        compute_s = write_s = 0.0
        for step in steps:
            for load in step.loads:
                compute_s += (load.statistics_s * step.num_passes + load.combine_s) * slow + load.serial_s
                write_s += load.write_s
        return {"compute": compute_s, "hash": write_s}

    def _beside_s(self, shard: ShardWork, client_s: float) -> float:
        """CPU beside the worker's own threads: of the clients, and of servers on this very machine."""
        output = self._place(self.output)
        upload_ns = max(output.write_cpu_ns - output.write_thread_ns, 0.0)
        crowded = _crowding(self.calibration.machine, self.conditions.cores_per_worker)
        return (client_s + shard.num_bytes * upload_ns / 1e9) * crowded + self._server_cpu_s(shard)

    def _reading(self, readings: Mapping[int, Reading]) -> ReadTime:
        network_s = disk_s = cpu_s = cold_cpu_s = 0.0
        for index, reading in readings.items():
            place = self._place(self.inputs[index])
            cpu_s += reading.num_bytes * place.read_cpu_ns / 1e9
            if place.is_local:
                cold_bytes = self.conditions.cold_share * reading.num_bytes_once
                disk_s += cold_bytes / place.cold_rate
                cold_cpu_s += cold_bytes * place.cold_cpu_ns / 1e9
            else:
                whole = reading.num_bytes / OPTIMAL_READ_BYTES  # what the calibrated rate has in it already
                waits = max(reading.num_requests - whole, 0.0) * self._request_s(place)
                waits += whole * max(self._request_s(place) - place.get_s, 0.0)
                network_s += reading.num_bytes / (self.conditions.read_rate or place.read_rate)
                network_s += waits / RANGES_IN_FLIGHT
        return ReadTime(network_s, disk_s, cpu_s, cold_cpu_s)

    def _taking_turns(self, read_s: float, write_s: float) -> float:
        """Seconds of a store that serves reads and writes, if it is one and the same; else 0."""
        output = self._place(self.output)
        if not output.turns or all(self._place(url) is not output for url in self.inputs):
            return 0.0
        shorter = min(read_s, write_s)
        return max(read_s, write_s) + output.turns * shorter if shorter else 0.0

    def _server_cpu_s(self, shard: ShardWork) -> float:
        """CPU that servers on this very machine take."""
        reading = sum(
            reading.num_bytes * self._place(self.inputs[index]).server_read_ns
            for index, reading in shard.readings().items()
        )
        return (reading + shard.num_bytes * self._place(self.output).server_write_ns) / 1e9

    def _num_requests(self, shard: ShardWork) -> int:
        parts = 0 if self._place(self.output).is_local else shard.num_parts
        return parts + sum(
            reading.num_requests
            for index, reading in shard.readings().items()
            if not self._place(self.inputs[index]).is_local
        )

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
        if not self.conditions.on_ray:
            return sum(durations), 0.0
        found = simulate(durations, self.conditions.num_workers, duration=lambda seconds: seconds)
        return found.makespan_s - found.tail_s, found.tail_s

    def _request_s(self, place: PlaceCosts) -> float:
        """One small request."""
        given = self.conditions.request_s
        return place.get_s if place.is_local or given is None else given

    def _cost(self, kernel: Kernel) -> tuple[float, float]:
        """Statistics and combine of one element, in ns."""
        if kernel not in self._costs:
            machine = self.calibration.machine
            self._costs[kernel] = machine.statistics_ns(kernel), machine.combine_ns(kernel)
        return self._costs[kernel]

    def _place(self, url: str) -> PlaceCosts:
        if url not in self._places:
            self._places[url] = self.calibration.place(url)[0]
        return self._places[url]


NUM_PUBLISHERS = 8
PUBLISHING_REQUESTS = 25
"""one after the other, around the shards of a merge"""


def _crowding(machine: MachineCosts, busy: float) -> float:
    """How much more CPU work takes while so many cores are busy."""
    return 1.0 + (machine.crowding - 1.0) * _fullness(machine, busy)


def _fullness(machine: MachineCosts, busy: float) -> float:
    """0 while one core is busy, 1 while all are."""
    return (min(max(busy, 1.0), machine.cores) - 1.0) / (machine.cores - 1.0) if machine.cores > 1 else 0.0
