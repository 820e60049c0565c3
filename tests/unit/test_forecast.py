"""What ``stockflow plan`` says: held against merges, files and servers, not against itself."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stockflow.cli import app
from stockflow.errors import RecipeError
from stockflow.forecast.amounts import survey
from stockflow.forecast.calibration import load_calibration, parse_calibration
from stockflow.forecast.measuring import calibrate, solved
from stockflow.forecast.pagecache import cached_share
from stockflow.forecast.prices import load_prices
from stockflow.recipe import load_recipe
from stockflow.run.driver import Inputs, MergeOptions, plan_merge
from tests.checkpoints import make_family, write_recipe
from tests.runs import MIB, merge_here, run

SHAPES = {"large": (700, 1024), "small.a": (33, 7), "small.b": (5,), "small.c": (1000,)}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, SHAPES, buffers=False))


def test_bytes_that_are_announced_are_read(recipe: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    plan, workspace = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(1024 * MIB, 2, "cpu"))
    announced = survey(plan, workspace, 2)

    merged = merge_here(recipe, tmp_path / "out")

    assert announced.num_bytes_read == merged.manifest.summary["bytes_read"]
    assert announced.num_bytes_written == merged.manifest.summary["bytes_written"]


def test_elements_are_counted_once_per_pass(recipe: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    plan, workspace = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(1024 * MIB, 2, "cpu"))

    (shard,) = survey(plan, workspace, 2).shards

    loads = [load for step in shard.steps for load in step.loads]
    assert sum(sum(load.elems.values()) for load in loads) == 700 * 1024 + 33 * 7 + 5 + 1000
    assert sum(load.num_bytes_out for load in loads) == shard.num_bytes - len(plan.shards[0].header)
    assert shard.num_pieces == 3 * len(SHAPES)


def test_plan_tells_time_memory_and_cost(recipe: Path, tmp_path: Path) -> None:
    finished = run("plan", recipe, tmp_path / "out", "--json", "--machine", "c7i.4xlarge", "--memory", "1GiB")

    facts = json.loads(finished.stdout)
    found = facts["forecast"]
    assert found["seconds"] == pytest.approx(sum(found["phases"].values()))
    assert list(found["phases"]) == ["start", "opening", "merging", "publishing", "tail"]
    assert found["cost"]["machines"] == pytest.approx(0.714 * found["seconds"] / 3600)
    assert found["cost"]["requests"] == 0, "folders are free"
    assert facts["worst_tensor"] == "large"
    assert facts["least_memory_bytes"] <= 1024 * MIB
    enough, little = (facts["least_memory_bytes"] + change for change in (0, -1))
    assert run("plan", recipe, tmp_path / "out", "--memory", enough).returncode == 0
    assert run("plan", recipe, tmp_path / "out", "--memory", little).returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--read-rate", "fast"], "--read-rate: expected a rate"),
        (["--write-rate", "10 miles/s"], "--write-rate: expected a rate"),
        (["--latency", "30"], "--latency: expected a time"),
        (["--machine", "abacus"], "no machine 'abacus'"),
        (["--prices", "/nowhere"], "cannot read the prices /nowhere"),
        (["--calibration", "/nowhere"], "cannot read the calibration /nowhere"),
    ],
)
def test_what_cannot_be_understood_is_said(recipe: Path, tmp_path: Path, words: list[str], said: str) -> None:
    finished = CliRunner().invoke(app, ["plan", str(recipe), str(tmp_path / "out"), *words])

    assert finished.exit_code == 2
    assert said in finished.stderr
    assert finished.stdout == ""


def test_a_users_calibration_goes_before_the_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    built_in, where = load_calibration(None)
    assert "another machine" in where
    own = tmp_path / "stockflow" / "calibration.json"
    own.parent.mkdir()
    own.write_text(built_in.to_json().replace(built_in.measured, "yesterday"))

    found, where = load_calibration(None)

    assert found.measured == "yesterday"
    assert str(own) in where
    assert parse_calibration(own.read_bytes(), "own") == found


def test_the_built_in_calibration_names_no_folder_of_ours(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    found = json.loads(run("plan", recipe, tmp_path / "out", "--json").stdout)["forecast"]["sources"]

    assert len(found) == 1
    assert "constants of another machine" in found[0]


def test_a_store_that_was_not_measured_is_taken_for_a_store_and_not_for_a_disk(tmp_path: Path) -> None:
    built_in, _ = load_calibration(None)
    own = tmp_path / "own.json"
    disk = replace(next(place for place in built_in.places if place.is_local), url="/data", name="")
    own.write_text(replace(built_in, places=(disk,)).to_json())

    found, _ = load_calibration(own)

    place, is_measured = found.place("s3://bucket/model")
    assert not is_measured
    assert not place.is_local
    assert "assumed" in place.name
    assert found.place("/data/model") == (disk, True)
    assert found.place("/other") == (disk, False)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "stockflow-calibration-1", "measured": "now"}'])
def test_what_is_no_calibration_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a calibration"):
        parse_calibration(text.encode(), "it")


@pytest.mark.parametrize(("measured", "found"), [(3.0, 2000.0), (1.0, 0.0), (0.5, 0.0), (1e9, 10_000.0)])
def test_what_the_model_lacks_is_found_by_halving(measured: float, found: float) -> None:
    assert solved(lambda micros: 1.0 + micros / 1000.0, measured) == pytest.approx(found, abs=1e-3)


def test_a_table_of_prices_can_be_replaced(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"format": "stockflow-prices-1", "source": "ours", "date": "now", "currency": "EUR",
                                  "stores": {}, "machines": {}}))  # fmt: skip

    assert load_prices(str(prices)).source == "ours"
    prices.write_text("{}")
    with pytest.raises(RecipeError, match="is not a table of prices"):
        load_prices(str(prices))


def test_files_in_memory_are_told_from_those_on_the_disk(tmp_path: Path) -> None:
    if _is_in_memory(tmp_path):
        pytest.skip("a file system without a disk")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * MIB))
    with path.open("rb") as file:
        assert cached_share(file.fileno()) == 1.0

        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        assert cached_share(file.fileno()) == 0.0
        assert cached_share(file.fileno()) == 0.0, "asking reads nothing"


def _is_in_memory(folder: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    within = [mount for mount in mounts if folder.is_relative_to(mount[1])]
    return max(within, key=lambda mount: len(mount[1]))[2] in ("tmpfs", "ramfs")


@pytest.mark.scale
def test_calibrating_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    found = calibrate(tmp_path, [], said.append)

    assert os.listdir(tmp_path) == []
    assert len(said) == 4
    assert parse_calibration(found.to_json().encode(), "it").machine.cores == found.machine.cores
    assert all(cost.statistics_ns > 0 and cost.combine_ns > 0 for cost in found.machine.kernels)
    (place,) = found.places
    assert place.url == str(tmp_path)
    assert min(place.start_s, place.read_rate, place.write_rate, place.put_s) > 0
