"""Bases, adapters on them and what PEFT itself makes of both in float32.

``python -m tests.peft_models write FOLDER`` makes all; ``merge BASE ADAPTER OUT`` merges what is there.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": 64,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("Llama", {"intermediate_size": 40}, {"target_modules": ALL}),
    "rslora": ("Llama", {"intermediate_size": 40}, {"target_modules": ALL, "use_rslora": True, "r": 3}),
    "patterns": (
        "Llama",
        {"intermediate_size": 40},
        {
            "target_modules": ALL,
            "rank_pattern": {r"^model.layers.1.mlp.up_proj": 5, "k_proj": 2},
            "alpha_pattern": {r"layers\.0\..*v_proj": 32, "1.self_attn.k_proj": 1},
        },
    ),
    "embeddings": ("Llama", {"intermediate_size": 40}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "saved": (
        "Llama",
        {"intermediate_size": 40},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "tokens": (
        "Llama",
        {"intermediate_size": 40, "tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 63]},
    ),
    "dora": ("Llama", {"intermediate_size": 40}, {"target_modules": ALL, "use_dora": True}),
    "bias": (
        "Llama",
        {"intermediate_size": 40, "attention_bias": True, "mlp_bias": True},
        {"target_modules": ALL, "bias": "all"},
    ),
    "lora bias": (
        "Llama",
        {"intermediate_size": 40, "attention_bias": True, "mlp_bias": True},
        {"target_modules": ALL, "lora_bias": True},
    ),
    "experts": (
        "Qwen3Moe",
        {"intermediate_size": 32, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "square experts of [in, out]": (
        "GptOss",
        {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}


def write_case(folder: Path, name: str) -> None:
    """Write a base in BF16, an adapter that was drawn, and the merged model in F32."""
    import transformers
    from peft import LoraConfig, get_peft_model

    family, config, said = CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SMALL, **config))
    copy.deepcopy(model).bfloat16().save_pretrained(folder / "base")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **said}))
    for parameter in (each for each in adapted.parameters() if each.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "lora")
    adapted.merge_and_unload().save_pretrained(folder / "merged")


def write_all(folder: str) -> None:
    """Write every case."""
    for case in CASES:
        write_case(Path(folder) / case, case)


def merge(base: str, adapter: str, out: str) -> None:
    """Merge an adapter into its base in float32."""
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    {"write": write_all, "merge": merge}[sys.argv[1]](*sys.argv[2:])
