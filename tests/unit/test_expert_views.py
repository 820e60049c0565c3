"""What planning makes of experts in several layouts, and what it refuses."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.checkpoints.decodes.low_rank import Added
from stockflow.checkpoints.decodes.stored import plain
from stockflow.checkpoints.opening import open_checkpoints
from stockflow.checkpoints.quantised import Stored
from stockflow.errors import BudgetError, CheckpointError
from stockflow.planning import file as plan_file
from stockflow.planning.budget import divide
from stockflow.planning.experts.projections import seen_one_by_one
from stockflow.planning.plan import MergePlan
from stockflow.planning.reads import schedule
from stockflow.recipe import parse_recipe
from stockflow.storage import open_store
from tests.expert_models import SMALL, Sizes, Tensors, models
from tests.plans import Merge, jobs_of, rule

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def merge_of(root: Path, *each: Mapping[str, torch.Tensor], **config: Any) -> Merge:
    merge = Merge(root, (1, 1, 1))
    merge.models = [dict(tensors) for tensors in each]
    return merge.write(config={"model_type": "qwen3_moe", "num_hidden_layers": SMALL.num_layers, **config})


def laid_out(root: Path, *layouts: str) -> Merge:
    return merge_of(root, *models(2, dict(enumerate(layouts))))


def said(plan: MergePlan, code: str) -> list[str]:
    return [remark.text for remark in plan.remarks if remark.code == code]


def stored(plan: MergePlan) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for shard in plan.shards for spec in shard.outputs}


def test_a_projection_is_a_run_of_bytes_of_its_fused_tensor(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "separate", "fused", "separate")

    job = jobs_of(merge.plan())["model.layers.0.mlp.experts.2.up_proj.weight"]

    operand = job.reading.operands[1]
    ((file, start),) = operand.extents
    payload = (merge.folders[1] / file).read_bytes()[start : start + job.output.num_bytes]
    expected = merge.models[1][GATE_UP][2, SMALL.inner :]
    assert payload == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert operand.is_plain
    assert job.reading.scope == "tensor"


def test_models_of_one_layout_have_nothing_said_of_them(tmp_path: Path) -> None:
    for layout in ("fused", "separate", "mixtral", "granite"):
        plan = laid_out(tmp_path / layout, layout, layout, layout).plan()
        assert not said(plan, "expert-layouts") + said(plan, "other-names")


def test_what_is_read_as_what_is_said(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "fused", "separate", "mixtral")

    plan = merge.plan()

    (text,) = said(plan, "expert-layouts")
    one, two = merge.folders[1:]
    assert text.startswith(
        f"{one}, {two} store experts one by one; they are read as such, and written in tensors that "
    )
    (text,) = said(plan, "other-names")
    assert text.startswith(f"20 tensors of {two} are those of {merge.folders[0]} under the names of another family, ")
    assert stored(plan) == {name: tuple(value.shape) for name, value in merge.models[0].items()}


@pytest.mark.parametrize(
    "layouts",
    [
        ("fused", "separate", "fused"),
        ("separate", "fused", "mixtral"),
        ("qwen_vl", "separate", "llama4"),
        ("gpt_oss",) * 3,
    ],
)
def test_a_plan_of_mixed_layouts_is_read_back_as_it_was(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    plan = laid_out(tmp_path, *layouts).plan()

    recorded = plan_file.parse(plan_file.encode(plan), "plan.json")

    assert recorded.plan_id == recorded.digest == recorded.plan.plan_id == plan.plan_id
    assert recorded.merge_id == recorded.copies_digest == plan.merge_id
    assert stored(recorded.plan) == stored(plan)
    assert [shard.header for shard in recorded.plan.shards] == [shard.header for shard in plan.shards]


@pytest.mark.parametrize("size", [1, 200, 400])
def test_no_shard_parts_a_fused_tensor(tmp_path: Path, size: int) -> None:
    plan = laid_out(tmp_path, "fused", "separate", "separate").plan(shard_size=size)

    files = [shard.file for shard in plan.shards for spec in shard.outputs if spec.name == GATE_UP]
    assert len(files) == 1
    assert len(plan.shards) > 2


@pytest.mark.parametrize("scope", ["tensor", "leading"])
def test_experts_are_decided_together_where_all_models_store_them_so(tmp_path: Path, scope: str) -> None:
    asked = {"stockflow": {"scope": scope}}

    job = jobs_of(laid_out(tmp_path / "alike", "fused", "fused", "fused").plan(**asked))[GATE_UP]
    assert job.reading.num_groups == {"tensor": 1, "leading": SMALL.num_experts}[scope]
    refusal = laid_out(tmp_path / "mixed", "fused", "separate", "fused").refusal(**asked)
    assert f"`scope: {scope}` decides the experts of a tensor as one, and some models store them one by one" in refusal
    merge = laid_out(tmp_path / "parted", "fused", "separate", "fused")
    plan = merge.plan(stockflow={"scope": scope, "experts": "separate"})
    assert {job.reading.num_groups for job in plan.jobs} == {1}


def test_rows_are_those_of_every_layout(tmp_path: Path) -> None:
    plan = laid_out(tmp_path, "fused", "separate", "fused").plan(stockflow={"scope": "row"})

    job = jobs_of(plan)["model.layers.0.mlp.experts.0.down_proj.weight"]
    assert job.reading.num_groups == SMALL.hidden


@pytest.mark.parametrize("action", ["copy", "skip"])
def test_rules_see_the_names_of_the_output(tmp_path: Path, action: str) -> None:
    merge = laid_out(tmp_path, "fused", "separate", "separate")

    plan = merge.plan(stockflow=rule(filter="gate_up_proj", action=action))

    if action == "copy":
        assert {job.output.name for job in plan.jobs if job.is_copy} == {
            f"model.layers.{layer}.mlp.experts.{number}.{role}_proj.weight"
            for layer in range(SMALL.num_layers)
            for number in range(SMALL.num_experts)
            for role in ("gate", "up")
        }
    else:
        assert list(plan.skipped) == [name for name in merge.models[0] if name.endswith("gate_up_proj")]
        assert GATE_UP not in stored(plan)
        assert DOWN in stored(plan)
    refusal = merge.refusal(stockflow=rule(filter="experts.0.gate_proj", action=action))
    assert "no tensor's name contains 'experts.0.gate_proj'" in refusal


def test_experts_of_several_dtypes_are_no_fused_tensor(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "fused", "separate", "separate")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    merge.models[1][name] = merge.models[1][name].float()
    merge.write()

    assert f"the experts of {GATE_UP!r} come as BF16 and F32, and a tensor has one dtype" in merge.refusal()
    assert stored(merge.plan(dtype="bfloat16")).keys() == merge.models[0].keys()


def test_unlike_experts_are_not_put_into_one_tensor(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "separate", "separate", "separate")
    for tensors in merge.models:
        del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    merge.write()

    refusal = merge.refusal(stockflow={"experts": "fused"})

    assert "'model.layers.0.mlp.experts' in " in refusal
    assert "found 8 tensors, BF16 [4, 6], BF16 [6, 4]" in refusal


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    fused, separate = models(2, {0: "fused", 1: "separate", 2: "separate"})[:2]
    fewer = {name: value for name, value in separate.items() if ".experts.2." not in name}

    refusal = merge_of(tmp_path, fused, fewer, separate).refusal()

    assert "6 tensors of 'model.layers.*.mlp.experts.*.' (0 to 1) are missing in " in refusal
    assert "rule" not in refusal


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    fused, separate, _ = models(2, {0: "fused", 1: "separate", 2: "separate"})
    other = {name: value.T.contiguous() if ".experts." in name else value for name, value in separate.items()}

    assert "expected [4, 6] as in " in merge_of(tmp_path, fused, other, separate).refusal()


def test_layouts_and_wrappers_may_differ_at_once(tmp_path: Path) -> None:
    plain, fused = models(1, {0: "separate", 1: "fused"})
    wrapped = {name.replace("model.", "model.language_model."): value for name, value in fused.items()}
    merge = merge_of(tmp_path, plain, wrapped, plain)

    plan = merge.plan()

    assert jobs_of(plan).keys() == plain.keys()
    assert "'model.language_model.' for 'model.'" in "".join(said(plan, "other-names"))


def test_slices_renumber_fused_tensors(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "fused", "separate", "fused")
    base, one = str(merge.folders[0]), str(merge.folders[1])
    both = [{"model": base, "layer_range": [1, 2]}, {"model": one, "layer_range": [1, 2]}]
    own = [{"model": base, "layer_range": [0, 2]}]

    plan = merge.plan(
        merge_method="linear", parameters={"weight": 1.0}, models=None, base_model=None,
        slices=[{"sources": own}, {"sources": both}],
    )  # fmt: skip

    shapes = stored(plan)
    assert [name for name in shapes if name.endswith("gate_up_proj")] == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(3)
    ]
    recorded = plan_file.parse(plan_file.encode(plan), "plan.json")
    assert recorded.plan.plan_id == plan.plan_id


def test_what_is_fused_otherwise_stays_as_it_is(tmp_path: Path) -> None:
    """Without the tensor beside it that tells how it lies, or of no two projections."""
    odd: Tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 6, 9).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.ones(3, 4, 6).bfloat16(),
        "model.layers.1.mlp.experts.gate_up_proj": torch.ones(3, 8, 6).bfloat16(),
    }

    jobs = jobs_of(merge_of(tmp_path, odd, odd, odd).plan())

    assert jobs.keys() == odd.keys()
    assert {job.reading.scope for job in jobs.values()} == {"leading"}


def test_a_plan_whose_runs_do_not_make_up_a_tensor_is_refused(tmp_path: Path) -> None:
    plan = laid_out(tmp_path, "qwen_vl", "fused", "fused").plan()
    for place, value in ((3, 2), (1, [3, 8, 5]), (4, 0), (4, 4), (4, "2"), (5, 1), (2, 10**6)):
        fields = json.loads(plan_file.encode(plan))
        fields["shards"][0]["wholes"][0][place] = value
        with pytest.raises(CheckpointError):
            plan_file.parse(json.dumps(fields).encode(), "plan.json")


def test_an_expert_that_is_transposed_must_fit(tmp_path: Path) -> None:
    sizes = Sizes(num_experts=1, hidden=1024, inner=512, num_layers=1)
    planned = merge_of(tmp_path, *models(2, "qwen_vl", sizes)).plan()
    jobs = [job for job in planned.jobs if ".experts." in job.output.name]
    block = 2 * sizes.hidden * sizes.inner

    for direct in (False, True):
        workspace = divide(jobs, 2**30, num_threads=1, baseline_bytes=0, direct=direct)
        assert workspace.slab_bytes >= 3 * 2 * block
        assert workspace.out_bytes >= 2 * block
        steps = list(schedule(jobs, workspace))
        assert sum(each.stop - each.start for step in steps for each in step.loads[0].requests) == 3 * 3 * block
        with pytest.raises(BudgetError, match="needs at least"):
            divide(jobs, 2 * 3 * 2 * block, num_threads=1, baseline_bytes=0, direct=direct)


def test_codes_are_written_one_by_one(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "fused", "separate", "qwen_vl")

    plan = merge.plan(stockflow={"output_format": "fp8_block"})

    assert {name for name in stored(plan) if ".experts." in name and name.endswith(".weight")} == {
        name for name in merge.models[1] if ".experts." in name
    }
    refusal = merge.refusal(stockflow={"output_format": "fp8_block", "experts": "fused"})
    assert "`experts: fused` writes plain numbers" in refusal


def test_square_stacks_ask_which_way_they_lie(tmp_path: Path) -> None:
    sizes = Sizes(num_experts=2, hidden=5, inner=5, num_layers=1)
    stacks, separate = models(1, {0: "step", 1: "separate"}, sizes)

    merge = merge_of(tmp_path / "mixed", separate, stacks, separate, hidden_size=5)
    refusal = merge.refusal()
    assert f"3 tensors of {merge.folders[1]} such as 'model.layers.0.moe." in refusal
    assert "`stockflow: {accept: [square-experts]}`" in refusal
    plan = merge.plan(stockflow={"accept": ["square-experts"]})
    assert stored(plan).keys() == separate.keys()
    alike = merge_of(tmp_path / "alike", stacks, stacks, stacks, hidden_size=5).plan()
    assert not said(alike, "square-experts")
    assert jobs_of(alike)["model.layers.0.moe.up_proj.weight"].reading.scope == "leading"


def test_what_an_adapter_adds_to_a_transposed_tensor_is_not_lost(tmp_path: Path) -> None:
    merge = laid_out(tmp_path, "qwen_vl", "qwen_vl", "qwen_vl")
    recipe = parse_recipe(yaml.safe_dump(merge.recipe), "recipe.yaml")
    base, one, two = open_checkpoints([open_store(place, recipe.storage) for place in recipe.checkpoints])
    added = Added(plain("BF16"), "BF16", 1.0)
    tune = replace(one, specs=base.specs, stored={DOWN: Stored(added, (base.specs[DOWN], base.specs[DOWN]))})

    seen = seen_one_by_one(recipe, [base, tune, two])

    assert all(DOWN in each.specs for each in seen.checkpoints)
    assert seen.checkpoints[1].stored[DOWN].decode == added
