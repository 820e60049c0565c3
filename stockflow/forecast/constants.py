"""The constants of a machine and its stores, as ``stockflow calibrate`` measured them: types, file, defaults."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

from stockflow.errors import CheckpointError, RecipeError
from stockflow.forecast.amounts import Kernel
from stockflow.storage import is_within, scheme_of
from stockflow.text.records import RecordKind, parse_record

BUILT_IN = "calibration.json"


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What one thread needs per element of the output, in nanoseconds, bytes already in its caches or in memory."""

    method: str
    """``linear``, ``elementwise`` or ``copy``"""
    dtype: str
    pass_source_ns: float
    """of a statistics pass, per source, base included"""
    pass_pair_ns: float
    """of a statistics pass, per source squared: products of all with all"""
    combine_source_ns: float
    """of the combine, per source"""

    def pass_ns(self, num_sources: int) -> float:
        """Return what one statistics pass takes."""
        return (self.pass_source_ns + self.pass_pair_ns * num_sources) * num_sources

    def elem_ns(self, kernel: Kernel) -> float:
        """Return what all passes and the combine take."""
        return kernel.num_passes * self.pass_ns(kernel.num_sources) + self.combine_source_ns * kernel.num_sources


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What computing costs on one machine."""

    name: str
    """processor, in words"""
    cores: int
    kernels: tuple[KernelCost, ...]
    efficiency: float
    """of each thread that computes while others do, against one alone: they share caches, memory and the interpreter,
    and the last span of a tensor keeps the others waiting"""
    tensor_us: float
    """per tensor: what Python does for it from its header to its row of facts"""
    piece_us: float
    """per source of each tensor, likewise"""
    ray_start_s: float
    """until Ray is connected and a worker has come up, without what a merge in one process needs"""

    def elem_ns(self, kernel: Kernel) -> float:
        """Return what one thread takes per element; what was not measured takes what is most like it."""

        def likeness(cost: KernelCost) -> tuple[bool, bool, bool]:
            return cost.method == kernel.method, cost.dtype == kernel.dtype, cost.dtype == "BF16"

        return max(self.kernels, key=likeness).elem_ns(kernel)


@dataclass(frozen=True, slots=True)
class PlaceCosts:
    """What one folder or one bucket is like, seen from one process on this machine."""

    url: str
    start_s: float
    """a merge of nothing, from the start of its process to its end"""
    shard_s: float
    """per further shard: create it, look at the inputs, receipt"""
    latency_s: float
    """of one small read"""
    read_rate: float
    """bytes per second, all readers of a process together, in ranges of 8 MiB; of a folder from the disk itself"""
    write_rate: float
    """bytes per second of one worker: hashed, written and durable"""
    read_cpu_ns: float
    """CPU per byte read, of a file in memory; if the store is on this machine, its own included"""
    write_cpu_ns: float
    """CPU per byte hashed and written, likewise"""
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

    def __post_init__(self) -> None:
        """Refuse, by a ValueError, what nothing can be predicted from."""
        rates = [rate for place in self.places for rate in (place.read_rate, place.write_rate)]
        if not rates or not self.machine.kernels or self.machine.cores < 1:
            raise ValueError("it has no places, kernels or cores")
        if min(*rates, self.machine.efficiency) <= 0:
            raise ValueError("a rate or the efficiency is not above zero")

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
        """Return the text of a calibration file; figures of four digits, as what is beyond is noise."""
        plain = {"format": _KIND.format, **asdict(self)}
        rounded = json.loads(json.dumps(plain), parse_float=lambda text: float(f"{float(text):.4g}"))
        return json.dumps(rounded, indent=1) + "\n"

    def with_places(self, places: Sequence[PlaceCosts]) -> "Calibration":
        """Return it with places replaced, where they are measured anew, or added."""
        known = {place.url: place for place in self.places} | {place.url: place for place in places}
        return replace(self, places=tuple(known.values()))


_KIND = RecordKind(
    "a calibration", partial(parse_record, Calibration), 10_000_000, 1_000_000, format="stockflow-calibration-1"
)


def parse_calibration(payload: bytes, where: str) -> Calibration:
    """Return what a calibration file says.

    Raises:
        RecipeError: it is none.
    """
    try:
        return _KIND.parse(payload, where)
    except CheckpointError as error:
        raise RecipeError(f"{error}; make one with `stockflow calibrate`") from None


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
    if not given and not path.exists():
        machine = built_in.machine
        return built_in, (
            f"constants of another machine ({machine.name}, {machine.cores} cores, {built_in.measured[:10]}): "
            "times may be far off; `stockflow calibrate` measures this one in a minute"
        )
    try:
        with path.open("rb") as file:
            payload = file.read(_KIND.max_bytes + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the calibration {path}: {error.strerror}") from None
    found = parse_calibration(payload, str(path))
    known = {place.is_local for place in found.places}
    others = [place for place in built_in.places if place.is_local not in known]
    return found.with_places(others), f"{path}, measured {found.measured}"
