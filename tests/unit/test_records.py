"""What a record of each kind is read within: bytes, values, its own fields, its seal; and how it says what is wrong."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stockflow.errors import CheckpointError, NotFoundError
from stockflow.output import claims, keys, manifest, numerics, receipts
from stockflow.planning import file as plan_file
from stockflow.progress import file as progress_file
from stockflow.storage import StorageConfig, open_store
from stockflow.text.records import RecordKind, parse_record
from stockflow.text.sealed import SEAL_KEY, seal
from tests.fuzz.readers import MANIFEST, PLAN, RECEIPT

PLAN_ID = "a" * 64
PROGRESS = progress_file.Progress(
    PLAN_ID, "b" * 16, "merging", 1.0, 2.0, 10.0, 3, 1, 0, 10, 5, 6, 7, 0.5, 0.25, None,
    (progress_file.InFlight("größe", "node:1", 1.5),), {"read": 2},
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of record: where one lies, its bytes, and what reads it from a store."""

    key: str
    payload: bytes
    read: Callable[[Any], object]
    declared: RecordKind[Any]


KINDS = {
    "manifest": Kind(keys.MANIFEST_FILE, manifest.encode(MANIFEST), manifest.read, manifest.KIND),
    "receipt": Kind(
        keys.receipt_key(PLAN_ID, RECEIPT.file),
        receipts.encode(RECEIPT),
        lambda store: receipts.read(store, PLAN_ID, RECEIPT.file),
        receipts.KIND,
    ),
    "claim": Kind(keys.CLAIM_FILE, claims.encode(claims.Claim.now(PLAN_ID, "b" * 16)), claims.read, claims.KIND),
    "plan": Kind(
        keys.plan_key(PLAN_ID),
        plan_file.encode(PLAN),
        lambda store: plan_file.read(store, keys.plan_key(PLAN_ID)),
        plan_file.KIND,
    ),
    "progress": Kind(
        keys.progress_key(PLAN_ID),
        progress_file.encode(PROGRESS),
        lambda store: progress_file.KIND.read(store, keys.progress_key(PLAN_ID)),
        progress_file.KIND,
    ),
    "numerics class": Kind(
        keys.numerics_key(PLAN_ID, 0),
        numerics.KIND.encode(numerics.Agreement("cpu", "b" * 16)),
        lambda store: numerics.KIND.read(store, keys.numerics_key(PLAN_ID, 0)),
        numerics.KIND,
    ),
}


def read_as(kind: Kind, payload: bytes, folder: Path) -> object:
    store = open_store(str(folder), StorageConfig(), writable=True)
    store.put(kind.key, payload)
    return kind.read(store)


def with_fields(kind: Kind, **fields: object) -> bytes:
    plain = json.loads(kind.payload) | fields
    plain.pop(SEAL_KEY, None)
    text = json.dumps(plain)
    return seal(text) if kind.declared.is_sealed else text.encode()


@pytest.mark.parametrize("name", KINDS)
def test_a_record_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]

    found = read_as(kind, kind.payload, tmp_path)

    if name == "plan":
        assert isinstance(found, plan_file.RecordedPlan)
        assert {found.plan.plan_id, found.plan_id, found.digest} == {PLAN.plan_id}
    else:
        assert kind.declared.encode(found) == kind.payload


@pytest.mark.parametrize("name", KINDS)
def test_a_record_that_is_gone_is_missing_and_not_malformed(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        KINDS[name].read(open_store(str(tmp_path), StorageConfig()))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bound", ["max_bytes", "max_values"])
def test_more_than_is_read_of_a_record_is_refused_before_it_is_parsed(name: str, bound: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    payload = kind.payload + b"[" * 20 if bound == "max_values" else kind.payload
    most = 19 if bound == "max_values" else len(payload) - 1
    store = open_store(str(tmp_path), StorageConfig(), writable=True)
    store.put(kind.key, payload)

    with pytest.raises(CheckpointError, match=rf"{kind.key} is not {kind.declared.noun} of stockflow: .*{most:,}"):
        replace(kind.declared, **{bound: most}).read(store, kind.key)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].declared.format])
def test_a_record_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    expected = f"expected the format '{KINDS[name].declared.format}', found 'another'"

    with pytest.raises(CheckpointError, match=expected):
        read_as(KINDS[name], with_fields(KINDS[name], format="another"), tmp_path)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "plan"])
def test_an_unknown_field_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the field 'colour' is unknown"):
        read_as(KINDS[name], with_fields(KINDS[name], colour="red"), tmp_path)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].declared.is_sealed])
def test_a_sealed_record_that_was_altered_is_refused(name: str, tmp_path: Path) -> None:
    payload = KINDS[name].payload.replace(PLAN_ID.encode(), b"f" * 64, 1)

    with pytest.raises(CheckpointError, match="is not as it was written"):
        read_as(KINDS[name], payload, tmp_path)


@dataclass(frozen=True)
class Part:
    """A part of a record."""

    sizes: tuple[int, ...]
    share: float | None = None


@dataclass(frozen=True)
class Whole:
    """A record of parts."""

    name: str
    parts: dict[str, int]


@pytest.mark.parametrize(
    ("plain", "told"),
    [
        ({"sizes": [1, -1]}, "'sizes': expected a whole number from 0 to 2**63 - 1, found -1"),
        ({"sizes": [True]}, "'sizes': expected a whole number from 0 to 2**63 - 1, found True"),
        ({"sizes": [2**63]}, "'sizes': expected a whole number from 0 to 2**63 - 1, found 9223372036854775808"),
        ({"sizes": {}}, "'sizes': expected a list, found {}"),
        ({"sizes": [], "share": "1"}, "'share': expected a finite number, found '1'"),
        ({"share": 1.0}, "the field 'sizes' is missing"),
        ([], "expected a mapping, found []"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(plain: object, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        parse_record(Part, plain)


def test_a_field_that_no_record_can_hold_is_a_mistake_of_its_declaration() -> None:
    kind = RecordKind("a whole", partial(parse_record, Whole), 100, 10)

    with pytest.raises(TypeError, match="a record cannot hold dict"):
        kind.parse(b'{"name": "a", "parts": {}}', "here")
