"""Output formats at plan time: which tensors are written in codes, and what the config says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.errors import RecipeError
from stockflow.planning.job import TensorJob
from stockflow.planning.plan import MergePlan
from tests import quantised
from tests.plans import Merge, rule

WEIGHT, OTHER = "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path, (1, 1, 1))


def add_codes(merge: Merge, *modules: str, scale: str = "F32") -> None:
    for seed, tensors in enumerate(merge.models):
        values = torch.randn(130, 256, generator=torch.Generator().manual_seed(seed))
        made = quantised.fp8(values, (128, 128), scale=scale)
        for module in modules:
            tensors |= {f"{module}.{own}": tensor for own, tensor in made.tensors.items()}


def add_plain(merge: Merge, *names: str) -> None:
    for seed, tensors in enumerate(merge.models):
        drawn = torch.randn(130, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
        tensors |= {name: drawn.clone() for name in names}


def written(plan: MergePlan) -> dict[str, tuple[str, str]]:
    """How each tensor is written: dtype, and rule of its scales."""
    jobs: list[TensorJob] = list(plan.jobs)
    return {output.name: (output.dtype, job.result.rule) for job in jobs for output in job.result.outputs}


def test_codes_are_kept_where_the_recipe_says_nothing_and_the_config_with_them(merge: Merge) -> None:
    add_codes(merge, WEIGHT)
    plan = merge.write(config={"quantization_config": FP8}).plan()

    found = written(plan)
    assert found[f"{WEIGHT}.weight"] == ("F8_E4M3", "amax")
    assert found[f"{WEIGHT}.weight_scale_inv"] == ("F32", "amax")
    assert found["embed.weight"] == ("BF16", "")
    assert plan.config == {"quantization_config": FP8}
    assert list(found).index(f"{WEIGHT}.weight_scale_inv") == list(found).index(f"{WEIGHT}.weight") + 1


@pytest.mark.parametrize(
    "asked", [{"dtype": "bfloat16"}, {"stockflow": {"output_format": "bfloat16"}}, {"out_dtype": "bfloat16"}]
)
def test_a_float_format_is_written_where_it_is_asked_for(merge: Merge, asked: dict[str, Any]) -> None:
    add_codes(merge, WEIGHT)
    plan = merge.write(config={"quantization_config": FP8, "a": 1}).plan(**asked)

    assert written(plan)[f"{WEIGHT}.weight"] == ("BF16", "")
    assert f"{WEIGHT}.weight_scale_inv" not in written(plan)
    assert plan.config == {"a": 1}


def test_codes_are_kept_beside_a_dtype_for_the_rest(merge: Merge) -> None:
    add_codes(merge, WEIGHT, scale="BF16")
    plan = merge.write(config={}).plan(dtype="float32", stockflow={"output_format": "keep"})

    assert written(plan)[f"{WEIGHT}.weight"] == ("F8_E4M3", "amax")
    assert written(plan)["embed.weight"] == ("F32", "")


def test_two_formats_are_an_error_that_names_both_lines(merge: Merge) -> None:
    with pytest.raises(RecipeError, match=r"`float16` here and `dtype: bfloat16` in line \d+ cannot both be"):
        merge.write().plan(dtype="bfloat16", stockflow={"output_format": "float16"})


def test_a_copy_is_of_codes_and_scales_where_these_are_kept_and_of_numbers_else(merge: Merge) -> None:
    add_codes(merge, WEIGHT)
    merge.write(config={"quantization_config": FP8})
    copied = rule(filter="up_proj", action="copy")

    assert {job.method for job in merge.plan(stockflow=copied).jobs if WEIGHT in job.output.name} == {"copy"}
    widened = merge.plan(dtype="float16", stockflow=copied)
    assert written(widened)[f"{WEIGHT}.weight"] == ("F16", "")


def test_what_is_written_as_numbers_among_codes_is_listed_in_the_config(merge: Merge) -> None:
    """A rule that casts one of two modules; and codes in integers, which are copied, are codes all the same."""
    add_codes(merge, WEIGHT)
    for tensors in merge.models:
        made = quantised.mxfp4(torch.randn(4, 64, dtype=torch.float64).numpy(), "I8")
        tensors |= {f"{OTHER}.{own}": tensor for own, tensor in made.tensors.items()}
    merge.write(config={"quantization_config": FP8})

    plan = merge.plan(stockflow=rule(filter="layers.1.mlp", action="copy"))

    assert written(plan)[f"{OTHER}.weight"] == ("I8", "")
    assert plan.config == {"quantization_config": FP8}


def test_fp8_blocks_are_made_of_matrices_that_inputs_are_multiplied_by(merge: Merge) -> None:
    names = (f"{WEIGHT}.weight", "lm_head.weight", "layers.0.mlp.gate.weight", "layers.0.self_attn.q_norm.weight")
    add_plain(merge, *names)
    plan = merge.write(config={"a": 1}).plan(stockflow={"output_format": "fp8_block", "routers": "copy"})

    coded = {name for name, (dtype, _) in written(plan).items() if dtype == "F8_E4M3"}
    assert coded == {f"{WEIGHT}.weight"}
    assert written(plan)[f"{WEIGHT}.weight_scale_inv"] == ("F32", "amax")
    assert plan.config is not None
    said = plan.config["quantization_config"]
    assert isinstance(said, dict)
    assert said["weight_block_size"] == [128, 128]
    assert {"lm_head", "embed", "layers.0.mlp.gate"} <= set(said["modules_to_not_convert"])
    assert "layers.0.mlp.up_proj" not in said["modules_to_not_convert"]


def test_fixed_scales_of_activations_are_the_bases_and_that_is_said(merge: Merge) -> None:
    add_codes(merge, WEIGHT)
    for tensors in merge.models:
        tensors[f"{WEIGHT}.input_scale"] = torch.tensor(0.5)
    merge.write(config={})

    assert written(merge.plan())[f"{WEIGHT}.input_scale"] == ("F32", "")
    (said,) = (remark for remark in merge.plan().remarks if remark.code == "static-scales")
    assert "is the base's, as no model was run" in said.text
    plan = merge.plan(dtype="bfloat16")
    assert f"{WEIGHT}.input_scale" not in written(plan)
    assert any("belong to its codes" in remark.text for remark in plan.remarks)


def test_scales_of_a_cache_of_keys_and_values_beside_plain_weights_are_no_weights(merge: Merge) -> None:
    for number, tensors in enumerate(merge.models):
        tensors["layers.0.self_attn.k_scale"] = torch.tensor(0.5 + number)
    merge.write(config={})

    (said,) = (remark for remark in merge.plan().remarks if remark.code == "static-scales")
    assert (said.severity, said.tensors) == ("warning", ("layers.0.self_attn.k_scale",))
    skipped = merge.plan(stockflow={"rules": [{"filter": "k_scale", "action": "skip"}]})
    assert "static-scales" not in {remark.code for remark in skipped.remarks}


@pytest.mark.parametrize("holders", [(0,), (0, 1), (1, 2), (2,)])
def test_scales_of_a_cache_that_only_some_models_have_are_left_out_by_the_rule_that_is_printed(
    merge: Merge, holders: tuple[int, ...]
) -> None:
    for number in holders:
        for each in ("k_scale", "v_scale"):
            merge.models[number][f"layers.0.self_attn.{each}"] = torch.tensor(0.5 + number)
    scheme = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    merge.write(config={"quantization_config": scheme})

    refusal = merge.refusal()
    assert "are measured on one model, and what announces them is not published" in refusal
    assert "copy" not in refusal
    plan = merge.plan(stockflow=rule(filter="_scale", action="skip"))
    assert not [name for name in written(plan) if name.endswith("_scale")]
    assert "quantization_config" not in (plan.config or {})


def test_a_file_of_modelopt_goes_with_codes_alone(merge: Merge) -> None:
    add_codes(merge, WEIGHT)
    merge.write(config={}, side_files={"hf_quant_config.json": "{}"})

    assert [side.key for side in merge.plan().side_files] == ["hf_quant_config.json"]
    assert merge.plan(dtype="bfloat16").side_files == ()
