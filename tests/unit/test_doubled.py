"""Facts that one config tells twice: differing ones are said, of which model and both values; equal ones are quiet."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.plans import Merge

LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0}
TEXT = {"model_type": "qwen2_5_vl_text", "hidden_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
FULL = {"rope_type": "default", "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
TWICE: dict[str, tuple[dict[str, Any], str]] = {
    "a model of version 5 saved by 4": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta: 10000.0 and rope_parameters.rope_theta: 500000.0",
    ),
    "within a section": (
        {"text_config": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}},
        "text_config.rope_theta: 10000.0 and text_config.rope_parameters.rope_theta: 500000.0",
    ),
    "layers that are told apart": (
        {"rope_theta": 1e4, "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}},
        "rope_theta: 10000.0 and rope_parameters.full_attention.rope_theta: 1000000.0",
    ),
    "layers with a window": (
        {"rope_local_base_freq": 2e4, "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}},
        "rope_local_base_freq: 20000.0 and rope_parameters.sliding_attention.rope_theta: 10000.0",
    ),
    "a share": (
        {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
        "rotary_pct: 0.5 and rope_parameters.partial_rotary_factor: 0.25",
    ),
    "a scaling that was lost": (
        {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 1e6}},
        "rope_parameters: {'factor': 4.0, 'rope_type': 'yarn'} and rope_scaling: {}",
    ),
    "two kinds of scaling": (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
        "rope_scaling.rope_type: 'yarn' and rope_scaling.type: 'linear'",
    ),
    "two lengths": (
        {"original_max_position_embeddings": 4096, "rope_scaling": LLAMA_31},
        "original_max_position_embeddings: 4096 and rope_scaling.original_max_position_embeddings: 8192",
    ),
    "heads": ({"n_head": 4, "num_attention_heads": 8}, "num_attention_heads: 8 and n_head: 4"),
    "an epsilon": (
        {"layer_norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "layer_norm_eps: 1e-06 and layer_norm_epsilon: 1e-05",
    ),
    "a word of another version": (
        {"num_experts": 8, "num_local_experts": 4}, "num_experts: 8 and num_local_experts: 4",
    ),
    "a token": (
        {"image_token_id": 7, "image_token_index": 9}, "image_token_index: 9 and image_token_id: 7",
    ),
    "outside and within": (
        {"hidden_size": 8, "rms_norm_eps": 1e-5, "text_config": TEXT},
        "rms_norm_eps: 1e-05 and text_config.rms_norm_eps: 1e-06",
    ),
    "equal bases": ({"rope_theta": 500000, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ""),
    "equal scalings": ({"rope_scaling": LLAMA_31, "rope_parameters": {**LLAMA_31, "rope_theta": 1e4}}, ""),
    "no scaling": ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ""),
    "sections of M-RoPE": ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}}, ""),
    "kinds of layers": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
         "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}, "",
    ),
    "equal outside and within": ({**TEXT, "text_config": TEXT}, ""),
    "an outer model of its own": ({"hidden_size": 4, "rms_norm_eps": 1e-5, "text_config": TEXT}, ""),
    "norms of two parts": ({"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5}, ""),
    "a tower": ({"hidden_size": 8, "rms_norm_eps": 1e-5, "vision_config": {**TEXT, "rms_norm_eps": 1e-6}}, ""),
}  # fmt: skip


def said(folder: Path, configs: tuple[dict[str, Any], ...]) -> list[Any]:
    merge = Merge(folder)
    for place, config in zip(merge.folders, configs, strict=True):
        write_checkpoint(place, {"w.weight": torch.ones(4, 4)}, config=config)
    return [remark for remark in merge.plan().remarks if remark.code == "config-contradicts"]


@pytest.mark.parametrize("case", TWICE)
def test_a_fact_that_a_config_tells_twice_and_differently_is_said(tmp_path: Path, case: str) -> None:
    config, text = TWICE[case]
    found = said(tmp_path, (config, config, config))

    assert len(found) == bool(text)
    assert not text or (text in found[0].text and found[0].severity == "warning" and len(found[0].models) == 3)
    assert not text or "is published with both" in found[0].text


def test_a_tune_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (found,) = said(tmp_path, (plain, {"rope_theta": 1e4, **plain}, plain))

    assert found.models == (str(Merge(tmp_path).folders[1]),)
    assert found.values == {"rope_theta": "10000.0", "rope_parameters.rope_theta": "500000.0"}
    assert "published" not in found.text
