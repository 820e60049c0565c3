"""`verify` and `verify --sample` of outputs on S3, by both clients; and the reading ahead that they share."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import boto3
import pytest

from stockflow.errors import StorageError
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, StoreOptions, open_store
from stockflow.storage.base import Stamp
from stockflow.verification.files import CHUNK_BYTES, Output, Range
from stockflow.verification.verify import SampleOptions, Verification, verify
from tests import runs
from tests.checkpoints import llama_shapes, make_family, write_recipe

MEMORY_BYTES = 1024 * 2**20


@pytest.fixture
def url(tmp_path: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an output on S3, merged from S3."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    s3 = boto3.client("s3")
    family = make_family(tmp_path, 2, llama_shapes(), num_shards=2)
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            s3.put_object(Bucket=s3_bucket, Key=f"{folder.name}/{path.name}", Body=path.read_bytes())
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/", f"s3://{s3_bucket}/"))
    options = MergeOptions(MEMORY_BYTES + runs.grown_bytes(), 2, "cpu", shard_size=60_000)
    output = f"s3://{s3_bucket}/out"
    merge(Inputs.open(load_recipe(str(recipe))), output, options, places.in_this_process)
    return output


def sampled(url: str, client: Literal["obstore", "fsspec"]) -> Verification:
    config = StorageConfig({url.removesuffix("/out"): StoreOptions(client=client)})
    options = SampleOptions(1.0, seed=1, memory_bytes=MEMORY_BYTES + runs.grown_bytes(), num_threads=2)
    return verify(url, config, inputs=True, sample=options)


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_an_output_on_s3_is_verified_and_recomputed(url: str, client: Literal["obstore", "fsspec"]) -> None:
    result = sampled(url, client)

    assert result.findings == ()
    assert result.sampled is not None
    assert (result.sampled.num_recorded, result.sampled.num_copied) == (len(llama_shapes()), 3)


def test_damage_on_s3_is_found_and_named(url: str) -> None:
    _, _, bucket, prefix = url.split("/")
    s3 = boto3.client("s3")
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1000)["Contents"]]
    # Claim, class and progress say who was at work; the last is there only if the merge took a second.
    not_published = ("manifest.json", "claim.json", "/numerics/000000.json", "/progress.json")
    damaged = [key for key in keys if not key.endswith(not_published)]
    for key in damaged:
        payload = bytearray(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        payload[len(payload) // 2] ^= 1
        s3.put_object(Bucket=bucket, Key=key, Body=bytes(payload))
    s3.delete_object(Bucket=bucket, Key=damaged[-1])

    found = {finding.where for finding in sampled(url, "obstore").findings}

    assert {key.removeprefix(f"{prefix}/") for key in damaged} <= found


# ------------------------------------------------------------------------------------------------- reading ahead


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    payloads = {"a": os.urandom(2 * CHUNK_BYTES + 12_345), "b": os.urandom(77), "empty": b""}
    for name, payload in payloads.items():
        (tmp_path / name).write_bytes(payload)
    return payloads


def read(tmp_path: Path, ranges: list[Range], num_ahead: int) -> Iterator[bytes]:
    output = Output(open_store(str(tmp_path), StorageConfig()))
    with ThreadPoolExecutor(2) as pool:
        for part in output.read_ahead(ranges, output.store.stamp, pool, num_ahead):
            yield bytes(part)


@pytest.mark.parametrize("num_ahead", [1, 2, 5])
def test_what_is_read_ahead_comes_in_order(tmp_path: Path, files: dict[str, bytes], num_ahead: int) -> None:
    ranges = [
        Range("b", 3, 70), Range("a", 0, len(files["a"])), Range("empty", 0, 0), Range("a", 5, CHUNK_BYTES + 1),
        Range("b", 0, 0), Range("b", 76, 1),
    ]  # fmt: skip

    payload = b"".join(read(tmp_path, ranges, num_ahead))

    assert payload == b"".join(files[key][start : start + num_bytes] for key, start, num_bytes in ranges)


def test_a_failure_ahead_is_raised_and_leaves_no_read_behind(tmp_path: Path, files: dict[str, bytes]) -> None:
    def stamps(key: str) -> Stamp:
        raise StorageError(f"no {key}")

    output = Output(open_store(str(tmp_path), StorageConfig()))
    with ThreadPoolExecutor(2) as pool, pytest.raises(StorageError, match="no a"):
        list(output.read_ahead([Range("a", 0, len(files["a"]))], stamps, pool, 4))
