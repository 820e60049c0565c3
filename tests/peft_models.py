"""Bases, adapters on them and what PEFT itself makes of both.

``python -m tests.peft_models write FOLDER`` makes all cases; ``apply BASE ADAPTER OUT ...`` merges what is there, and
asks base and adapter, unmerged, for logits; ``together BASE OUT ADAPTER ...`` merges several into one base; ``forward
MODEL ...`` asks plain models for their logits.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": 64,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 500,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"intermediate_size": 96, "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
LOGITS = "logits.npy"


@dataclass(frozen=True)
class Case:
    """One row of what adapters hold: a model's config beside its sizes, and what ``LoraConfig`` is told."""

    lora: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: {"intermediate_size": 160})
    family: str = "Llama"
    is_bin: bool = False
    dtype: torch.dtype = torch.float32
    """of the adapter's file"""
    num_more: int = 0
    """tokens that the base is given before the adapter is trained, and its file lacks"""

    @property
    def changes_tied(self) -> bool:
        """Whether the adapter changes a head or an embedding that are one tensor."""
        names = ("target_modules", "modules_to_save", "trainable_token_indices")
        changed = {str(each) for name in names for each in self.lora.get(name, ())}
        return bool(self.model.get("tie_word_embeddings") and changed & {"lm_head", "embed_tokens"})


BIASED = {"intermediate_size": 160, "attention_bias": True, "mlp_bias": True}
TIED = {"intermediate_size": 160, "tie_word_embeddings": True}
EMBEDDED = ["embed_tokens", "lm_head", "q_proj"]
CASES: dict[str, Case] = {
    "plain": Case({"target_modules": ALL}),
    "factors of BF16": Case({"target_modules": ALL}, dtype=torch.bfloat16),
    "factors of F16": Case({"target_modules": ALL}, dtype=torch.float16),
    "rslora": Case({"target_modules": ALL, "use_rslora": True, "r": 3}),
    "patterns": Case(
        {
            "target_modules": ALL,
            "rank_pattern": {r"^model.layers.1.mlp.up_proj": 5, "k_proj": 2},
            "alpha_pattern": {r"layers\.0\..*v_proj": 32, "1.self_attn.k_proj": 1},
        }
    ),
    "all-linear": Case({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "some layers": Case({"target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "a regex": Case({"target_modules": r".*\.1\..*(q|up)_proj"}),
    "Conv1D": Case({"target_modules": ["c_attn", "c_proj", "c_fc"]}, {}, "GPT2"),
    "embeddings": Case({"target_modules": EMBEDDED}),
    "embedding of a tied head": Case({"target_modules": ["embed_tokens", "q_proj"]}, TIED),
    "head tied to its embedding": Case({"target_modules": ["lm_head", "q_proj"]}, TIED),
    "both of what is tied": Case({"target_modules": EMBEDDED}, TIED),
    "kept tied": Case({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, TIED),
    "saved": Case({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "saved of a tied head": Case({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, TIED),
    "saved and kept tied": Case(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED
    ),
    "more tokens": Case({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, num_more=7),
    "more tokens of a tied head": Case(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        TIED,
        num_more=7,
    ),
    "more tokens, not trained": Case({"target_modules": ["q_proj"]}, num_more=7),
    "more tokens of a tied head, not trained": Case({"target_modules": ["q_proj"]}, TIED, num_more=7),
    "more tokens, with factors": Case({"target_modules": EMBEDDED}, num_more=7),
    "more tokens, rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [500, 506]}, num_more=7),
    "more tokens, rows of a tied head": Case(
        {"target_modules": ["q_proj"], "trainable_token_indices": [500, 506]}, TIED, num_more=7
    ),
    "tokens": Case({"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 499]}),
    "tokens of a tied head": Case({"target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 499]}, TIED),
    "tokens of both": Case(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}}
    ),
    "tokens of both of what is tied": Case(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}}, TIED
    ),
    "dora": Case({"target_modules": ALL, "use_dora": True}),
    "dora, rslora": Case({"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "bias all": Case({"target_modules": ALL, "bias": "all"}, BIASED),
    "bias lora_only": Case({"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}, BIASED),
    "lora bias": Case({"target_modules": ALL, "lora_bias": True}, BIASED),
    "bin": Case({"target_modules": ALL}, is_bin=True),
    "experts": Case({"target_modules": ["q_proj"], "target_parameters": EXPERTS}, MOE, "Qwen3Moe"),
    "gates and ups": Case({"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}, MOE, "Qwen3Moe"),
    "downs": Case({"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}, MOE, "Qwen3Moe"),
    "experts of Mixtral": Case(
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"gate_up_proj": 3},
        },
        {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        "Mixtral",
    ),
    "modules of Mixtral": Case(
        {"target_modules": ["q_proj", "w1", "w3", "w2"], "rank_pattern": {"w2": 2}, "alpha_pattern": {"w2": 5}},
        {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        "Mixtral",
    ),
    "modules of Qwen3-MoE": Case({"target_modules": ["down_proj"], "use_rslora": True}, MOE, "Qwen3Moe"),
    "modules of GPT-NeoX": Case({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, family="GPTNeoX"),
    "experts of MiniMax-M2": Case(
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
        "MiniMaxM2",
    ),
    "square experts of [in, out]": Case(
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, GPT_OSS, "GptOss"
    ),
}


def model_of(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model in a folder, of the class that its config names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=dtype).eval()


def save_logits(model: Any, folder: str | Path) -> None:
    """Write what a model says of twelve tokens."""
    tokens = torch.tensor([[5, 1, 60, 7, 63, 33, 2, 9, 41, 18, 5, 11]])
    with torch.no_grad():
        np.save(Path(folder) / LOGITS, model(input_ids=tokens).logits.double().numpy())


def adapted_of(model: Any, adapter: str | Path) -> Any:
    """Return a model with the adapter in a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).to(model.dtype).eval()


def merged(adapted: Any, case: Case) -> Any:
    """Return the model that PEFT makes; each of what is tied by itself, as what both are would be changed twice."""
    if not case.changes_tied:
        return adapted.merge_and_unload()
    for head in (each for each in adapted.base_model.model.lm_head.modules() if type(each) is nn.Linear):
        if head.weight.shape[0] >= SIZES["vocab_size"]:
            head.weight = nn.Parameter(head.weight.detach().clone())
    model = adapted.merge_and_unload()
    model.config.tie_word_embeddings = bool(case.lora.get("ensure_weight_tying"))
    model.tie_weights()
    return model


def write_case(folder: Path, case: Case) -> None:
    """Write a base in BF16, an adapter that was drawn, and the merged model in F32 and in F64."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    end = "LMHeadModel" if case.family == "GPT2" else "ForCausalLM"
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500} if case.family == "GPT2" else SIZES
    config = getattr(transformers, f"{case.family}Config")(**sizes, **case.model)
    getattr(transformers, f"{case.family}{end}")(config).bfloat16().save_pretrained(folder / "base")

    def base(dtype: torch.dtype) -> Any:
        model = model_of(folder / "base", dtype)
        if case.num_more:
            torch.manual_seed(2)
            model.resize_token_embeddings(model.config.vocab_size + case.num_more, mean_resizing=False)
        return model

    wrapped = get_peft_model(
        base(torch.float32), LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **case.lora})
    )
    for parameter in (each for each in wrapped.parameters() if each.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.to(case.dtype).save_pretrained(folder / "lora", safe_serialization=not case.is_bin)
    for dtype in (torch.float32, torch.float64):
        out = folder / ("exact" if dtype == torch.float64 else "merged")
        merged(adapted_of(base(dtype), folder / "lora"), case).save_pretrained(out)
    save_logits(adapted_of(base(torch.float32), folder / "lora"), folder / "merged")


def write_all(folder: str) -> None:
    """Write every case."""
    for name, case in CASES.items():
        write_case(Path(folder) / name, case)


def apply(*places: str) -> None:
    """Merge adapters into their bases in float32: base, adapter and output, as often as there are some."""
    for base, adapter, out in zip(places[::3], places[1::3], places[2::3], strict=True):
        adapted = adapted_of(model_of(base), adapter)
        copy.deepcopy(adapted).merge_and_unload().save_pretrained(out)
        save_logits(adapted, out)


def together(base: str, out: str, *adapters: str) -> None:
    """Merge several adapters into their base in float32, one after the other."""
    model = adapted_of(model_of(base), adapters[0])
    for name in adapters[1:]:
        model.load_adapter(name, adapter_name=Path(name).parent.name)
    names = ["default", *(Path(name).parent.name for name in adapters[1:])]
    model.float().merge_and_unload(adapter_names=names).save_pretrained(out)


def forward(*folders: str) -> None:
    """Ask models that have no adapter."""
    for folder in folders:
        save_logits(model_of(folder), folder)


if __name__ == "__main__":
    {"write": write_all, "apply": apply, "together": together, "forward": forward}[sys.argv[1]](*sys.argv[2:])
