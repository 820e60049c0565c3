"""Adapters that were extracted, loaded and merged by PEFT itself: ``make test-peers``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stockflow
from tests import oracle
from tests.integration.test_adapters_peft import MOST_APART, apart, with_peft
from tests.peft_models import SMALL

pytestmark = pytest.mark.peers

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "factors": ("Llama", {}, {"rank": 16}, ("proj.weight", "lm_head.weight")),
    "energies": ("Llama", {}, {"rank": 16, "energy": 1 - 1e-9}, ("1.self_attn.q_proj.weight", "up_proj.weight")),
    "whole": (
        "Llama",
        {"attention_bias": True},
        {"rank": 16, "keep_whole": True},
        ("0.self_attn.q_proj.weight", ".bias", "norm.weight", "embed_tokens.weight"),
    ),
    "embeddings": ("Llama", {}, {"rank": 64, "embeddings": True}, ("embed_tokens.weight", "0.self_attn.q_proj.weight")),
    "tied": (
        "Llama",
        {"tie_word_embeddings": True},
        {"rank": 16, "keep_whole": True},
        ("embed_tokens.weight", "k_proj.weight"),
    ),
    "experts": (
        "Qwen3Moe",
        {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
        {"rank": 16},
        ("1.mlp.experts.gate_up_proj", "experts.down_proj", "q_proj.weight"),
    ),
    "experts of [in, out]": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"rank": 64},
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "Conv1D": ("GPT2", {}, {"rank": 64, "keep_whole": True}, (".bias", "attn.c_attn.weight", "mlp.c_proj.weight")),
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}


def write_pair(folder: Path, family: str, said: dict[str, Any], ends: tuple[str, ...]) -> None:
    """Write a base, and a tune in which tensors of these names moved."""
    import transformers

    torch.manual_seed(3)
    sizes = GPT2 if family == "GPT2" else {**SMALL, "intermediate_size": 40}
    end = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{end}")(getattr(transformers, f"{family}Config")(**sizes, **said))
    model.save_pretrained(folder / "base")
    for name, parameter in model.named_parameters():
        if name.endswith(ends):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, adapters that were extracted of them, and what PEFT makes of base and adapter, with its logits."""
    folder = tmp_path_factory.mktemp("extracted")
    for case, (family, said, options, ends) in CASES.items():
        write_pair(folder / case, family, said, ends)
        stockflow.extract(folder / case / "base", folder / case / "tuned", folder / case / "lora", **options)
    with_peft("apply", *(folder / case / name for case in CASES for name in ("base", "lora", "merged")))
    with_peft("forward", *(folder / case / "tuned" for case in CASES))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_peft_makes_the_tuned_model_of_base_and_adapter(case: str, models: Path) -> None:
    base, tuned, merged = (oracle.load_checkpoint(models / case / name) for name in ("base", "tuned", "merged"))
    for name, (_, expected) in tuned.items():
        np.testing.assert_allclose(merged[name].array, expected, atol=2e-5, err_msg=name)
    assert any((base[name].array != tuned[name].array).any() for name in base)
    assert apart(models / case / "merged", models / case / "tuned") <= MOST_APART
