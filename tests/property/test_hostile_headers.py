"""Headers nobody should have written: refused by the rule they break, within bounds of memory and time."""

import os
import random
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from stockflow.checkpoints.files.header import MAX_HEADER_BYTES
from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import HeaderError
from stockflow.storage import StorageConfig, open_store
from tests.fuzz.headers import RULES, file_of, malformed, parse, rule_of, valid

SEED = 20_251
NUM_EACH = 450
BYTES_PER_BYTE = 40
"""of memory per byte of a header; a valid one of short names takes about as much"""


class Peak:
    num_bytes = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """Give the most memory that Python held at once, beyond what it held before."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    peak = Peak()
    try:
        yield peak
    finally:
        peak.num_bytes = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()


def test_valid_headers_are_the_start() -> None:
    source = random.Random(SEED)
    for _ in range(300):
        header, size = valid(source)

        assert len(header) - ("__metadata__" in header) == len(parse(file_of(header, size)))  # type: ignore[arg-type]


def test_ten_thousand_malformed_headers_are_refused_by_the_rule_they_break(
    record_property: Callable[[str, object], None],
) -> None:
    """Every rule at least a hundred times; nothing but HeaderError, no message of more than a few lines."""
    hits: Counter[str] = Counter()
    slowest_s, longest = 0.0, 0
    for file in malformed(SEED, NUM_EACH):
        started = time.perf_counter()
        try:
            parse(file)
        except HeaderError as error:
            hits[rule_of(str(error))] += 1
            longest = max(longest, len(str(error)))
        slowest_s = max(slowest_s, time.perf_counter() - started)

    record_property("seed", SEED)
    record_property("malformed", hits.total())
    record_property("hits", dict(hits))
    record_property("slowest_s", slowest_s)
    print(
        f"seed {SEED}: {hits.total():,} malformed headers refused by {len(hits)} rules, each at least "
        f"{min(hits.values())} times; the slowest took {slowest_s * 1000:.0f} ms"
    )
    assert hits.total() >= 10_000
    assert RULES.keys() == hits.keys()
    assert min(hits.values()) >= 100, hits
    assert longest < 500


def test_a_malformed_header_takes_memory_in_proportion_to_its_size() -> None:
    most, largest = 0, 0
    for file in malformed(SEED + 1, 10):
        with measured() as peak, suppress(HeaderError):
            parse(file)

        assert peak.num_bytes < 100_000 + BYTES_PER_BYTE * len(file)
        most, largest = max(most, peak.num_bytes), max(largest, len(file))
    print(f"seed {SEED + 1}: at most {most:,} bytes of memory; the largest file has {largest:,} bytes")


LARGE = {
    "empty lists": '{"a":[' + "[]," * 140_000 + "[]]}",
    "empty mappings": '{"a":[' + "{}," * 140_000 + "{}]}",
    "small numbers": '{"a":[' + "1," * 200_000 + "1]}",
    "large numbers": '{"a":[' + "9000000000000," * 60_000 + "1]}",
    "fractions": '{"a":[' + ".1e5,".replace(".", "0.") * 60_000 + "1]}",
    "empty names": '{"a":{' + ",".join(f'"{number:x}":0' for number in range(40_000)) + "}}",
    "one name": '{"a":{' + '"":0,' * 80_000 + '"":0}}',
    "a name": '{"' + "n" * 800_000 + '":1}',
    "a name beyond Latin": '{"' + "n" * 800_000 + '🤗":1}',
    "a shape": '{"a":{"dtype":"U8","shape":[' + "9223372036854775807," * 40_000 + '1],"data_offsets":[0,1]}}',
    "tensors without keys": "{" + ",".join(f'"{number:x}":{{}}' for number in range(30_000)) + "}",
    "digits": '{"a":[' + ("9" * 4300 + ",") * 180 + "1]}",
    "escapes": '{"' + "\\u0041" * 132_000 + '":1}',
    "quotes": '{"' + '\\"' * 400_000,
    "white space": "{" + " " * 800_000,
    "open lists": '{"a":' + "[" * 800_000,
}
"""Half a megabyte each, of what takes the most to hold or the longest to read."""


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_header_takes_memory_and_time_in_proportion(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    file = file_of(LARGE[kind], 1)

    started = time.perf_counter()
    with pytest.raises(HeaderError) as caught:
        parse(file)
    seconds = time.perf_counter() - started
    with measured() as peak, pytest.raises(HeaderError):
        parse(file)

    record_property("bytes_per_byte", peak.num_bytes / len(file))
    record_property("seconds_per_megabyte", seconds * 1e6 / len(file))
    print(
        f"{kind}: {peak.num_bytes / len(file):.0f} bytes of memory per byte, {seconds * 1e6 / len(file):.2f} s per MB"
    )
    assert len(str(caught.value)) < 500
    assert peak.num_bytes < BYTES_PER_BYTE * len(file)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 50 * 10**12, 2**64 - 1])
def test_a_header_of_a_trillion_tensors_is_refused_before_any_allocation(tmp_path: Path, length: int) -> None:
    """The file is as large as a file can be, so that it is the promise that is refused."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":')
    os.truncate(path, 10**12)
    store = open_store(str(tmp_path), StorageConfig())
    with pytest.raises(HeaderError):
        open_checkpoints([store])  # imports and caches are warm now

    with measured() as peak, pytest.raises(HeaderError, match=f"claims a header of {length:,} bytes; the format"):
        open_checkpoints([store])

    assert peak.num_bytes < 1_000_000  # the first read, of 128 KiB, and threads


def test_a_shape_that_overflows_is_refused_before_any_allocation() -> None:
    file = file_of({"a": {"dtype": "F64", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, 8)

    with measured() as peak, pytest.raises(HeaderError, match="overflows"):
        parse(file)

    assert peak.num_bytes < 20_000
