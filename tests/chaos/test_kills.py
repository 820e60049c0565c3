"""At least a hundred random kills on disk, on S3 and on Ray: ``make chaos``, ``make chaos ARGS='--seed 7'``.

After each there is no manifest, or an output that ``verify`` passes; the next run resumes, redoes no shard that has a
receipt, and ends with the digests of the undisturbed merge.
"""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import boto3
import pytest
import yaml

from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from stockflow.storage import StorageConfig, StoreOptions
from tests.chaos.kills import Chaos, Kill, Phase, Site, Victim, table
from tests.chaos.outputs import BucketOutput, FolderOutput, Output
from tests.chaos.processes import Commanded, Forked, Running
from tests.checkpoints import make_family
from tests.fault_proxy import FaultyProxy
from tests.runs import MIB, grown_bytes
from tests.s3_server import CREDENTIALS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

SHAPES = {f"model.layers.{index}.weight": (1000, 1200) for index in range(12)}
SHARD_SIZE = 2_500_000
"""one tensor of 2.4 MB in each; three parts of an upload"""
BUCKET = "chaos"
SHARES = {"disk": 0.50, "s3": 0.30, "ray": 0.14, "ray s3": 0.06}
"""of all kills, by site"""
ENOUGH = 50
"""kills, below which their phases are left to chance"""
DRIVER: tuple[Victim, ...] = ("driver",)
ANYBODY: tuple[Victim, ...] = (*["worker"] * 4, "driver", "everything")


def _phases(start_s: float, shard_s: float, publish_s: float) -> dict[Phase, float]:
    return {"before a shard": start_s, "in a shard": shard_s, "publishing": publish_s}


class Grounds:
    """One family on disk and in a bucket behind a throttling proxy, and the sites that merge it."""

    def __init__(self, folder: Path, endpoint: str, proxy: FaultyProxy) -> None:
        self._folder, self._proxy = folder, proxy
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._numbers = count(1)
        self.behind = StorageConfig({f"s3://{BUCKET}": StoreOptions(endpoint=endpoint)})
        self._client.create_bucket(Bucket=BUCKET)
        family = make_family(folder, 2, SHAPES)
        on_disk = [family.base, *family.tuned]
        for path in (file for model in on_disk for file in model.iterdir()):
            self._client.upload_file(str(path), BUCKET, f"{path.parent.name}/{path.name}")
        self._disk = self._recipe("disk", [str(model) for model in on_disk])
        self._s3 = self._recipe("s3", [f"s3://{BUCKET}/{model.name}" for model in on_disk])
        self.expected = self._undisturbed()

    def sites(self) -> dict[str, Site]:
        """Return where merges are killed: two in processes of their own, two on Ray."""
        # A throttled store makes moments that are long enough to be hit.
        self._proxy.delays_s |= {"get": 0.05, "part": 0.03, "put": 0.03}
        return {
            "disk": Site(
                "disk", self._forked(self._disk), self._folder_output, DRIVER, False, 2, _phases(0.3, 0.06, 0.1)
            ),
            "s3": Site("s3", self._forked(self._s3), self._bucket_output, DRIVER, False, 2, _phases(1.0, 0.3, 0.6)),
            "ray": Site("ray", self._on_ray(), self._folder_output, ANYBODY, True, 2, _phases(6.0, 0.4, 0.8)),
            "ray s3": Site("ray s3", self._on_ray(), self._bucket_output, ANYBODY, True, 2, _phases(6.0, 0.6, 1.2)),
        }

    def _recipe(self, name: str, models: list[str]) -> Path:
        content = {"merge_method": "model_stock", "base_model": models[0]}
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | {"models": [{"model": model} for model in models[1:]]}))
        return path

    def _undisturbed(self) -> dict[str, str]:
        options = MergeOptions(1024 * MIB + grown_bytes(), 2, "cpu", SHARD_SIZE)
        inputs = Inputs.open(load_recipe(str(self._disk)))
        result = merge(inputs, str(self._folder / "undisturbed"), options, in_this_process)
        return {shard.file: result.manifest.files[shard.file].sha256 for shard in result.plan.shards}

    def _folder_output(self) -> Output:
        return FolderOutput(self._folder / f"out-{next(self._numbers)}")

    def _bucket_output(self) -> Output:
        return BucketOutput(self._client, self._proxy, BUCKET, f"out-{next(self._numbers)}")

    def _arguments(self, recipe: Path, output: Output, *more: str) -> list[str]:
        options = ["--shard-size", str(SHARD_SIZE), "--memory", "1GiB", "--device", "cpu", "--quiet", *more]
        return ["merge", str(recipe), output.url, *options]

    def _environment(self) -> dict[str, str]:
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self._proxy.url}

    def _forked(self, recipe: Path) -> Callable[[Output], Running]:
        def start(output: Output) -> Running:
            arguments = self._arguments(recipe, output, "--workers", "2")
            return Forked(arguments, self._environment(), self._folder / "log.txt", part_bytes=MIB)

        return start

    def _on_ray(self) -> Callable[[Output], Running]:
        def start(output: Output) -> Running:
            arguments = self._arguments(self._s3, output, "--executor", "ray", "--workers", "2")
            return Commanded(arguments, self._environment(), self._folder / "log.txt")

        return start

    def log(self) -> str:
        """Return what the merges said last."""
        path = self._folder / "log.txt"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Grounds]:
    with FaultyProxy(s3_endpoint) as proxy:
        yield Grounds(tmp_path_factory.mktemp("chaos"), s3_endpoint, proxy)


def test_random_kills_are_survived(
    grounds: Grounds, seed: int, num_kills: int, sites: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kills: list[Kill] = []
    lines = []
    for number, (name, site) in enumerate(grounds.sites().items()):
        if name not in sites:
            continue
        started = time.monotonic()
        chaos = Chaos(site, Random(f"{seed} {number}"), grounds.expected, grounds.behind)
        try:
            kills += chaos.run(round(SHARES[name] / sum(SHARES[site] for site in sites) * num_kills))
        except AssertionError:
            with capsys.disabled():
                print(f"\nseed {seed}, at {name}, after {len(chaos.kills)} kills there:\n{grounds.log()}")
            raise
        lines.append(f"{name}: {chaos.num_merges} merges ended, {time.monotonic() - started:.0f} s")
        with capsys.disabled():
            print(f"\n{lines[-1]}", end="", flush=True)

    with capsys.disabled():
        print(f"\n{table(kills, seed)}\n")
    assert len(kills) >= num_kills - 1  # shares are rounded
    if num_kills >= ENOUGH:
        assert sum(kill.phase == "in a shard" for kill in kills) >= 0.7 * num_kills
        assert sum(kill.phase == "publishing" for kill in kills) >= 0.1 * num_kills
