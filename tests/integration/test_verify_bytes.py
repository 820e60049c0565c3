"""No byte of a published output can change without a finding that names its file."""

import json
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from stockflow.storage import StorageConfig
from stockflow.verification.verify import verify
from tests.checkpoints import llama_shapes, make_family, write_recipe
from tests.runs import merge_here

SHARD_SIZE = 40_000
EVERY = [(2003, 6), pytest.param(1009, 12, marks=pytest.mark.slow), pytest.param(127, 40, marks=pytest.mark.slow)]
"""Bytes between the places tried inside of a region, and the most inside of a file; primes, so that they fall on every
phase of a structure."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("output")
    family = make_family(root, 2, llama_shapes(), buffers=True, num_shards=2)
    merge_here(write_recipe(root / "recipe.yaml", "model_stock", family), root / "out", shard_size=SHARD_SIZE)
    assert verify(str(root / "out"), StorageConfig()).findings == ()
    return root / "out"


@pytest.fixture(scope="module")
def originals(output: Path) -> dict[str, bytes]:
    """Return every file that a byte can be changed of but the manifest, which the others are judged by."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    kept = {str(path.relative_to(output)): path.read_bytes() for path in files}
    # Claim, class and progress say who was at work; the last is there only if the merge took a second.
    own_records = ("manifest.json", "claim.json", "/numerics/000000.json", "/progress.json")
    return {key: payload for key, payload in kept.items() if not key.endswith(own_records)}


def found_in(output: Path) -> set[str]:
    return {finding.where for finding in verify(str(output), StorageConfig()).findings}


def places(key: str, path: Path, payload: bytes, every: int, most: int) -> Iterator[int]:
    """Yield a place of every class: first and last bytes, length field, header, ends of tensors, marks of formats."""
    yield from (0, len(payload) - 1)
    if key.endswith(".safetensors"):
        yield from range(1, 8)
        header = 8 + int.from_bytes(payload[:8], "little")
        yield from range(8, header, max(every, header // most))
        yield from (header - 1, header)
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
        entries = json.loads(payload[8:header])
        yield from (header + end for name in names for end in (entries[name]["data_offsets"][1] - 1,))
    if key.endswith(".parquet"):
        yield from (len(payload) - back for back in range(2, 9))  # length of the footer, magic
    yield from range(every, len(payload), max(every, len(payload) // most))


@pytest.mark.parametrize(("every", "most"), EVERY)
def test_a_changed_byte_of_any_class_in_any_file_is_found(
    output: Path, originals: dict[str, bytes], every: int, most: int
) -> None:
    """In all files at once, so that each must be found beside the others; one bit of it, or all."""
    tried = {key: sorted(set(places(key, output / key, payload, every, most))) for key, payload in originals.items()}
    num_tried = 0
    try:
        for row in zip_longest(*tried.values()):
            changed = {key: place for key, place in zip(tried, row, strict=True) if place is not None}
            for number, (key, place) in enumerate(changed.items()):
                payload = bytearray(originals[key])
                payload[place] ^= 0xFF if (place + number) % 2 else 1 << place % 8
                (output / key).write_bytes(payload)

            found = found_in(output)

            assert changed.keys() <= found, (changed, found)
            assert found <= originals.keys()
            num_tried += len(changed)
            for key in changed:
                (output / key).write_bytes(originals[key])
    finally:
        for key, payload in originals.items():
            (output / key).write_bytes(payload)
    assert num_tried > (300 if every < 1000 else 100)
    assert found_in(output) == set()


@given(drawn=st.data())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_random_byte_in_random_files_is_found(
    output: Path, originals: dict[str, bytes], drawn: st.DataObject
) -> None:
    keys = drawn.draw(st.lists(st.sampled_from(sorted(originals)), min_size=1, max_size=4, unique=True))
    try:
        for key in keys:
            payload = bytearray(originals[key])
            place = drawn.draw(st.integers(0, len(payload) - 1))
            payload[place] = drawn.draw(st.integers(0, 255).filter(lambda value, old=payload[place]: value != old))
            (output / key).write_bytes(payload)

        found = found_in(output)

        assert set(keys) <= found
    finally:
        for key in keys:
            (output / key).write_bytes(originals[key])


def test_a_changed_byte_of_the_manifest_is_one_finding_that_names_it(output: Path) -> None:
    manifest = output / "manifest.json"
    original = manifest.read_bytes()
    try:
        for place in range(0, len(original), 5):
            payload = bytearray(original)
            payload[place] ^= 1 << place % 8
            manifest.write_bytes(payload)

            assert found_in(output) == {"manifest.json"}, place
    finally:
        manifest.write_bytes(original)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_of_any_kind_is_found(
    output: Path, originals: dict[str, bytes], tmp_path: Path, share: float
) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    for key, payload in originals.items():
        (copy / key).write_bytes(payload[: int(share * len(payload))])

    assert found_in(copy) == originals.keys()
