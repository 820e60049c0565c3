"""Packed weights: told by names, dtypes and neighbours, refused by the name of their format, never merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.plans import Merge, jobs_of, rule

I32, U8, I8, F16, BF16, F32, FP8, E8M0 = (
    torch.int32, torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
)  # fmt: skip
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]

FORMATS: dict[str, tuple[str, Tensors]] = {
    "GPTQ": ("GPTQ", {
        "qweight": ((8, 32), I32), "qzeros": ((2, 4), I32), "scales": ((2, 32), F16), "g_idx": ((64,), I32),
    }),
    "GPTQ without act-order": ("GPTQ", {"qweight": ((8, 32), I32), "qzeros": ((2, 4), I32), "scales": ((2, 32), F16)}),
    "AWQ": ("AWQ", {"qweight": ((64, 4), I32), "qzeros": ((2, 4), I32), "scales": ((2, 32), F16)}),
    "Kimi-K2": (
        "compressed-tensors",
        {"weight_packed": ((32, 8), I32), "weight_scale": ((32, 2), BF16), "weight_shape": ((2,), I32)},
    ),
    "Kimi-K3": ("compressed-tensors (MXFP4)", {"weight_packed": ((32, 32), U8), "weight_scale": ((32, 2), U8)}),
    "NVFP4 by compressed-tensors": (
        "compressed-tensors (NVFP4)",
        {"weight_packed": ((32, 32), U8), "weight_scale": ((32, 4), FP8), "weight_global_scale": ((1,), F32)},
    ),
    "NVFP4 by modelopt": (
        "NVFP4",
        {
            "weight": ((32, 32), U8), "weight_scale": ((32, 4), FP8), "weight_scale_2": ((), F32),
            "input_scale": ((), F32),
        },
    ),
    "LLM.int8": (
        "bitsandbytes (LLM.int8)",
        {"weight": ((32, 64), I8), "SCB": ((32,), F32), "weight_format": ((), U8)},
    ),
    "NF4": (
        "bitsandbytes (NF4)",
        {
            "weight": ((1024, 1), U8), "weight.absmax": ((32,), U8), "weight.nested_absmax": ((1,), F32),
            "weight.nested_quant_map": ((256,), F32), "weight.quant_map": ((16,), F32),
            "weight.quant_state.bitsandbytes__nf4": ((80,), U8),
        },
    ),
    "FP4": (
        "bitsandbytes (FP4)",
        {
            "weight": ((1024, 1), U8), "weight.absmax": ((32,), F32), "weight.quant_map": ((16,), F32),
            "weight.quant_state.bitsandbytes__fp4": ((80,), U8),
        },
    ),
    "DeepSeek-V3": ("FP8 block", {"weight": ((32, 64), FP8), "weight_scale_inv": ((1, 1), F32)}),
    "DeepSeek-V4": ("FP8 block", {"weight": ((32, 64), FP8), "scale": ((1, 1), E8M0)}),
    "DeepSeek-V4's experts": ("MXFP4", {"weight": ((32, 32), I8), "scale": ((32, 2), E8M0)}),
    "Qwen3-FP8": ("FP8 block", {"weight": ((32, 64), FP8), "weight_scale_inv": ((1, 1), BF16)}),
    "MiniMax-M3": ("FP8 block", {"weight": ((32, 64), FP8), "weight_scale_inv": ((32, 2), U8)}),
    "FP8 by row": ("FP8", {"weight": ((32, 64), FP8), "weight_scale": ((32, 1), F32), "input_scale": ((), F32)}),
    "Mistral Large 4": ("FP8", {"weight": ((32, 64), FP8), "qscale_weight": ((), F32)}),
    "FP8 alone": ("FP8", {"weight": ((32, 64), torch.float8_e5m2)}),
    "gpt-oss": (
        "MXFP4",
        {
            "gate_up_proj_blocks": ((2, 8, 2, 16), U8), "gate_up_proj_scales": ((2, 8, 2), U8),
            "gate_up_proj_bias": ((2, 8), BF16),
        },
    ),
    "W8A8": ("INT8 with scales", {"weight": ((32, 64), I8), "weight_scale": ((32, 1), BF16)}),
    "BitNet": ("packed U8 with scales", {"weight": ((8, 64), U8), "weight_scale": ((1,), BF16)}),
    "MLX": ("MLX", {"weight": ((32, 8), torch.uint32), "scales": ((32, 2), BF16), "biases": ((32, 2), BF16)}),
    "HQQ": ("HQQ", {"W_q": ((32, 32), U8), "scale": ((64, 1), F16), "zero": ((64, 1), F16)}),
    "EETQ": ("EETQ", {"weight": ((64, 32), I8), "weight_scales": ((32,), F16)}),
    "AQLM": ("AQLM", {
        "codes": ((4, 8, 1), torch.int16), "codebooks": ((1, 9, 1, 8), F16), "scales": ((4, 1, 1, 1), F16),
    }),
    "QuIP#": ("QuIP#", {"Qidxs": ((4, 8), torch.int16), "SU": ((8,), F16), "SV": ((8,), F16)}),
    "EXL2": ("EXL2", {"q_weight": ((8, 32), I32), "q_scale": ((2, 4), I32), "q_scale_max": ((2,), F16)}),
    "EXL3": ("EXL3", {"trellis": ((2, 2, 32), torch.int16), "suh": ((32,), F16), "svh": ((32,), F16)}),
    "2:4 sparse": (
        "compressed-tensors (2:4 sparse)", {"compressed": ((32, 32), BF16), "bitmask": ((32, 8), U8)},
    ),
    "Marlin": ("Marlin", {"B": ((4, 64), I32), "s": ((1, 32), F16), "workspace": ((16,), I32)}),
    "bytes": ("packed U8", {"weight": ((32, 68), U8)}),
    "another layout": ("packed I32 with scales", {"packed_w1": ((8, 32), I32), "w1_scale": ((8, 1), F32)}),
    "a layout nobody has seen": ("packed I32 with scales", {"kernel": ((8, 32), I32), "kernel_scale": ((32,), F32)}),
}  # fmt: skip
"""What lies in a module, by whose: name, shape and dtype, and what the format is called."""
READ = {
    "Kimi-K2", "Kimi-K3", "NVFP4 by compressed-tensors", "NVFP4 by modelopt", "DeepSeek-V3", "DeepSeek-V4",
    "DeepSeek-V4's experts", "Qwen3-FP8", "MiniMax-M3", "FP8 by row", "Mistral Large 4", "gpt-oss",
}  # fmt: skip
"""Those that stand for numbers (test_quantised)."""


def packed(module: str, form: str) -> dict[str, torch.Tensor]:
    return {f"{module}.{own}": torch.ones(shape).to(dtype) for own, (shape, dtype) in FORMATS[form][1].items()}


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


@pytest.mark.parametrize("form", sorted(FORMATS.keys() - READ))
def test_a_format_is_refused_by_its_name_though_all_models_are_equal(merge: Merge, form: str) -> None:
    for tensors in merge.models:
        tensors |= packed("layers.0.up_proj", form)

    found = merge.write().refusal()

    assert "3 problems" in found
    for folder in merge.folders:
        assert f"{folder} holds {FORMATS[form][0]} weights (1 tensor, such as layers.0.up_proj." in found


def test_eight_bits_without_any_scale_are_cast_back_and_not_looked_for_elsewhere(merge: Merge) -> None:
    for tensors in merge.models:
        tensors |= packed("layers.0.up_proj", "FP8 alone")
        tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(8).to(FP8)

    found = merge.write().refusal()
    assert "and no scale of them: if they were cast as they were" in found
    assert "v.bfloat16() if 'float8' in str(v.dtype) else v" in found
    assert "numbers only with their scales" not in found


def test_eight_bits_that_lost_their_scales_are_not_cast_back(merge: Merge) -> None:
    for tensors in merge.models:
        tensors |= packed("layers.0.up_proj", "FP8 alone")
    merge.write(config={"quantization_config": {"quant_method": "fp8"}})

    found = merge.refusal()

    assert "its config has `quantization_config`, so there were some, and they are lost. Give the 16-bit model" in found
    assert "bfloat16()" not in found


def test_what_casts_eight_bits_back_changes_no_number(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    kept = {"a": codes.clone().view(torch.float8_e4m3fn), "b": codes.clone().view(torch.float8_e5m2), "c": codes}
    save_file(kept, tmp_path / "FILE")

    advised = {k: v.bfloat16() if "float8" in str(v.dtype) else v for k, v in load_file(tmp_path / "FILE").items()}

    for name in "ab":
        assert torch.equal(advised[name].float().nan_to_num(1e9), kept[name].float().nan_to_num(1e9))
    assert advised["c"].dtype == torch.uint8


def test_each_packed_model_has_its_own_sentence_and_the_names_they_lack_none(merge: Merge) -> None:
    merge.models[1] |= packed("layers.0.up_proj", "GPTQ")
    merge.models[2] |= packed("layers.1.up_proj", "NF4") | packed("layers.2.up_proj", "NF4")

    found = merge.write().refusal()

    assert found.count("\n") == 2
    assert f"{merge.folders[1]} holds GPTQ weights (1 tensor, such as layers.0.up_proj.qweight)" in found
    assert f"{merge.folders[2]} holds bitsandbytes (NF4) weights (2 tensors" in found


@pytest.mark.parametrize("form", ["GPTQ", "NF4", "gpt-oss", "DeepSeek-V3", "BitNet"])
def test_what_a_rule_copies_or_leaves_out_whole_is_not_merged(merge: Merge, form: str) -> None:
    for tensors in merge.models:
        tensors |= packed("layers.0.up_proj", form)
    merge.write(config={"quantization_config": {"quant_method": "x"}})

    plan = merge.plan(stockflow=rule(filter="up_proj", action="copy"))
    assert {job.method for name, job in jobs_of(plan).items() if "up_proj" in name} == {"copy"}
    assert plan.config == {"quantization_config": {"quant_method": "x"}}

    plan = merge.plan(stockflow=rule(filter="up_proj", action="skip"))
    assert plan.config == {}


def test_scales_that_would_be_merged_beside_codes_that_are_copied_are_refused(merge: Merge) -> None:
    for tensors in merge.models:
        tensors |= packed("layers.0.up_proj", "GPTQ")

    assert "GPTQ" in merge.write().refusal(stockflow=rule(filter="qweight", action="copy"))


@pytest.mark.parametrize(
    "plain",
    [
        {"attn.bias": ((1, 1, 4, 4), U8), "attn.masked_bias": ((), F32)},
        {"bn.num_batches_tracked": ((), torch.int64), "bn.running_mean": ((4,), F32)},
        {"attn.relative_position_index": ((4, 4), torch.int64), "attn.logit_scale": ((4, 1, 1), F32)},
        {"attn.relative_position_index": ((4, 4), I32), "attn.logit_scale": ((4, 1, 1), F32)},
        {"attn.relative_position_index": ((4, 4), I32), "attn.scale": ((4,), F32)},
        {"position_ids": ((1, 77), torch.int64), "logit_scale": ((), F32)},
        {"position_ids": ((1, 77), I32), "scale": ((), F32)},
        {"temperature_step": ((1,), I32), "temperature_scale": ((1,), F32), "logit_scale": ((1,), F32)},
        {"attn.buckets": ((4, 4), I32), "attn.logit_scale": ((1,), F32)},
        {"attn.bias": ((1, 1, 4, 4), U8), "attn.scale": ((4,), F32)},
        {"gate.tid2eid": ((10, 2), torch.int64), "gate.weight": ((4, 7), BF16)},
        {"codes": ((4, 4), I32)},
        {"norm.scale": ((7,), BF16), "norm.weight": ((7,), BF16)},
        {"attn.k_scale": ((), F32), "attn.q_proj.weight": ((7, 7), BF16), "attn.v_scale": ((), F32)},
        {"layer_scale1.gamma": ((7,), BF16), "gamma": ((7,), BF16)},
    ],
    ids=lambda plain: " ".join(plain),
)  # fmt: skip
def test_masks_counters_indices_and_scales_of_layers_are_not_packed(merge: Merge, plain: Tensors) -> None:
    for tensors in merge.models:
        tensors |= {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in plain.items()}

    assert {remark.code for remark in merge.write().plan().remarks} <= {
        "running-statistics",
        "static-scales",
        "index-data",
    }


LEFTOVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GPTQ": ({"hidden_size": 7, "quantization_config": {"quant_method": "gptq", "bits": 4}}, {"hidden_size": 7}),
    "in text_config": (
        {"text_config": {"hidden_size": 7, "quantization_config": {"quant_method": "fp8"}}, "vision_config": {}},
        {"text_config": {"hidden_size": 7}, "vision_config": {}},
    ),
    "twice": ({"quantization_config": {"bits": 4}, "thinker_config": {"text_config": {"compression_config": {"a": 1}}}},
              {"thinker_config": {"text_config": {}}}),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}, "a": 1}, {"a": 1}),
    "DeepSeek-V4": ({"expert_dtype": "fp4", "a": 1}, {"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("which", LEFTOVERS)
def test_what_a_config_says_of_packed_weights_goes_where_there_are_none(merge: Merge, which: str) -> None:
    given, published = LEFTOVERS[which]
    plan = merge.write(config=given).plan()

    assert plan.config == published
    (said,) = plan.remarks
    assert (said.code, said.severity, said.models) == ("quantization-removed", "note", (str(merge.folders[0]),))
    assert "they are plain numbers" in said.text


def test_a_file_that_speaks_of_packed_weights_stays_behind_and_is_named(merge: Merge) -> None:
    plan = merge.write(config={}, side_files={"hf_quant_config.json": json.dumps({"quantization": {}})}).plan()

    assert [side.key for side in plan.side_files] == []
    (said,) = (remark for remark in plan.remarks if remark.code == "quantization-removed")
    assert said.values == {"removed": "hf_quant_config.json"}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"expert_dtype": "bfloat16"},
        {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}},
    ],
)
def test_keys_that_say_nothing_stay_as_they_are(merge: Merge, config: dict[str, Any]) -> None:
    plan = merge.write(config=config).plan()

    assert plan.config == config
    assert plan.remarks == ()


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "SCB", "weight.absmax"])
def test_scales_beside_plain_weights_are_refused_until_left_out_or_accepted(merge: Merge, scale: str) -> None:
    merge.models[1][f"embed.{scale}"] = torch.ones(1, 1)
    for tensors in merge.models[::2]:
        tensors[f"embed.{scale}"] = torch.ones(1, 1)
    merge.write(config={})

    found = merge.refusal()
    assert "one problem" not in found
    assert f"{merge.folders[1]} has 1 scale such as embed.{scale} beside weights of plain numbers" in found
    assert merge.plan(stockflow={"accept": ["leftover-scales"]}).remarks[0].severity == "refusal"
    assert merge.plan(stockflow=rule(filter=scale, action="skip")).remarks[0].code == "skipped"
