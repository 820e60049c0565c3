"""Whole merges from and to object storage: the same bytes as on disk, the same claim, resume and verify."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml

from stockflow.errors import BudgetError, InputChangedError, OutputConflictError, PlanError, RecipeError
from stockflow.events import Event, Note, OnEvent, ignore
from stockflow.output import ownership
from stockflow.output.receipts import Receipt
from stockflow.planning.budget import client_bytes
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import Execute, Merged, MergeOptions, merge, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, StoreOptions, open_store
from stockflow.storage.parts import upload_bytes
from stockflow.verification.verify import verify
from tests.checkpoints import LLAMA_CONFIG, make_family, write_checkpoint
from tests.fault_proxy import Fault, FaultyProxy, Request
from tests.runs import MIB, command, grown_bytes, run
from tests.s3_server import moto_server
from tests.waiting import wait_until

MEMORY_BYTES = 1024 * MIB
SHARD_SIZE = 150_000
"""about ten shards of the little models here"""
CONFIG = LLAMA_CONFIG | {"torch_dtype": "bfloat16", "tie_word_embeddings": True}
NUM_TUNED = 2


class Listener:
    """Keeps the notes it is told of stores."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and not event.text.startswith("compiling kernels"):  # on a slow machine
            self.notes.append(event.text)


class Place:
    """The same checkpoints in a folder and in two buckets, and recipes over either."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.s3 = boto3.client("s3", endpoint_url=endpoint)
        family = make_family(folder / "models", NUM_TUNED, num_shards=2, config=CONFIG)
        self.on_disk = [str(path) for path in (family.base, *family.tuned)]
        self.on_s3 = ["s3://bases/models/base", *(f"s3://tunes/{number}" for number in range(1, NUM_TUNED + 1))]
        for bucket in ("bases", "tunes", "out"):
            self.s3.create_bucket(Bucket=bucket)
        for source, url in zip(self.on_disk, self.on_s3, strict=True):
            self.upload(Path(source), url)

    def upload(self, folder: Path, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        for path in folder.iterdir():
            self.s3.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())

    def recipe(self, models: Sequence[str], **storage: dict[str, Any]) -> Path:
        """Write a recipe and return its path; ``storage`` are options by bucket."""
        content: dict[str, Any] = {
            "merge_method": "model_stock",
            "base_model": models[0],
            "models": [{"model": model} for model in models[1:]],
            "stockflow": {"storage": {f"s3://{bucket}/": options for bucket, options in storage.items()}},
        }
        path = self.folder / f"recipe-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a prefix of the output bucket."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket="out", Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def receipts(self, prefix: str) -> list[dict[str, Any]]:
        """Return the receipts below a prefix of the output bucket."""
        keys = [key for key in self.keys(f"{prefix}/_stockflow/") if "/receipts/" in key]
        return [json.loads(self.s3.get_object(Bucket="out", Key=key)["Body"].read()) for key in keys]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Place]:
    """A server of its own: the names of its buckets appear in recipes."""
    with moto_server() as endpoint:
        yield Place(tmp_path_factory.mktemp("s3"), endpoint)


@pytest.fixture(autouse=True)
def endpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
    return place.endpoint


@pytest.fixture
def out(request: pytest.FixtureRequest) -> str:
    """A prefix of the output bucket for one test."""
    return f"{request.node.name.partition('[')[0]}-{time.monotonic_ns()}"


@pytest.fixture(scope="module")
def digests(place: Place) -> dict[str, str]:
    """What the merge gives from disk to disk."""
    return shards(merge_at(place.recipe(place.on_disk), str(place.folder / "reference")))


def merge_at(
    recipe: Path | str,
    output: str,
    on_event: OnEvent = ignore,
    execute: Execute = places.in_this_process,
) -> Merged:
    """Merge in this process."""
    options = MergeOptions(MEMORY_BYTES + grown_bytes(), 2, "cpu", SHARD_SIZE)
    return merge(Inputs.open(load_recipe(str(recipe))), output, options, execute, on_event)


def shards(result: Merged) -> dict[str, str]:
    return {shard.file: result.manifest.files[shard.file].sha256 for shard in result.plan.shards}


# The same bytes everywhere


@pytest.mark.parametrize(
    ("source", "client"),
    [
        pytest.param("disk", "obstore", marks=pytest.mark.slow),
        ("s3", "obstore"),
        ("s3", "fsspec"),
        pytest.param("disk", "fsspec", marks=pytest.mark.slow),
    ],
)
def test_shards_are_the_same_on_s3_as_on_disk(
    place: Place, out: str, digests: dict[str, str], source: str, client: str
) -> None:
    models = place.on_s3 if source == "s3" else place.on_disk
    options = {bucket: {"client": client} for bucket in ("bases", "tunes", "out")}
    recipe = place.recipe(models, **options)

    result = merge_at(recipe, f"s3://out/{out}")

    assert digests == shards(result)
    assert len(digests) > 5
    expected_pin = "if-match" if source == "s3" else "stat"
    assert {expected_pin} == set(result.manifest.pins)
    assert not verify(f"s3://out/{out}", load_recipe(str(recipe)).storage, inputs=True).findings
    assert "Uploads" not in place.s3.list_multipart_uploads(Bucket="out")
    receipts = place.receipts(out)
    assert len(digests) == len(receipts)
    assert all(receipt["peak_memory_bytes"] > 0 for receipt in receipts)


def test_s3_to_disk_and_memory_to_memory_give_the_same_shards(
    place: Place, tmp_path: Path, digests: dict[str, str]
) -> None:
    from_s3 = merge_at(place.recipe(place.on_s3), str(tmp_path / "out"))
    models = [f"memory://models/{number}" for number in range(len(place.on_disk))]
    for folder, url in zip(place.on_disk, models, strict=True):
        store = open_store(url, StorageConfig())
        for path in Path(folder).iterdir():
            store.put(path.name, path.read_bytes())
    in_memory = merge_at(place.recipe(models), "memory://merged")

    assert digests == shards(from_s3) == shards(in_memory)
    assert from_s3.plan.plan_id != in_memory.plan.plan_id
    assert from_s3.plan.merge_id == in_memory.plan.merge_id


def test_a_recipe_on_s3_is_merged_by_the_command_line(place: Place, out: str, digests: dict[str, str]) -> None:
    place.s3.put_object(Bucket="bases", Key="recipes/r.yaml", Body=place.recipe(place.on_s3).read_bytes())
    arguments = ("merge", "s3://bases/recipes/r.yaml", f"s3://out/{out}", "--shard-size", SHARD_SIZE, "--device", "cpu")

    first = run(*arguments, "--memory", f"{MEMORY_BYTES}", "--json")
    again = run(*arguments)

    assert first.returncode == 0, first.stderr
    assert digests == json.loads(first.stdout)["shards"]
    assert (again.returncode, "already finished" in again.stdout) == (0, True)
    assert all(receipt["peak_memory_bytes"] < MEMORY_BYTES for receipt in place.receipts(out))


# Several endpoints in one recipe


def test_each_bucket_may_have_an_endpoint_of_its_own(
    place: Place, out: str, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with FaultyProxy(place.endpoint) as first, FaultyProxy(place.endpoint) as second:
        recipe = place.recipe(
            place.on_s3,
            bases={"endpoint": first.url},
            tunes={"endpoint": second.url, "client": "fsspec"},
            out={"endpoint": place.endpoint},
        )

        assert digests == shards(merge_at(recipe, f"s3://out/{out}"))
        assert all("/bases" in request for request in first.requests)
        assert all("/tunes" in request for request in second.requests)


# Claim, resume, verify


class SilentAfterReceipts(FaultyProxy):
    """Never answers for a receipt once ``num_receipts`` were written."""

    def __init__(self, upstream: str, num_receipts: int) -> None:
        super().__init__(upstream)
        self.num_left = num_receipts

    def next_fault(self, request: Request) -> Fault:
        fault = super().next_fault(request)
        if request.step != "put" or "/receipts/" not in request.path:
            return fault
        self.num_left -= 1
        return "stall" if self.num_left < 0 else fault


def test_a_killed_merge_is_resumed(place: Place, out: str, digests: dict[str, str]) -> None:
    recipe = place.recipe(place.on_s3)
    with SilentAfterReceipts(place.endpoint, 2) as proxy:
        arguments = ("merge", recipe, f"s3://out/{out}", "--shard-size", SHARD_SIZE, "--device", "cpu", "--json")
        storage = yaml.safe_load(recipe.read_text())
        storage["stockflow"]["storage"] = {"s3://out/": {"endpoint": proxy.url}}
        recipe.write_text(yaml.safe_dump(storage))
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: proxy.num_left < 0 and len(place.receipts(out)) == 2, process)
        process.kill()
        process.communicate()
        assert f"{out}/manifest.json" not in place.keys(out)
        proxy.num_left = len(digests)

        resumed = run(*arguments)

    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_shards"] == 2
    assert digests == json.loads(resumed.stdout)["shards"]
    assert not verify(f"s3://out/{out}", StorageConfig()).findings


def test_verify_finds_an_object_that_was_tampered_with(place: Place, out: str) -> None:
    file = next(iter(shards(merge_at(place.recipe(place.on_s3), f"s3://out/{out}"))))
    payload = bytearray(place.s3.get_object(Bucket="out", Key=f"{out}/{file}")["Body"].read())
    payload[-1] ^= 1
    place.s3.put_object(Bucket="out", Key=f"{out}/{file}", Body=bytes(payload))

    found = run("verify", f"s3://out/{out}")

    assert found.returncode == 4, found.stderr
    assert f"{file}: has sha256" in found.stdout


def test_a_replaced_shard_is_merged_again(place: Place, out: str, digests: dict[str, str]) -> None:
    """With another stamp and equal size its bytes decide."""
    recipe = place.recipe(place.on_s3)
    files = sorted(shards(merge_at(recipe, f"s3://out/{out}")))
    same = place.s3.get_object(Bucket="out", Key=f"{out}/{files[0]}")["Body"].read()
    place.s3.put_object(Bucket="out", Key=f"{out}/{files[0]}", Body=same)
    place.s3.put_object(Bucket="out", Key=f"{out}/{files[1]}", Body=b"\0" * 4096)
    place.s3.delete_object(Bucket="out", Key=f"{out}/manifest.json")

    resumed = merge_at(recipe, f"s3://out/{out}")

    assert len(files) - 1 == resumed.num_resumed
    assert digests == shards(resumed)
    assert not verify(f"s3://out/{out}", StorageConfig()).findings


def test_another_plan_in_the_same_prefix_is_refused(place: Place, out: str) -> None:
    merge_at(place.recipe(place.on_s3), f"s3://out/{out}")

    with pytest.raises(OutputConflictError, match=r"holds the finished output of another plan"):
        merge_at(place.recipe([place.on_s3[0], *place.on_s3[:0:-1]]), f"s3://out/{out}")
    with pytest.raises(OutputConflictError, match=r"is not empty and not an output of stockflow"):
        merge_at(place.recipe(place.on_disk), "s3://tunes/2")


@pytest.mark.parametrize(
    "output", ["s3://tunes/1", "s3://tunes/1/", "s3://tunes/1/out", "s3a://tunes/1/out", "S3://tunes/1//"]
)
def test_an_output_inside_an_input_is_refused(place: Place, output: str) -> None:
    with pytest.raises(PlanError, match=r"is, or lies in, the input s3://tunes/1"):
        merge_at(place.recipe(place.on_s3), output)


@pytest.mark.parametrize("output", ["s3://tunes//1/out", "s3://tunes/x/../1/out", "s3://tunes/./1"])
def test_a_url_that_hides_where_it_leads_is_refused(place: Place, output: str) -> None:
    with pytest.raises(RecipeError, match=r"has an empty, `\.` or `\.\.` segment"):
        merge_at(place.recipe(place.on_s3), output)


def test_a_sibling_of_an_input_is_no_input(place: Place, digests: dict[str, str]) -> None:
    assert digests == shards(merge_at(place.recipe(place.on_s3), "s3://tunes/1-merged"))


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_an_input_replaced_after_planning_is_named_with_both_stamps(
    place: Place, out: str, tmp_path: Path, client: str
) -> None:
    url = f"s3://tunes/replaced-{client}"
    place.upload(Path(place.on_disk[1]), url)
    file = next(path.name for path in sorted(Path(place.on_disk[1]).iterdir()) if path.suffix == ".safetensors")
    key = f"replaced-{client}/{file}"
    payload = bytearray(place.s3.get_object(Bucket="tunes", Key=key)["Body"].read())
    before = place.s3.head_object(Bucket="tunes", Key=key)["ETag"]
    payload[-1] ^= 1

    def replace_first(*arguments: Any) -> Iterator[Receipt]:
        place.s3.put_object(Bucket="tunes", Key=key, Body=bytes(payload))
        return places.in_this_process(*arguments)

    recipe = place.recipe([place.on_s3[0], place.on_s3[2], url], tunes={"client": client})
    with pytest.raises(InputChangedError) as caught:
        merge_at(recipe, f"s3://out/{out}", execute=replace_first)

    after = place.s3.head_object(Bucket="tunes", Key=key)["ETag"]
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in (f"{url}/{file}", before, after))
    assert f"{out}/manifest.json" not in place.keys(out)


# Stores with weaker promises


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_weaker_promises_are_said_and_worked_with(
    place: Place, out: str, digests: dict[str, str], client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SETTLE_S", 0.1)
    listener = Listener()
    with FaultyProxy(place.endpoint) as proxy:
        proxy.ignored_headers |= {"if-match", "if-none-match"}
        options = {"endpoint": proxy.url, "client": client}
        recipe = place.recipe(place.on_s3, bases=options, tunes=options, out=options)
        result = merge_at(recipe, f"s3://out/{out}", listener)

    assert digests == shards(result)
    open_models, *notes = listener.notes
    assert open_models.startswith("3 models are read over http://")
    assert len(notes) == 3
    assert notes[0].startswith(f"s3://out/{out}: this store does not create objects exclusively")
    assert [f"{url}: this store ignores If-Match" for url in place.on_s3[:2]] == [
        note.partition(",")[0] for note in notes[1:]
    ]


def test_a_store_that_keeps_its_promises_is_not_spoken_of(place: Place, out: str) -> None:
    listener = Listener()

    merge_at(place.recipe(place.on_s3), f"s3://out/{out}", listener)

    assert not [note for note in listener.notes if " read over http://" not in note]


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_a_store_without_conditional_writes_is_worked_with(place: Place, out: str, client: str) -> None:
    """Swift answers 501; claim and manifest are then written after a look."""
    store = open_store(f"s3://out/{out}", StorageConfig({"s3://out": StoreOptions(client=client)}))
    with FaultyProxy(place.endpoint) as proxy:
        options = StoreOptions(endpoint=proxy.url, client=client)
        weak = open_store(f"s3://out/{out}", StorageConfig({"s3://out": options}))
        proxy.fail("PUT", "501")
        weak.put_new("claim.json", b"mine")
        proxy.fail("PUT", "501")
        with pytest.raises(FileExistsError, match="already exists"):
            weak.put_new("claim.json", b"theirs")
        proxy.fail("PUT", "501")

        assert not weak.creates_exclusively("claim.json", b"mine")
        assert weak.pins_reads("claim.json")
    assert store.creates_exclusively("claim.json", b"mine")
    assert (store.read_head("claim.json", 9)[0], store.stamp("claim.json").size) == (b"mine", 4)


# Memory


def test_memory_of_the_clients_is_counted_where_they_work() -> None:
    inputs, shard_bytes = ["s3://bucket/a", "/disk/b"], 5_000_000_000

    both = client_bytes(inputs, "s3://bucket/out", shard_bytes)

    assert client_bytes(inputs[1:], "/disk/out", shard_bytes) == 0
    assert both == client_bytes(inputs, "/disk/out", shard_bytes) + 2 * upload_bytes(shard_bytes)
    # Sixteen ranges of 8 MiB took 176 MiB, an upload beside them 296, with either client (docs/promises.md#failures).
    assert both > 296 * MIB


@pytest.mark.slow
def test_a_worker_on_s3_stays_within_its_memory(place: Place, out: str, tmp_path: Path) -> None:
    drawn = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    urls = []
    for model in range(3):
        tensors = {f"layers.{number}.weight": drawn * (1 + model * number / 99) for number in range(8)}
        urls.append(f"s3://tunes/large-{model}")
        place.upload(write_checkpoint(tmp_path / str(model), tensors, num_shards=4), urls[-1])
    limit = 900 * MIB

    merged = run("merge", place.recipe(urls), f"s3://out/{out}", "--memory", limit, "--device", "cpu")

    assert merged.returncode == 0, merged.stderr
    peak = max(receipt["peak_memory_bytes"] for receipt in place.receipts(out))
    assert peak < limit, f"{peak / MIB:.0f} MiB"


def test_a_limit_without_room_for_the_clients_is_refused(place: Place, out: str) -> None:
    options = MergeOptions(480 * MIB, 2, "cpu", SHARD_SIZE)
    on_disk, on_s3 = (Inputs.open(load_recipe(str(place.recipe(models)))) for models in (place.on_disk, place.on_s3))

    plan_merge(on_disk, "/nowhere/out", options)
    with pytest.raises(BudgetError, match=r"Raise --memory"):
        plan_merge(on_s3, f"s3://out/{out}", options)
