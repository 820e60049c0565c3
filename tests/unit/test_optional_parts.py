"""Parts that tunes mostly come without, and routers: merged where all models have them, else the base's, and said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.planning.plan import MergePlan
from stockflow.text.remarks import Remark
from tests.plans import Merge, jobs_of, rule

NUM_LAYERS = 3
LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1.0}}


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(4, 4, dtype=torch.bfloat16) for name in names}


BODY = ones(
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(NUM_LAYERS) for part in ("self_attn.q_proj", "mlp.gate")),
    "lm_head.weight",
)
PARTS = {
    "the vision tower": ones("visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight"),
    "the vision tower ": ones("model.vision_tower.layers.3.fc.weight", "model.multi_modal_projector.linear_1.weight"),
    "the audio tower": ones("audio_tower.layers.0.fc1.weight", "embed_audio.projection.weight"),
    "layers that predict further tokens": ones(
        "model.layers.3.eh_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.shared_head.norm.weight",
    ),
    "layers that predict further tokens ": ones("mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"),
}


def merge_of(root: Path, *models: Mapping[str, torch.Tensor]) -> Merge:
    merge = Merge(root, (1, 1, 1))
    merge.models = [dict(each) for each in models]
    config = {"model_type": "deepseek_v3", "num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 1}
    return merge.write(config=config)


def said(plan: MergePlan, code: str) -> list[Remark]:
    return [remark for remark in plan.remarks if remark.code == code]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_model_lacks_is_the_base_s_and_that_is_said(tmp_path: Path, part: str) -> None:
    merge = merge_of(tmp_path, BODY | PARTS[part], BODY | PARTS[part], BODY)

    plan = merge.plan()

    assert {name for name, job in jobs_of(plan).items() if job.is_copy} == set(PARTS[part])
    (remark,) = said(plan, "part-kept")
    assert remark.severity == "note"
    assert remark.tensors == tuple(job.output.name for job in plan.jobs if job.is_copy)
    assert remark.models == (str(merge.folders[2]),)
    assert f"{part.strip()} of {merge.folders[0]} " in remark.text
    assert f"out as stored, {len(PARTS[part])} tensors such as " in remark.text


@pytest.mark.parametrize("part", PARTS)
def test_what_all_models_have_is_merged(tmp_path: Path, part: str) -> None:
    plan = merge_of(tmp_path, *[BODY | PARTS[part]] * 3).plan()

    assert not any(job.is_copy for job in plan.jobs)
    assert not said(plan, "part-kept")


@pytest.mark.parametrize("part", PARTS)
def test_a_model_with_some_of_a_part_is_refused(tmp_path: Path, part: str) -> None:
    some = dict(list(PARTS[part].items())[:-1])

    assert "is missing in " in merge_of(tmp_path, BODY | PARTS[part], BODY | some, BODY).refusal()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_the_base_lacks_is_refused(tmp_path: Path, part: str) -> None:
    assert "which gives the output its names" in merge_of(tmp_path, BODY, BODY | PARTS[part], BODY).refusal()


def test_other_tensors_that_a_model_lacks_are_refused_beside_its_parts(tmp_path: Path) -> None:
    less = {name: value for name, value in BODY.items() if ".2." not in name}
    merge = merge_of(tmp_path, BODY | PARTS["the vision tower"], less, BODY)

    assert "visual" not in merge.refusal()
    assert "model.layers." in merge.refusal()


def test_rules_come_before_parts(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, BODY | PARTS["the audio tower"], BODY, BODY)

    plan = merge.plan(stockflow=rule(filter="audio", action="skip"))

    assert jobs_of(plan).keys() == BODY.keys()
    assert not said(plan, "part-kept")


def test_merged_routers_are_warned_of(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, BODY, BODY, BODY)

    for method in ({}, LINEAR):
        (remark,) = said(merge.plan(**method), "routers-merged")
        assert remark.severity == "warning"
        assert remark.tensors == tuple(name for name in BODY if ".mlp.gate." in name)
        assert "`stockflow: {routers: copy}`" in remark.text
    ties = {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 1.0}}
    assert not said(merge.plan(**ties), "routers-merged")


def test_routers_are_copied_where_the_recipe_says_so(tmp_path: Path) -> None:
    merge = merge_of(tmp_path, BODY, BODY, BODY)

    plan = merge.plan(stockflow={"routers": "copy"})

    assert {name for name, job in jobs_of(plan).items() if job.is_copy} == {n for n in BODY if ".mlp.gate." in n}
    assert not said(plan, "routers-merged")


def test_a_rule_says_more_of_a_router_than_the_option(tmp_path: Path) -> None:
    own = {"routers": "copy", **rule(filter="layers.1.mlp.gate", merge_method="linear", parameters={"weight": 1.0})}

    plan = merge_of(tmp_path, BODY, BODY, BODY).plan(stockflow=own)

    assert [remark.tensors for remark in said(plan, "routers-merged")] == [("model.layers.1.mlp.gate.weight",)]
