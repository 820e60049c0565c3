"""`stockflow clean`: what killed runs left goes, once nobody can be at work; nothing else does."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from stockflow.errors import NotFoundError, OutputConflictError
from stockflow.output.claims import Heartbeat
from stockflow.output.clean import abort_leftovers, find_leftovers, leftover_facts, remove
from stockflow.output.keys import CLAIM_FILE
from stockflow.storage import LocalStore, StorageConfig, Store, StoreOptions, open_store
from stockflow.verification.verify import verify
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.fault_proxy import Fault, FaultyProxy, Request
from tests.waiting import HANG_S

SHAPES = {f"model.layers.{index}.weight": (400, 1000) for index in range(8)}
OPTIONS = ("--shard-size", "800kB", "--memory", "600MiB", "--workers", "1", "--device", "cpu", "--quiet")
HOUR_S = 3600.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_recipe(folder / "recipe.yaml", "model_stock", make_family(folder, 2, SHAPES))


def killed(recipe: Path, output: Path) -> None:
    """Kill a merge while it writes a shard, after its first receipt."""
    process = runs.start_and_stop("merge", recipe, output, *OPTIONS)
    process.kill()
    process.communicate()


def grow_old(store: Store, seconds: float = HOUR_S) -> None:
    """Make claim and records of runs, and on disk temporary files, so much older."""
    for key in store.list("_stockflow/"):
        if key == CLAIM_FILE or "/runs/" in key:
            record = json.loads(store.read_head(key, 1000)[0])
            store.put(key, json.dumps(record | {"heartbeat": time.time() - seconds}).encode())
    if "://" not in store.url:
        for path in Path(store.url).rglob("*partial"):
            os.utime(path, (time.time() - seconds,) * 2)


def contents(output: Path) -> dict[str, str]:
    """Return the digest of every file, by path."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_a_killed_merge_left_is_shown_then_removed_and_the_merge_resumes(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed(recipe, output)
    (receipt, *_) = sorted(output.glob("_stockflow/*/receipts/*.json"))
    orphan = receipt.with_name("model-00009-of-00010.safetensors.json")
    orphan.write_bytes(receipt.read_bytes().replace(receipt.stem.encode(), orphan.stem.encode()))
    partials = {name for name in runs.leftovers(output) if ".model-" in name}
    store = open_store(str(output), StorageConfig())

    refused = runs.invoke("clean", output, "--yes")
    grow_old(store)
    before = contents(output)
    shown = runs.invoke("clean", output)
    after_showing = contents(output)
    removed = runs.invoke("clean", output, "--yes", "--json")
    is_gone = not orphan.exists()
    resumed = runs.merge_elsewhere(recipe, output, *OPTIONS[:-1])

    assert refused.exit_code == 2
    assert f"a run was seen in {output}" in refused.stderr
    assert (shown.exit_code, before) == (0, after_showing)
    assert all(word in shown.stdout for word in (*partials, orphan.name, "/runs/", "--yes removes them"))
    assert receipt.name not in shown.stdout
    told = json.loads(removed.stdout)
    assert told["removed"] is True
    assert partials <= {entry["name"] for entry in told["temporary_files"]}
    assert partials
    assert [orphan.name] == [key.rpartition("/")[2] for key in told["records"] if "/receipts/" in key]
    assert is_gone
    assert resumed["resumed_shards"] >= 1
    assert runs.leftovers(output) == []


def test_a_published_output_stays_byte_for_byte(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=800_000)
    before = contents(output)
    store = open_store(str(output), StorageConfig())
    strangers = {"thesis.txt": b"years of work", "_stockflow/notes.txt": b"mine", "sub/_stockflow/claim.json": b"{}"}
    for key, payload in strangers.items():
        store.put(key, payload)
    store.put(f"_stockflow/{'f' * 64}/receipts/model.safetensors.json", b"of a plan that owns the prefix no more")
    partial = output / ".model-00001-of-00009.safetensors.0123abcd.stockflow-partial"
    partial.write_bytes(b"half")
    grow_old(store)
    claim = contents(output)[CLAIM_FILE]

    cleaned = runs.invoke("clean", output, "--yes")

    assert cleaned.exit_code == 0, cleaned.stderr
    assert "removed: 2" in cleaned.stdout
    expected = before | {CLAIM_FILE: claim} | {k: hashlib.sha256(v).hexdigest() for k, v in strangers.items()}
    assert expected == contents(output)
    assert verify(str(output), StorageConfig()).findings == ()


@pytest.mark.parametrize("age_s", [0.0, 890.0])
def test_a_run_seen_lately_is_left_alone(recipe: Path, tmp_path: Path, age_s: float) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=800_000)
    store = open_store(str(output), StorageConfig())
    plan_id = json.loads((output / "manifest.json").read_text())["plan_id"]
    found = find_leftovers(store)
    store.put(f"_stockflow/{plan_id}/runs/0123.json", json.dumps({"heartbeat": time.time() - age_s}).encode())

    with pytest.raises(OutputConflictError, match="what it writes is not left over"):
        find_leftovers(store)
    with pytest.raises(OutputConflictError, match="what it writes is not left over"):
        remove(store, found)


def test_a_run_that_a_listing_does_not_show_yet_is_seen_by_its_claim(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=800_000)
    store = open_store(str(output), StorageConfig())
    claim = json.loads((output / CLAIM_FILE).read_text())
    store.put(
        f"_stockflow/{claim['plan_id']}/runs/{claim['run']}.json", json.dumps({"heartbeat": time.time()}).encode()
    )
    listed = store.list
    monkeypatch.setattr(
        store, "list", lambda *a, **k: {key: s for key, s in listed(*a, **k).items() if "/runs/" not in key}
    )

    with pytest.raises(OutputConflictError, match="what it writes is not left over"):
        find_leftovers(store)


def test_an_output_is_cleaned_right_after_its_merge(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.merge_here(recipe, output, shard_size=800_000)
    partial = output / ".model-00001-of-00009.safetensors.0123abcd.stockflow-partial"
    partial.write_bytes(b"half")
    os.utime(partial, (time.time() - HOUR_S,) * 2)

    cleaned = runs.invoke("clean", output, "--yes")

    assert cleaned.exit_code == 0, cleaned.stderr
    assert "a finished output" in cleaned.stdout
    assert "whose runs have ended" in cleaned.stdout
    assert runs.leftovers(output) == []


def test_a_stopped_merge_is_cleaned_right_after_its_end(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stopped = runs.start_and_stop("merge", recipe, output, *OPTIONS)
    stopped.send_signal(signal.SIGTERM)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(HANG_S) == 143

    cleaned = runs.invoke("clean", output, "--yes")

    assert cleaned.exit_code == 0, cleaned.stderr
    assert "an unfinished merge" in cleaned.stdout
    assert runs.merge_elsewhere(recipe, output, *OPTIONS[:-1])["resumed_shards"] >= 1


def test_a_foreign_prefix_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0123abcd.stockflow-partial").write_bytes(b"half")

    with pytest.raises(NotFoundError, match="neither a manifest nor a claim"):
        find_leftovers(open_store(str(tmp_path), StorageConfig()))


# On object storage


class Uploads:
    """A bucket with an abandoned claim in ``merged`` and open uploads in and around it."""

    ours = ("merged/model-00001-of-00002.safetensors", "merged/model.safetensors")
    foreign = (
        "model.safetensors",
        "merged2/model.safetensors",
        "merged/sub/model.safetensors",
        "merged/thesis.tar",
        "merged/other.safetensors",
    )

    def __init__(self, endpoint: str, bucket: str) -> None:
        self.s3: Any = boto3.client("s3", endpoint_url=endpoint)
        self.bucket = bucket
        claim = json.dumps({"plan_id": "a" * 64, "heartbeat": time.time() - HOUR_S, "run": "b" * 16})
        self.s3.put_object(Bucket=bucket, Key=f"merged/{CLAIM_FILE}", Body=claim.encode())
        for key in (*self.ours, *self.ours, *self.foreign):
            upload = self.s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
            self.s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")

    def open(self) -> list[str]:
        return sorted(upload["Key"] for upload in self.s3.list_multipart_uploads(Bucket=self.bucket)["Uploads"])


@pytest.fixture
def uploads(s3_endpoint: str, s3_bucket: str) -> Uploads:
    return Uploads(s3_endpoint, s3_bucket)


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_endpoint) as server:
        yield server


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_open_uploads_of_the_prefix_go_and_no_others(uploads: Uploads, s3_endpoint: str, client: str) -> None:
    config = StorageConfig(
        {"s3://": StoreOptions(endpoint=s3_endpoint, client="fsspec" if client == "fsspec" else "auto")}
    )
    store = open_store(f"s3://{uploads.bucket}/merged", config)
    before = uploads.open()

    found = find_leftovers(store)
    shown = uploads.open()
    remove(store, found)
    remove(store, found)  # what is gone already is no error

    assert sorted(uploads.ours * 2) == sorted(f"merged/{piece.key}" for piece in found.half_written)
    assert before == shown
    assert sorted(uploads.foreign) == uploads.open()


@pytest.mark.parametrize(
    ("fault", "said"), [("501", "does not list open uploads"), ("denied", "need s3:ListBucketMultipartUploads")]
)
@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_a_store_that_tells_nothing_of_uploads_is_named(
    uploads: Uploads, proxy: FaultyProxy, fault: Fault, said: str, client: str
) -> None:
    class Forbids(FaultyProxy):
        def next_fault(self, request: Request) -> Fault:
            super().next_fault(request)
            return fault if "uploads" in request.path else "pass"

    with Forbids(str(uploads.s3.meta.endpoint_url)) as server:
        config = StorageConfig(
            {"s3://": StoreOptions(endpoint=server.url, client="fsspec" if client == "fsspec" else "auto")}
        )
        found = find_leftovers(open_store(f"s3://{uploads.bucket}/merged", config))

    assert found.half_written == ()
    assert said in "".join(found.notes)
    assert leftover_facts(found, is_removed=False)["notes"] == list(found.notes)


def test_a_store_without_uploads_has_none() -> None:
    store = open_store("memory://clean/out", StorageConfig())
    store.put(CLAIM_FILE, json.dumps({"plan_id": "a" * 64, "heartbeat": 0.0, "run": "b" * 16}).encode())

    assert find_leftovers(store).count == 0


def test_what_a_worker_that_hangs_was_writing_is_swept_and_never_appears(tmp_path: Path) -> None:
    """Its file is locked, and it may go on when the output is long published."""
    store = LocalStore(str(tmp_path))

    def hang_and_go_on() -> None:
        with store.create("model.safetensors") as file:
            file.write(b"half")
            abort_leftovers(store, "plan", "run", {"model.safetensors"})
            assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    with pytest.raises(NotFoundError):
        hang_and_go_on()
    assert store.list() == {}


def test_what_a_neighbour_is_writing_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with Heartbeat(store, "plan", "another"), store.create("model.safetensors") as file:
        file.write(b"whole")
        abort_leftovers(store, "plan", "run", {"model.safetensors"})

    assert store.read_head("model.safetensors", 9)[0] == b"whole"
