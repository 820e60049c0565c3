"""Samples: some numbers of the same tensors of every checkpoint, for what headers do not tell: copies and strangers.

Of codes the scales are sampled: they are as large as the numbers they stand for.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from stockflow.checkpoints.decodes.stored import BlockScaled, GroupScaled, plain
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import may_be_tied
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.quantised import Stored
from stockflow.checkpoints.values import WIDENED, as_numbers
from stockflow.kernels.arrays import Floats
from stockflow.storage import Store

T = TypeVar("T")
Kind = Literal["matrix", "norm", "statistics", "scales"]
"""Of a tensor: ``norm`` for the weights of norms, ``statistics`` for running ones, ``scales`` for those of codes."""
NUM_SAMPLES, MAX_SAMPLES, NUM_ENDS, NUM_VECTORS = 8, 16, 2, 4
"""Of matrices, and where they are of more kinds; embeddings and heads among them; vectors of a kind."""
NUM_TRIED = 4
"""Of matrices of a kind, before it is taken for one that not all models have alike."""
NUM_RUNS, RUN = 4, 2048
"""Of matrices, among which kinds are looked for where there are more."""
SAMPLE_ELEMS = 2048
NUM_READERS = 16
RUNNING_STATISTICS = (
    *(".running_mean", ".running_var", ".moving_mean", ".moving_variance", ".cluster_size", ".embed_avg"),
    *(".weight_u", ".parametrizations.weight.0._u"),
)
"""Ends of the names; the last two are of spectral norms."""
_DIGITS = b"0123456789"
_NORM = re.compile(r"(norm|(^|\.)ln)\w*(\.\w+)*\.(weight|scale|gamma)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """A run of elements from the middle of a tensor."""

    name: str
    payload: bytes
    """as they are stored"""
    values: Floats
    """the same as float64"""
    kind: Kind = "matrix"
    dtype: str = "F32"


Samples = Sequence[Sequence[Sample]]
"""Of each checkpoint, of the same places."""


def take_samples(stores: Sequence[Store], checkpoints: Sequence[Checkpoint]) -> Samples:
    """Return samples of matrices, norms, running statistics and scales of codes that all have, over all their depth.

    Each is one small read.

    Raises:
        StockflowError: reading failed after retries, or an input changed.
    """
    specs = sampled_specs(checkpoints)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        read = [
            [pool.submit(_sample, store, checkpoint, spec) for spec in specs]
            for store, checkpoint in zip(stores, checkpoints, strict=True)
        ]
        return [[each.result() for each in samples] for samples in read]


def sampled_specs(checkpoints: Sequence[Checkpoint]) -> list[TensorSpec]:
    """Return floats and scales of equal codes that all have, over all their depth; of matrices all kinds."""
    coded = {name for each in checkpoints for name in each.stored}
    plain_ones = [spec for name, spec in checkpoints[0].specs.items() if spec.kind == "float" and name not in coded]
    matrices = [spec for spec in plain_ones if len(spec.shape) > 1]
    vectors = [spec for spec in plain_ones if len(spec.shape) == 1]
    norms = [spec for spec in vectors if is_of_a_norm(spec.name)]
    statistics = [spec for spec in vectors if spec.name.endswith(RUNNING_STATISTICS)]
    ends = [spec for spec in matrices if may_be_tied(spec.name)]
    kinds = (ends, NUM_ENDS), (norms, NUM_VECTORS), (statistics, NUM_VECTORS)
    others = [spec for specs, count in kinds for spec in _alike(checkpoints, specs, count)]
    return [*dict.fromkeys([*_of_all_kinds(checkpoints, matrices), *others]), *_scales(checkpoints)]


def _of_all_kinds(checkpoints: Sequence[Checkpoint], matrices: list[TensorSpec]) -> Iterator[TensorSpec]:
    """Yield matrices that all have, of each kind as many, each kind at other depths: tunes may differ in one alone."""
    by_kind: dict[tuple[bytes, str], list[TensorSpec]] = {}
    for spec in _runs_of(matrices):
        by_kind.setdefault(_place_in_a_layer(spec.name), []).append(spec)
    kinds = _spread(list(by_kind.values()), MAX_SAMPLES)
    most = next(
        (n for n in range(1, NUM_SAMPLES) if sum(min(n, len(kind)) for kind in kinds) >= NUM_SAMPLES), NUM_SAMPLES
    )
    for number, kind in enumerate(kinds):
        count = min(most, len(kind))
        for turn in range(count):
            place = int((turn + (number + 0.5) / len(kinds)) / count * len(kind))
            tried = (kind[place], *_spread(kind, NUM_TRIED))
            alike = (spec for spec in tried if spec.num_elems and all(_has_alike(each, spec) for each in checkpoints))
            yield from islice(alike, 1)


def _runs_of(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Return runs over all the depth, each longer than a layer of hundreds of experts; all where they are few."""
    starts = [number * (len(specs) - RUN) // (NUM_RUNS - 1) for number in range(NUM_RUNS)]
    return specs if len(specs) <= NUM_RUNS * RUN else [spec for start in starts for spec in specs[start : start + RUN]]


def _place_in_a_layer(name: str) -> tuple[bytes, str]:
    """Return a name without numbers of layers and experts, but for that of its own module, such as `w1`."""
    module = name.rsplit(".", 2)[-2:][0]
    return name.encode().translate(None, _DIGITS), "" if module.isdigit() else module


def is_of_a_norm(name: str) -> bool:
    """Return whether a vector is what a norm multiplies by."""
    return bool(_NORM.search(name))


def _alike(checkpoints: Sequence[Checkpoint], specs: list[TensorSpec], count: int) -> list[TensorSpec]:
    looked_at = _spread(specs, 4 * count)
    alike = [spec for spec in looked_at if all(_has_alike(each, spec) for each in checkpoints)]
    return _spread([spec for spec in alike if spec.num_elems], count)


def _kind_of(checkpoint: Checkpoint, spec: TensorSpec) -> Kind:
    if spec.name not in checkpoint.specs:
        return "scales"
    if len(spec.shape) > 1:
        return "matrix"
    return "statistics" if spec.name.endswith(RUNNING_STATISTICS) else "norm"


def _scales(checkpoints: Sequence[Checkpoint]) -> list[TensorSpec]:
    donor = checkpoints[0].stored
    looked_at = [(name, donor[name]) for name in _spread(list(donor), 4 * NUM_SAMPLES)]
    alike = [
        held.parts[1]
        for name, held in looked_at
        if isinstance(held.decode, BlockScaled | GroupScaled)
        and held.parts[1].dtype in WIDENED
        and all(_has_scales(each, name, held) for each in checkpoints)
    ]
    return _spread(alike, NUM_SAMPLES)


def _has_scales(checkpoint: Checkpoint, name: str, held: Stored) -> bool:
    """Return whether a checkpoint has scales of the same codes under the same name."""
    own = checkpoint.stored.get(name)
    return own is not None and own.decode == held.decode and own.parts[1] == held.parts[1]


def _has_alike(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    """Return whether a checkpoint has the same tensor, of whatever float dtype."""
    own = checkpoint.specs.get(spec.name)
    return own is spec or (own is not None and own.shape == spec.shape and {own.dtype, spec.dtype} <= WIDENED)


def _spread(specs: list[T], count: int) -> list[T]:
    """Return so many of these, the first and the last among them, in equal steps."""
    if len(specs) <= count:
        return specs
    return [specs[index * (len(specs) - 1) // (count - 1)] for index in range(count)]


def _sample(store: Store, checkpoint: Checkpoint, spec: TensorSpec) -> Sample:
    own, count = checkpoint.specs.get(spec.name, spec), min(SAMPLE_ELEMS, spec.num_elems)
    start = (spec.num_elems - count) // 2
    decode, extents = checkpoint.joined.get(spec.name) or (plain(own.dtype), (checkpoint.extents[spec.name],))
    payload = b""
    for extent, (first, last) in zip(extents, decode.ranges(spec.shape, start, start + count), strict=True):
        buffer = bytearray(last - first)
        if buffer:
            store.read_into(extent.file, extent.start + first, memoryview(buffer), checkpoint.files[extent.file])
            payload += buffer
    numbers = as_numbers(payload, own.dtype)
    assert numbers is not None
    return Sample(spec.name, payload, numbers, _kind_of(checkpoint, spec), own.dtype)
