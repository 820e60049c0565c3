"""The constants of a machine and its stores, as ``stockflow calibrate`` measured them: types, file, defaults."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path

from stockflow.errors import RecipeError
from stockflow.forecast.amounts import Kernel
from stockflow.storage import is_within, scheme_of
from stockflow.text.records import fields_of, parse_record

FORMAT = "stockflow-calibration-1"
MAX_FILE_BYTES = 10_000_000
BUILT_IN = "calibration.json"
COPY_NS = 0.3
"""per byte and source, for tensors that are carried over; in real checkpoints they are few and small"""


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What one thread needs per element, in nanoseconds, bytes already in memory."""

    method: str
    """``linear`` or ``elementwise``"""
    dtype: str
    num_sources: int
    """base included"""
    statistics_ns: float
    """per statistics pass"""
    combine_ns: float


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What computing costs on one machine."""

    name: str
    """processor, in words"""
    cores: int
    kernels: tuple[KernelCost, ...]
    hash_ns: float
    """per byte of the output"""
    crowding: float
    """CPU seconds of the same work on all cores, over those on one: caches and memory are shared"""
    turn_us: float
    """per source of each span that a thread reads itself, while all cores compute: it waits for the interpreter, which
    one thread has at a time"""
    open_piece_us: float
    """per tensor of each checkpoint: reading headers"""
    plan_tensor_us: float
    """per tensor: planning before the merge, and publishing after it"""
    merge_tensor_us: float
    """per tensor: what Python does for it"""
    merge_piece_us: float
    """per source of each tensor, likewise"""
    ray_start_s: float
    """until Ray is connected and a worker has come up, without what a merge in one process needs"""

    def statistics_ns(self, kernel: Kernel) -> float:
        """Return what a statistics pass takes one thread per element."""
        return 0.0 if kernel.method == "copy" else self._cost(kernel, lambda cost: cost.statistics_ns)

    def combine_ns(self, kernel: Kernel) -> float:
        """Return what the combine takes one thread per element."""
        if kernel.method == "copy":
            return COPY_NS * kernel.num_sources
        return self._cost(kernel, lambda cost: cost.combine_ns)

    def _cost(self, kernel: Kernel, figure: Callable[[KernelCost], float]) -> float:
        """Interpolate over the number of sources; a dtype measured at one number alone takes the shape of BF16."""
        method = [cost for cost in self.kernels if cost.method == kernel.method] or list(self.kernels)
        own = [cost for cost in method if cost.dtype == kernel.dtype] or method
        if len(own) > 1:
            return _interpolated(own, kernel.num_sources, figure)
        (only,) = own
        reference = [cost for cost in self.kernels if cost.method == "linear" and cost.dtype == "BF16"]
        if only.num_sources == kernel.num_sources or not reference:
            return figure(only)
        here, there = (_interpolated(reference, number, figure) for number in (only.num_sources, kernel.num_sources))
        return figure(only) * there / here if here else figure(only)


def _interpolated(costs: Sequence[KernelCost], num_sources: int, figure: Callable[[KernelCost], float]) -> float:
    """The figure at a number of sources: on the line between its neighbours, or through the two nearest."""
    points = sorted((cost.num_sources, figure(cost)) for cost in costs)
    if len(points) == 1:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if num_sources <= right or right == points[-1][0]:
            return max(low + (high - low) * (num_sources - left) / (right - left), 0.0)
    raise AssertionError("the last pair always answers")


@dataclass(frozen=True, slots=True)
class PlaceCosts:
    """What one folder or one bucket is like, seen from one process on this machine."""

    url: str
    start_s: float
    """a merge of nothing: until the inputs are opened, loading the kernels, and the process's end"""
    publish_s: float
    """a merge of nothing: claim, plan, table of tensors, manifest"""
    shard_s: float
    """per further shard: create it, look at the inputs, receipt"""
    get_s: float
    """reading a small object"""
    put_s: float
    """writing a small object, durable"""
    read_rate: float
    """bytes per second, all readers of a process together, in ranges of 8 MiB; from files in the page cache"""
    cold_rate: float
    """bytes per second from the disk itself; of an object store the same as ``read_rate``"""
    write_rate: float
    """bytes per second, durable"""
    read_cpu_ns: float
    """CPU of this process per byte read"""
    write_cpu_ns: float
    """CPU of this process per byte written"""
    write_thread_ns: float
    """the part of it in the thread that also hashes"""
    server_read_ns: float = 0.0
    """CPU per byte that a server on this very machine takes"""
    server_write_ns: float = 0.0
    turns: float = 0.0
    """0: reading and writing at once do not disturb each other; 1: they take turns"""
    cold_cpu_ns: float = 0.0
    """CPU per byte that comes from the disk, beyond ``read_cpu_ns``: finding pages for it, and asking"""
    name: str = ""
    """in words, if it is none of the reader's own places"""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return scheme_of(self.url) == "file"


@dataclass(frozen=True, slots=True)
class Calibration:
    """One machine and the places that were measured from it."""

    measured: str
    """when, in ISO format"""
    stockflow: str
    """version"""
    note: str
    """what was not measured but assumed, in words"""
    machine: MachineCosts
    places: tuple[PlaceCosts, ...]

    def place(self, url: str) -> tuple[PlaceCosts, bool]:
        """Return the costs of a location, and whether they were measured there and not at the next of its kind."""
        within = [place for place in self.places if is_within(url, place.url) and not place.name]
        if within:
            return max(within, key=lambda place: len(place.url)), True
        scheme = scheme_of(url)
        alike = [place for place in self.places if scheme_of(place.url) == scheme]
        stores = [place for place in self.places if not place.is_local]
        return (alike or stores or list(self.places))[0], False

    def to_json(self) -> str:
        """Return the text of a calibration file."""
        return json.dumps({"format": FORMAT, **_rounded(asdict(self))}, indent=1) + "\n"

    def with_places(self, places: Sequence[PlaceCosts]) -> "Calibration":
        """Return it with places replaced, where they are measured anew, or added."""
        known = {place.url: place for place in self.places} | {place.url: place for place in places}
        return replace(self, places=tuple(known.values()))

    def with_machine(self, other: "Calibration") -> "Calibration":
        """Return it with everything but the places taken from another one."""
        return replace(other, places=self.places)


def parse_calibration(payload: bytes, where: str) -> Calibration:
    """Return what a calibration file says.

    Raises:
        RecipeError: it is none.
    """
    try:
        found = parse_record(Calibration, fields_of(payload, FORMAT))
        if not found.places or not found.machine.kernels or found.machine.cores < 1:
            raise ValueError("it has no places, kernels or cores")
        return found
    except ValueError as error:
        raise RecipeError(f"{where} is not a calibration: {error}; make one with `stockflow calibrate`") from None


def default_path() -> Path:
    """Return where calibrations of this machine's user are kept."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return Path(home or Path.home() / ".config") / "stockflow" / "calibration.json"


def load_calibration(given: str | os.PathLike[str] | None) -> tuple[Calibration, str]:
    """Return the calibration to use and where it is from, in words: the one given, the user's, else the built-in one.

    Kinds of places that a calibration of the user's lacks are taken from the built-in one.

    Raises:
        RecipeError: the file given is not there, or one of the files is no calibration.
    """
    payload = resources.files("stockflow.forecast").joinpath("data", BUILT_IN).read_bytes()
    built_in = parse_calibration(payload, f"the built-in {BUILT_IN}")
    path = Path(given) if given else default_path()
    if given or path.exists():
        try:
            with path.open("rb") as file:
                payload = file.read(MAX_FILE_BYTES)
        except OSError as error:
            raise RecipeError(f"cannot read the calibration {path}: {error.strerror}") from None
        found = parse_calibration(payload, str(path))
        known = {place.is_local for place in found.places}
        others = [place for place in built_in.places if place.is_local not in known]
        return found.with_places(others), f"{path}, measured {found.measured}"
    machine = built_in.machine
    return built_in, (
        f"constants of another machine ({machine.name}, {machine.cores} cores, {built_in.measured[:10]}): "
        "times may be far off; `stockflow calibrate` measures this one in a minute"
    )


def _rounded(value: object) -> dict[str, object]:
    """The same with figures of a few digits: what is beyond is noise."""

    def walk(item: object) -> object:
        if isinstance(item, float):
            return float(f"{item:.4g}")
        if isinstance(item, dict):
            return {key: walk(inner) for key, inner in item.items()}
        return [walk(inner) for inner in item] if isinstance(item, list | tuple) else item

    rounded = walk(value)
    assert isinstance(rounded, dict)
    return rounded
