"""Values that are read before a merge: small integers, floats that are no weights, and whether a head is a copy.

A few ranges per checkpoint, of bounded number and size; what is not read here is compared while merging.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.files.layout import Extent, HeaderCache
from stockflow.checkpoints.heads import original_of, tie_flag, tied_names
from stockflow.checkpoints.weights import Weights
from stockflow.storage import Stamp, Store

MAX_TENSOR_BYTES, MAX_INDEX_BYTES = 65_536, 2**20
"""Of integers and complex numbers, and of floats that are named like indices, masks or frequencies."""
MAX_GAP_BYTES = 4_096
"""Between small tensors that one request reads."""
MAX_RANGES, MAX_RANGE_BYTES = 32, 2**18
NUM_PROBES, PROBE_ELEMS = 8, 8_192
"""Ranges in which a head is held against its embedding, and their length."""

Floats = npt.NDArray[np.float64]
INDEX_DATA = ("position_ids", "position_index", "token_type_ids", "cache_position")
"""Ends of the names of what holds indices, not weights, in whatever dtype."""
FREQUENCIES = ("inv_freq",)
_SCALAR_MASKS = ("masked_bias",)
MASKS = ("_mask", *_SCALAR_MASKS)
"""Ends of the names of what holds zeros, ones and numbers that hide; of a single number, which may be trained, one."""
MASKED = -9_000
"""What hides a place before a softmax is less: -1e4, in BF16 -9,984, the least number of a dtype, or infinity."""
_NO_WEIGHTS = (*INDEX_DATA, *FREQUENCIES, *MASKS)
_INTEGERS = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "integer")
WIDENED = frozenset({"BF16", "F16", "F32", "F64"})
_NUMPY = {"BOOL": "u1", "C64": "<f4", "F16": "<f2", "F32": "<f4", "F64": "<f8"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True, slots=True)
class KnownValues:
    """What was read of a checkpoint's tensors, by where they lie: views give them other names."""

    data: Mapping[Extent, bytes] = field(default_factory=dict)
    """all bytes of some small tensors"""
    fixed: frozenset[Extent] = frozenset()
    """floats that are named like indices, masks or frequencies, and are"""
    copies: frozenset[Extent] = frozenset()
    """heads and copies whose values are those of their embedding, in every range that was looked at"""


NOTHING_READ = KnownValues()


def small_tensors(specs: Mapping[str, TensorSpec], extents: Mapping[str, Extent]) -> dict[Extent, TensorSpec]:
    """Return the tensors of a checkpoint whose values are all to be known, in the order of where they lie."""
    return dict(sorted((extents[name], spec) for name, spec in specs.items() if _is_wanted(spec)))


def read_values(store: Store, weights: Weights, config: Config | None, cache: HeaderCache) -> KnownValues:
    """Return what is to be known of a checkpoint's values before anything is merged.

    Raises:
        StorageError: reading failed after retries.
        InputChangedError: a file is no longer the one whose header was read.
    """
    specs, extents, reader = weights.specs, weights.extents, _Ranges(store, weights.files)
    wanted = cache.found(small_tensors, specs, extents)
    data = dict(reader.together(cache.found(neighbours, wanted)))
    fixed = frozenset(extent for extent, spec in wanted.items() if _are_no_weights(spec, data.get(extent)))
    names = cache.found(tied_names, specs)
    candidates = names.copies if tie_flag(config) is False else names.ties
    pairs = [(name, original_of(name, specs[name].shape, names, specs)) for name in candidates]
    copies = frozenset(
        extents[name]
        for name, original in pairs
        if original and _are_equal(reader, (specs[name], extents[name]), (specs[original], extents[original]))
    )
    return KnownValues(data, fixed, copies)


def as_numbers(payload: bytes, dtype: str) -> Floats | None:
    """Return stored numbers as float64, of complex ones both parts; None for dtypes that are no plain numbers."""
    if dtype == "BF16":
        return (np.frombuffer(payload, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(payload, _NUMPY[dtype]).astype(np.float64) if dtype in _NUMPY else None


def _is_wanted(spec: TensorSpec) -> bool:
    if spec.dtype in _INTEGERS or spec.dtype == "C64":
        return 0 < spec.num_bytes <= MAX_TENSOR_BYTES
    return spec.name.endswith(_NO_WEIGHTS) and spec.dtype in WIDENED and 0 < spec.num_bytes <= MAX_INDEX_BYTES


def _are_no_weights(spec: TensorSpec, payload: bytes | None) -> bool:
    """Return whether floats are what their name says; frequencies are, whether they were read or not."""
    if spec.dtype not in WIDENED or payload is None:
        return spec.dtype in WIDENED and spec.name.endswith(FREQUENCIES)
    numbers = as_numbers(payload, spec.dtype)
    assert numbers is not None
    if spec.name.endswith(MASKS):
        is_one = spec.num_elems == 1 and not spec.name.endswith(_SCALAR_MASKS)
        return not is_one and bool(((numbers == 0) | (numbers == 1) | (numbers <= MASKED)).all())
    is_whole = bool(np.isfinite(numbers).all()) and np.array_equal(numbers, np.trunc(numbers))
    return is_whole or spec.name.endswith(FREQUENCIES)


def _are_equal(reader: "_Ranges", a: tuple[TensorSpec, Extent], b: tuple[TensorSpec, Extent]) -> bool:
    num_elems = a[0].num_elems
    length = min(PROBE_ELEMS, num_elems)
    starts = {(num_elems - length) * number // (NUM_PROBES - 1) for number in range(NUM_PROBES)}
    return all(_same_range(reader, a, b, start, length) for start in sorted(starts, reverse=True))


def _same_range(
    reader: "_Ranges", a: tuple[TensorSpec, Extent], b: tuple[TensorSpec, Extent], start: int, length: int
) -> bool:
    found = []
    for spec, extent in (a, b):
        width = spec.num_bytes // spec.num_elems if spec.num_elems else 0
        payload = reader.read(extent.file, extent.start + start * width, length * width)
        found.append(as_numbers(payload, spec.dtype))
    return found[0] is not None and found[1] is not None and np.array_equal(found[0], found[1], equal_nan=True)


class _Ranges:
    def __init__(self, store: Store, stamps: Mapping[str, Stamp]) -> None:
        self._store = store
        self._stamps = stamps

    def read(self, file: str, start: int, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        self._store.read_into(file, start, memoryview(buffer), self._stamps[file])
        return bytes(buffer)

    def together(self, groups: Iterable[list[tuple[Extent, int]]]) -> Iterator[tuple[Extent, bytes]]:
        """Yield each extent with its bytes, neighbours by one request."""
        for group in groups:
            (file, start), (last, num_bytes) = group[0][0], group[-1]
            payload = self.read(file, start, last.start + num_bytes - start)
            for extent, size in group:
                yield extent, payload[extent.start - start : extent.start - start + size]


def neighbours(wanted: Mapping[Extent, TensorSpec]) -> list[list[tuple[Extent, int]]]:
    """Return the first extents in order, with their sizes: as many as ``MAX_RANGES`` requests read."""
    groups: list[list[tuple[Extent, int]]] = []
    for extent, spec in wanted.items():
        num_bytes = spec.num_bytes
        if groups:
            first, (last, size) = groups[-1][0][0], groups[-1][-1]
            is_near = extent.file == last.file and extent.start - (last.start + size) <= MAX_GAP_BYTES
            if is_near and extent.start + num_bytes - first.start <= MAX_RANGE_BYTES:
                groups[-1].append((extent, num_bytes))
                continue
        if len(groups) == MAX_RANGES:
            break
        groups.append([(extent, num_bytes)])
    return groups
