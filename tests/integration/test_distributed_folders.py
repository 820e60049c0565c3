"""Checkpoints of torch.distributed are merged like their twins in safetensors, from disk and from S3, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockflow
from stockflow.storage import StorageConfig
from stockflow.verification.recompute import SampleOptions
from stockflow.verification.verify import verify
from tests import oracle, runs
from tests.checkpoints import BUFFERS, ZOO, Family, make_family, write_recipe
from tests.distributed_checkpoints import save_distributed


def sharded(model: Path, num_ranks: int, **options: Any) -> Path:
    """Write the weights of a checkpoint in safetensors as so many ranks do, beside it; return the new folder."""
    folder = model.parent / f"{model.name}-dcp"
    save_distributed(folder, load_file(model / "model.safetensors"), num_ranks, **options)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def tensors_of(out: Path) -> Mapping[str, torch.Tensor]:
    return {name: each for file in out.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", 2, ZOO)


def all_sharded(family: Family) -> Family:
    base = sharded(family.base, 3, values={"optimizer.lr": b"0.1"}, around=["model"])
    return Family(base, (sharded(family.tuned[0], 1), sharded(family.tuned[1], 5)))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("model_stock", {}),
        ("ties", {"per_model": {"density": [0.5, 0.5], "weight": [1.0, 1.0]}}),
        ("linear", {"per_model": {"weight": [0.5, 0.5]}, "dtype": "float32"}),
        ("model_stock", {"stockflow": {"scope": "row"}}),
        ("model_stock", {"stockflow": {"rules": [{"filter": "embed", "action": "copy"}]}}),
    ],
    ids=["model_stock", "ties", "linear_f32", "rows", "copy"],
)
def test_a_merge_is_that_of_the_twins_in_safetensors(
    method: str, parameters: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    expected, found = tmp_path / "expected", tmp_path / "found"
    runs.merge_here(write_recipe(tmp_path / "twins.yaml", method, family, **parameters), expected)

    merged = runs.merge_here(write_recipe(tmp_path / "recipe.yaml", method, all_sharded(family), **parameters), found)

    twins = tensors_of(expected)
    for name, tensor in tensors_of(found).items():
        assert (tensor.dtype, tensor.shape) == (twins[name].dtype, twins[name].shape)
        assert torch.equal(tensor.flatten().view(torch.uint8), twins[name].flatten().view(torch.uint8)), name
    assert tensors_of(found).keys() == twins.keys() == {*ZOO, *BUFFERS}
    assert "no-tensors" in {remark.code for remark in merged.plan.remarks}
    sample = SampleOptions(1.0, seed=0, memory_bytes=2**31 + runs.grown_bytes(), num_threads=2)
    assert [str(each) for each in verify(str(found), StorageConfig(), sample=sample).findings] == []


def test_it_is_what_the_oracle_says(family: Family, tmp_path: Path) -> None:
    runs.merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", all_sharded(family)), tmp_path / "out")

    expected = oracle.merge_folder("model_stock", family.base, family.tuned)
    found = oracle.load_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, result in expected.items():
        if result.dtype in oracle.FORMATS:
            bits = oracle.round_to(result.dtype, found[name].array)
            assert oracle.ulp_distance(result.dtype, bits, result.bits).max(initial=0) <= 1
        else:
            np.testing.assert_array_equal(found[name].array, result.out)


LARGE = {"large.matrix": (300, 1000), "large.vector": (270_001,), "large.experts": (7, 1, 140_000)}
"""Tensors of several spans."""


def test_on_s3_within_other_memory_it_is_the_same(tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    """Loads end within shards, and shards within loads."""
    family = make_family(tmp_path / "models", 2, LARGE, buffers=False)
    here = Family(sharded(family.base, 7), (sharded(family.tuned[0], 64), sharded(family.tuned[1], 2)))
    local = runs.merge_here(write_recipe(tmp_path / "here.yaml", "model_stock", here), tmp_path / "out")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in sorted(path for path in (tmp_path / "models").glob("*-dcp/*") if path.is_file()):
        client.upload_file(str(path), s3_bucket, str(path.relative_to(tmp_path / "models")))
    options = {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", here, stockflow={"storage": options})
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "models"), f"s3://{s3_bucket}"))

    merged = runs.merge_elsewhere(recipe, tmp_path / "remote", "--memory", "600MiB", "--workers", "1")

    assert runs.shard_digests(tmp_path / "remote") == runs.expected_digests([local])[0]
    assert merged["summary"]["peak_memory_bytes"] < 600 * 2**20


def test_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", 2, LARGE, buffers=False)
    ours = Family(sharded(family.base, 7), (sharded(family.tuned[0], 64), sharded(family.tuned[1], 2)))
    given = {"density": [0.3, 0.6], "weight": [1, 2]}
    recipes = [
        write_recipe(tmp_path / f"{number}.yaml", "ties", each, per_model=given)
        for number, each in enumerate((family, ours))
    ]
    runs.merge_here(recipes[0], tmp_path / "expected")

    runs.merge_here(recipes[1], tmp_path / "wide", num_threads=3)
    narrow = runs.merge_elsewhere(recipes[1], tmp_path / "narrow", "--memory", "400MiB", "--workers", "1")

    expected, wide = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "wide")
    assert all(torch.equal(wide[name], tensor) for name, tensor in expected.items())
    assert runs.shard_digests(tmp_path / "narrow") == runs.shard_digests(tmp_path / "wide")
    assert narrow["summary"]["peak_memory_bytes"] < 400 * 2**20


def test_diff_and_inspect_read_shards(family: Family, tmp_path: Path) -> None:
    first, second = sharded(family.base, 3), sharded(family.tuned[0], 2)

    assert stockflow.diff(family.base, first).is_equal
    assert stockflow.diff(first, first).is_equal
    twins, found = stockflow.diff(family.base, family.tuned[0]), stockflow.diff(first, second)
    assert not found.is_equal
    assert {each.name for each in found.differing} == {each.name for each in twins.differing}
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(first, (second, sharded(family.tuned[1], 4))))
    twin = write_recipe(tmp_path / "twin.yaml", "model_stock", family)
    ours, theirs = ({subject.name: row for subject, row in zip(each.subjects, each.packed_TQ, strict=True)}
                    for each in map(stockflow.inspect, (recipe, twin)))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(row, theirs[name], equal_nan=True) for name, row in ours.items())


def test_experts_in_shards_are_seen_one_by_one(tmp_path: Path) -> None:
    """Ends of shards and of projections fall in different places; one model stores them one by one."""
    fused = "model.layers.0.mlp.experts"
    shapes = {f"{fused}.gate_up_proj": (5, 12, 8), f"{fused}.down_proj": (5, 8, 6), "model.norm.weight": (8,)}
    family = make_family(tmp_path / "models", 2, shapes, buffers=False)
    ours = Family(sharded(family.base, 3), (sharded(family.tuned[0], 2), family.tuned[1]))
    tensors = load_file(family.tuned[1] / "model.safetensors")
    up, down = tensors.pop(f"{fused}.gate_up_proj"), tensors.pop(f"{fused}.down_proj")
    for number in range(5):
        tensors |= {f"{fused}.{number}.gate_proj.weight": up[number, :6].clone()}
        tensors |= {f"{fused}.{number}.up_proj.weight": up[number, 6:].clone()}
        tensors |= {f"{fused}.{number}.down_proj.weight": down[number].clone()}
    save_file(tensors, family.tuned[1] / "model.safetensors", {"format": "pt"})
    for name, each in (("expected", family), ("found", ours)):
        runs.merge_here(write_recipe(tmp_path / f"{name}.yaml", "model_stock", each), tmp_path / name)

    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "found")
    assert found.keys() == expected.keys() == shapes.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_resumed_merge_reads_the_recorded_plan(family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", all_sharded(family))
    first = runs.merge_here(recipe, tmp_path / "out", shard_size=100_000)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / first.plan.shards[1].file).unlink()

    again = runs.merge_here(recipe, tmp_path / "out", shard_size=100_000)

    assert again.num_resumed == len(first.plan.shards) - 1
    assert runs.expected_digests([again]) == runs.expected_digests([first])
