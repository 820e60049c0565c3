"""Small models of real architectures, saved by transformers: what is said of them is so, and ties are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.checkpoints.opening import open_checkpoints
from stockflow.planning.make import make_plan
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.storage import open_store
from tests.checkpoints import Family, write_recipe
from tests.runs import merge_here

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
SIDES: dict[str, Any] = {key: SMALL[key] for key in list(SMALL)[:4]}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "Llama, tied": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL),
    "Qwen3, tied": ("Qwen3Config", "Qwen3ForCausalLM", SMALL | {"head_dim": 8, "tie_word_embeddings": True}),
    "Qwen3 MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", SMALL | EXPERTS),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", SMALL | EXPERTS),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL | {"head_dim": 8}),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | {"head_dim": 8}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", SMALL),
    "Phi 3": ("Phi3Config", "Phi3ForCausalLM", SMALL | {"pad_token_id": 0}),
    "DeepSeek V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", SMALL | EXPERTS | MLA),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", SMALL | EXPERTS | {"head_dim": 8}),
    "Mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "T5": ("T5Config", "T5ForConditionalGeneration", T5),
    "T5 1.1": ("T5Config", "T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
    "BERT": ("BertConfig", "BertForMaskedLM", SMALL),
    "BERT, a classifier": ("BertConfig", "BertForSequenceClassification", SMALL | {"num_labels": 3}),
    "CLIP": ("CLIPConfig", "CLIPModel", {
        "text_config": SIDES | {"vocab_size": 96}, "vision_config": SIDES | {"image_size": 32, "patch_size": 8},
    }),
}  # fmt: skip
RIGHTLY = {"precision-kept", "index-data", "routers-merged", "expert-units"}
"""What is rightly said of some of them."""


def saved(folder: Path, family: str, *, seed: int, **changed: Any) -> Path:
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options | changed))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def planned(folders: list[Path], **options: Any) -> MergePlan:
    models = [{"model": str(folder)} for folder in folders[1:]]
    recipe = {"merge_method": "model_stock", "base_model": str(folders[0]), "models": models, "dtype": "bfloat16"}
    parsed = parse_recipe(yaml.safe_dump(recipe | options), "recipe.yaml")
    return make_plan(parsed, open_checkpoints([open_store(each, parsed.storage) for each in parsed.checkpoints]))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_of_models_that_fit_together(tmp_path: Path, family: str) -> None:
    folders = [saved(tmp_path / str(seed), family, seed=seed) for seed in range(3)]

    plan = planned(folders)

    assert [remark.text for remark in plan.remarks if remark.code not in RIGHTLY] == []
    assert plan.config is not None


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    "epsilon": ("Gemma 2", {"rms_norm_eps": 1e-5}, "norm epsilon"),
    "window": ("Mistral", {"sliding_window": 512}, "sliding_window"),
    "router": ("Qwen3 MoE", {"num_experts_per_tok": 1}, "experts per token"),
    "activation": ("BERT", {"hidden_act": "relu"}, "activation"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_differs_in_saved_configs_is_found(tmp_path: Path, case: str) -> None:
    family, changed, name = CHANGES[case]
    folders = [saved(tmp_path / str(seed), family, seed=seed, **(changed if seed == 2 else {})) for seed in range(3)]

    said = [remark.text for remark in planned(folders).remarks if remark.code == "config-differs"]
    assert any(name in text for text in said)


@pytest.mark.parametrize("family", ["Llama, tied", "Qwen3, tied"])
def test_an_untied_tune_of_a_tied_model_is_refused_or_untied(tmp_path: Path, family: str) -> None:
    folders = [saved(tmp_path / str(seed), family, seed=seed, tie_word_embeddings=seed < 2) for seed in range(3)]

    with pytest.raises(ValueError, match="is a tensor of its own in"):
        planned(folders)
    plan = planned(folders, stockflow={"accept": ["head-untied"]})
    assert plan.config is not None
    assert plan.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in {job.output.name for job in plan.jobs}


@pytest.mark.parametrize("family", ["Qwen3 MoE", "Mixtral"])
def test_experts_that_transformers_saved_in_two_ways_merge_to_one_model(tmp_path: Path, family: str) -> None:
    """One by one, as models are published, and all of a layer together, as they are in memory."""
    config_class, model_class, options = FAMILIES[family]
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).to(torch.bfloat16)
        for is_published in (True, False):
            model.save_pretrained(tmp_path / f"{seed}-{is_published}", save_original_format=is_published)
        models.append(model)

    merged = {}
    for mixture in ((True, True, True), (True, False, False), (False, True, False)):
        folders = [tmp_path / f"{seed}-{is_published}" for seed, is_published in enumerate(mixture)]
        output = tmp_path / "-".join(map(str, mixture))
        recipe = write_recipe(output.with_suffix(".yaml"), "model_stock", Family(folders[0], tuple(folders[1:])))
        merge_here(recipe, output)
        loaded = getattr(transformers, model_class).from_pretrained(output, dtype=torch.bfloat16)
        merged[mixture] = loaded.state_dict()

    first, *others = merged.values()
    assert first.keys() == models[0].state_dict().keys()
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(first[name], models[0].state_dict()[name])
