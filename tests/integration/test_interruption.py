"""SIGINT and SIGTERM: the process ends within seconds, whatever storage does, and leaves nothing open if it can."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
import yaml

from stockflow.errors import InterruptedRunError
from stockflow.interruption import interruption
from stockflow.output.ownership import earlier_plan
from stockflow.storage import StorageConfig, open_store
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe
from tests.fault_proxy import Fault, FaultyProxy, Request, Weather
from tests.waiting import HANG_S, wait_until

END_S = 60.0
"""Within which a process must be gone: seconds on a quiet machine, where an answer that never comes takes minutes."""
LONG_S = 600.0
"""of patience that nothing here may use up"""
UNHURRIED = {"GRACE_S": 20.0, "LAST_ACTS_S": 20.0}
"""What takes a second on a quiet machine may take longer than the three that a run has."""
OPTIONS = ("--memory", "1GiB", "--device", "cpu", "--quiet")
SHAPES = {f"model.layers.{index}.weight": (1024, 2048) for index in range(7)}
"""one shard of 29 MB, from two models of that size"""
ANSWERED_BYTES = 24 << 20
"""of a model: enough for the upload of the first part, not for the end"""
PLANNING_BYTES = 100_000
"""What planning reads of tensors is less."""
races = pytest.mark.races


class StallingProxy(FaultyProxy):
    """Never answers for the last bytes of a model, so that a merge hangs in the middle of its only shard."""

    def next_fault(self, request: Request) -> Fault:
        fault = super().next_fault(request)
        first, _, last = (request.header("range") or "bytes=0-0").removeprefix("bytes=").partition("-")
        is_merging = request.step == "get" and "/models/" in request.path and int(last) - int(first) > PLANNING_BYTES
        is_last_of_model = is_merging and int(first) >= ANSWERED_BYTES
        return "stall" if is_last_of_model else fault


@dataclass
class Place:
    """A recipe over models in a bucket, which is the output's too, behind a proxy."""

    recipe: Path
    bucket: str
    proxy: FaultyProxy
    s3: Any

    @property
    def output(self) -> str:
        return f"s3://{self.bucket}/merged"

    def uploads(self) -> list[str]:
        return [upload["Key"] for upload in self.s3.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]

    def keys(self) -> list[str]:
        page = self.s3.list_objects_v2(Bucket=self.bucket, Prefix="merged/", MaxKeys=1000)
        return [entry["Key"] for entry in page.get("Contents", ())]

    def grow_old(self) -> None:
        """Make claim and records of runs those of an hour ago."""
        for key in self.keys():
            if key.endswith("claim.json") or "/runs/" in key:
                record = json.loads(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())
                body = json.dumps(record | {"heartbeat": time.time() - 3600})
                self.s3.put_object(Bucket=self.bucket, Key=key, Body=body.encode())

    def reach(self, client: str) -> None:
        """Have the recipe reach the bucket through the proxy."""
        content = yaml.safe_load(self.recipe.read_text())
        content["stockflow"] = {"storage": {f"s3://{self.bucket}/": {"endpoint": self.proxy.url, "client": client}}}
        self.recipe.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("models"), 2, SHAPES)


@pytest.fixture
def place(family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> Iterator[Place]:
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    urls = []
    for folder in family.tuned:
        for file in folder.iterdir():
            s3.put_object(Bucket=s3_bucket, Key=f"models/{folder.name}/{file.name}", Body=file.read_bytes())
        urls.append(f"s3://{s3_bucket}/models/{folder.name}")
    recipe = tmp_path / "recipe.yaml"
    content = {"merge_method": "linear", "models": [{"model": url} for url in urls], "parameters": {"weight": 1.0}}
    recipe.write_text(yaml.safe_dump(content))
    with StallingProxy(s3_endpoint) as proxy:
        yield Place(recipe, s3_bucket, proxy, s3)


def start(*arguments: object, **constants: float) -> "subprocess.Popen[str]":
    """Start a command, with other constants of ``stockflow.interruption``."""
    changes = (f"interruption.{name} = {value}" for name, value in constants.items())
    return runs.start(*arguments, script="\n".join(["from stockflow import interruption", *changes]))


def end(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """Send a signal; see that the process ends, and return what it said."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=END_S)[1]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "client", "executor"),
    [
        (signal.SIGTERM, "obstore", "local"),
        pytest.param(signal.SIGINT, "fsspec", "local", marks=races),
        pytest.param(signal.SIGTERM, "obstore", "ray", marks=races),
        pytest.param(signal.SIGINT, "obstore", "local", marks=races),
        pytest.param(signal.SIGTERM, "fsspec", "local", marks=races),
        pytest.param(signal.SIGINT, "fsspec", "ray", marks=races),
    ],
)
def test_an_upload_is_aborted_where_the_store_answers(
    place: Place, number: signal.Signals, client: str, executor: str
) -> None:
    place.reach(client)
    workers = ("--workers", 1, "--executor", executor)
    process = start("merge", place.recipe, place.output, *OPTIONS, *workers, ONE_STOP_S=LONG_S, **UNHURRIED)
    wait_until(place.uploads, process)

    process.send_signal(number)  # and once more below, as GNU timeout does
    said = end(process, number)

    assert process.returncode == 128 + number, said
    assert place.uploads() == []
    assert f"stopped by {number.name}; run the same command again to resume" in said
    assert "Traceback" not in said
    merged = place.keys()
    assert not [key for key in merged if key.endswith(("manifest.json", ".safetensors")) or "/runs/" in key]


@pytest.mark.parametrize(
    ("outage", "client", "executor"),
    [
        pytest.param("stall", "obstore", "local", marks=races),
        pytest.param("503", "fsspec", "local", marks=races),
        pytest.param("503", "obstore", "local", marks=races),
        pytest.param("stall", "fsspec", "local", marks=races),
        pytest.param("503", "obstore", "ray", marks=races),
        pytest.param("stall", "obstore", "ray", marks=races),
    ],
)
def test_an_outage_keeps_nobody_waiting(
    place: Place, outage: Literal["503", "stall"], client: str, executor: str
) -> None:
    place.reach(client)
    process = start("merge", place.recipe, place.output, *OPTIONS, "--workers", 1, "--executor", executor)
    wait_until(place.uploads, process)
    place.proxy.weathers = [Weather({outage: 1.0}, seed=0)]
    met_before = place.proxy.met.total()
    wait_until(lambda: place.proxy.met.total() > met_before, process)

    said = end(process, signal.SIGTERM)
    place.proxy.weathers = []
    left = place.uploads()
    place.grow_old()
    cleaned = runs.run("clean", place.output, "--recipe", place.recipe, "--yes")

    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; run the same command again to resume" in said
    assert "stockflow clean" in said
    assert "Traceback" not in said, said
    # What stalls is an answer: the abort may have been carried out.
    assert left == ["merged/model.safetensors"] or (outage == "stall" and left == [])
    assert cleaned.returncode == 0, cleaned.stderr
    assert place.uploads() == []


def test_a_second_signal_ends_at_once(place: Place) -> None:
    place.reach("obstore")
    process = start("merge", place.recipe, place.output, *OPTIONS, GRACE_S=LONG_S)
    wait_until(place.uploads, process)

    place.proxy.weathers = [Weather({"stall": 1.0}, seed=0)]
    process.send_signal(signal.SIGINT)
    try:
        while process.poll() is None:  # another one counts half a second after the first was heard
            time.sleep(0.6)
            process.send_signal(signal.SIGTERM)
    finally:
        process.kill()
    _, said = process.communicate()

    assert process.returncode == 128 + signal.SIGTERM
    assert "Ended at once" in said


def test_a_stalled_input_leaves_no_temporary_file(place: Place, tmp_path: Path) -> None:
    place.reach("obstore")
    output = tmp_path / "out"
    process = start("merge", place.recipe, output, *OPTIONS, **UNHURRIED)
    wait_until(lambda: runs.leftovers(output), process)

    said = end(process, signal.SIGTERM)

    assert process.returncode == 128 + signal.SIGTERM, said
    assert runs.leftovers(output) == []
    assert "stopped by SIGTERM; run the same command again to resume" in said
    assert "Traceback" not in said


WITHOUT_A_WATCHER = """
import os, signal, time
from stockflow import interruption
from stockflow.errors import InterruptedRunError
interruption._watch = lambda descriptor: time.sleep(600)
try:
    with interruption.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
except InterruptedRunError:
    print(interruption.stop_requested(), flush=True)
os._exit(0)
"""


def test_the_way_out_knows_that_it_is_one_before_the_watcher_does() -> None:
    """Or it waits for requests that hang: one time in two a signal took six seconds instead of one."""
    told = subprocess.run([sys.executable, "-c", WITHOUT_A_WATCHER], capture_output=True, text=True, timeout=HANG_S)

    assert told.stdout == "True\n", told.stderr


def test_a_signal_while_an_earlier_plan_is_read_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else goes wrong with that plan only shortens a message."""

    def interrupted(*_: object, **__: object) -> bytes:
        raise interruption(signal.SIGTERM)

    monkeypatch.setattr("stockflow.planning.file.read", interrupted)

    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        earlier_plan(open_store("memory://interruption/out", StorageConfig()), "a" * 64)


IN_THE_COMPILER = """
import ctypes, os, signal
from stockflow.engine.merging import UnitMerger

prepare = UnitMerger.prepare

def prepare_and_call_back(merger, jobs):
    ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGTERM))()
    prepare(merger, jobs)

UnitMerger.prepare = prepare_and_call_back
"""
"""A signal while kernels are compiled: what its handler raises within a callback of C code is printed and lost."""


def test_a_signal_that_meets_the_compiler_ends_the_run(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    process = runs.start("merge", recipe, tmp_path / "out", *OPTIONS, script=IN_THE_COMPILER)
    _, said = process.communicate(timeout=HANG_S)

    assert process.returncode == 128 + signal.SIGTERM
    assert said == "stockflow: stopped by SIGTERM; run the same command again to resume\n"
    assert not list((tmp_path / "out").glob("*.safetensors"))


HANGS = """
import os, signal, time
from contextlib import suppress
from stockflow import interruption
from stockflow.errors import InterruptedRunError
interruption.GRACE_S = interruption.LAST_ACTS_S = {grace_s}
with interruption.interruptible():
    with suppress(InterruptedRunError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    while True:  # the watcher may have begun to count late
        time.sleep(interruption.ONE_STOP_S)
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("grace_s", [0.1, LONG_S], ids=["out of patience", "second signal"])
@pytest.mark.parametrize("reader", ["gone", "stuck"])
def test_who_reads_standard_error_cannot_keep_the_process(reader: str, grace_s: float) -> None:
    """As in ``stockflow merge ... 2>&1 | tee log``: Ctrl-C ends tee as well."""
    reading, writing = os.pipe()
    if reader == "gone":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)

    try:
        ended = subprocess.run([sys.executable, "-c", HANGS.format(grace_s=grace_s)], stderr=writing, timeout=HANG_S)
    finally:
        os.close(writing)
        if reader == "stuck":
            os.close(reading)

    assert ended.returncode == 128 + signal.SIGTERM
