"""Bits that flip on the way from a store: read twice and noticed, or merged and found by a sample."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
import pytest
import yaml

from stockflow.engine.worker import WorkerSpec
from stockflow.events import OnEvent
from stockflow.forecast.amounts import Workload
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.results import PlanResult
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import StorageConfig
from stockflow.verification.verify import SampleOptions, verify
from tests import runs
from tests.checkpoints import llama_shapes, make_family, write_recipe
from tests.fault_proxy import FaultyProxy

MEMORY_BYTES = 1024 * runs.MIB


class Place:
    """A family in a bucket behind a proxy, outputs in a folder."""

    def __init__(self, folder: Path, recipe: Path, proxy: FaultyProxy) -> None:
        self.folder, self.recipe, self.proxy = folder, recipe, proxy

    def merged(self, name: str, *, num_flips: int = 0, reads_twice: bool = False) -> Merged:
        """Merge; so many of the first answers that bring weights have one bit changed."""

        def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
            self.proxy.fail("get", "flip", times=num_flips)
            return in_this_process(spec, shards, on_event)

        options = MergeOptions(MEMORY_BYTES + runs.grown_bytes(), 2, "cpu")
        inputs = Inputs.open(load_recipe(str(self.recipe)), reads_twice=reads_twice)
        return merge(inputs, str(self.folder / name), options, execute)


@pytest.fixture
def place(
    tmp_path: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Place]:
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    family = make_family(tmp_path, 2, llama_shapes())
    for folder in (family.base, *family.tuned):
        for path in folder.iterdir():
            s3.put_object(Bucket=s3_bucket, Key=f"{folder.name}/{path.name}", Body=path.read_bytes())
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    text = recipe.read_text().replace(f"{tmp_path}/", f"s3://{s3_bucket}/")
    client = getattr(request, "param", "obstore")
    storage = {f"s3://{s3_bucket}/": {"client": client}}
    recipe.write_text(f"{text}\n{yaml.safe_dump({'stockflow': {'on_nonfinite': 'propagate', 'storage': storage}})}")
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Place(tmp_path, recipe, proxy)


@pytest.mark.parametrize("place", ["obstore", "fsspec"], indirect=True)
def test_a_bit_that_flips_on_the_way_is_found_and_read_again(place: Place) -> None:
    undisturbed = place.merged("undisturbed")
    told = place.merged("told", num_flips=3, reads_twice=True)

    assert place.proxy.met["get", "flip"] == 3
    assert undisturbed.plan.plan_id == told.plan.plan_id
    assert runs.shard_digests(place.folder / "undisturbed") == runs.shard_digests(place.folder / "told")
    assert undisturbed.manifest.summary["retries"] == 0 < told.manifest.summary["retries"]


def test_a_bit_that_was_merged_is_found_by_a_sample(place: Place) -> None:
    place.merged("out", num_flips=1)
    options = SampleOptions(1.0, seed=1, memory_bytes=MEMORY_BYTES + runs.grown_bytes(), num_threads=2)

    found = verify(str(place.folder / "out"), StorageConfig(), inputs=True, sample=options).findings

    assert place.proxy.met["get", "flip"] == 1
    assert not verify(str(place.folder / "out"), StorageConfig()).findings
    assert len(found) >= 1


def test_a_plan_names_what_travels_in_the_open_and_tells_the_price(place: Place, tmp_path: Path) -> None:
    from stockflow import api

    once = api.plan(str(place.recipe), tmp_path / "out")
    twice = api.plan(str(place.recipe), tmp_path / "out", verify_inputs=True)

    assert [remark.models for remark in once.plan.remarks if remark.code == "over-http"] == [
        tuple(checkpoint.url for checkpoint in once.plan.checkpoints)
    ]
    assert once.plan_id == twice.plan_id
    assert work_of(twice) == (2 * once.work.num_bytes_read, 2 * once.work.num_reads, once.work.num_bytes_read)
    assert "(--verify-inputs)" in str(twice)
    asked = place.proxy.num_bytes
    place.merged("twice", reads_twice=True)
    assert place.proxy.num_bytes - asked > twice.work.num_bytes_read


def work_of(result: PlanResult) -> tuple[int, int, int]:
    work: Workload = result.work
    return work.num_bytes_read, work.num_reads, work.num_bytes_again
