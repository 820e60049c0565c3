"""Receipts say which process merged a shard and when; earlier ones, which do not, are good too."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from stockflow.engine.inputs import Sources
from stockflow.engine.shard import OnBytes
from stockflow.engine.worker import Worker, WorkerSpec
from stockflow.output.receipts import Receipt
from stockflow.output.sealed import SEAL_KEY, seal
from stockflow.recipe import load_recipe
from stockflow.run.driver import Inputs, MergeOptions, plan_merge
from stockflow.storage import StorageConfig
from stockflow.verification.verify import verify
from tests import runs
from tests.checkpoints import make_family, write_recipe

ADDED = {"began", "ended", "worker"}


def test_receipts_say_who_merged_a_shard_and_when(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (10, 10)}))
    before = time.time()

    runs.merge_here(recipe, tmp_path / "out")

    after = time.time()
    (receipt,) = runs.receipts(tmp_path / "out")
    assert before <= receipt["began"] < receipt["ended"] <= after
    assert f"{os.uname().nodename}:{os.getpid()}" == receipt["worker"]


def test_receipts_of_earlier_versions_are_read_and_verified(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (10, 10)}))
    runs.merge_here(recipe, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("_stockflow/*/receipts/*.json")
    earlier = {name: value for name, value in json.loads(path.read_text()).items() if name not in {*ADDED, SEAL_KEY}}
    path.write_bytes(seal(json.dumps(earlier)))

    receipt = Receipt.from_json(path.read_bytes(), str(path))

    assert (receipt.began, receipt.ended, receipt.worker) == (None, None, "")
    assert verify(str(tmp_path / "out"), StorageConfig()).findings == ()
    assert runs.merge_here(recipe, tmp_path / "out").outcome == "already_finished"


def test_a_receipt_counts_the_retries_of_its_own_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is published while the next one is read: with requests repeated, too."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"a": (9, 9), "b": (9, 9)}))
    memory_bytes = 1024 * runs.MIB + runs.grown_bytes()
    inputs = Inputs.open(load_recipe(str(recipe)))
    plan, _ = plan_merge(inputs, str(tmp_path / "out"), MergeOptions(memory_bytes, 1, shard_size=200))
    spec = WorkerSpec(
        plan.plan_id, plan.checkpoints, str(tmp_path / "out"), StorageConfig(), "error", memory_bytes, 1, "cpu"
    )
    num_retries, all_read = 0, threading.Event()

    class Publishing(Worker):
        def check_owner(self) -> None:
            assert all_read.wait(60)

    def with_retries(added: int) -> OnBytes:
        def on_bytes(num_read: int, num_written: int) -> None:
            nonlocal num_retries
            num_retries += added if num_written else 0

        return on_bytes

    monkeypatch.setattr(Sources, "num_retries", property(lambda _: num_retries))
    worker = Publishing(spec)
    published = [worker.begin(shard, with_retries(10**place)) for place, shard in enumerate(plan.shards[:2])]
    all_read.set()
    worker.close()

    assert [future.result().retries for future in published] == [{"read": 1}, {"read": 10}]
