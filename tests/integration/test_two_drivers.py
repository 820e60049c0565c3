"""Two drivers and one prefix: the same plan twice is harmless, another plan or other bits never get in."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from stockflow.errors import OutputConflictError
from stockflow.output import claims
from stockflow.output.claims import Claim, Heartbeat
from stockflow.output.clean import abort_leftovers
from stockflow.output.keys import CLAIM_FILE
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.recipe import load_recipe
from stockflow.run.driver import Execute, Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import StorageConfig, open_store
from stockflow.verification.verify import verify
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.fault_proxy import Fault, FaultyProxy, Request
from tests.runs import start, start_and_stop
from tests.waiting import HANG_S

OPTIONS = ("--shard-size", "800kB", "--memory", "600MiB", "--workers", "1", "--device", "cpu", "--quiet")
SHAPES = {f"model.layers.{index}.weight": (400, 1000) for index in range(12)}
NUM_ROUNDS = 20
FEW = 6
"""rounds where the other fourteen belong to make test-races"""
OTHER_CLASS = "from stockflow.engine import cpu; cpu.HostArithmetic.numerics_class = 'cuda-sm90'\n"
"""A machine without a GPU that says it has one: nothing else about it matters here."""

races = pytest.mark.races


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two plans over the same models."""
    folder = tmp_path_factory.mktemp("models")
    family = make_family(folder, 2, SHAPES)
    other = {"per_model": {"weight": [0.3, 0.7]}, "with_base": False}
    return (
        write_recipe(folder / "one.yaml", "model_stock", family),
        write_recipe(folder / "other.yaml", "linear", family, **other),
    )


@pytest.fixture(scope="module")
def undisturbed(recipes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The digests of the shards of both plans."""
    outputs = [tmp_path_factory.mktemp("undisturbed") / str(number) for number in range(2)]
    for recipe, output in zip(recipes, outputs, strict=True):
        runs.merge_here(recipe, output, shard_size=800_000)
    return [runs.shard_digests(output) for output in outputs]


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_endpoint) as server:
        yield server


def finish(*processes: "subprocess.Popen[str]") -> list[tuple[int, str]]:
    said = [process.communicate(timeout=HANG_S)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def with_storage(recipe: Path, folder: Path, url: str, **options: str) -> Path:
    """Return the same recipe with storage options for a URL."""
    content: dict[str, Any] = yaml.safe_load(recipe.read_text())
    content["stockflow"] = {"storage": {url: options}}
    path = folder / recipe.name
    path.write_text(yaml.safe_dump(content))
    return path


# At the same instant


def race(first: Path, second: Path, outputs: Sequence[str]) -> list[tuple[str, str]]:
    """Have two processes claim every output at the same moment; return what each of them got, by output."""
    rivals = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rival", str(recipe), *outputs], cwd=runs.REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for recipe in (first, second)
    ]  # fmt: skip
    for rival in rivals:
        assert rival.stdout
        assert rival.stdout.readline() == "ready\n"
    moment = str(time.time() + 0.3)
    for rival in rivals:
        assert rival.stdin
        rival.stdin.write(f"{moment}\n")
        rival.stdin.flush()
    return list(zip(*(json.loads(rival.communicate(timeout=HANG_S)[0]) for rival in rivals), strict=True))


STORES = ["local", "s3-obstore"]
ALL_STORES = [*STORES, "weak-obstore", "s3-fsspec", "weak-fsspec"]


@pytest.mark.parametrize(
    ("store", "num_rounds"),
    [*((store, FEW) for store in STORES), *(pytest.param(store, NUM_ROUNDS, marks=races) for store in ALL_STORES)],
)
def test_one_of_two_plans_gets_the_prefix_at_the_same_instant(
    store: str, num_rounds: int, recipes: tuple[Path, Path], tmp_path: Path, s3_bucket: str, proxy: FaultyProxy
) -> None:
    top = f"s3://{s3_bucket}" if store != "local" else str(tmp_path)
    if store != "local":
        kind, client = store.split("-")
        proxy.ignored_headers |= {"if-none-match", "if-match"} if kind == "weak" else set()
        recipes = tuple(with_storage(r, tmp_path, f"{top}/", endpoint=proxy.url, client=client) for r in recipes)  # type: ignore[assignment]

    results = race(*recipes, [f"{top}/{number}" for number in range(num_rounds)])

    assert len(results) == num_rounds
    for result in results:
        assert sorted(told == "ours" for told in result) == [False, True], result
        (refusal,) = (told for told in result if told != "ours")
        assert "claimed by" in refusal
        assert "another plan" in refusal


@pytest.mark.parametrize(
    ("is_weak", "num_rounds"),
    [(False, FEW), *(pytest.param(is_weak, NUM_ROUNDS, marks=races) for is_weak in (False, True))],
)
def test_the_same_plan_gets_in_twice_at_the_same_instant(
    is_weak: bool, num_rounds: int, recipes: tuple[Path, Path], tmp_path: Path, s3_bucket: str, proxy: FaultyProxy
) -> None:
    proxy.ignored_headers |= {"if-none-match", "if-match"} if is_weak else set()
    recipe = with_storage(recipes[0], tmp_path, f"s3://{s3_bucket}/", endpoint=proxy.url)

    results = race(recipe, recipe, [f"s3://{s3_bucket}/{number}" for number in range(num_rounds)])

    assert results == [("ours", "ours")] * num_rounds


# Whole merges


ROUNDS = [0, *(pytest.param(number, marks=races) for number in range(1, NUM_ROUNDS))]


@pytest.mark.parametrize("number", ROUNDS)
def test_the_same_plan_twice_at_once_on_disk(
    number: int, recipes: tuple[Path, Path], undisturbed: list[dict[str, str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"

    results = finish(*(start("merge", recipes[0], output, *OPTIONS) for _ in range(2)))

    assert [code for code, _ in results] == [0, 0], results
    assert undisturbed[0] == runs.shard_digests(output)
    assert verify(str(output), StorageConfig()).findings == ()
    assert runs.leftovers(output) == []
    assert not list(output.glob("_stockflow/*/runs/*"))


@races
@pytest.mark.parametrize("is_weak", [False, True])
@pytest.mark.parametrize("number", range(NUM_ROUNDS))
def test_two_drivers_at_once_on_s3(
    number: int, is_weak: bool, recipes: tuple[Path, Path], undisturbed: list[dict[str, str]], tmp_path: Path,
    s3_endpoint: str, s3_bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In even rounds the same plan twice, in odd ones two plans."""
    proxy.ignored_headers |= {"if-none-match", "if-match"} if is_weak else set()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    output = f"s3://{s3_bucket}/out"
    is_same = number % 2 == 0

    results = finish(*(start("merge", recipe, output, *OPTIONS) for recipe in (recipes[0], recipes[not is_same])))

    codes = [code for code, _ in results]
    assert sorted(codes) == ([0, 0] if is_same else [0, 2]), results
    found = verify(output, StorageConfig())
    assert found.findings == ()
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    manifest = json.loads(s3.get_object(Bucket=s3_bucket, Key="out/manifest.json")["Body"].read())
    expected = undisturbed[0 if is_same else codes.index(0)]
    assert expected == {key: manifest["files"][key]["sha256"] for key in expected}
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=s3_bucket)


class LosesAnswers(FaultyProxy):
    """Carries out the first exclusive creation of each key, and says nothing."""

    def next_fault(self, request: Request) -> Fault:
        is_first = bool(request.header("if-none-match")) and f"{request.method} {request.path}" not in self.requests
        fault = super().next_fault(request)
        return "lost" if is_first else fault


@pytest.mark.parametrize("client", ["obstore", pytest.param("fsspec", marks=races)])
def test_a_creation_whose_answer_is_lost_is_our_own(
    client: str, recipes: tuple[Path, Path], tmp_path: Path, s3_endpoint: str, s3_bucket: str
) -> None:
    output = f"s3://{s3_bucket}/out"
    with LosesAnswers(s3_endpoint) as losing:
        recipe = with_storage(recipes[0], tmp_path, f"s3://{s3_bucket}/", endpoint=losing.url, client=client)
        finished = runs.run("merge", recipe, output, *OPTIONS)
        created = [
            request
            for request, headers in zip(losing.requests, losing.headers, strict=True)
            if "if-none-match" in headers and request.endswith(("claim.json", "manifest.json", "000000.json"))
        ]

    assert finished.returncode == 0, finished.stderr
    assert len(set(created)) == 3
    assert len(created) == 6, "each was asked for twice"


# Numerics classes, and runs that lost the prefix


def test_an_output_keeps_to_one_numerics_class(
    recipes: tuple[Path, Path], undisturbed: list[dict[str, str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped = start_and_stop("merge", recipes[0], output, *OPTIONS, script=OTHER_CLASS)
    stopped.send_signal(signal.SIGTERM)
    stopped.send_signal(signal.SIGCONT)
    ((code, said),) = finish(stopped)
    (agreed,) = {receipt["numerics_class"] for receipt in runs.receipts(output)}

    refused = runs.run("merge", recipes[0], output, *OPTIONS)
    anew = runs.run("merge", recipes[0], output, *OPTIONS[:-1], "--overwrite")

    assert code == 128 + signal.SIGTERM, said
    assert refused.returncode == 2
    assert f"is merged on machines of class {agreed}, and this one computes as" in refused.stderr
    assert anew.returncode == 0, anew.stderr
    assert "they are merged again as" in anew.stderr
    assert undisturbed[0] == runs.shard_digests(output)
    assert len({receipt["numerics_class"] for receipt in runs.receipts(output)}) == 1
    assert verify(str(output), StorageConfig()).findings == ()


def test_a_live_run_of_another_class_is_not_disturbed(recipes: tuple[Path, Path], tmp_path: Path) -> None:
    """Else its shards, published meanwhile, would be replaced by other bits."""
    output = tmp_path / "out"
    alive = start_and_stop("merge", recipes[0], output, *OPTIONS, script=OTHER_CLASS)
    try:
        refused = [runs.run("merge", recipes[0], output, *OPTIONS, *more) for more in ((), ("--overwrite",))]
    finally:
        alive.send_signal(signal.SIGCONT)
    ((code, said),) = finish(alive)

    assert [process.returncode for process in refused] == [2, 2]
    assert all("would not fit together bit for bit" in process.stderr for process in refused)
    assert code == 0, said
    assert verify(str(output), StorageConfig()).findings == ()
    assert len({receipt["numerics_class"] for receipt in runs.receipts(output)}) == 1


def published(output: Path) -> dict[str, int]:
    """Return the files directly in an output and when they were written, those being written left out."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob("[!.]*") if path.is_file()}


def test_a_run_whose_prefix_was_taken_writes_no_more_shards(
    recipes: tuple[Path, Path], undisturbed: list[dict[str, str]], tmp_path: Path
) -> None:
    """It slept while --overwrite replaced and published the prefix; its shards have the same names."""
    output = tmp_path / "out"
    asleep = start_and_stop("merge", recipes[0], output, *OPTIONS, num_receipts=2)
    try:
        taken = runs.run("merge", recipes[1], output, *OPTIONS, "--overwrite")
        before = published(output)
    finally:
        asleep.send_signal(signal.SIGCONT)
    ((code, said),) = finish(asleep)

    assert taken.returncode == 0, taken.stderr
    assert code == 2
    assert "was taken by another plan" in said
    assert undisturbed[1] == runs.shard_digests(output)
    assert before == published(output)
    # Put to sleep while it wrote a receipt, it wrote that to its end: a stray record, which `verify` names.
    findings = verify(str(output), StorageConfig()).findings
    assert [finding for finding in findings if "is a record of another run" not in finding.problem] == []


# Uploads of a run that took the prefix


def merge_by(execute: Execute, recipe: Path, output: str, *, overwrite: bool = False) -> Merged:
    options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", 800_000, overwrite)
    return merge(Inputs.open(load_recipe(str(recipe))), output, options, execute)


def test_a_run_that_lost_its_prefix_leaves_the_uploads_of_the_one_that_took_it(
    recipes: tuple[Path, Path], undisturbed: list[dict[str, str]], s3_endpoint: str, s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Their shards have equal names; the loser sweeps as it ends, while the other one uploads."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    output = f"s3://{s3_bucket}/out"
    has_begun, is_uploading = threading.Event(), threading.Event()

    def lose(spec: Any, shards: Sequence[ShardPlan], tracker: Any) -> Iterator[Receipt]:
        has_begun.set()
        assert is_uploading.wait(HANG_S)
        yield from in_this_process(spec, shards, tracker)

    def take(spec: Any, shards: Sequence[ShardPlan], tracker: Any) -> Iterator[Receipt]:
        shard = {"Bucket": s3_bucket, "Key": f"out/{shards[0].file}"}
        upload = {**shard, "UploadId": s3.create_multipart_upload(**shard)["UploadId"]}
        part = s3.upload_part(**upload, PartNumber=1, Body=b"half")
        is_uploading.set()
        with pytest.raises(OutputConflictError, match="was taken by another plan"):
            loser.result(timeout=HANG_S)
        parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        yield from in_this_process(spec, shards, tracker)

    with ThreadPoolExecutor(1) as beside:
        loser = beside.submit(merge_by, lose, recipes[0], output)
        assert has_begun.wait(HANG_S)
        result = merge_by(take, recipes[1], output, overwrite=True)

    assert undisturbed[1] == runs.expected_digests([result])[0]
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=s3_bucket)


@pytest.mark.parametrize("sign", ["run", "claim"])
def test_uploads_are_swept_once_no_plan_has_a_run_alive(sign: str, s3_endpoint: str, s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    store = open_store(f"s3://{s3_bucket}/out", StorageConfig(), writable=True)
    shard, ours, others = "model-00001-of-00002.safetensors", "a" * 64, "b" * 64
    s3.create_multipart_upload(Bucket=s3_bucket, Key=f"out/{shard}")

    with Heartbeat(store, ours, "our run"):
        if sign == "run":
            with Heartbeat(store, others, "their run"):
                abort_leftovers(store, ours, "our run", {shard})
        else:
            store.put(CLAIM_FILE, claims.encode(Claim.now(others, "their run")))
            abort_leftovers(store, ours, "our run", {shard})
        kept = s3.list_multipart_uploads(Bucket=s3_bucket).get("Uploads", [])
        store.put(CLAIM_FILE, claims.encode(Claim.now(ours, "our run")))
        abort_leftovers(store, ours, "our run", {shard})

    assert [upload["Key"] for upload in kept] == [f"out/{shard}"]
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=s3_bucket)
