"""Receipts say which process merged a shard and when, and are believed only as they were written."""

import os
import threading
import time
from pathlib import Path

import pytest

from stockflow.engine.inputs import Sources
from stockflow.engine.shard import OnBytes
from stockflow.engine.worker import Worker, WorkerSpec
from stockflow.errors import CheckpointError
from stockflow.output import receipts
from stockflow.output.shards import valid_receipts
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, plan_merge
from stockflow.run.inputs import Inputs
from stockflow.storage import StorageConfig, open_store
from tests import runs
from tests.checkpoints import make_family, write_recipe


def test_receipts_say_who_merged_a_shard_and_when(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (10, 10)}))
    before = time.time()

    runs.merge_here(recipe, tmp_path / "out")

    after = time.time()
    (receipt,) = runs.receipts(tmp_path / "out")
    assert before <= receipt["began"] < receipt["ended"] <= after
    assert f"{os.uname().nodename}:{os.getpid()}" == receipt["worker"]


def test_a_receipt_that_was_altered_proves_nothing(tmp_path: Path) -> None:
    """Its seal is compared by whoever reads it, a merge that would resume with it, too."""
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (10, 10)}))
    result = runs.merge_here(recipe, tmp_path / "out")
    store = open_store(str(tmp_path / "out"), StorageConfig())
    (shard,) = result.plan.shards
    assert [*valid_receipts(store, result.plan)] == [shard.file]
    (path,) = (tmp_path / "out").glob("_stockflow/*/receipts/*.json")
    path.write_bytes(path.read_bytes().replace(b'"bytes_read": ', b'"bytes_read": 1'))

    with pytest.raises(CheckpointError, match="is not as it was written"):
        receipts.read(store, result.plan.plan_id, shard.file)
    assert valid_receipts(store, result.plan) == {}


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
