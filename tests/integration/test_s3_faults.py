"""Whole merges over a store that fails: the same digests in the end, or exit 3 and a prefix that resumes."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import boto3
import pytest
import yaml

from stockflow.errors import AccessDeniedError, InputChangedError, StorageError
from stockflow.output.keys import MANIFEST_FILE
from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import Merged, MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, Store, fs, objects, open_store, parts
from stockflow.storage.retry import RetryPolicy
from stockflow.verification.verify import verify
from tests.checkpoints import make_family
from tests.fault_proxy import Fault, FaultyProxy, Outage, Step, Weather
from tests.runs import MIB, grown_bytes, receipts, shard_digests

SHAPES = {f"model.layers.{index}.weight": (600, 1000) for index in range(6)}
SHARD_SIZE = 1_300_000
"""one tensor of 1.2 MB in each, two parts"""
QUICK = partial(RetryPolicy, attempts=6, first_delay_s=0.01, max_delay_s=0.05, read_timeout_s=3.0, write_timeout_s=3.0)
"""A busy machine may take a second for an answer, but not three, six times in a row."""
STORM: dict[Fault, float] = {"503": 0.05, "reset": 0.01, "cut": 0.01, "truncate": 0.01, "stall": 0.01}
"""as the issue asks: 5 % SlowDown, 2 % resets (before and within bodies), 1 % truncation, 1 % stalls"""
LATE_STORM: dict[Fault, float] = {
    "503": 0.05,
    "reset": 0.02,
    **dict.fromkeys(("cut", "truncate", "429", "lost"), 0.01),
    "stall": 0.005,
}
"""with listings that lag by two seconds"""
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a family and the merge of it, undisturbed."""
    folder = tmp_path_factory.mktemp("faults")
    family = make_family(folder, 2, SHAPES)
    merged(recipe_at(folder, [str(path) for path in (family.base, *family.tuned)]), str(folder / "out"))
    return folder


@pytest.fixture(scope="module")
def digests(local: Path) -> dict[str, str]:
    return shard_digests(local / "out")


@pytest.fixture
def place(
    request: pytest.FixtureRequest, local: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator["Place"]:
    """A family in a bucket behind a proxy; by indirect parametrization, for another client."""
    if getattr(request, "param", "obstore") == "obstore":  # s3fs refuses such small parts
        monkeypatch.setattr(parts, "DEFAULT_PART_BYTES", MIB)
    for module in (objects, fs):
        monkeypatch.setattr(module, "RetryPolicy", QUICK)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for folder in (local / "base", local / "tuned-1", local / "tuned-2"):
        for path in folder.iterdir():
            client.upload_file(str(path), s3_bucket, f"{folder.name}/{path.name}")
    with FaultyProxy(s3_endpoint) as proxy:
        yield Place(local, s3_bucket, proxy, s3_endpoint, getattr(request, "param", "obstore"))


class Place:
    """A family and an output in one bucket behind a proxy."""

    def __init__(self, folder: Path, bucket: str, proxy: FaultyProxy, endpoint: str, client: str) -> None:
        self.proxy = proxy
        self.output = f"s3://{bucket}/out"
        models = [f"s3://{bucket}/{name}" for name in ("base", "tuned-1", "tuned-2")]
        self.recipe = recipe_at(folder, models, {f"s3://{bucket}/": {"endpoint": proxy.url, "client": client}})
        self.behind = StorageConfig({f"s3://{bucket}": _options(endpoint)})

    def found(self) -> Store:
        """The output, past the proxy."""
        return open_store(self.output, self.behind)

    def merge(self) -> Merged:
        return merged(self.recipe, self.output)


def _options(endpoint: str) -> objects.StoreOptions:
    return objects.StoreOptions(endpoint=endpoint)


def recipe_at(folder: Path, models: list[str], storage: object = None) -> Path:
    path = folder / f"recipe-{random.getrandbits(40):x}.yaml"
    content = {
        "merge_method": "model_stock",
        "base_model": models[0],
        "models": [{"model": name} for name in models[1:]],
    }
    path.write_text(yaml.safe_dump(content | {"stockflow": {"storage": storage or {}}}))
    return path


def merged(recipe: Path, output: str) -> Merged:
    options = MergeOptions(1024 * MIB + grown_bytes(), 2, "cpu", SHARD_SIZE)
    return merge(Inputs.open(load_recipe(str(recipe))), output, options, places.in_this_process)


def shards(result: Merged) -> dict[str, str]:
    return {shard.file: result.manifest.files[shard.file].sha256 for shard in result.plan.shards}


def test_the_local_merge_has_shards_of_several_parts(local: Path, digests: dict[str, str]) -> None:
    assert len(digests) == 6
    assert all((local / "out" / file).stat().st_size > MIB for file in digests)
    assert all(receipt["retries"] == {"read": 0} for receipt in receipts(local / "out"))


# What passes


def test_a_merge_in_a_storm_gives_the_same_digests(place: Place, digests: dict[str, str]) -> None:
    met: Counter[Fault] = Counter()
    retries = 0.0
    for seed in SEEDS:
        place.proxy.weathers = [Weather(STORM, seed)]
        place.output = f"{place.output}-{seed}"

        result = place.merge()

        assert digests == shards(result)
        assert not verify(place.output, place.behind).findings
        retries += result.manifest.summary["retries"]
    for (_, fault), count in place.proxy.met.items():
        met[fault] += count
    assert set(STORM) <= set(met), met
    assert sum(met.values()) > 0.05 * len(place.proxy.requests) > 7.5
    assert retries > 0


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", ["obstore", "fsspec"], indirect=True)
def test_many_merges_in_storms_give_the_same_digests(
    place: Place, digests: dict[str, str], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place.proxy.listing_lag_s = 2.0
    outputs = [f"{place.output}-{number}" for number in range(5)]
    for number, output in enumerate(outputs):
        place.output, place.proxy.weathers = output, [Weather(LATE_STORM, seed + number)]

        assert digests == shards(place.merge())
        place.proxy.weathers.clear()
        assert not verify(output, place.behind).findings
    met: Counter[Fault] = Counter()
    for (_, fault), count in place.proxy.met.items():
        met[fault] += count

    with capsys.disabled():
        print(f"\nseeds {seed} to {seed + 4}: {len(place.proxy.requests)} requests met {dict(met)}; 5 merges the same")
    assert set(LATE_STORM) == set(met)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_merge_under_every_fault_at_once_gives_the_same_digests(
    place: Place, digests: dict[str, str], seed: int
) -> None:
    """Flipped bytes too, on the way up: a shard that did not arrive ends a run, and the next one makes it again."""
    every = [fault for fault in get_args(Fault) if fault not in _FINAL]
    way_up: frozenset[Step] = frozenset(("put", "part"))
    place.proxy.weathers = [Weather({"flip": 0.15}, seed, way_up), Weather(dict.fromkeys(every, 0.02), seed)]
    failures = []

    for _ in range(12):
        try:
            result = place.merge()
            break
        except StorageError as error:
            failures.append(str(error))
    else:
        pytest.fail("\n".join(failures))

    assert digests == shards(result)
    place.proxy.weathers.clear()
    assert not verify(place.output, place.behind).findings
    assert sum(count for (_, fault), count in place.proxy.met.items() if fault == "flip") > 0
    assert all("run again to resume" in failure for failure in failures)


_FINAL = {"501", "expired", "denied", "elsewhere", "skewed", "moved", "gone", "wrong-etag", "pass", "flip"}
"""what says no, not now"""


def test_a_listing_that_lags_behind_ends_no_merge(place: Place, digests: dict[str, str]) -> None:
    """Nothing that a run writes is listed before it ends, and what it wrote is missing when it is first asked for."""
    place.proxy.listing_lag_s = 600.0
    place.proxy.fail("head", "gone", times=2)

    assert digests == shards(place.merge())
    assert place.proxy.met["head", "gone"] == 2


def test_a_shard_whose_upload_met_a_senseless_answer_is_merged_again(place: Place, digests: dict[str, str]) -> None:
    """obstore asks for a part, and the end of an upload, once where the answer is none of S3."""
    place.proxy.fail("part", "html", after=2)
    place.proxy.fail("complete", "empty", after=2)
    place.proxy.fail("head", "wrong-etag", after=2)
    place.proxy.fail("GET", "wrong-etag", after=20)

    assert digests == shards(place.merge())
    assert place.proxy.steps.count("create") == len(digests) + 2
    assert sum(place.proxy.met.values()) == 4


def test_uploads_that_always_break_end_with_exit_3(place: Place, digests: dict[str, str]) -> None:
    place.proxy.outages.append(Outage("complete", "model-00003", "html"))

    with pytest.raises(StorageError, match=r"^model-00003\S+ was tried 3 times, the last time: cannot write .*again"):
        place.merge()
    assert sum("model-00003" in words and "POST" in words for words in place.proxy.requests) == 2 * places.MAX_UPLOADS
    place.proxy.outages.clear()
    assert digests == shards(place.merge())


def test_an_etag_that_was_wrong_while_planning_leaves_no_claim(place: Place, digests: dict[str, str]) -> None:
    inputs = Inputs.open(load_recipe(str(place.recipe)))
    files = inputs.checkpoints[1].files
    wrong = {file: replace(stamp, version='"0"') for file, stamp in files.items()}
    inputs.checkpoints[1] = replace(inputs.checkpoints[1], files=wrong)
    options = MergeOptions(1024 * MIB + grown_bytes(), 2, "cpu", SHARD_SIZE)

    with pytest.raises(InputChangedError):
        merge(inputs, place.output, options, places.in_this_process)

    assert place.found().list() == {}
    assert digests == shards(place.merge())


# What does not pass

OUTAGES = [
    Outage("get", "tuned-2/model.safetensors"),
    Outage("part", "model-00003"),
    Outage("put", "out/manifest.json"),
]
RARER = [
    Outage("complete", "model-00003"),
    Outage("head", "model-00003"),
    Outage("put", "receipts/model-00003"),
    Outage("list", "base"),
    Outage("put", "_stockflow/claim.json"),
    Outage("put", "/plan.json"),
    Outage("create", "model-00003"),
    Outage("put", "tensors.parquet"),
    Outage("put", "out/config.json"),
    Outage("list", "prefix=out"),
    Outage("part", "model-00003", "lost"),
    Outage("get", "tuned-2/model.safetensors", "stall"),
    Outage("get", "tuned-2/model.safetensors", "truncate"),
]


@pytest.mark.parametrize(
    "outage",
    [*OUTAGES, *(pytest.param(outage, marks=pytest.mark.chaos) for outage in RARER)],
    ids=lambda outage: f"{outage.step} {outage.words} {outage.fault}",
)
def test_an_outage_ends_with_exit_3_and_a_prefix_that_resumes(
    place: Place, digests: dict[str, str], outage: Outage
) -> None:
    place.proxy.outages.append(outage)

    with pytest.raises(StorageError, match=r"cannot \w+ s3://\S+( \(.+\))? after 6 attempts: ") as caught:
        place.merge()
    num_met = place.proxy.met[outage.step, outage.fault]
    place.proxy.outages.clear()
    found = place.found().list()
    resumed = place.merge()

    assert caught.value.exit_code == 3
    assert str(caught.value).endswith(("run again", "run again to resume"))  # planning had begun, or the merge
    assert ("HTTP 503 SlowDown" in str(caught.value)) == (outage.fault == "503" and outage.step != "head")
    assert num_met >= 6
    assert MANIFEST_FILE not in found
    assert sum("/receipts/" in key for key in found) == resumed.num_resumed
    assert ("00003" in outage.words) <= (resumed.num_resumed >= 2)  # the fourth may have ended meanwhile
    assert digests == shards(resumed)
    assert not verify(place.output, place.behind).findings


@pytest.mark.parametrize(
    ("outage", "told"),
    [
        (Outage("part", "model-00003", "expired"), "cannot write {}/model-00003"),
        pytest.param(
            Outage("get", "tuned-2/model.safetensors", "denied"), "tuned-2/model.safetensors", marks=pytest.mark.chaos
        ),
        pytest.param(
            Outage("put", "receipts/model-00003", "denied"), "cannot write {}/_stockflow/", marks=pytest.mark.chaos
        ),
        pytest.param(
            Outage("put", "out/manifest.json", "expired"), "cannot create {}/manifest.json", marks=pytest.mark.chaos
        ),
    ],
)
def test_rights_that_end_while_merging_are_said_and_the_prefix_resumes(
    place: Place, digests: dict[str, str], outage: Outage, told: str
) -> None:
    place.proxy.outages.append(outage)

    with pytest.raises(AccessDeniedError, match="access denied") as caught:
        place.merge()
    num_met = place.proxy.met[outage.step, outage.fault]
    place.proxy.outages.clear()
    found = place.found().list()
    resumed = place.merge()

    assert caught.value.exit_code == 2
    assert told.format(place.output) in str(caught.value)
    assert num_met <= 9  # the first refusal counts; reads and parts beside it were on their way
    assert MANIFEST_FILE not in found
    assert sum("/receipts/" in key for key in found) == resumed.num_resumed
    assert digests == shards(resumed)
