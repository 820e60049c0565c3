"""Requests that ``stockflow plan`` announces, against those a server was asked."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
import pytest
import yaml

from tests.checkpoints import make_family
from tests.fault_proxy import FaultyProxy
from tests.runs import run
from tests.s3_server import moto_server, s3_credentials
from tests.selection import mostly_slow

INPUTS, OUTPUTS = "bases", "out"
SHAPES = {"large": (300, 1024), "small.a": (33, 7), "small.b": (5,), "wide": (40, 2048)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyProxy, Sequence[str]]]:
    """A store with a family of checkpoints, seen through a proxy that counts."""
    folder = tmp_path_factory.mktemp("models")
    family = make_family(folder, 2, SHAPES, num_shards=2)
    with s3_credentials(), moto_server() as moto, FaultyProxy(moto) as proxy:
        s3 = boto3.client("s3", endpoint_url=moto)
        for bucket in (INPUTS, OUTPUTS):
            s3.create_bucket(Bucket=bucket)
        for number, path in enumerate((family.base, *family.tuned)):
            for file in path.iterdir():
                s3.upload_file(str(file), INPUTS, f"{number}/{file.name}")
        yield proxy, [f"s3://{INPUTS}/{number}" for number in range(3)]


LOOKS = 3 * 4
"""Small reads of each model before anything is planned that are not announced: small tensors, tokenizers, heads."""


@pytest.mark.parametrize("shard_size", mostly_slow(["1GB", "500kB"], ["500kB"]))
def test_requests_that_are_announced_are_made(
    server: tuple[FaultyProxy, Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    proxy, locations = server
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    recipe = tmp_path / "recipe.yaml"
    models = [{"model": location} for location in locations[1:]]
    recipe.write_text(yaml.safe_dump({"merge_method": "model_stock", "base_model": locations[0], "models": models}))
    words = [recipe, f"s3://{OUTPUTS}/{shard_size}", "--shard-size", shard_size, "--json"]
    forecast = json.loads(run("plan", *words).stdout)["forecast"]
    announced = forecast["store_requests"]
    proxy.requests.clear()

    assert run("merge", *words, "--quiet").returncode == 0

    asked = Counter(_billed(request) for request in proxy.requests)
    asked[OUTPUTS, "puts"] += _announced_by_the_clock(forecast["seconds"]) - _put_by_the_clock(proxy.requests)
    for bucket in (INPUTS, OUTPUTS):
        for kind in ("gets", "puts"):
            expected = sum(store[kind] for store in announced if f"s3://{bucket}/" in store["url"])
            looks = LOOKS if (bucket, kind) == (INPUTS, "gets") else 0
            assert 0 <= asked[bucket, kind] - expected <= looks, (bucket, kind)


def _announced_by_the_clock(seconds: float) -> int:
    """Heartbeats one second into the run and every ten, a report with each, and one after all."""
    return 2 * (1 + int((seconds - 1) // 10)) + 1 if seconds >= 1 else 0


def _put_by_the_clock(requests: Sequence[str]) -> int:
    """Reports and heartbeats, but for the two of every run: that it begins, and whether creation is exclusive."""
    puts = [request for request in requests if request.startswith("PUT")]
    return sum("progress.json" in put for put in puts) + sum("/runs/" in put for put in puts) - 2


def _billed(request: str) -> tuple[str, str]:
    """Bucket and kind of a request; further pages of a listing are not counted: real ones have a thousand entries."""
    method, path = request.split()[:2]
    bucket = path.lstrip("/").partition("/")[0].partition("?")[0]
    if method == "DELETE" or "continuation-token" in path:
        return bucket, "free"
    is_listing = method == "GET" and ("list-type" in path or "uploads" in path)
    return bucket, "gets" if method in ("GET", "HEAD") and not is_listing else "puts"
