"""The safetensors header: what a tensor is, the one dtype table, a strict parser and an encoder.

Source: https://github.com/huggingface/safetensors, format description and its validation rules.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, cast

from stockflow.errors import HeaderError
from stockflow.text.strictjson import parse_json, shown

MAX_HEADER_BYTES = 100_000_000
"""The format's own cap."""
LENGTH_BYTES = 8
MAX_INTEGER = 2**63 - 1
METADATA_KEY = "__metadata__"
_FORMAT = re.compile(rb'"__metadata__"\s*:\s*\{[^{}]*"format"\s*:\s*"(\w+)"')
_FIELDS = {"dtype", "shape", "data_offsets"}
"""Of an entry; others are passed over, as the reference reader does."""

DtypeKind = Literal["float", "integer", "packed", "complex"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type of the format."""

    name: str
    bits: int
    kind: DtypeKind
    """``packed``: floating point of 8 bits or less, whose meaning depends on scales stored elsewhere"""


_NAMES: dict[tuple[int, DtypeKind], tuple[str, ...]] = {
    (4, "packed"): ("F4",),
    (6, "packed"): ("F6_E2M3", "F6_E3M2"),
    (8, "packed"): ("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    (8, "integer"): ("BOOL", "U8", "I8"),
    (16, "integer"): ("I16", "U16"),
    (16, "float"): ("F16", "BF16"),
    (32, "integer"): ("I32", "U32"),
    (32, "float"): ("F32",),
    (64, "integer"): ("I64", "U64"),
    (64, "float"): ("F64",),
    (64, "complex"): ("C64",),
}
DTYPES: dict[str, Dtype] = {name: Dtype(name, *key) for key, names in _NAMES.items() for name in names}
"""Every dtype of the format, by its name in a header."""


def width_of(dtype: str) -> int:
    """Return the bytes of an element, of dtypes that fill whole ones."""
    return DTYPES[dtype].bits // 8


@lru_cache(2**12)
def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; models have few shapes, and planning asks for each of them again and again."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


class TensorSpec(NamedTuple):
    """Name, element type and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elems(self) -> int:
        """Number of elements; 1 for a zero-dimensional tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return size_of(self.dtype, self.shape)

    @property
    def kind(self) -> DtypeKind:
        """What sort of numbers the tensor holds."""
        return DTYPES[self.dtype].kind


class PlacedTensor(NamedTuple):
    """A tensor and where its bytes lie in its file."""

    spec: TensorSpec
    start: int
    """absolute byte offset in the file"""


class FileContents(NamedTuple):
    """What is in a file of weights."""

    tensors: list[PlacedTensor]
    """in the order of their bytes"""
    others: tuple[str, ...] = ()
    """names of what is no tensor"""
    format: str = "pt"
    """whose tensors these are, by what the metadata of safetensors says: PyTorch's, ``tf``, ``flax`` or ``mlx``"""


def encode_header(specs: Iterable[TensorSpec], metadata: dict[str, str]) -> bytes:
    """Return the first bytes of a file, complete before any tensor is computed.

    Tensors follow in the order given, without gaps. The JSON is padded with spaces to a multiple of
    8 bytes, as the reference writer does, so equal input gives equal files.
    """
    entries: dict[str, object] = {METADATA_KEY: metadata} if metadata else {}
    start = 0
    for spec in specs:
        stop = start + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def header_bytes(first_bytes: bytes, file_size: int, where: str) -> int:
    """Return the size of length field and JSON together, in bytes.

    Raises:
        HeaderError: the file is too short, or the length is beyond the file or the format's cap.
    """
    if len(first_bytes) < LENGTH_BYTES:
        raise HeaderError(
            f"{where} is {file_size} bytes long; a safetensors file starts with an {LENGTH_BYTES}-byte length"
        )
    (length,) = struct.unpack_from("<Q", first_bytes)
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{where} claims a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}. "
            "It is probably not a safetensors file"
        )
    if LENGTH_BYTES + length > file_size:
        raise HeaderError(
            f"{where} claims a header of {length:,} bytes but is only {file_size:,} bytes long; it was truncated"
        )
    return LENGTH_BYTES + int(length)


def parse_header(head: bytes, file_size: int, where: str) -> list[PlacedTensor]:
    """Return the tensors of a file in the order of their bytes.

    Args:
        head: exactly the length field and the JSON (see ``header_bytes``).
        file_size: of the whole file, in bytes.
        where: names the file in messages.

    Raises:
        HeaderError: anything the format does not allow.
    """
    entries = _parse_json(head[LENGTH_BYTES:], where)
    _check_metadata(entries.pop(METADATA_KEY, None), where)
    placed = sorted(_parse_entries(entries, where), key=lambda entry: (entry[1], entry[2]))
    data_start, expected = len(head), 0
    for spec, start, stop in placed:
        if start != expected:
            problem = "overlaps the tensor before it" if start < expected else "leaves a gap before it"
            raise HeaderError(
                f"{where}: tensor {shown(spec.name)} {problem}: its data starts at {start:,}, expected {expected:,}"
            )
        expected = stop
    if data_start + expected != file_size:
        problem = "was truncated" if data_start + expected > file_size else "has trailing bytes"
        raise HeaderError(
            f"{where} {problem}: its header describes {data_start + expected:,} bytes, the file has {file_size:,}"
        )
    return [PlacedTensor(spec, data_start + start) for spec, start, _ in placed]


def format_of(head: bytes) -> str:
    """Return whose the tensors of a file are by what its metadata says; PyTorch's if it says nothing."""
    found = _FORMAT.search(head)
    return found[1].decode() if found else "pt"


def _parse_json(body: bytes, where: str) -> dict[str, object]:
    if not body.startswith(b"{"):
        raise HeaderError(f"{where}: the header does not begin with '{{'")
    try:
        return cast(dict[str, object], parse_json(body, allows_constants=False))
    except ValueError as error:
        raise HeaderError(f"{where}: the header is not valid: {error}") from None


def _check_metadata(metadata: object, where: str) -> None:
    if metadata is not None and not isinstance(metadata, dict):
        raise HeaderError(f"{where}: {METADATA_KEY} must map strings to strings")
    if metadata and not all(
        isinstance(value, str) and is_text(key) and is_text(value) for key, value in metadata.items()
    ):
        raise HeaderError(f"{where}: {METADATA_KEY} must map strings to strings")


def _parse_entries(entries: dict[str, object], where: str) -> Iterator[tuple[TensorSpec, int, int]]:
    for name, entry in entries.items():
        if not is_text(name):
            raise HeaderError(
                f"{where}: the name of tensor {shown(name)} holds half of a surrogate pair, which is not Unicode"
            )
        if type(entry) is not dict or not entry.keys() >= _FIELDS:
            raise HeaderError(f"{where}: the entry of tensor {shown(name)} must hold dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise HeaderError(f"{where}: tensor {shown(name)} has the unknown dtype {shown(dtype)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise HeaderError(
                f"{where}: tensor {shown(name)} must have a shape and two data_offsets of integers from 0 to 2**63 - 1"
            )
        start, stop = offsets
        num_elems = _product_within(shape, MAX_INTEGER)
        num_bits = num_elems * DTYPES[dtype].bits
        if num_bits // 8 > MAX_INTEGER:
            raise HeaderError(f"{where}: the size of tensor {shown(name)} overflows: shape {shown(shape)}")
        if num_bits % 8:
            raise HeaderError(
                f"{where}: tensor {shown(name)} of {dtype} does not fill whole bytes: shape {shown(shape)}"
            )
        if stop - start != num_bits // 8:
            raise HeaderError(
                f"{where}: tensor {shown(name)} of {dtype} {shown(shape)} takes {num_bits // 8:,} bytes, "
                f"its data_offsets say {stop - start:,}"
            )
        yield TensorSpec(name, dtype, tuple(shape)), start, stop


def is_text(value: str) -> bool:
    """Whether ``value`` can be encoded: JSON's escapes can spell halves of surrogate pairs, which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _product_within(sizes: list[int], limit: int) -> int:
    """The product, or 8 times ``limit`` once it is larger: that of thousands of large sizes would take minutes."""
    product = 1
    for size in sizes:
        product *= size
        if product > limit:
            return 8 * limit
    return product


def _are_sizes(value: object) -> bool:
    """Whether ``value`` is a list of plain integers in range; booleans and floats are not."""
    if type(value) is not list or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_INTEGER)
