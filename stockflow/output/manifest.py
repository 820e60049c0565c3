"""The manifest: the record that makes an output official."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from stockflow.checkpoints.adapters.config import CONFIG_KEY
from stockflow.output.keys import MANIFEST_FILE
from stockflow.planning.plan import CheckpointRef
from stockflow.text.records import Place, RecordKind, parse_record
from stockflow.text.remarks import Remark


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """Size and sha256 of one file of an output."""

    size: int
    sha256: str

    @classmethod
    def of(cls, payload: bytes) -> "PublishedFile":
        """Return those of a file with these bytes."""
        return cls(len(payload), hashlib.sha256(payload).hexdigest())


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
    gram: tuple[tuple[float, ...], ...]
    """products of [w_0, d_1 .. d_N] over all tensors whose method needs them; () if there is no such tensor"""
    remarks: tuple[Remark, ...] = ()
    """what its plan said of recipe and inputs"""

    @property
    def is_adapter(self) -> bool:
        """Whether the output is an adapter, which has no plan of shards."""
        return CONFIG_KEY in self.files


KIND = RecordKind(
    noun="a manifest",
    decode=partial(parse_record, Manifest),
    format="stockflow-manifest-1",
    max_bytes=64_000_000,
    max_values=2_000_000,  # a file takes three; a checkpoint of 400 B parameters in shards of 5 GB has 163
    is_sealed=True,
    indent=1,
)
encode, parse = KIND.encode, KIND.parse


def read(store: Place) -> Manifest:
    """Return the manifest of an output.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it cannot be read as one, or is not as it was written.
    """
    return KIND.read(store, MANIFEST_FILE)
