"""Headers that break one rule each, made from valid ones, and the rules by the words that refuse them."""

import json
import random
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stockflow.checkpoints.files.header import DTYPES, MAX_HEADER_BYTES, MAX_INTEGER, header_bytes, parse_header

WHERE = "folder/model.safetensors"
NAMES = ("model.layers.0.weight", "lm_head", "größe", "重み", "a b", "x/y", "", "..", "emoji 🤗", "C:\\x", "n" * 300)
WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0]
PARTS_OF_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits % 8]

RULES: Mapping[str, str] = {
    "the file holds a length": r"starts with an 8-byte length",
    "the length is within the format's cap": r"the format allows 100,000,000",
    "the header is within the file": r"but is only [\d,]+ bytes long; it was truncated",
    "the header begins with a brace": r"does not begin with '\{'",
    "the header is UTF-8": r"it is not UTF-8",
    "the header is nested within bounds": r"nested too deeply",
    "no key occurs twice": r"occurs twice",
    "numbers are finite": r"(NaN|Infinity) is not a number",
    "integers can be read": r"integer string conversion",
    "the header is JSON": r"the header is not valid: (Expecting|Extra data|Invalid|Unterminated|Illegal)",
    "metadata maps texts to texts": r"__metadata__ must map",
    "names are Unicode": r"half of a surrogate pair",
    "an entry has its three keys": r"must hold dtype, shape and data_offsets",
    "the dtype is known": r"unknown dtype",
    "sizes are whole numbers within 63 bits": r"integers from 0 to 2\*\*63 - 1",
    "a size does not overflow": r"overflows",
    "a tensor fills whole bytes": r"does not fill whole bytes",
    "offsets are as long as the tensor": r"its data_offsets say",
    "tensors leave no gap": r"leaves a gap",
    "tensors do not overlap": r"overlaps the tensor",
    "the data is in the file": r"was truncated: its header describes",
    "nothing follows the data": r"has trailing bytes",
}
"""Every reason to refuse a header, and how its message is known."""


def rule_of(message: str) -> str:
    """Return the rule that a message says is broken."""
    found = [rule for rule, words in RULES.items() if re.search(words, message)]
    if len(found) != 1:
        raise AssertionError(f"this message is of no rule, or of several: {message}")
    return found[0]


def parse(file: bytes) -> object:
    """Parse the header of a file, as checkpoints do: the length first."""
    return parse_header(file[: header_bytes(file[:8], len(file), WHERE)], len(file), WHERE)


Header = dict[str, Any]


def valid(random: random.Random) -> tuple[Header, int]:
    """Return the mapping of a valid header with at least two tensors that have bytes, and the size of its data."""
    header: Header = {}
    if random.random() < 0.7:
        header["__metadata__"] = {"format": "pt", "k" * random.randrange(9): "värde"}
    stop = 0
    for name in random.sample(NAMES, random.randrange(2, len(NAMES))):
        shape = [random.randrange(1, 5) for _ in range(random.randrange(4))]
        if len(header) > 3 and random.random() < 0.2:
            shape.append(0)
        dtype = random.choice(WHOLE_BYTES)
        size = DTYPES[dtype].bits // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [stop, stop + size]}
        stop += size
    entries = list(header.items())
    random.shuffle(entries)
    return dict(entries), stop


def file_of(header: Header | str | bytes, num_data_bytes: int, *, padding: bytes = b"") -> bytes:
    """Return a file with this header: a mapping, or its text."""
    if isinstance(header, dict):
        header = json.dumps(header, ensure_ascii=False)
    body = (header.encode() if isinstance(header, str) else header) + padding
    return struct.pack("<Q", len(body)) + body + bytes(num_data_bytes)


def _tensor(random: random.Random, header: Header) -> tuple[str, dict[str, Any]]:
    """Return one of the tensors that have bytes."""
    names = [name for name, entry in header.items() if name != "__metadata__" and 0 not in entry["shape"]]
    name = random.choice(names)
    return name, header[name]


def _last(header: Header) -> dict[str, Any]:
    """Return the tensor at the end of the data."""
    tensors = (entry for name, entry in header.items() if name != "__metadata__" and 0 not in entry["shape"])
    return max(tensors, key=lambda entry: int(entry["data_offsets"][1]))


def _insert(random: random.Random, header: Header, entry: str) -> str:
    """Return the header's text with one more entry at a random place."""
    entries = [json.dumps({name: value}, ensure_ascii=False)[1:-1] for name, value in header.items()]
    entries.insert(random.randrange(len(entries) + 1), entry)
    return f"{{{','.join(entries)}}}"


Mutation = Callable[[random.Random, Header, int], bytes]


def short(random: random.Random, header: Header, size: int) -> bytes:
    return file_of(header, size)[: random.randrange(8)]


def huge_length(random: random.Random, header: Header, size: int) -> bytes:
    anywhere = random.randrange(10**9, 2**64)
    length = random.choice([MAX_HEADER_BYTES + 1, 10**12, 50 * 10**12, 2**63, 2**64 - 1, anywhere])
    return struct.pack("<Q", length) + file_of(header, size)[8:]


def length_beyond_the_file(random: random.Random, header: Header, size: int) -> bytes:
    file = file_of(header, size)
    return struct.pack("<Q", len(file) - 8 + random.randrange(1, 10**6)) + file[8:]


def another_beginning(random: random.Random, header: Header, size: int) -> bytes:
    first = random.choice([b" ", b"\n", b"\xef\xbb\xbf", b"[", b"\0", b'"', b"1", b"PK"])
    return file_of(first + json.dumps(header).encode(), size)


def no_header(random: random.Random, header: Header, size: int) -> bytes:
    return struct.pack("<Q", 0) + bytes(random.randrange(99))


def bytes_that_are_no_text(random: random.Random, header: Header, size: int) -> bytes:
    body = bytearray(json.dumps(header).encode())
    place = random.randrange(1, len(body))
    body[place:place] = random.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"\x80"])
    return file_of(bytes(body), size)


def deep(random: random.Random, header: Header, size: int) -> bytes:
    opened, closed = random.choice([("[", "]"), ('{"a":', "}")])
    depth = random.choice([120, 400, 900, 990, 5_000, 50_000])
    end = closed * depth if random.random() < 0.5 else ""
    return file_of(_insert(random, header, f'"deep":{opened * depth}1{end}'), size)


def doubled(random: random.Random, header: Header, size: int) -> bytes:
    name, entry = random.choice(list(header.items()))
    if random.random() < 0.5:
        return file_of(_insert(random, header, json.dumps({name: entry}, ensure_ascii=False)[1:-1]), size)
    inner = ",".join([json.dumps(entry)[1:-1], *[json.dumps({key: entry[key]})[1:-1] for key in list(entry)[:1]]])
    others = {key: value for key, value in header.items() if key != name}
    return file_of(_insert(random, others, f"{json.dumps(name)}:{{{inner}}}"), size)


def constant(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    entry[random.choice(["shape", "data_offsets"])].append(random.choice([float("nan"), float("inf"), -float("inf")]))
    return file_of(header, size)


def integer_of_many_digits(random: random.Random, header: Header, size: int) -> bytes:
    digits = "9" * random.choice([4_301, 5_000, 50_000])
    return file_of(_insert(random, header, f'"n":{{"dtype":"U8","shape":[{digits}],"data_offsets":[0,1]}}'), size)


UNQUOTABLE = ["\x01", "\n", "\\x"]


def broken_json(random: random.Random, header: Header, size: int) -> bytes:
    text = json.dumps(header)
    match random.randrange(6):
        case 0:
            text = text[: random.randrange(1, len(text))]
        case 1:
            text += random.choice(["{}", ",", "\0" * 8, "x", "]"])
        case 2:
            text = text.replace(":", random.choice(["", "=", "::"]), 1)
        case 3:
            text = text.replace('"', "'")
        case 4:
            text = text[:-1] + random.choice([",}", ",,", "//"])
        case 5:
            text = text.replace('"dtype"', f'"dt{random.choice(UNQUOTABLE)}ype"', 1)
    return file_of(text, size)


def wrong_metadata(random: random.Random, header: Header, size: int) -> bytes:
    header["__metadata__"] = random.choice(
        [[], "pt", 1, {"a": 1}, {"a": None}, {"a": {}}, {"a": ["x"]}, {"a": True}, {"a": "x", "b": 1.5}]
    )
    return file_of(header, size)


def metadata_that_is_no_text(random: random.Random, header: Header, size: int) -> bytes:
    return file_of(json.dumps(header | {"__metadata__": {"\ud800": "a", "b": "\udfff"}}), size)


def name_that_is_no_text(random: random.Random, header: Header, size: int) -> bytes:
    name, _ = _tensor(random, header)
    half = random.choice(["\ud800", "\udc00x"])
    return file_of(json.dumps({name + half if key == name else key: entry for key, entry in header.items()}), size)


def wrong_entry(random: random.Random, header: Header, size: int) -> bytes:
    name, entry = _tensor(random, header)
    match random.randrange(3):
        case 0:
            header[name] = random.choice([None, [], 1, "x", True, [entry], {}, 1.5])
        case 1:
            del entry[random.choice(list(entry))]
        case 2:
            entry["type"] = entry.pop("dtype")
    return file_of(header, size)


def unknown_dtype(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    entry["dtype"] = random.choice([None, 1, "f32", "F31", "", ["F32"], {"a": 1}, "F32 ", "\ud800", "x" * 10**5, True])
    return file_of(json.dumps(header), size)


WRONG_SIZES = [-1, 2**63, 2**64 + 1, 10**4000, True, 1.0, "1", None, [1], {"a": 1}, -(2**70), 1e300]


def wrong_sizes(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    key = random.choice(["shape", "data_offsets"])
    if random.random() < 0.6:
        entry[key] = [*entry[key], random.choice(WRONG_SIZES)] if key == "shape" else [0, random.choice(WRONG_SIZES)]
    elif key == "shape":
        entry[key] = random.choice([None, 1, "x", {}, [[]], True])
    else:
        entry[key] = random.choice([None, 1, "x", {}, [], [0], [0, 1, 2], [[], []]])
    return file_of(header, size)


def overflowing_shape(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    entry["shape"] = random.choice(
        [[2**62, 4], [MAX_INTEGER] * random.randrange(2, 2_000), [2**32] * 2, [3] * 50, [2**62, 4, 0], [10**12] * 2]
    )
    return file_of(header, size)


def part_of_a_byte(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    entry["dtype"], entry["shape"] = random.choice(PARTS_OF_BYTES), random.choice([[3], [1], [5, 7], []])
    return file_of(header, size)


def offsets_of_another_length(random: random.Random, header: Header, size: int) -> bytes:
    _, entry = _tensor(random, header)
    start, stop = entry["data_offsets"]
    match random.randrange(4):
        case 0:
            entry["data_offsets"] = [stop, start]
        case 1:
            entry["data_offsets"] = [start, stop + random.randrange(1, 99)]
        case 2:
            entry["shape"] = [*entry["shape"], random.randrange(2, 2**20)]
        case 3:
            entry["shape"] = [0]
    return file_of(header, size)


def gap(random: random.Random, header: Header, size: int) -> bytes:
    moved = random.randrange(1, 2**40)
    entry = _last(header) if random.random() < 0.5 else None
    for name, each in header.items():
        if name != "__metadata__" and (entry is None or each is entry):
            each["data_offsets"] = [offset + moved for offset in each["data_offsets"]]
    return file_of(header, size)


def overlap(random: random.Random, header: Header, size: int) -> bytes:
    entry = _last(header)
    start, stop = entry["data_offsets"]
    back = random.randrange(1, start + 1)
    entry["data_offsets"] = [start - back, stop - back]
    return file_of(header, size)


def cut_data(random: random.Random, header: Header, size: int) -> bytes:
    return file_of(header, size - random.randrange(1, size + 1))


def trailing_bytes(random: random.Random, header: Header, size: int) -> bytes:
    return file_of(header, size + random.randrange(1, 99), padding=b" " * random.randrange(9))


MUTATIONS: tuple[Mutation, ...] = (
    short, huge_length, length_beyond_the_file, another_beginning, no_header, bytes_that_are_no_text, deep, doubled,
    constant, integer_of_many_digits, broken_json, wrong_metadata, metadata_that_is_no_text, name_that_is_no_text,
    wrong_entry, unknown_dtype, wrong_sizes, overflowing_shape, part_of_a_byte, offsets_of_another_length, gap, overlap,
    cut_data, trailing_bytes,
)  # fmt: skip


WORDS = (b"1", b"-", b"e9", b"null", b"NaN", b"[", b"}", b'"', b"\\u", b"\xff", b",", b":")


def scrambled(random: random.Random, file: bytes) -> bytes:
    """Return a file with a few bytes changed, inserted, cut or moved, and mostly a length that fits."""
    body = bytearray(file)
    for _ in range(random.randrange(1, 5)):
        place, other = sorted(random.randrange(8, len(body) + 1) for _ in range(2))
        match random.randrange(5):
            case 0:
                body[place:place] = random.choice(WORDS)
            case 1:
                body[place : place + 1] = bytes([random.randrange(256)])
            case 2:
                del body[place : place + random.randrange(1, 9)]
            case 3:
                body[place:place] = body[place:other]
            case 4:
                body += bytes(random.randrange(9))
    if random.random() < 0.8:
        body[:8] = struct.pack("<Q", max(bytes(body).rfind(b"}") - 7, 0))
    return bytes(body)


def malformed(seed: int, num_each: int) -> Iterator[bytes]:
    """Yield files of every mutation, ``num_each`` of each, and as many scrambled ones of every kind."""
    for mutation in MUTATIONS:
        source = random.Random(f"{seed} {mutation.__name__}")
        for _ in range(num_each):
            file = mutation(source, *valid(source))
            yield file
    source = random.Random(f"{seed} scrambled")
    for _ in range(num_each * 4):
        yield scrambled(source, file_of(*valid(source)))
