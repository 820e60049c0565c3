"""All experts of a layer decided as one: what one tensor of all would give, in whatever layout they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch

from stockflow import merge, plan, verify
from stockflow.errors import PlanError
from tests import oracle, runs
from tests.checkpoints import write_recipe
from tests.expert_models import SMALL, Sizes, family
from tests.integration.test_expert_layouts import projections, tensors
from tests.runs import merge_here

MIXED: Mapping[str, Mapping[int, str] | str] = {
    "one by one": "separate",
    "base fused": {0: "fused", 1: "separate", 2: "separate"},
    "transposed": {0: "qwen_vl", 1: "fused", 2: "separate"},
    "by turns": "gpt_oss",
    "stacks": {0: "step", 1: "turned_step", 2: "separate"},
}
METHODS: Mapping[str, dict[str, Any]] = {
    "model_stock": {},
    "ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "breadcrumbs": {"parameters": {"weight": 0.5, "density": 0.4, "gamma": 0.1}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "della": {"parameters": {"weight": 0.5, "density": 0.4}},
    "sce": {"parameters": {"select_topk": 0.5}},
    "ramplus_tl": {},
    "arcee_fusion": {},
}
LARGE = Sizes(num_experts=2, hidden=640, inner=512, num_layers=1)
"""A projection has more elements than a span."""


def merged(folder: Path, layouts: Mapping[int, str] | str, method: str, sizes: Sizes = SMALL, **top: Any) -> Path:
    stockflow = {"scope": "layer"} | top.pop("stockflow", {})
    num_tuned = 1 if method == "arcee_fusion" else 2
    asked = METHODS[method] | top
    recipe = write_recipe(
        folder / "recipe.yaml", method, family(folder, num_tuned, layouts, sizes), stockflow=stockflow, **asked
    )
    merge_here(recipe, folder / "out")
    return folder / "out"


def in_one(stored: Mapping[str, oracle.Stored]) -> dict[str, oracle.Floats]:
    """Return the experts of each layer as a tensor that holds all."""
    roles: dict[tuple[str, str], dict[tuple[int, int], oracle.Floats]] = {}
    for name, each in stored.items():
        if ".experts." in name and name.endswith(".weight"):
            _, _, layer, _, _, number, role, _ = name.split(".")
            own = roles.setdefault((layer, "down" if role == "down_proj" else "gate_up"), {})
            own[int(number), int(role == "up_proj")] = each.array
    return {".".join(key): np.concatenate([own[place].ravel() for place in sorted(own)]) for key, own in roles.items()}


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["", "large"])
@pytest.mark.parametrize("method", ["model_stock", "ties", "sce"])
def test_one_unit_is_what_the_oracle_makes_of_one_tensor(method: str, sizes: Sizes, tmp_path: Path) -> None:
    out = in_one(oracle.load_checkpoint(merged(tmp_path, "separate", method, sizes)))
    base, *tuned = [
        in_one(oracle.load_checkpoint(folder))
        for folder in (tmp_path / "base", tmp_path / "tuned-1", tmp_path / "tuned-2")
    ]

    for name, found in out.items():
        sources = base[name], [each[name] for each in tuned]
        if method == "model_stock":
            want = oracle.model_stock(*sources)
        elif method == "sce":
            want = oracle.sce(*sources, topk=0.5)
        else:
            want = oracle.ties(*sources, [0.5, 0.5], [0.4, 0.4])
        distance = oracle.ulp_distance("BF16", oracle.round_to("BF16", found), oracle.round_to("BF16", want.out))
        assert np.count_nonzero(distance) <= 1e-4 * distance.size, name
        assert distance.max() <= 1, name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ties"])
def test_one_unit_is_what_one_tensor_of_all_gives(method: str, tmp_path: Path) -> None:
    """Where mergekit's tensor is the stored one, whole tensors are decided; draws go by its name, too."""
    merged(tmp_path / "apart", "separate", method)
    merged(tmp_path / "in one", "fused", method, stockflow={"scope": "tensor"})

    apart, in_one = (projections(tensors(tmp_path / each)) for each in ("apart", "in one"))

    assert apart.keys() == in_one.keys()
    assert all(torch.equal(value, in_one[key]) for key, value in apart.items())


@pytest.mark.parametrize("method", ["model_stock", "ties"])
def test_no_layout_changes_a_number(method: str, tmp_path: Path) -> None:
    found = []
    for name, layouts in MIXED.items():
        merged(tmp_path / name, layouts, method)
        found.append(projections(tensors(tmp_path / name)))

    for other in found[1:]:
        assert all(torch.equal(value.contiguous(), other[key].contiguous()) for key, value in found[0].items())


def test_rows_say_what_was_decided_together_and_norms_are_their_own(tmp_path: Path) -> None:
    out = merged(tmp_path, "separate", "model_stock")

    rows = {name: row for name, row in runs.tensor_facts(out).items() if row["scope"] == "layer"}
    first = [row for name, row in rows.items() if ".layers.0." in name and "down" not in name]

    assert len(rows) == SMALL.num_layers * SMALL.num_experts * 3
    assert len({row["ratio"] for row in first}) == 1
    assert len({row["base_norm"] for row in first}) == len(first)
    assert len({row["ratio"] for row in rows.values()}) == 2 * SMALL.num_layers


def test_experts_that_are_merged_in_two_ways_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"experts\.0\..* and .*experts\.1\..* are decided as one, as `scope: layer`"):
        merged(
            tmp_path, "separate", "ties",
            parameters={"weight": [{"filter": "experts.1.", "value": 0.2}, {"value": 0.5}], "density": 0.4},
        )  # fmt: skip


def test_a_sample_of_a_layer_is_verified_with_all_of_it(tmp_path: Path) -> None:
    out = merged(tmp_path, "separate", "model_stock", stockflow={"shard_size": "1KB"})

    found = verify(out, sample="2%", seed=3)

    assert found.is_sound, found.findings


@pytest.mark.parametrize("method", ["model_stock", "ties"])
def test_storage_changes_no_byte(method: str, tmp_path: Path, s3_endpoint: str, s3_bucket: str) -> None:
    local = merged(tmp_path, "separate", method, LARGE)
    client, urls = boto3.client("s3", endpoint_url=s3_endpoint), []
    for name in ("base", "tuned-1", "tuned-2"):
        for path in (tmp_path / name).iterdir():
            client.put_object(Bucket=s3_bucket, Key=f"{name}/{path.name}", Body=path.read_bytes())
        urls.append(f"s3://{s3_bucket}/{name}")
    stockflow = {"scope": "layer", "storage": {f"s3://{s3_bucket}/": {"endpoint": s3_endpoint}}}
    recipe = {"merge_method": method, "base_model": urls[0], "models": urls[1:], "stockflow": stockflow}

    merge(recipe | METHODS[method], str(tmp_path / "from S3"), memory=1200 * runs.MIB + runs.grown_bytes())

    found, expected = (oracle.load_checkpoint(each) for each in (tmp_path / "from S3", local))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(each.array, expected[name].array) for name, each in found.items())


@pytest.mark.parametrize(
    ("scope", "method", "is_said"),
    [(None, "ties", True), ("layer", "ties", False), ("tensor", "ties", True), (None, "linear", False)],
)
def test_a_plan_says_where_mergekit_decides_more_together(
    scope: str | None, method: str, is_said: bool, tmp_path: Path
) -> None:
    own = family(tmp_path, 2, "separate")
    asked = {"stockflow": {"scope": scope}} if scope else {}
    recipe = write_recipe(tmp_path / "recipe.yaml", method, own, parameters={"weight": 0.5}, **asked)

    codes = [remark.code for remark in plan(recipe, tmp_path / "out").plan.remarks]

    assert ("expert-units" in codes) is is_said
