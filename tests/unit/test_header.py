"""The header: byte-equal to the safetensors library's, and strict about everything a file may claim."""

import ctypes
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stockflow.checkpoints.files.header import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    PlacedTensor,
    TensorSpec,
    encode_header,
    header_bytes,
    parse_header,
)
from stockflow.errors import CheckpointError, HeaderError

WHERE = "folder/model.safetensors"

FORMAT_DTYPES = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Names and bits, copied from the format's Rust enum (safetensors 0.8.0)."""

SERIALIZED = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64",
    "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""What the library's ``serialize`` calls the dtypes; F4 and F6 are left out, their logical shape is its own affair."""

NAMES = (
    "model.layers.0.weight", "größe.ß", "重み.0", "emoji.🤗", 'quote"d', "back\\slash", "tab\tand\nnewline",
    "control\x01\x1f", "delete\x7f", "separators\u2028\u2029", "slash/ed", "<&>", " ", "nul\x00",
)  # fmt: skip
SHAPES = ((2, 3), (), (0,), (3, 0, 2), (8,), (1, 1, 1, 4))


def serialize(specs: Mapping[str, TensorSpec], metadata: dict[str, str] | None) -> bytes:
    """The library's file: header and zeros, in the order it chooses."""
    storage = ctypes.create_string_buffer(max((spec.num_bytes for spec in specs.values()), default=0) or 1)
    return bytes(
        safetensors.serialize(
            {
                name: safetensors.TensorSpec(
                    dtype=SERIALIZED[spec.dtype],
                    shape=list(spec.shape),
                    data_ptr=ctypes.addressof(storage),
                    data_len=spec.num_bytes,
                )
                for name, spec in specs.items()
            },
            metadata,
        )
    )


def split(file: bytes) -> bytes:
    """The length field and the JSON of a file."""
    return file[: header_bytes(file[:LENGTH_BYTES], len(file), WHERE)]


def parse(file: bytes) -> list[PlacedTensor]:
    return parse_header(split(file), len(file), WHERE)


def file_of(header: object, num_data_bytes: int = 0) -> bytes:
    """A file with this header (JSON text, bytes, or something to be dumped) and so many bytes of data."""
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    body = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(body)) + body + bytes(num_data_bytes)


def deserialize(file: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What the library finds in a file."""
    found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    return found


def library_accepts(file: bytes) -> bool:
    try:
        deserialize(file)
    except (safetensors.SafetensorError, OverflowError, ValueError):
        return False
    return True


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_entry(shape: str = "[1]", offsets: str = "[0,4]", dtype: str = '"F32"') -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def claimed_bytes(header: object) -> int:
    """Where the last tensor ends, so that the size of the file is not what is wrong with it; 4 if nobody can say."""
    entries = header.values() if isinstance(header, dict) else []
    offsets = [entry["data_offsets"] for entry in entries if isinstance(entry, dict) and "data_offsets" in entry]
    stops = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and 0 <= pair[1] <= 100]
    return int(max(stops, default=4))


# ---------------------------------------------------------------------------------------------- encoding


def test_the_dtype_table_is_the_formats() -> None:
    assert len(FORMAT_DTYPES) == 22
    assert {dtype.name: dtype.bits for dtype in DTYPES.values()} == FORMAT_DTYPES
    assert all(name == dtype.name for name, dtype in DTYPES.items())


@pytest.mark.parametrize("dtype", FORMAT_DTYPES)
def test_the_library_accepts_every_dtype_as_encoded(dtype: str) -> None:
    spec = TensorSpec("t", dtype, (8, 2))

    [(name, found)] = deserialize(encode_header([spec], {}) + bytes(spec.num_bytes))

    assert (name, found["dtype"], list(found["shape"])) == ("t", dtype, [8, 2])
    assert spec.num_bytes == len(found["data"]) == 16 * FORMAT_DTYPES[dtype] // 8


@pytest.mark.parametrize("dtype", SERIALIZED)
@pytest.mark.parametrize("shape", SHAPES)
def test_header_bytes_equal_the_librarys(dtype: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("weight", dtype, shape)

    theirs = serialize({"weight": spec}, {"format": "pt"})

    assert split(theirs) == encode_header([spec], {"format": "pt"})
    assert theirs == encode_header([spec], {"format": "pt"}) + bytes(spec.num_bytes)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, {"größe": 'é"\\\n\x01'}])
def test_header_bytes_equal_the_librarys_for_many_names_and_dtypes_in_its_order(metadata: dict[str, str]) -> None:
    specs = {
        f"{name}#{number}": TensorSpec(f"{name}#{number}", dtype, SHAPES[(number + offset) % len(SHAPES)])
        for offset, name in enumerate(NAMES)
        for number, dtype in enumerate(SERIALIZED)
    }

    theirs = serialize(specs, metadata or None)
    in_its_order = [placed.spec for placed in parse(theirs)]

    assert len(specs) == len(in_its_order)
    assert {spec.name: spec for spec in in_its_order} == specs
    assert split(theirs) == encode_header(in_its_order, metadata)


def test_header_bytes_equal_those_of_save_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "half": torch.ones(3, dtype=torch.float16),
        "byte": torch.ones(5, dtype=torch.uint8),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "flag": torch.ones(2, 2, dtype=torch.bool),
        "重み": torch.ones(2, 2, dtype=torch.float32),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    file = path.read_bytes()

    placed = parse(file)

    assert split(file) == encode_header([entry.spec for entry in placed], {"format": "pt"})
    for entry in placed:
        values = file[entry.start : entry.start + entry.spec.num_bytes]
        assert values == tensors[entry.spec.name].flatten().view(torch.uint8).numpy().tobytes()


def test_the_header_is_padded_to_eight_bytes_with_spaces() -> None:
    for length in range(1, 20):
        head = encode_header([TensorSpec("n" * length, "U8", (3,))], {})
        assert len(head) % 8 == 0
        assert struct.unpack("<Q", head[:8])[0] == len(head) - 8
        assert head[8:].rstrip(b" ").endswith(b"}")


def test_a_file_without_tensors_is_a_file() -> None:
    for metadata in ({}, {"format": "pt"}):
        head = encode_header([], metadata)
        assert parse_header(head, len(head), WHERE) == []
        assert library_accepts(head)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
specs = st.lists(
    st.builds(
        TensorSpec,
        text.filter(lambda name: name != "__metadata__"),
        st.sampled_from([name for name, bits in FORMAT_DTYPES.items() if bits >= 8]),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


@given(specs=specs, metadata=st.dictionaries(text, text, max_size=2))
@settings(max_examples=100)
def test_what_is_encoded_is_parsed_and_accepted_by_the_library(
    specs: list[TensorSpec], metadata: dict[str, str]
) -> None:
    head = encode_header(specs, metadata)
    file = head + bytes(sum(spec.num_bytes for spec in specs))

    placed = parse(file)

    # Tensors without bytes may lie beside their neighbours in any order.
    assert [spec for spec in specs if spec.num_bytes] == [entry.spec for entry in placed if entry.spec.num_bytes]
    assert set(specs) == {entry.spec for entry in placed}
    ends = [len(head), *(entry.start + entry.spec.num_bytes for entry in placed)]
    assert [entry.start for entry in placed] == ends[:-1]
    assert library_accepts(file)


# ---------------------------------------------------------------------------------------------- refusing

BEFORE_THE_JSON = {
    "an empty file": (b"", "is 0 bytes long"),
    "seven bytes": (bytes(7), "is 7 bytes long"),
    "a length without a header": (struct.pack("<Q", 0), "does not begin with '{'"),
    "a header larger than the format allows": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        "100,000,001 bytes; the format allows 100,000,000",
    ),
    "the largest length there is": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615 bytes"),
    "a length beyond the file": (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes but is only 10 bytes long"),
    "a text file": (b"hello world, this is no tensor", "not a safetensors file"),
    "a pickle": (b"PK\x03\x04" + bytes(40), "a safetensors|truncated|does not begin"),
}
JSON_CASES = {
    "not UTF-8": (file_of(b'{"\xff":1}'), r"not UTF-8 \(byte 2\)"),
    "UTF-16": (file_of('{"a":1}'.encode("utf-16-le")), "not valid"),
    "a byte order mark": (file_of(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "a leading space": (file_of(b" {}"), "does not begin with '{'"),
    "a list": (file_of(b"[]"), "does not begin with '{'"),
    "a number": (file_of(b"12"), "does not begin with '{'"),
    "not JSON": (file_of(b'{"a":'), "is not valid"),
    "JSON and more": (file_of(b"{}{}"), "is not valid: Extra data"),
    "zeros as padding": (file_of(b"{}" + bytes(6)), "is not valid: Extra data"),
    "a comment": (file_of(b"{/**/}"), "is not valid"),
    "a trailing comma": (file_of(b'{"a":1,}'), "is not valid"),
    "a raw control character": (file_of(b'{"a\n":1}'), "is not valid"),
    "duplicate tensors": (file_of(f"{raw_entry()[:-1]},{raw_entry()[1:]}", 4), "key 'a' occurs twice"),
    "duplicate keys of a tensor": (
        file_of('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        "key 'dtype' occurs twice",
    ),
    "duplicate metadata": (
        file_of('{"__metadata__":{"k":"1","k":"2"}}'), "key 'k' occurs twice",
    ),
    "two metadata entries": (file_of('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' occurs twice"),
    "deep nesting of lists": (file_of('{"a":' + "[" * 100_000), "nested too deeply"),
    "deep nesting of mappings": (file_of('{"a":' * 100_000), "nested too deeply"),
    "NaN": (file_of(raw_entry(shape="[NaN]"), 4), "NaN is not a number the format allows"),
    "Infinity": (file_of(raw_entry(offsets="[0,Infinity]"), 4), "Infinity is not a number"),
    "negative infinity": (file_of(raw_entry(offsets="[-Infinity,4]"), 4), "-Infinity is not a number"),
    "an integer of 5,000 digits": (file_of(raw_entry(shape=f"[1{'0' * 5000}]"), 4), "not valid|'a'"),
}  # fmt: skip
METADATA_CASES = {
    f"metadata: {metadata}": (file_of(f'{{"__metadata__":{metadata}}}'), "__metadata__ must map strings to strings")
    for metadata in (
        "[]",
        '"pt"',
        "1",
        '{"a":1}',
        '{"a":null}',
        '{"a":{}}',
        '{"a":"\\ud800"}',
        '{"\\udfff":""}',
    )
}
TENSOR_CASES = {
    "an entry that is no mapping": ({"a": [1]}, "hold dtype, shape and data_offsets"),
    "an entry that is null": ({"a": None}, "hold dtype, shape and data_offsets"),
    "an empty entry": ({"a": {}}, "hold dtype, shape and data_offsets"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "hold dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "hold dtype, shape and data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, "hold dtype, shape and data_offsets"),
    "an unknown dtype": ({"a": tensor("F31")}, "unknown dtype 'F31'"),
    "a dtype in lower case": ({"a": tensor("f32")}, "unknown dtype 'f32'"),
    "a dtype that is a number": ({"a": tensor(32)}, "unknown dtype 32"),
    "a dtype that is null": ({"a": tensor(None)}, "unknown dtype None"),
    "a dtype that is a list": ({"a": tensor(["F32"] * 1000)}, r"unknown dtype \['F32'.{60,80}\.\.\.$"),
    "a shape that is a number": ({"a": tensor(shape=1)}, "must have a shape"),
    "a shape that is null": ({"a": tensor(shape=None)}, "must have a shape"),
    "a shape that is a text": ({"a": tensor(shape="1")}, "must have a shape"),
    "a boolean size": ({"a": tensor(shape=[True])}, "must have a shape"),
    "a float size": ({"a": tensor(shape=[1.0])}, "must have a shape"),
    "an exponent": (raw_entry(shape="[1e0]"), "must have a shape"),
    "a size in quotes": ({"a": tensor(shape=["1"])}, "must have a shape"),
    "a nested shape": ({"a": tensor(shape=[[1]])}, "must have a shape"),
    "a negative size": ({"a": tensor(shape=[-1])}, "must have a shape"),
    "two negative sizes": ({"a": tensor(shape=[-1, -1])}, "must have a shape"),
    "a size of 2**63": ({"a": tensor(shape=[2**63, 0])}, "must have a shape"),
    "a size of 2**64 + 1": ({"a": tensor(shape=[2**64 + 1])}, "must have a shape"),
    "a size of 10**4000": ({"a": tensor(shape=[10**4000])}, "must have a shape"),
    "offsets that are null": ({"a": tensor(offsets=None)}, "two data_offsets"),
    "one offset": ({"a": tensor(offsets=[0])}, "two data_offsets"),
    "three offsets": ({"a": tensor(offsets=[0, 4, 4])}, "two data_offsets"),
    "a boolean offset": ({"a": tensor(offsets=[False, 4])}, "two data_offsets"),
    "a float offset": ({"a": tensor(offsets=[0.0, 4.0])}, "two data_offsets"),
    "a negative offset": ({"a": tensor(offsets=[-4, 0])}, "two data_offsets"),
    "an offset of 2**64": ({"a": tensor(offsets=[0, 2**64])}, "two data_offsets"),
    "offsets in reverse": ({"a": tensor(offsets=[4, 0])}, "takes 4 bytes, its data_offsets say -4"),
    "too few bytes": ({"a": tensor(shape=[2])}, "takes 8 bytes, its data_offsets say 4"),
    "too many bytes": ({"a": tensor(shape=[0])}, "takes 0 bytes, its data_offsets say 4"),
    "an overflowing shape": ({"a": tensor(shape=[2**62, 4])}, "overflows"),
    "an overflow in bytes alone": ({"a": tensor(shape=[2**62])}, "overflows"),
    "an overflow that a zero hides": ({"a": tensor(shape=[2**62, 4, 0], offsets=[0, 0])}, "overflows"),
    "an F4 that does not fill a byte": ({"a": tensor("F4", [3], [0, 1])}, "does not fill whole bytes"),
    "an F6 that does not fill a byte": ({"a": tensor("F6_E2M3", [2], [0, 2])}, "does not fill whole bytes"),
    "half of a surrogate pair": ('{"\\ud800a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "surrogate"),
    "a gap at the start": ({"a": tensor(offsets=[4, 8])}, "leaves a gap before it: its data starts at 4, expected 0"),
    "a gap": ({"b": tensor(), "a": tensor(offsets=[8, 12])}, "leaves a gap before it: its data starts at 8"),
    "an overlap": ({"b": tensor(), "a": tensor(offsets=[2, 6])}, "overlaps the tensor before it"),
    "the same bytes twice": ({"A": tensor(), "a": tensor()}, "overlaps the tensor before it"),
    "a tensor inside another": (
        {"b": tensor(shape=[3], offsets=[0, 12]), "a": tensor(offsets=[4, 8])}, "overlaps the tensor before it",
    ),
    "an empty tensor inside another": (
        {"b": tensor(), "a": tensor(shape=[0], offsets=[2, 2])}, "overlaps the tensor before it",
    ),
    "an empty tensor past the end": ({"b": tensor(), "a": tensor(shape=[0], offsets=[9, 9])}, "leaves a gap"),
}  # fmt: skip
SIZE_CASES = {
    "offsets past the end": (file_of({"a": tensor()}, 3), "was truncated: its header describes"),
    "no data at all": (file_of({"a": tensor()}), "was truncated"),
    "a tensor of an exabyte": (file_of({"a": tensor("U8", [2**60], [0, 2**60])}, 4), "was truncated"),
    "a trailing byte": (file_of({"a": tensor()}, 5), "has trailing bytes"),
    "data without tensors": (file_of("{}", 1), "has trailing bytes"),
}
FILES = (
    BEFORE_THE_JSON
    | JSON_CASES
    | METADATA_CASES
    | SIZE_CASES
    | {case: (file_of(header, claimed_bytes(header)), message) for case, (header, message) in TENSOR_CASES.items()}
)
STRICTER_THAN_THE_LIBRARY = {
    "a leading space", "duplicate tensors", "duplicate metadata", "a key too many",
}  # fmt: skip
"""Breaches of the format's description that safetensors 0.8.0 lets pass."""


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_is_refused_in_words(case: str) -> None:
    file, message = FILES[case]

    with pytest.raises(HeaderError, match=message) as caught:
        parse(file)

    found = str(caught.value)
    assert found.startswith(WHERE)
    assert len(found) < 400
    assert isinstance(caught.value, CheckpointError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    if case in TENSOR_CASES:
        assert "tensor 'a'" in found or "tensor '\\ud800a'" in found


@pytest.mark.parametrize("case", FILES)
def test_the_library_refuses_it_too(case: str) -> None:
    """Where it does not, the list says so: a new version that differs should be noticed."""
    file, _ = FILES[case]

    assert library_accepts(file) == (case in STRICTER_THAN_THE_LIBRARY)


def test_every_case_is_wrong_for_its_own_reason_only() -> None:
    """The bytes around the breaches are right: without them the library and we accept the file."""
    for file in (file_of({"a": tensor()}, 4), file_of(raw_entry(), 4), file_of('{"__metadata__":{"a":"b"}}')):
        parse(file)
        assert library_accepts(file)


@pytest.mark.parametrize(
    ("case", "file"),
    {
        "offsets out of the order of names": file_of({"a": tensor(offsets=[4, 8]), "b": tensor()}, 8),
        "no padding": file_of(b"{}"),
        "fields that nobody knows": file_of({"a": tensor() | {"strides": [1], "": None}}, 4),
        "white space of all kinds after the JSON": file_of(b"{} \t\r\n"),
        "empty tensors at every place": file_of(
            {
                "x": tensor(shape=[0], offsets=[4, 4]),
                "a": tensor(),
                "y": tensor(shape=[0, 5], offsets=[0, 0]),
                "z": tensor(shape=[3, 0], offsets=[4, 4]),
            },
            4,
        ),
        "a zero before what would overflow": file_of({"a": tensor(shape=[0, 2**62, 4], offsets=[0, 0])}),
        "an escaped name": file_of('{"\\u0061\\ud83e\\udd17":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1),
        "an empty name": file_of({"": tensor()}, 4),
        "an F4 that fills a byte": file_of({"a": tensor("F4", [2, 3], [0, 3])}, 3),
        "an F6 that fills three": file_of({"a": tensor("F6_E3M2", [4], [0, 3])}, 3),
    }.items(),
)
def test_what_the_format_allows_is_accepted(case: str, file: bytes) -> None:
    placed = parse(file)

    assert library_accepts(file), case
    theirs = {name: (found["dtype"], tuple(found["shape"])) for name, found in deserialize(file)}
    assert theirs == {entry.spec.name: (entry.spec.dtype, entry.spec.shape) for entry in placed}


def test_nesting_just_below_the_parsers_limit_is_refused_in_words() -> None:
    """Neither comparing nor printing what was found may exhaust the stack that parsing has just spared."""
    limit = sys.getrecursionlimit()
    for depth in range(limit - 120, limit + 20, 4):
        for nested in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            for header in (f'{{"a":{nested}}}', raw_entry(dtype=nested), raw_entry(shape=nested)):
                with pytest.raises(HeaderError):
                    parse(file_of(header, 4))


@pytest.mark.timeout(120)
def test_thousands_of_huge_sizes_are_refused_at_once() -> None:
    """A naive product of a million 63-bit numbers takes hours."""
    file = file_of(raw_entry(shape=f"[{','.join([str(2**63 - 1)] * 1_000_000)}]"), 4)

    with pytest.raises(HeaderError, match="overflows") as caught:
        parse(file)

    assert len(str(caught.value)) < 400


def test_twenty_thousand_tensors_are_parsed_in_order() -> None:
    wanted = [TensorSpec(f"model.layers.{n}.weight", "BF16", (n % 7, 2)) for n in range(20_000)]
    head = encode_header(wanted, {"format": "pt"})

    placed = parse_header(head, len(head) + sum(spec.num_bytes for spec in wanted), WHERE)

    assert [spec for spec in wanted if spec.num_bytes] == [entry.spec for entry in placed if entry.spec.num_bytes]


# ---------------------------------------------------------------------------------------------- mutations

SEED_FILE = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor("BF16", [2, 3], [0, 12]),
        "é": tensor("F4", [2], [12, 13]),
        "scalar": tensor("F64", [], [13, 21]),
    },
    21,
)
WORDS = (
    b"1",
    b"-",
    b".",
    b"e",
    b"null",
    b"NaN",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\ud800",
    b"\xff",
    b"9" * 30,
)


def outcome(file: bytes) -> bool:
    """Whether a file is accepted; anything but a HeaderError escapes."""
    try:
        parse(file)
    except HeaderError:
        return False
    return True


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    file = bytearray(SEED_FILE)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(file)))
        match draw(st.sampled_from(["byte", "insert", "cut", "end"])):
            case "byte" if place < len(file):
                file[place] = draw(st.integers(0, 255))
            case "insert":
                file[place:place] = draw(st.sampled_from(WORDS))
            case "cut":
                del file[place : place + draw(st.integers(1, 9))]
            case "end":
                file += bytes(draw(st.integers(1, 9)))
    if draw(st.booleans()) and len(file) >= LENGTH_BYTES:  # mend the length, so that the JSON is what is wrong
        end = bytes(file).rfind(b"}") + 1
        file[:LENGTH_BYTES] = struct.pack("<Q", max(end - LENGTH_BYTES, 0))
    return bytes(file)


@given(file=mutated())
@example(file=SEED_FILE)
@settings(max_examples=600)
def test_no_mutation_of_a_file_raises_anything_else_or_passes_what_the_library_refuses(file: bytes) -> None:
    if outcome(file):
        assert library_accepts(file) or b"-0" in file  # json.loads takes -0 for 0, serde for a float


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-5, 2**65) | st.sampled_from(["F32", "U8", ""]) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "a"]), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3),
    num_data_bytes=st.integers(0, 9),
)
@settings(max_examples=300)
def test_no_json_raises_anything_else(header: dict[str, object], num_data_bytes: int) -> None:
    file = file_of(header, num_data_bytes)

    if outcome(file):
        assert library_accepts(file)


@given(cut=st.integers(0, len(SEED_FILE) - 1))
@settings(max_examples=60)
def test_no_truncation_passes(cut: int) -> None:
    assert outcome(SEED_FILE)
    assert not outcome(SEED_FILE[:cut])


def test_the_size_of_a_spec() -> None:
    for dtype, bits in FORMAT_DTYPES.items():
        assert TensorSpec("t", dtype, (4, 6)).num_bytes == 24 * bits // 8
    assert TensorSpec("t", "F32", ()).num_elems == 1
    assert TensorSpec("t", "F32", (3, 0)).num_elems == 0
    assert np.prod((2**31, 2**31), dtype=object) == TensorSpec("t", "U8", (2**31, 2**31)).num_bytes
