"""What ``stockflow plan`` says: held against merges, files and servers, not against itself."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import stockflow
from stockflow.errors import RecipeError
from stockflow.forecast.amounts import Kernel, survey
from stockflow.forecast.calibrate import calibrate
from stockflow.forecast.constants import load_calibration, parse_calibration
from stockflow.forecast.transfers import is_on_this_machine
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.runs import MIB, merge_here
from tests.waiting import HANG_S, wait_until

SHAPES = {"large": (700, 1024), "small.a": (33, 7), "small.b": (5,), "small.c": (1000,)}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, SHAPES, buffers=False))


def test_bytes_that_are_announced_are_read(recipe: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    plan, workspace = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(1024 * MIB, 2, "cpu"))
    announced = survey(plan, workspace)

    merged = merge_here(recipe, tmp_path / "out")

    assert announced.num_bytes_read == merged.manifest.summary["bytes_read"]
    assert announced.num_bytes_written == merged.manifest.summary["bytes_written"]


def test_elements_are_counted_once_whatever_the_passes(recipe: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(load_recipe(str(recipe)))
    plan, workspace = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(1024 * MIB, 2, "cpu"))

    work = survey(plan, workspace)

    assert work.elems == {Kernel("linear", "BF16", 3, 1): 700 * 1024 + 33 * 7 + 5 + 1000}
    assert work.num_pieces == 3 * len(SHAPES)


def test_an_output_that_is_computed_more_finely_is_another_kernel(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"weight": (3, 5)}, buffers=False)
    inputs = Inputs.open(load_recipe(str(write_recipe(tmp_path / "r.yaml", "model_stock", family, dtype="float32"))))
    plan, workspace = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(1024 * MIB, 2, "cpu"))

    assert survey(plan, workspace).elems == {Kernel("linear", "F32", 3, 1): 15}


def test_plan_tells_time_memory_and_cost(recipe: Path, tmp_path: Path) -> None:
    finished = runs.invoke("plan", recipe, tmp_path / "out", "--json", "--machine-price", "7.2", "--memory", "1GiB")

    facts = json.loads(finished.stdout)
    found = facts["forecast"]
    assert found["seconds"] == pytest.approx(sum(found["phases"].values()))
    assert list(found["phases"]) == ["start", "overhead", "merging"]
    assert found["phases"]["merging"] == max(found["stages"].values())
    assert found["cost"] == {
        "machine_price": 7.2,
        "num_machines": 1,
        "machines": pytest.approx(7.2 * found["seconds"] / 3600),
    }
    assert found["inputs_in_memory"]
    assert found["disk_seconds"] > 0
    assert facts["worst_tensor"] == "large"
    assert facts["least_memory_bytes"] <= 1024 * MIB
    enough, little = (facts["least_memory_bytes"] + change for change in (0, -1))
    assert runs.invoke("plan", recipe, tmp_path / "out", "--memory", enough).exit_code == 0
    assert runs.invoke("plan", recipe, tmp_path / "out", "--memory", little).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        ([], "inputs in folders are taken to be in memory; from the disk, reading them takes at least", "  cost "),
        (["--read-rate", "1MB/s"], "come from the disk, at the rate that is given: 4.31 s", "  cost "),
        (["--machine-price", "3600"], ": 1 machine at 3600 an hour, start to end", "  store "),
    ],
)
def test_what_is_assumed_and_what_is_given_is_said(
    recipe: Path, tmp_path: Path, words: list[str], said: str, unsaid: str
) -> None:
    told = runs.invoke("plan", recipe, tmp_path / "out", *words).stdout

    assert said in told
    assert unsaid not in told


def test_the_cores_of_a_calibration_that_is_given_count(recipe: Path, tmp_path: Path) -> None:
    built_in, _ = load_calibration(None)
    (tmp_path / "large.json").write_text(replace(built_in, machine=replace(built_in.machine, cores=48)).to_json())

    given = stockflow.plan(recipe, tmp_path / "out", calibration=tmp_path / "large.json", memory="4GiB")
    on_ray = stockflow.plan(
        recipe, tmp_path / "out", calibration=tmp_path / "large.json", memory="4GiB", executor="ray", workers=49
    )

    assert given.forecast.conditions.num_threads == 48
    assert on_ray.forecast.conditions.num_machines == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--read-rate", "fast"], "--read-rate: expected a rate"),
        (["--write-rate", "10 miles/s"], "--write-rate: expected a rate"),
        (["--latency", "30"], "--latency: expected a time"),
        (["--machine-price", "inf"], "--machine-price: expected a price per hour, found inf"),
        (["--machine-price", "c7i.4xlarge"], "--machine-price"),
        (["--calibration", "/nowhere"], "cannot read the calibration /nowhere"),
    ],
)
def test_what_cannot_be_understood_is_said(recipe: Path, tmp_path: Path, words: list[str], said: str) -> None:
    finished = runs.invoke("plan", recipe, tmp_path / "out", *words)

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


def test_calibrating_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    place, out = tmp_path / "place", tmp_path / "out.json"
    measuring = runs.start("calibrate", "--folder", place, "--out", out)
    wait_until(lambda: place.exists() and any(place.glob("*/*")), measuring)

    measuring.terminate()

    _, said = measuring.communicate(timeout=HANG_S)
    assert measuring.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said
    assert list(place.iterdir()) == []
    assert not out.exists()


def test_the_built_in_calibration_names_no_folder_of_ours(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    found = json.loads(runs.invoke("plan", recipe, tmp_path / "out", "--json").stdout)["forecast"]["sources"]

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


def test_a_folder_that_was_not_measured_is_named_in_a_command_that_may_be_typed(recipe: Path, tmp_path: Path) -> None:
    built_in, _ = load_calibration(None)
    disk = replace(next(place for place in built_in.places if place.is_local), url="/data", name="")
    (tmp_path / "own.json").write_text(replace(built_in, places=(disk,)).to_json())

    planned = stockflow.plan(recipe, tmp_path / "a folder" / "out", calibration=tmp_path / "own.json")

    assert f"`stockflow calibrate --folder '{tmp_path / 'a folder'}'`" in str(planned)


def _without(field: str, value: float | int) -> str:
    built_in, _ = load_calibration(None)
    return re.sub(f'"{field}": [^,]*', f'"{field}": {value}', built_in.to_json())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": "stockflow-calibration-1", "measured": "now"}',
        _without("cores", 0),
        _without("efficiency", 0.0),
        _without("read_rate", 0.0),
        _without("write_rate", -1.0),
    ],
)
def test_what_is_no_calibration_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a calibration"):
        parse_calibration(text.encode(), "it")


@pytest.mark.parametrize(
    ("url", "endpoint", "found"),
    [
        ("s3://bucket", "http://127.0.0.1:9000", True),
        ("s3://bucket", "http://localhost:9000", True),
        ("s3://bucket", "http://192.0.2.1", False),
        ("s3://bucket", "not a url", False),
        ("gs://bucket", "http://127.0.0.1:9000", False),
    ],
)
def test_a_store_on_this_machine_is_known_by_its_endpoint(
    url: str, endpoint: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    assert is_on_this_machine(url) == found


@pytest.mark.scale
def test_calibrating_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []

    found = calibrate(tmp_path, [], said.append)

    assert os.listdir(tmp_path) == []
    assert len(said) == 4
    assert parse_calibration(found.to_json().encode(), "it").machine.cores == found.machine.cores
    assert all(cost.combine_source_ns > 0 for cost in found.machine.kernels)
    assert 0 < found.machine.efficiency <= 1
    (place,) = found.places
    assert place.url == str(tmp_path)
    assert min(place.start_s, place.read_rate, place.write_rate, place.latency_s) > 0
