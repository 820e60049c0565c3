"""Values that are read before a merge: small integers, floats that are no weights, and whether a head is a copy.

A few ranges per checkpoint, of bounded number and size; what is not read here is compared while merging.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.files.header import DTYPES, TensorSpec, width_of
from stockflow.checkpoints.files.layout import Extent, HeaderCache
from stockflow.checkpoints.heads import TiedNames, original_of, tie_flag, tied_names
from stockflow.checkpoints.weights import Weights
from stockflow.storage import Stamp, Store

MAX_TENSOR_BYTES, MAX_INDEX_BYTES = 65_536, 2**20
"""Of integers and complex numbers, and of floats that are named like indices, masks or frequencies."""
MAX_GAP_BYTES = 4_096
"""Between small tensors that one request reads."""
MAX_RANGES, MAX_RANGE_BYTES = 32, 2**18
NUM_PROBES, PROBE_ELEMS = 8, 8_192
"""Ranges in which a head is held against its embedding when a checkpoint is opened, and their length."""

Floats = npt.NDArray[np.float64]
INDEX_DATA = ("position_ids", "position_index", "token_type_ids", "cache_position")
"""Ends of the names of what holds indices, not weights, in whatever dtype."""
FREQUENCIES = ("inv_freq",)
_SCALAR_MASKS = ("masked_bias",)
MASKS = ("_mask", ".mask", *_SCALAR_MASKS)
"""Ends of the names of what holds zeros, ones and numbers that hide; of a single number, which may be trained, one."""
MAX_LARGE_MASKS = 4
"""Kinds of masks that are too large to be read, of which a part in the middle of one is looked at."""
MASKED = -9_000
"""What hides a place before a softmax is less: -1e4, in BF16 -9,984, the least number of a dtype, or infinity."""
_NO_WEIGHTS = (*INDEX_DATA, *FREQUENCIES, *MASKS)
_INTEGERS = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "integer")
WIDENED = frozenset({"BF16", "F16", "F32", "F64"})
_NUMPY = {"BOOL": "u1", "C64": "<f4", "F16": "<f2", "F32": "<f4", "F64": "<f8"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}


NO_NAMES = TiedNames((), (), ())


class Located(NamedTuple):
    """A tensor of a checkpoint, and where it lies."""

    spec: TensorSpec
    extent: Extent


@dataclass(frozen=True, slots=True)
class KnownCopy:
    """A head or copy whose values are those of its embedding."""

    copy: Located
    original: Located
    is_whole: bool
    """whether all of it was compared; else eight ranges"""


@dataclass(frozen=True, slots=True)
class KnownValues:
    """What was read of a checkpoint's tensors, by where they lie: views give them other names."""

    data: Mapping[Extent, bytes] = field(default_factory=dict)
    """all bytes of some small tensors"""
    fixed: frozenset[Extent] = frozenset()
    """floats that are named like indices, masks or frequencies, and are"""
    copies: Mapping[Extent, KnownCopy] = field(default_factory=dict)
    """heads and copies whose values are those of their embedding wherever they were compared"""
    partly: Mapping[Extent, int] = field(default_factory=dict)
    """those that were taken for copies until all was compared, each with the last row that differs"""
    names: TiedNames = NO_NAMES
    """which of its tensors may stand for one"""
    left_behind: frozenset[Extent] = frozenset()
    """heads that a config ties, and that are the donor's embedding instead of their own"""
    untied_alike: frozenset[Extent] = frozenset()
    """heads that a config unties, and that are their embedding all the same"""


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
    fixed |= _large_masks(reader, cache.found(large_masks, specs), extents)
    names = cache.found(tied_names, specs)
    candidates = names.copies if tie_flag(config) is False else names.ties
    pairs = [(name, original_of(name, specs[name].shape, names, specs)) for name in candidates]
    copies = {
        extents[name]: copy
        for name, original in pairs
        if original
        and (copy := reader.copy(Located(specs[name], extents[name]), Located(specs[original], extents[original])))
    }
    return KnownValues(data, fixed, copies, names=names)


def large_masks(specs: Mapping[str, TensorSpec]) -> list[list[TensorSpec]]:
    """Return the first kinds of what is named like a mask and too large to be read: equal names but for numbers."""
    found: dict[tuple[object, ...], list[TensorSpec]] = {}
    for name, spec in specs.items():
        if name.endswith(MASKS) and spec.dtype in WIDENED and spec.num_bytes > MAX_INDEX_BYTES:
            found.setdefault((re.sub(r"\d+", "", name), spec.shape, spec.dtype), []).append(spec)
    return list(found.values())[:MAX_LARGE_MASKS]


def _large_masks(
    reader: "_Ranges", kinds: Iterable[list[TensorSpec]], extents: Mapping[str, Extent]
) -> frozenset[Extent]:
    """Return where the masks lie of which some numbers hide, and none is another than masks hold."""
    found = set[Extent]()
    for kind in kinds:
        spec, (file, start) = kind[0], extents[kind[0].name]
        width = spec.num_bytes // spec.num_elems
        middle = (spec.num_elems - PROBE_ELEMS) // 2
        numbers = as_numbers(reader.read(file, start + middle * width, PROBE_ELEMS * width), spec.dtype)
        if numbers is not None and _is_of_a_mask(numbers) and bool((numbers <= MASKED).any()):
            found.update(extents[each.name] for each in kind)
    return frozenset(found)


def _is_of_a_mask(numbers: Floats) -> bool:
    return bool(((numbers == 0) | (numbers == 1) | (numbers <= MASKED)).all())


def as_numbers(payload: bytes | memoryview, dtype: str) -> Floats | None:
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
        return not is_one and _is_of_a_mask(numbers)
    is_whole = bool(np.isfinite(numbers).all()) and np.array_equal(numbers, np.trunc(numbers))
    return is_whole or spec.name.endswith(FREQUENCIES)


def probes(num_elems: int) -> list[range]:
    """Return in which elements two tensors are compared first, the last of them before the others."""
    length = min(PROBE_ELEMS, num_elems)
    starts = {(num_elems - length) * number // (NUM_PROBES - 1) for number in range(NUM_PROBES)}
    return [range(start, start + length) for start in sorted(starts, reverse=True)]


def read_run(store: Store, stamps: Mapping[str, Stamp], place: Located, run: range) -> bytearray:
    """Return the bytes of some elements of a tensor."""
    width = width_of(place.spec.dtype)
    payload = bytearray(len(run) * width)
    store.read_into(
        place.extent.file, place.extent.start + run.start * width, memoryview(payload), stamps[place.extent.file]
    )
    return payload


def last_difference(one: bytes | bytearray, other: bytes | bytearray, dtypes: tuple[str, str]) -> int | None:
    """Return the last element in which equally many numbers differ, if any; what is no plain number always does."""
    if not all(dtype == "BF16" or dtype in _NUMPY for dtype in dtypes):
        return 0
    if dtypes[0] == dtypes[1] and one == other:
        return None
    widths = [width_of(dtype) for dtype in dtypes]
    for start in reversed(range(0, len(one) // widths[0], PROBE_ELEMS)):
        parts = (
            memoryview(payload)[start * width : (start + PROBE_ELEMS) * width]
            for payload, width in zip((one, other), widths, strict=True)
        )
        a, b = (as_numbers(part, dtype) for part, dtype in zip(parts, dtypes, strict=True))
        assert a is not None
        assert b is not None
        if (differing := np.flatnonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))).size:
            return start + int(differing[-1])
    return None


class _Ranges:
    def __init__(self, store: Store, stamps: Mapping[str, Stamp]) -> None:
        self._store = store
        self._stamps = stamps

    def copy(self, copy: Located, original: Located) -> KnownCopy | None:
        """Return a copy if it is one in every range that is looked at."""
        if copy.extent == original.extent:  # two names of the same bytes
            return KnownCopy(copy, original, is_whole=True)
        if any(self._differ(copy, original, run) for run in probes(copy.spec.num_elems)):
            return None
        return KnownCopy(copy, original, is_whole=copy.spec.num_elems <= NUM_PROBES * PROBE_ELEMS)

    def _differ(self, one: Located, other: Located, run: range) -> bool:
        a, b = (read_run(self._store, self._stamps, place, run) for place in (one, other))
        return last_difference(a, b, (one.spec.dtype, other.spec.dtype)) is not None

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
