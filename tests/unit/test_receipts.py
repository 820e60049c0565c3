"""Receipts say which process merged a shard and when; earlier ones, which do not, are good too."""

import json
import os
import time
from pathlib import Path

from stockflow.receipts import Receipt
from stockflow.sealed import SEAL_KEY, seal
from stockflow.storage import StorageConfig
from stockflow.verify import verify
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
