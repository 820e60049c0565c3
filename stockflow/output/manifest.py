"""What makes an output official: its manifest, the claim on its prefix, and the names of everything in it."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from stockflow.errors import CheckpointError
from stockflow.output.sealed import SEAL_KEY, check_num_values, check_seal, seal
from stockflow.planning.plan import CheckpointRef
from stockflow.storage import Store, read_small, redact
from stockflow.text.records import fields_of, parse_record
from stockflow.text.strictjson import parse_text_json

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = "stockflow-manifest-1"
RECORDS = "_stockflow/"
"""Folder of everything in an output that is not part of the model."""
CLAIM_FILE = RECORDS + "claim.json"
MAX_MANIFEST_BYTES = 64_000_000
MAX_MANIFEST_VALUES = 2_000_000
"""A file takes three; a checkpoint of 400 B parameters in shards of 5 GB has 163."""


def receipt_folder(plan_id: str) -> str:
    """Return the folder of a plan's receipts."""
    return f"{RECORDS}{plan_id}/receipts/"


def receipt_key(plan_id: str, file: str) -> str:
    """Return where the receipt of a shard lies."""
    return f"{receipt_folder(plan_id)}{file}.json"


def plan_key(plan_id: str) -> str:
    """Return where the plan lies."""
    return f"{RECORDS}{plan_id}/plan.json"


def progress_key(plan_id: str) -> str:
    """Return where a running merge reports."""
    return f"{RECORDS}{plan_id}/progress.json"


def tensors_key(plan_id: str) -> str:
    """Return where the table of tensor facts lies."""
    return f"{RECORDS}{plan_id}/tensors.parquet"


def run_folder(plan_id: str) -> str:
    """Return the folder where the runs of a plan say that they are alive."""
    return f"{RECORDS}{plan_id}/runs/"


def numerics_folder(plan_id: str) -> str:
    """Return the folder that says which numerics class a plan's shards keep to."""
    return f"{RECORDS}{plan_id}/numerics/"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """Size and sha256 of one file of an output."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record of a finished merge; an output prefix without one is not an output."""

    plan_id: str
    merge_id: str
    recipe: str
    inputs: tuple[CheckpointRef, ...]
    pins: tuple[str, ...]
    """per input, how its reads were held to the stamps"""
    files: Mapping[str, PublishedFile]
    numerics: int
    numerics_classes: tuple[str, ...]
    versions: Mapping[str, str]
    summary: Mapping[str, float]
    gram: tuple[tuple[float, ...], ...] = ()
    """products of [w_0, d_1 .. d_N] over all tensors whose method needs them; () if there is no such tensor"""

    def to_json(self) -> bytes:
        """Return the manifest as it is published."""
        return seal(json.dumps({"format": MANIFEST_FORMAT, **asdict(self)}, indent=1, ensure_ascii=False))

    @classmethod
    def from_json(cls, payload: bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            fields = fields_of(payload, MANIFEST_FORMAT)
            fields.pop(SEAL_KEY, None)
            return parse_record(cls, fields)
        except ValueError as error:
            raise CheckpointError(f"{where} is not a manifest of stockflow: {error}") from None


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of an output.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one, or is not as it was written.
    """
    where = f"{redact(store.url)}/{MANIFEST_FILE}"
    payload = read_small(store, MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    check_num_values(payload, MAX_MANIFEST_VALUES, where)
    manifest = Manifest.from_json(payload, where)
    check_seal(payload, where)
    return manifest


@dataclass(frozen=True, slots=True)
class Claim:
    """Which plan owns a prefix; written once, so that nobody refreshing it can undo another's taking it over."""

    plan_id: str
    heartbeat: float
    """seconds since the epoch when it was made; its runs beat in records of their own (``claims.Heartbeat``)"""
    run: str = ""
    """who made it; tells equal claims of two runs apart"""

    @classmethod
    def now(cls, plan_id: str, run: str = "") -> "Claim":
        """Return a claim of this moment."""
        return cls(plan_id, time.time(), run)

    def to_json(self) -> bytes:
        """Return the claim as it lies in the prefix."""
        return json.dumps(asdict(self)).encode()


def read_claim(store: Store) -> Claim:
    """Read the claim on a prefix.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one.
    """
    payload = read_small(store, CLAIM_FILE, max_bytes=10_000)
    try:
        return parse_record(Claim, parse_text_json(payload, allows_constants=False))
    except ValueError as error:
        raise CheckpointError(f"{redact(store.url)}/{CLAIM_FILE} is not a claim of stockflow: {error}") from None
