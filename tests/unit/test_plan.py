"""What a plan is identified by."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.plans import Merge, rule


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


def test_equal_inputs_give_equal_plans(merge: Merge) -> None:
    merge.write()

    assert merge.plan() == merge.plan()
    assert merge.plan().plan_id == merge.plan().plan_id
    assert re.fullmatch("[0-9a-f]{64}", merge.plan().plan_id)
    assert merge.plan().plan_id != merge.plan().merge_id


def test_the_plan_is_the_same_in_another_process(merge: Merge, tmp_path: Path) -> None:
    """Neither the hash seed nor the memory, the workers or the device of the command is in it."""
    merge.write()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge.recipe))
    expected = merge.plan()

    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "stockflow", "plan", path, tmp_path / "out", "--json", *options],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
                check=True,
                capture_output=True,
            ).stdout
        )
        for seed, options in (
            ("1", ["--memory", "700MiB", "--workers", "1"]),
            ("2", ["--memory", "3GiB", "--device=cpu"]),
        )
    ]

    assert [expected.plan_id] * 2 == [plan["plan_id"] for plan in found]
    assert [expected.merge_id] * 2 == [plan["merge_id"] for plan in found]


def test_what_the_recipe_says_about_anything_else_is_not_in_the_plan(merge: Merge) -> None:
    merge.write()
    plan = merge.plan()

    storage = {"storage": {"s3://elsewhere/": {"anonymous": True}}}

    assert plan.plan_id == merge.plan(stockflow=storage).plan_id
    assert plan.plan_id == merge.plan(stockflow={"on_negative": "clamp", "shard_size": "256MB"}).plan_id


CHANGES: dict[str, Mapping[str, Any]] = {
    "a parameter": {"parameters": {"filter_wise": True}},
    "a parameter for one tensor": {"parameters": {"filter_wise": [{"filter": "embed", "value": True}]}},
    "the policy": {"stockflow": {"on_negative": "extrapolate"}},
    "the scope": {"stockflow": {"scope": "leading"}},
    "the dtype": {"dtype": "float32"},
    "the method": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "a rule": {"stockflow": rule(filter="embed", action="copy")},
    "a tensor less": {"stockflow": rule(filter="embed", action="skip")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_both_ids_change_with_what_decides_the_output(merge: Merge, change: str) -> None:
    merge.write()
    before, after = merge.plan(), merge.plan(**CHANGES[change])

    assert before.plan_id != after.plan_id
    assert before.merge_id != after.merge_id


def test_both_ids_change_with_layout_order_and_the_donor_of_side_files(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    reordered = merge.plan(models=merge.recipe["models"][::-1])
    side_files = merge.plan(stockflow={"side_files_from": str(merge.folders[1])})

    for after in (merge.plan(shard_size=100), reordered, side_files):
        assert before.plan_id != after.plan_id
    for after in (merge.plan(shard_size=100), side_files):
        assert before.merge_id != after.merge_id


def test_both_ids_change_with_the_config_that_is_published(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    path = merge.folders[0] / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))

    after = merge.plan()

    assert before.config != after.config
    assert before.plan_id != after.plan_id
    assert before.merge_id != after.merge_id


def test_a_touched_input_is_another_plan_of_the_same_merge(merge: Merge) -> None:
    merge.write()
    before = merge.plan()
    os.utime(merge.folders[1] / "model-00001-of-00002.safetensors", ns=(1, 1))
    touched = merge.plan()
    os.utime(merge.folders[0] / "tokenizer.json", ns=(1, 1))
    touched_side_file = merge.plan()

    assert len({before.plan_id, touched.plan_id, touched_side_file.plan_id}) == 3
    assert len({before.merge_id, touched.merge_id, touched_side_file.merge_id}) == 1


def test_copies_elsewhere_give_the_same_merge(tmp_path: Path) -> None:
    here = Merge(tmp_path / "here").write()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    there = Merge(tmp_path / "there")

    assert here.plan().plan_id != there.plan().plan_id
    assert here.plan().merge_id == there.plan().merge_id


def test_inputs_that_are_sharded_otherwise_give_the_same_merge(tmp_path: Path) -> None:
    """Only the base's layout can matter: it gives the order."""
    one = Merge(tmp_path / "one", (1, 2, 3)).write()
    other = Merge(tmp_path / "other", (1, 3, 1)).write()

    assert one.plan().plan_id != other.plan().plan_id
    assert one.plan().merge_id == other.plan().merge_id


def test_the_plan_is_plain_json(merge: Merge) -> None:
    plan = merge.write().plan()

    text = json.dumps(plan.to_json(), allow_nan=False)

    assert plan.plan_id == json.loads(text)["plan_id"]
    assert [job.output.name for job in plan.jobs] == [
        row[0] for shard in json.loads(text)["shards"] for row in shard["tensors"]
    ]


def test_plans_survive_copying(merge: Merge) -> None:
    """Plans travel to workers; a digest computed before must not be what makes two of them equal."""
    plan = merge.write().plan()
    _ = plan.plan_id

    assert copy.deepcopy(plan) == plan
    assert copy.deepcopy(plan).plan_id == plan.plan_id
