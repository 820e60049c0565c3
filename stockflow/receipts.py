"""What a worker reports of a shard: one row of facts per tensor and a receipt, plain JSON in the output prefix."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from stockflow.errors import CheckpointError
from stockflow.header import DTYPES
from stockflow.records import as_plain, fields_of, parse_record
from stockflow.sealed import SEAL_KEY, seal
from stockflow.storage import Stamp
from stockflow.strictjson import shown

RECEIPT_FORMAT = "stockflow-receipt-1"


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
    """zero_delta, clamped, copied"""
    facts: Mapping[str, float] = field(default_factory=dict)
    """further numbers of the method or scope, such as the number of groups and of clamped ones"""
    coefficients: tuple[tuple[str, ...], ...] | None = None
    """per group, as hex floats; None where there are none or too many to keep"""


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
    began: float | None = None
    """when its worker began with it, in seconds since the epoch; None in receipts of earlier versions"""
    ended: float | None = None
    """when it was durable, by the same clock"""
    worker: str = ""
    """which process merged it, as ``node:pid``"""

    def to_json(self) -> bytes:
        """Return the receipt as it lies in the output prefix."""
        parts = {"stamp": as_plain(self.stamp), "tensors": list(map(as_plain, self.tensors))}
        return seal(json.dumps({"format": RECEIPT_FORMAT, **as_plain(self), **parts}, ensure_ascii=False))

    @classmethod
    def from_json(cls, payload: bytes, where: str) -> "Receipt":
        """Parse a receipt.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            fields = fields_of(payload, RECEIPT_FORMAT)
            fields.pop(SEAL_KEY, None)
            receipt = parse_record(cls, fields)
            if unknown := {row.dtype for row in receipt.tensors} - DTYPES.keys():
                raise ValueError(f"the dtype {shown(min(unknown))} is unknown")
        except ValueError as error:
            raise CheckpointError(f"{where} is not a receipt of stockflow: {error}") from None
        return receipt


def finite(value: float) -> float | None:
    """Return a number as it goes into facts: None for NaN and infinity, which JSON and tables do without."""
    return float(value) if math.isfinite(value) else None
