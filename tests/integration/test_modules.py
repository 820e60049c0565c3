"""Models for sentence embeddings: weights of modules are merged where they lie, and what loaders need is copied."""

import json
import shutil
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stockflow
from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import CheckpointError, PlanError
from stockflow.recipe import load_recipe
from stockflow.storage import StorageConfig, open_store
from stockflow.verification.recompute import SampleOptions
from stockflow.verification.verify import verify
from tests import oracle, runs
from tests.checkpoints import Family, write_recipe
from tests.sentence_models import DENSE_SHAPES, make_sentence_family

COPIED = {
    "1_Pooling/config.json", "2_Dense/config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
}  # fmt: skip


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_sentence_family(tmp_path / "models")


def recipe_of(family: Family, path: Path, **top_level: Any) -> Path:
    return write_recipe(path / "recipe.yaml", "model_stock", family, **top_level)


@pytest.mark.parametrize("shard_size", [None, 2000], ids=["one file", "sharded"])
def test_a_dense_layer_is_merged_where_it_lies(family: Family, tmp_path: Path, shard_size: int | None) -> None:
    out = tmp_path / "out"
    merged = runs.merge_here(recipe_of(family, tmp_path), out, shard_size=shard_size)

    for folder in ("", "2_Dense"):
        models = [model / folder for model in (family.base, *family.tuned)]
        expected = oracle.merge_folder("model_stock", models[0], models[1:])
        found = oracle.load_checkpoint(out / folder)
        assert found.keys() == expected.keys()
        for name, result in expected.items():
            assert found[name].dtype == result.dtype
            np.testing.assert_array_equal(found[name].array, oracle.widen(result.dtype, result.bits))
    with safe_open(out / "2_Dense" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == DENSE_SHAPES.keys(), "as the module's own loader knows them"
        assert file.metadata() == {"format": "pt"}
    assert {side.key for side in merged.plan.side_files} == COPIED
    assert all((out / key).read_bytes() == (family.base / key).read_bytes() for key in COPIED)
    assert {*COPIED, "2_Dense/model.safetensors"} <= merged.manifest.files.keys()
    assert {remark.code for remark in merged.plan.remarks} == set()
    found_again = verify(
        str(out),
        StorageConfig(),
        sample=SampleOptions(1.0, seed=0, memory_bytes=2**31 + runs.grown_bytes(), num_threads=2),
    )
    assert [str(finding) for finding in found_again.findings] == []


def test_an_output_with_modules_is_opened_resumed_and_replaced(family: Family, tmp_path: Path) -> None:
    recipe, out = recipe_of(family, tmp_path), tmp_path / "out"
    first = runs.merge_here(recipe, out, shard_size=2000)
    (out / "manifest.json").unlink()

    resumed = runs.merge_here(recipe, out, shard_size=2000)

    assert resumed.num_resumed == len(resumed.plan.shards) == len(first.plan.shards) > 2
    [again] = open_checkpoints([open_store(str(out), StorageConfig())])
    assert again.specs.keys() == {job.output.name for job in first.plan.jobs}
    assert {"2_Dense/linear.weight", "2_Dense/linear.bias"} < again.specs.keys()
    assert stockflow.diff(out, out).differing == ()

    plain = write_recipe(tmp_path / "plain.yaml", "linear", family, with_base=False, per_model={"weight": [1.0, 1.0]})
    for model in (family.base, *family.tuned):
        for entry in ("1_Pooling", "2_Dense", "modules.json"):
            path = model / entry
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    runs.merge_here(plain, out, overwrite=True)
    assert not (out / "2_Dense" / "model.safetensors").exists(), "of the output that was replaced"
    assert not (out / "1_Pooling" / "config.json").exists()
    assert verify(str(out), StorageConfig()).findings == ()


def test_modules_on_s3_are_the_same(family: Family, tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    local = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "out")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in sorted(path for path in (tmp_path / "models").rglob("*") if path.is_file()):
        client.upload_file(str(path), s3_bucket, str(path.relative_to(tmp_path / "models")))
    options = {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}
    text = recipe_of(family, tmp_path, stockflow={"storage": options}).read_text()
    remote = tmp_path / "remote.yaml"
    remote.write_text(text.replace(str(tmp_path / "models"), f"s3://{s3_bucket}"))

    merged = runs.merge_here(remote, f"s3://{s3_bucket}/out")

    assert runs.expected_digests([merged]) == runs.expected_digests([local])
    assert merged.plan.merge_id == local.plan.merge_id
    result = verify(f"s3://{s3_bucket}/out", load_recipe(str(remote)).storage)
    assert [str(finding) for finding in result.findings] == []


def test_a_snapshot_of_the_hubs_cache_has_links_in_its_subfolders(family: Family, tmp_path: Path) -> None:
    snapshots = []
    for number, model in enumerate((family.base, *family.tuned)):
        repository = tmp_path / "hub" / f"models--org--m{number}"
        snapshot = repository / "snapshots" / "0123abcd"
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            key = path.relative_to(model)
            blob = repository / "blobs" / str(key).replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            (snapshot / key).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / key).symlink_to(blob)
        snapshots.append(snapshot)
    direct = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "direct")

    merged = runs.merge_here(recipe_of(Family(snapshots[0], tuple(snapshots[1:])), tmp_path), tmp_path / "out")

    assert runs.expected_digests([merged]) == runs.expected_digests([direct])
    assert {side.key for side in merged.plan.side_files} == COPIED


def test_a_model_of_modules_alone_is_merged(family: Family, tmp_path: Path) -> None:
    """As static embeddings and routers are saved: no weights directly in the folder."""
    for model in (family.base, *family.tuned):
        (model / "0_Transformer").mkdir()
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            (model / name).rename(model / "0_Transformer" / name)
        modules = json.loads((model / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (model / "modules.json").write_text(json.dumps(modules))

    out = tmp_path / "out"
    merged = runs.merge_here(recipe_of(family, tmp_path), out)

    assert [shard.file for shard in merged.plan.shards] == [
        "0_Transformer/model.safetensors",
        "2_Dense/model.safetensors",
    ]
    assert [each.code for each in merged.plan.remarks if each.severity == "warning"] == []
    assert (out / "0_Transformer" / "tokenizer.json").exists()
    assert (out / "0_Transformer" / "config.json").exists()
    assert not (out / "model.safetensors.index.json").exists()
    assert verify(str(out), StorageConfig()).findings == ()


def test_a_router_names_modules_too(family: Family, tmp_path: Path) -> None:
    for model in (family.base, *family.tuned):
        (model / "2_Dense").rename(model / "query_0_Dense")
        (model / "router_config.json").write_text(
            json.dumps({"types": {"query_0_Dense": "sentence_transformers.models.Dense.Dense"}, "structure": {}})
        )
        (model / "modules.json").write_text("[]")

    merged = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "out")

    assert [shard.file for shard in merged.plan.shards] == ["model.safetensors", "query_0_Dense/model.safetensors"]
    assert {"router_config.json", "query_0_Dense/config.json"} <= {side.key for side in merged.plan.side_files}


def planned(recipe: Path, output: Path, *, strict: bool = False) -> stockflow.PlanResult:
    return stockflow.plan(recipe, output, strict=strict)


def test_a_module_that_one_model_lacks_is_refused(family: Family, tmp_path: Path) -> None:
    shutil.rmtree(family.tuned[0] / "2_Dense")

    with pytest.raises(PlanError, match=r"2 tensors of '2_Dense/linear.' are missing in \S+/tuned-1") as caught:
        planned(recipe_of(family, tmp_path), tmp_path / "out")
    assert "which loaders will look for" not in str(caught.value), "the base has it"


@pytest.mark.parametrize("is_listed", [False, True], ids=["dropped", "lost"])
def test_a_module_that_all_tunes_dropped_is_left_out_and_one_they_lost_is_not(
    family: Family, tmp_path: Path, is_listed: bool
) -> None:
    for model in family.tuned:
        shutil.rmtree(model / "2_Dense")
        modules = json.loads((model / "modules.json").read_text())
        kept = [each for each in modules if is_listed or each["path"] != "2_Dense"]
        (model / "modules.json").write_text(json.dumps(kept))

    with pytest.raises(PlanError, match=r"2 tensors of '2_Dense/linear.' are missing in \S+/tuned-1") as caught:
        planned(recipe_of(family, tmp_path), tmp_path / "out")

    rule = {"filter": "2_Dense/", "action": "skip"}
    taken = str(family.tuned[0])
    advice = f'`stockflow: {{side_files_from: "{taken}", rules: [{{filter: "2_Dense/", action: skip}}]}}` leaves it out'
    assert (advice in str(caught.value)) is not is_listed
    if not is_listed:
        obeyed = recipe_of(family, tmp_path, stockflow={"side_files_from": taken, "rules": [rule]})
        plan = planned(obeyed, tmp_path / "out").plan
        assert not any("2_Dense" in name for name in (*(job.output.name for job in plan.jobs), *plan.written_files))
        assert not any("2_Dense" in side.key for side in plan.side_files)


def test_weights_of_a_module_in_pickle_are_merged_too(family: Family, tmp_path: Path) -> None:
    expected = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "expected")
    for model in (family.base, *family.tuned[:1]):
        torch.save(load_file(model / "2_Dense" / "model.safetensors"), model / "2_Dense" / "pytorch_model.bin")
        (model / "2_Dense" / "model.safetensors").unlink()

    merged = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "out")

    assert runs.expected_digests([merged]) == runs.expected_digests([expected])
    assert not (tmp_path / "out" / "2_Dense" / "pytorch_model.bin").exists()
    assert verify(str(tmp_path / "out"), StorageConfig()).findings == ()
    (family.base / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model.bin was written by a PyTorch of before 1.6"):
        planned(recipe_of(family, tmp_path), tmp_path / "again")


def test_sharded_weights_of_a_module_are_merged_into_one_file(family: Family, tmp_path: Path) -> None:
    whole = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "whole")
    for model in (family.base, *family.tuned):
        dense = model / "2_Dense"
        with safe_open(dense / "model.safetensors", "pt") as file:
            for number, name in enumerate(sorted(file.keys()), start=1):
                save_file({name: file.get_tensor(name)}, dense / f"model-{number:05d}-of-00002.safetensors")
        (dense / "model.safetensors").unlink()
        (dense / "model.safetensors.index.json").write_text("{}")

    merged = runs.merge_here(recipe_of(family, tmp_path), tmp_path / "out")

    found, expected = (oracle.load_checkpoint(tmp_path / name / "2_Dense") for name in ("out", "whole"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].array, stored.array) for name, stored in expected.items())
    assert len(merged.plan.shards) == len(whole.plan.shards)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "_stockflow/x", ".git", "a\\b", "a//b"])
def test_a_module_that_leaves_the_folder_is_refused(family: Family, tmp_path: Path, path: str) -> None:
    (family.tuned[1] / "modules.json").write_text(json.dumps([{"idx": 1, "path": path, "type": "x.Dense"}]))

    with pytest.raises(stockflow.StockflowError, match=r"tuned-2/modules.json names the folder .* is none of a model"):
        planned(recipe_of(family, tmp_path), tmp_path / "out")


def test_a_module_that_is_not_there_is_said_unless_it_needs_no_file(family: Family, tmp_path: Path) -> None:
    for model in (family.base, *family.tuned):
        shutil.rmtree(model / "1_Pooling")

    remarks = planned(recipe_of(family, tmp_path), tmp_path / "out").plan.remarks

    assert [(remark.code, remark.severity) for remark in remarks] == [("missing-files", "warning")], "of the base"
    assert "name '1_Pooling', which loaders will look for and which are not there" in remarks[0].text
    with pytest.raises(PlanError, match=r"\[missing-files, refused by --strict\]"):
        planned(recipe_of(family, tmp_path), tmp_path / "out", strict=True)


def test_rules_know_the_tensors_of_modules_by_folder_and_name(family: Family, tmp_path: Path) -> None:
    rules = {"rules": [{"filter": "2_Dense/", "action": "copy"}]}

    runs.merge_here(recipe_of(family, tmp_path, stockflow=rules), tmp_path / "out")

    found, base = (oracle.load_checkpoint(place / "2_Dense") for place in (tmp_path / "out", family.base))
    assert all(np.array_equal(found[name].array, stored.array) for name, stored in base.items())
