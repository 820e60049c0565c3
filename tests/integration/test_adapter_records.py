"""Adapters made here: killed and resumed, and what `verify`, `report`, `status`, `audit` and `clean` know of them."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from typer.testing import Result

import stockflow
from stockflow.adapters import pieces
from stockflow.errors import OutputConflictError
from stockflow.events import Done, Event, Moved, Stage
from tests import adapters, runs
from tests.checkpoints import LLAMA_CONFIG, write_checkpoint

NAMES = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(6)]
WHOLE = "model.norm.weight"
PLACES = ("base", "tuned", "out")


def write(folder: Path) -> list[str]:
    """Write a model and a tune of all its matrices but one; return where they are, and where the adapter goes."""
    random = torch.Generator().manual_seed(3)
    base = {name: torch.randn(40, 30, generator=random) for name in NAMES} | {WHOLE: torch.ones(40)}
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=random) for name, tensor in base.items()}
    tuned[NAMES[4]] = base[NAMES[4]]
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(folder / name, tensors, config=LLAMA_CONFIG)
    return [str(folder / place) for place in PLACES]


def extracted(places: list[str], **settings: Any) -> stockflow.Extraction:
    return stockflow.extract(*places, rank=4, keep_whole=True, workers=1, **settings)


def run(*words: object) -> Result:
    result = runs.invoke(*words)
    assert "Traceback" not in result.output
    return result


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


_KILLED = """
import json, os, signal, sys
import stockflow
from stockflow.adapters import pieces
from stockflow.events import Done

pieces.PIECE_BYTES = 1
done = []

def tell(event):
    if isinstance(event, Done) and "q_proj" in event.item:
        done.append(event.item)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "merge":
    stockflow.merge(*sys.argv[2:4], on_event=tell, **json.loads(sys.argv[4]))
else:
    stockflow.extract(*sys.argv[1:4], rank=4, keep_whole=True, workers=1, on_event=tell, **json.loads(sys.argv[4]))
"""


def killed_midway(places: list[str], **settings: Any) -> None:
    """Extract, or merge, in a process of its own that is killed after four of the matrices."""
    words = [sys.executable, "-c", _KILLED, *places, json.dumps(settings)]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_an_extraction_that_is_killed_goes_on_and_ends_with_equal_bytes(tmp_path: Path) -> None:
    places = write(tmp_path)
    out = tmp_path / "out"
    whole = extracted([*places[:2], str(tmp_path / "at-once")])

    killed_midway(places)

    assert not (out / "adapter_config.json").exists()
    status = json.loads(run("status", out, "--json").stdout)
    assert (status["state"], status["bytes_done"] > 0) == ("running", True), "seen a moment ago"
    unfinished = run("verify", out)
    assert (unfinished.exit_code, "not a finished output" in unfinished.output) == (2, True)
    other = run("extract", *places, "--rank", 3, "--keep-whole")
    assert (other.exit_code, "unfinished run of another plan" in other.output) == (2, True)
    read: list[str] = []
    resumed = extracted(places, on_event=lambda event: read.append(event.item) if isinstance(event, Done) else None)
    assert [item for item in read if item in NAMES] == NAMES[3:], "the others are not looked at again"
    assert files_of(out) == files_of(tmp_path / "at-once")
    assert (resumed.tensors, resumed.num_equal, resumed.energy) == (whole.tensors, whole.num_equal, whole.energy)
    assert not list(out.rglob("factors/*")), "nothing is left of what was kept meanwhile"
    assert run("verify", out).exit_code == 0


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_extraction_that_is_killed_goes_on_in_a_bucket(
    executor: str, s3_endpoint: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    extracted([*write(tmp_path)[:2], str(tmp_path / "at-once")])
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in [path for name in PLACES[:2] for path in (tmp_path / name).iterdir()]:
        client.upload_file(str(path), s3_bucket, f"{path.parent.name}/{path.name}")
    places = [f"s3://{s3_bucket}/{place}" for place in PLACES]
    storage = {"storage": {f"s3://{s3_bucket}": {"endpoint": s3_endpoint}}}
    recipe = {"merge_method": "passthrough", "models": [{"model": "x/y"}], "stockflow": storage}
    killed_midway(places, recipe=recipe, executor=executor)

    read: list[str] = []
    extracted(
        places,
        recipe=recipe,
        executor=executor,
        on_event=lambda event: read.append(event.item) if isinstance(event, Done) else None,
    )

    assert 0 < len([item for item in read if item in NAMES]) < len(NAMES), "some are not looked at again"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_bucket, Prefix="out/")
    left = {entry["Key"].removeprefix("out/") for page in pages for entry in page["Contents"]}
    assert not [key for key in left if "/factors/" in key], "nothing is left of what was kept meanwhile"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        body = client.get_object(Bucket=s3_bucket, Key=f"out/{name}")["Body"].read()
        expected = (tmp_path / "at-once" / name).read_bytes()
        assert body == expected.replace(str(tmp_path).encode(), f"s3://{s3_bucket}".encode())


def stops_after(number: int) -> Callable[[Event], None]:
    left = iter(range(number))

    def tell(event: Event) -> None:
        if isinstance(event, Done) and event.item in NAMES and next(left, None) is None:
            raise KeyboardInterrupt

    return tell


def test_pieces_that_are_damaged_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    places, out = write(tmp_path), tmp_path / "out"
    extracted([*places[:2], str(tmp_path / "at-once")])
    with pytest.raises(KeyboardInterrupt):
        extracted(places, on_event=stops_after(5))
    kept = sorted(out.rglob("factors/*.safetensors"))
    assert len(kept) >= 4
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"\x55")
    receipt = next(path for path in out.rglob("receipts/**/*.json") if kept[1].name in path.name)
    receipt.write_text("{}")

    extracted(places)

    assert files_of(out) == files_of(tmp_path / "at-once")


def test_what_is_finished_is_not_made_again_but_told(tmp_path: Path) -> None:
    places = write(tmp_path)
    first = extracted(places)
    moved: list[Event] = []

    again = extracted(places, on_event=lambda event: moved.append(event) if isinstance(event, Moved) else None)

    assert moved == []
    assert again == first
    with pytest.raises(OutputConflictError, match="finished output of another plan"):
        stockflow.extract(*places, rank=3, keep_whole=True)
    assert stockflow.extract(*places, rank=3, keep_whole=True, overwrite=True).tensors[0].rank == 3
    assert run("verify", places[2]).exit_code == 0


def test_what_another_plan_published_meanwhile_is_not_taken_for_ours(tmp_path: Path) -> None:
    places = write(tmp_path)
    other = stockflow.extract(*places[:2], tmp_path / "other", rank=2, keep_whole=True, workers=1)
    theirs = (Path(other.output_url) / "manifest.json").read_bytes()

    def publishing(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "publishing":
            (tmp_path / "out" / "manifest.json").write_bytes(theirs)

    with pytest.raises(OutputConflictError, match="was published by another plan"):
        extracted(places, on_event=publishing)

    assert (tmp_path / "out" / "manifest.json").read_bytes() == theirs
    assert list((tmp_path / "out").glob("_stockflow/*/factors/*")), "what was made stays, for another place"


def test_every_byte_is_verified(tmp_path: Path) -> None:
    places, out = write(tmp_path), tmp_path / "out"
    extracted(places)

    sound = run("verify", out, "--inputs")

    assert (sound.exit_code, "4 files, 11 tensors" in sound.output, "--sample" in sound.output) == (0, True, False)
    sample = run("verify", out, "--sample", "5%")
    assert (sample.exit_code, "is an adapter" in sample.output) == (2, True)
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    (out / "adapter_config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "tuned" / "model.safetensors").touch()
    damaged = run("verify", out, "--inputs")
    assert damaged.exit_code == 4
    assert all(f"{name}: " in damaged.output for name in (weights.name, "adapter_config.json", "model.safetensors"))
    assert "changed since" in damaged.output


def test_the_records_tell_what_an_adapter_is(tmp_path: Path) -> None:
    places, out = write(tmp_path), tmp_path / "out"
    found = extracted(places)

    told = run("report", out)

    assert told.exit_code == 0
    assert all(word in told.output for word in (*places[:2], "stockflow extract", "5 tensors by factors of rank 4"))
    record = stockflow.report(out)
    assert isinstance(record, stockflow.AdapterRecord)
    assert record.tensors == found.tensors
    facts = json.loads(run("report", out, "--json").stdout)
    assert facts["summary"]["tensors"] == len(found.tensors) == 6
    page = run("report", out, "--html", tmp_path / "page.html")
    assert (page.exit_code, "is an adapter" in page.output) == (2, True)
    assert "6 of 6 tensors" in run("status", out).output
    audit = run("audit", out)
    assert (audit.exit_code, "is an adapter" in audit.output) == (2, True)
    (out / "_stockflow" / record.manifest.plan_id / "tensors.parquet").write_bytes(b"")
    damaged = run("report", out)
    assert (damaged.exit_code, "is not as the manifest says" in damaged.output) == (4, True)


def test_what_a_killed_extraction_left_beside_a_finished_one_is_cleaned(tmp_path: Path) -> None:
    places, out = write(tmp_path), tmp_path / "out"
    extracted(places)
    folder = out / "_stockflow" / json.loads((out / "manifest.json").read_text())["plan_id"] / "factors"
    (folder / "0-000000.safetensors").write_bytes(b"left")

    assert "stale record" in run("clean", out).output
    run("clean", out, "--yes")

    assert not list(folder.iterdir())
    assert run("verify", out).exit_code == 0


def test_adapters_that_are_merged_have_records_and_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    shapes = dict.fromkeys(NAMES, (40, 30))
    for number in range(2):
        adapters.write_adapter(tmp_path / f"lora-{number}", adapters.linear(shapes, ["q_proj"], r=3, seed=number))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / f"lora-{each}"), "parameters": {"weight": 0.5}} for each in range(2)],
        "stockflow": {"output": "adapter", "rank": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    whole = stockflow.merge(tmp_path / "recipe.yaml", tmp_path / "at-once")
    assert isinstance(whole, stockflow.CombinedAdapter)
    stop = stops_after(3)

    with pytest.raises(KeyboardInterrupt):
        stockflow.merge(tmp_path / "recipe.yaml", tmp_path / "out", on_event=lambda event: stop(as_weight(event)))
    resumed = stockflow.merge(tmp_path / "recipe.yaml", tmp_path / "out")

    assert isinstance(resumed, stockflow.CombinedAdapter)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at-once")
    assert resumed.energies == whole.energies
    assert run("verify", tmp_path / "out", "--inputs").exit_code == 0
    assert "6 tensors by factors of rank 4; 0 tensors whole" in run("report", tmp_path / "out").output


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_adapters_are_merged_in_a_bucket_and_go_on_there(
    executor: str, s3_endpoint: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for number in range(3):
        made = adapters.linear(dict.fromkeys(NAMES, (40, 30)), ["q_proj"], r=3, seed=number)
        folder = adapters.write_adapter(tmp_path / f"lora-{number}", made, base_model_name_or_path="org/base")
        for path in folder.iterdir():
            client.upload_file(str(path), s3_bucket, f"{folder.name}/{path.name}")
    whole = stockflow.merge(merge_of_three(str(tmp_path)), tmp_path / "at-once")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge_of_three(f"s3://{s3_bucket}", endpoint=s3_endpoint)))
    places = ["merge", str(tmp_path / "recipe.yaml"), f"s3://{s3_bucket}/out"]
    killed_midway(places, executor=executor)
    read: list[str] = []

    resumed = stockflow.merge(
        *places[1:],
        executor=executor,
        on_event=lambda event: read.append(event.item) if isinstance(event, Done) else None,
    )

    assert isinstance(whole, stockflow.CombinedAdapter)
    assert isinstance(resumed, stockflow.CombinedAdapter)
    assert resumed.energies == whole.energies
    assert 0 < len([item for item in read if f"{item}.weight" in NAMES]) < len(NAMES), "some are not made again"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        body = client.get_object(Bucket=s3_bucket, Key=f"out/{name}")["Body"].read()
        assert body == (tmp_path / "at-once" / name).read_bytes()
    assert run("verify", places[2], "--recipe", places[1], "--inputs").exit_code == 0


def merge_of_three(root: str, **storage: str) -> dict[str, Any]:
    models = [{"model": f"{root}/lora-{each}", "parameters": {"weight": 0.5 - each}} for each in range(3)]
    options = {"output": "adapter", "rank": 4, **({"storage": {root: storage}} if storage else {})}
    return {"merge_method": "task_arithmetic", "base_model": "org/base", "models": models, "stockflow": options}


def as_weight(event: Event) -> Event:
    return Done(f"{event.item}.weight") if isinstance(event, Done) else event
