"""Receipts: what a worker reports of a shard it merged, with a row of facts per tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from sys import intern

from stockflow.checkpoints.files.header import DTYPES
from stockflow.output.keys import receipt_key
from stockflow.storage import Stamp
from stockflow.text.records import Place, RecordKind, parse_record
from stockflow.text.strictjson import shown

MAX_COEFFICIENTS = 2_000_000
"""of all tensors of a shard together, 50 MB; by row, a shard of experts would have several times as many"""


ENDS_OF_ZEROS = "ends_of_zeros"
"""Fact of tensors that end in zeros in some models and not in others: a bit for each of the former."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One row of tensors.parquet. None stands for what the method does not know."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: str
    method: str
    scope: str
    num_elems: int
    mean_cosine: float | None = None
    """mean pairwise cosine of the task vectors; in row and leading scope the mean over groups"""
    min_cosine: float | None = None
    max_cosine: float | None = None
    ratio: float | None = None
    """t of Model Stock; in row and leading scope the mean over groups"""
    legacy_ratio: float | None = None
    """what the two-model formula 2 cos / (1 + cos) gives; None for cos <= 0"""
    base_norm: float | None = None
    delta_norms: tuple[float, ...] = ()
    """one per tuned model"""
    flags: tuple[str, ...] = ()
    """zero_delta, clamped, copied; rounding_noise, scales"""
    facts: Mapping[str, float] = field(default_factory=dict)
    """further numbers of the method or scope, such as the number of groups and of clamped ones"""
    coefficients: tuple[tuple[str, ...], ...] | None = None
    """per group, as hex floats; None where there are none or too many to keep"""

    @property
    def num_parameters(self) -> int:
        """Numbers that it stands for: of codes as many as they are, of scales none."""
        return 0 if "scales" in self.flags else int(self.facts.get("numbers", self.num_elems))


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a shard was written: what it is, what it cost, and the facts of its tensors."""

    plan_id: str
    file: str
    size: int
    sha256: str
    stamp: Stamp
    """of the object, taken after writing"""
    numerics_class: str
    bytes_read: int
    seconds: Mapping[str, float]
    """by stage, over all threads: read, statistics, combine, hash, write, publish, wait_read, wait_write; and total"""
    retries: Mapping[str, int]
    """by cause"""
    peak_memory_bytes: int
    tensors: tuple[TensorFacts, ...]
    memory_bytes: int
    """what its worker was allowed"""
    gram: tuple[tuple[float, ...], ...]
    """products of [w_0, d_1 .. d_N], summed over the tensors whose method needs them and all checkpoints; () if none"""
    began: float
    """when its worker began with it, in seconds since the epoch"""
    ended: float
    """when it was durable, by the same clock"""
    worker: str
    """which process merged it, as ``node:pid``"""

    def __post_init__(self) -> None:
        """Refuse dtypes that are none."""
        if unknown := {row.dtype for row in self.tensors} - DTYPES.keys():
            raise ValueError(f"the dtype {shown(min(unknown))} is unknown")


KIND = RecordKind(
    noun="a receipt",
    decode=partial(parse_record, Receipt),
    format="stockflow-receipt-1",
    max_bytes=256_000_000,  # of 92,000 tensors of 16 models it has 110 MB
    max_values=12_000_000,
    is_sealed=True,
)
encode, parse = KIND.encode, KIND.parse


def read(store: Place, plan_id: str, file: str) -> Receipt:
    """Return the receipt of a shard.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one, or is not as it was written.
    """
    return KIND.read(store, receipt_key(plan_id, file))


def within_bounds(tensors: Sequence[TensorFacts]) -> Iterator[TensorFacts]:
    """Yield the facts of a shard's tensors as they go into its receipt, so that it is never too large to be read.

    Coefficients are left out from where there would be more than ``MAX_COEFFICIENTS``; ``verify --sample`` decides
    those tensors again.
    """
    left = MAX_COEFFICIENTS
    for facts in tensors:
        left -= sum(map(len, facts.coefficients or ()))
        yield facts if left >= 0 else replace(facts, coefficients=None)


def condensed(receipt: Receipt) -> Receipt:
    """Return what a driver keeps of a receipt: words that its rows share once, and no coefficients.

    Of 48 experts' tensors, by 768 rows and eight models, these take 25 MB; only `verify` needs them, and reads them
    from the store.
    """
    return replace(receipt, tensors=tuple(_condensed(row, receipt.file) for row in receipt.tensors))


def _condensed(row: TensorFacts, file: str) -> TensorFacts:
    return replace(
        row,
        dtype=intern(row.dtype),
        shard=file if row.shard == file else row.shard,
        method=intern(row.method),
        scope=intern(row.scope),
        flags=tuple(map(intern, row.flags)),
        coefficients=None,
    )


def total_gram(receipts: Sequence[Receipt]) -> tuple[tuple[float, ...], ...]:
    """Return the Gram of whole models, added over shards: () if no shard has one, or one that should have it does not.

    A shard whose sum is beyond float64 lacks it; what was summed without that would be no property of the models.
    """
    with_norms = [receipt for receipt in receipts if receipt.gram or any(row.delta_norms for row in receipt.tensors)]
    if not with_norms or len({len(receipt.gram) for receipt in with_norms}) > 1:
        return ()
    rows = zip(*(receipt.gram for receipt in with_norms), strict=True)
    return tuple(tuple(map(math.fsum, zip(*same_row, strict=True))) for same_row in rows)
