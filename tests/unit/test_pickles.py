"""Pickles that others wrote: honest ones are understood as Python does, hostile ones are refused, and nothing runs."""

import collections
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from stockflow.checkpoints.files.pickles import Global, Made, Pairs, Persistent, read_pickle
from stockflow.errors import CheckpointError

REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ALLOWED = {Global("collections", "OrderedDict"), REBUILD, Global("torch", "FloatStorage")}
PROTOCOLS = [2, 3, 4, 5]


def read(payload: bytes, max_steps: int = 10_000) -> object:
    return read_pickle(payload, ALLOWED, max_steps, "x.bin")


def plain(found: object) -> object:
    """Return what Python would have made of it."""
    if isinstance(found, Pairs):
        return {plain(key): plain(value) for key, value in found}
    if isinstance(found, list | tuple):
        return type(found)(plain(each) for each in found)
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_constants_and_containers_are_what_python_reads(protocol: int) -> None:
    shared = [1]
    values = {
        "none": None, "true": True, "false": False, "small": 7, "byte": 255, "short": 256, "int": -70_000,
        "long": 2**62, "negative": -(2**40), "float": 1.5, "text": "ü" * 300, "empty": (), "one": (1,), "two": (1, "b"),
        "three": (1, 2, 3), "four": (1, 2, 3, 4), "list": [1, [2, []]], "again": [shared, shared],
        "ordered": collections.OrderedDict(a=1, b=collections.OrderedDict()), 3: "number", "many": list(range(3000)),
    }  # fmt: skip

    found = plain(read(pickle.dumps(values, protocol), 20_000))

    assert found == values
    if protocol > 2:  # as a call of codecs.encode before
        assert read(pickle.dumps([b"bytes", b"x" * 300], protocol)) == [b"bytes", b"x" * 300]


def test_calls_are_kept_by_name_with_arguments_state_and_ids() -> None:
    payload = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x00aQK\x03tR}X\x01\x00\x00\x00bK\x01sb."

    found = read(payload)

    assert isinstance(found, Made)
    assert (found.by, found.args) == (REBUILD, (Persistent("a"), 3))
    assert found.state == [("b", 1)]


class Hostile:
    """Runs a command when Python unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Evaluated(Hostile):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system({self.command!r})",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "around",
    [lambda bad: bad, lambda bad: {"a": [1, (bad,)]}, lambda bad: {"a": 1, bad: 2}],
    ids=["alone", "in", "key"],
)
@pytest.mark.parametrize("kind", [Hostile, Evaluated])
def test_what_python_would_run_is_refused_by_name(
    kind: type[Hostile], around: Any, protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(around(kind(f"touch {marker}")), protocol)

    with pytest.raises(CheckpointError, match=r"x.bin: its pickle names '(posix.system|\w+.eval)'.*nothing ran"):
        read(payload)

    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists(), "it was hostile"


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


FORGED = {
    "an attribute of an allowed module": text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93.",
    "an attribute of an allowed class": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93.",
    "a relative of an allowed name": text("torch._utils") + text("_rebuild_tensor_v2 ") + b"\x93.",
    "a name that is remembered": text("os") + b"\x94" + text("system") + b"\x94h\x00h\x01\x93.",
    "a name of bytes": b"C\x02osC\x06system\x93.",
    "a name that is a call": b"ccollections\nOrderedDict\n)R" + text("system") + b"\x93.",
    "a module with a line break": b"X\x04\x00\x00\x00os\n." + text("system") + b"\x93.",
    "in text": b"cos\nsystem\n.",
}


@pytest.mark.parametrize("payload", FORGED.values(), ids=FORGED)
def test_forged_names_are_refused(payload: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"names .*refused"):
        read(b"\x80\x04" + payload)


REFUSED = {
    "a call of a text": (text("os.system") + b")R.", "calls what is no plain name"),
    "a call of what was called": (b"ctorch._utils\n_rebuild_tensor_v2\n)R)R.", "calls what is no plain name"),
    "a call with a list": (b"ctorch._utils\n_rebuild_tensor_v2\n]R.", "calls what is no plain name"),
    "attributes of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets attributes of what has none"),
    "attributes of a text": (text("a") + b"}b.", "sets attributes of what has none"),
    "an instance of old": (b"(ios\nsystem\n.", "instruction 'i'"),
    "an object of old": (b"(cos\nsystem\no.", "names 'os.system'"),
    "a registered extension": (b"\x82\x01.", r"instruction '\\x82'"),
    "a call with keywords": (b")}\x92.", r"instruction '\\x92'"),
    "an id in text": (b"P0\n.", "instruction 'P'"),
    "a huge text": (b"\x8d" + struct.pack("<Q", 2**62) + b"a.", "damaged at byte 9"),
    "huge bytes": (b"\x8e" + struct.pack("<Q", 2**62) + b"a.", "damaged"),
    "a huge array of bytes": (b"\x96" + struct.pack("<Q", 2**40) + b".", "instruction"),
    "a huge number": (b"\x8b" + struct.pack("<i", 2**30) + b".", "instruction"),
    "a text that is cut": (b"X\xff\xff\xff\x7fabc", "damaged"),
    "a remembered value that is none": (b"j\xff\xff\xff\x7f.", "damaged"),
    "an end before a value": (b".", "damaged"),
    "two values at the end": (b"NN.", "damaged"),
    "no end": (b"N", "damaged"),
    "nothing": (b"", "damaged"),
    "a tuple of too much": (b"N\x86.", "damaged"),
    "a mark that is none": (b"Nt.", "damaged"),
    "pairs of three": (b"}(NNNu.", "damaged"),
    "an append to a mapping": (b"}Na.", "damaged"),
    "pairs of a list": (b"]NNs.", "damaged"),
    "no line": (b"cos", "damaged"),
    "no text": (b"X\x02\x00\x00\x00\xff\xfe.", "damaged"),
    "an endless loop": (b"N0" * 20, "instruction '0'"),
    "too much": (b"]" * 30_000, "has more than 10,000 instructions"),
}


@pytest.mark.parametrize(("payload", "message"), REFUSED.values(), ids=REFUSED)
def test_other_tricks_and_damage_are_errors(payload: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(payload)


def test_a_memo_is_no_larger_than_what_is_remembered() -> None:
    """Python's own reader would take 16 GiB for this index."""
    assert read(b"}r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86.") == ([], [])


def test_values_may_be_deep_shared_or_hold_themselves() -> None:
    deep = read(b"N" + b"\x85" * 200_000 + b".", 300_000)
    laughs = read(b"]q\x00" + b"h\x00\x86q\x00" * 1000 + b".")
    itself = read(b"]q\x00h\x00a.")

    assert isinstance(deep, tuple)
    assert isinstance(laughs, tuple)
    assert isinstance(itself, list)
    assert itself[0] is itself
