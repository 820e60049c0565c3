"""Configs of all models held against each other, and what the published one promises: real models' keys and values."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stockflow
from stockflow.output.publish import encode_config
from stockflow.planning import file as plan_file
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, make_family, write_checkpoint, write_recipe
from tests.plans import Merge

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None, "hidden_act": "silu",
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
LLAMA_31 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 28, "hidden_size": 3584,
    "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_attention_heads": 32}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 256, "query_pre_attn_scalar": 224,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 6,
    },
    "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16, "hidden_size": 1152},
}  # fmt: skip
GEMMA3_5 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "sliding_window": 1024,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "factor": 8.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16, "hidden_size": 1152},
}  # fmt: skip
GEMMA3_PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_attention_heads": 16},
}  # fmt: skip
GEMMA3_WHOLE = {
    **GEMMA3_PUBLISHED,
    "text_config": {
        **GEMMA3_PUBLISHED["text_config"], "attention_bias": False, "attn_logit_softcapping": None, "head_dim": 256,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        "sliding_window_pattern": 6, "use_cache": True, "vocab_size": 262208,
    },
    "vision_config": {
        **GEMMA3_PUBLISHED["vision_config"], "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "projector_hidden_act": "gelu",
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14,
    },
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 4096,
    "rope_theta": 10000.0,
}
PHI3 = {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.02], "long_factor": [1.07, 1.12]},
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "num_attention_heads": 128, "hidden_size": 7168,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "original_max_position_embeddings": 4096},
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "head_dim": 64, "num_attention_heads": 64, "swiglu_limit": 7.0, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"], "rope_scaling": {"rope_type": "yarn", "factor": 32.0},
}  # fmt: skip
JAMBA = {
    "model_type": "jamba",
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "mamba_d_state": 16,
}
MAMBA2 = {"model_type": "mamba2", "num_heads": 80, "head_dim": 64, "n_groups": 1, "state_size": 128, "chunk_size": 256}
T5 = {"model_type": "t5", "num_heads": 8, "d_kv": 64, "d_model": 512, "relative_attention_num_buckets": 32}
CLIP = {
    "model_type": "clip", "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 8, "hidden_size": 512},
    "vision_config": {"patch_size": 32, "num_attention_heads": 12, "hidden_size": 768, "layer_norm_eps": 1e-5},
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "layer_norm_eps": 1e-12,
    "id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}, "hidden_act": "gelu",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "n_head": 12,
    "n_embd": 768,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
BITNET = {
    "model_type": "bitnet",
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
}
COHERE = {"model_type": "cohere", "logit_scale": 0.0625, "use_qk_norm": False}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "attention_multiplier": 0.0078125,
}
QWEN2_VL = {
    "model_type": "qwen2_vl", "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0}
V5 = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16", "rope_theta": None}
SEQUENCE = {"architectures": ["LlamaForSequenceClassification"]}


def within(config: dict[str, Any], section: str, **changed: Any) -> dict[str, Any]:
    return {**config, section: {**config[section], **changed}}


QUIET: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a filling that one tune has": (LLAMA, {**LLAMA, "pad_token_id": 2}),
    "another filling of one tune": ({**LLAMA, "pad_token_id": 0}, {**LLAMA, "pad_token_id": 2}),
    "a filling that one tune lacks": ({**LLAMA, "pad_token_id": 0}, LLAMA),
    "nothing": (LLAMA, LLAMA),
    "how it was saved": (
        LLAMA, {**LLAMA, "transformers_version": "4.57.1", "torch_dtype": "float32", "use_cache": False},
    ),
    "where from": (LLAMA, {**LLAMA, "_name_or_path": "/x", "unsloth_version": "2025.3", "unsloth_fixed": True}),
    "training": (LLAMA, {**LLAMA, "attention_dropout": 0.1, "initializer_range": 0.01, "router_aux_loss_coef": 0.1}),
    "FSDP": (LLAMA, {**LLAMA, "architectures": ["FSDPLlamaForCausalLM"]}),
    "transformers 5": (LLAMA, {**LLAMA, **V5}),
    "head_dim that follows": (LLAMA, {**LLAMA, "head_dim": 128}),
    "attention bias that is off": (LLAMA, {**LLAMA, "attention_bias": False, "mlp_bias": False}),
    "layers with a window that is not used": (QWEN2, {**QWEN2, "max_window_layers": 21}),
    "a window that is not used": (QWEN2, {**QWEN2, "sliding_window": None, "max_window_layers": 28}),
    "Gemma 3 of both": (GEMMA3, within(GEMMA3_5, "text_config", rope_local_base_freq=None)),
    "Llama 2 without a base": ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 10000}),
    "longrope's length": (
        PHI3, {**PHI3, "rope_scaling": {**PHI3["rope_scaling"], "original_max_position_embeddings": 4096}},
    ),
    "mrope": (QWEN2_VL, {
        "model_type": "qwen2_vl",
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
    }),
    "positions of images, by 5": (
        {"vision_config": {"model_type": "qwen2_5_vl_vision"}},
        {"vision_config": {"model_type": "qwen2_5_vl_vision", "rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "axial",
        }}},
    ),
    "names nobody gave": (GPT2, {**GPT2, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}),
    "one function": (GPT2, {**GPT2, "activation_function": "gelu_pytorch_tanh"}),
    "leftover of a format": (LLAMA, {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}),
    "a token of images by an older name": ({**QWEN2_VL, "image_token_index": 9}, {**QWEN2_VL, "image_token_id": 9}),
    "a token of images by both names": (
        {**QWEN2_VL, "image_token_index": 9, "image_token_id": 9}, {**QWEN2_VL, "image_token_id": 9},
    ),
    "a token of sounds by an older name": (
        {"text_config": {"audio_token_index": 9}}, {"text_config": {"audio_token_id": 9}},
    ),
    "experts by another name": (
        {**QWEN3_MOE, "num_local_experts": 8}, {**QWEN3_MOE, "num_experts": 8},
    ),
    "ModernBERT of both": (
        {"model_type": "modernbert", "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
        {"model_type": "modernbert", "rope_parameters": {
            "full_attention": {"rope_theta": 160000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        }},
    ),
    "what a class takes by default": (
        {"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "use_parallel_residual": True},
    ),
    "Mixtral without a base": ({"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e6}),
    "no decoder": (BERT, {**BERT, "is_decoder": False}),
    "Gemma 3 as it is published, and saved whole": (GEMMA3_PUBLISHED, GEMMA3_WHOLE),
    "LLaVA as it is published, and saved whole": (LLAVA, {
        **LLAVA, "text_config": {
            **LLAVA["text_config"], "hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": None, "head_dim": 128,
            "attention_bias": False, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
        },
        "vision_config": {**LLAVA["vision_config"], "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    }),
    "RoBERTa as it is published, and saved whole": (
        {"model_type": "xlm-roberta", "bos_token_id": 0}, {"model_type": "xlm-roberta", "pad_token_id": 1,
                                                          "bos_token_id": 0},
    ),
    "Mamba as it is published, and saved whole": (
        {"model_type": "mamba2"}, {"model_type": "mamba2", "residual_in_fp32": True},
    ),
    "outputs that are asked for": (LLAMA, {**LLAMA, "output_router_logits": True, "output_hidden_states": True}),
    "dropout of tokens": (LLAMA, {**LLAMA, "moe_token_dropout": 0.2, "hidden_dropout": 0.1, "num_mtp_layers": 1}),
    "Phi's share": ({"model_type": "phi"}, {"model_type": "phi", "partial_rotary_factor": 0.5}),
    "T5 1.1 as it is published, and saved whole": (
        {**T5, "feed_forward_proj": "gated-gelu"},
        {**T5, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
         "relative_attention_max_distance": 128},
    ),
    "T5 as it is published, and saved whole": (
        {"model_type": "t5"},
        {"model_type": "t5", "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False,
         "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32},
    ),
    "layer types by a newer version": (QWEN2, {**QWEN2, "layer_types": ["full_attention"]}),
}  # fmt: skip
ARCHITECTURE, HEADS, CONFIG, LENGTH, KEYS = (
    "architecture-differs", "heads-differ", "config-differs", "context-length-differs", "config-keys-differ",
)  # fmt: skip
LOUD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama and mistral": (ARCHITECTURE, LLAMA, {**LLAMA, "model_type": "mistral"}, "model_type"),
    "another head": (ARCHITECTURE, LLAMA, {**LLAMA, **SEQUENCE}, "architectures"),
    "another text model": (
        ARCHITECTURE, GEMMA3, within(GEMMA3, "text_config", model_type="gemma2"), "text_config.model_type",
    ),
    "40 heads": (HEADS, LLAMA, {**LLAMA, "num_attention_heads": 64, "head_dim": 128}, "number of attention heads"),
    "4 groups": (HEADS, LLAMA, {**LLAMA, "num_key_value_heads": 4}, "number of key-value heads"),
    "head_dim": (HEADS, QWEN3, {**QWEN3, "head_dim": 64}, "size of an attention head"),
    "GPT-2's heads": (HEADS, GPT2, {**GPT2, "n_head": 16}, "number of attention heads"),
    "T5's heads": (HEADS, T5, {**T5, "num_heads": 16, "d_kv": 32}, "number of attention heads"),
    "the vision tower's": (
        HEADS, CLIP, within(CLIP, "vision_config", num_attention_heads=16),
        "vision_config.number of attention heads",
    ),
    "heads by two words": (
        HEADS, {**T5, "encoder_attention_heads": 2}, {**T5, "encoder_attention_heads": 4}, "encoder_attention_heads",
    ),
    "MLA": (HEADS, DEEPSEEK, {**DEEPSEEK, "qk_rope_head_dim": 32}, "qk_rope_head_dim"),
    "Mamba-2's": (HEADS, MAMBA2, {**MAMBA2, "num_heads": 40, "head_dim": 128}, "number of attention heads"),
    "rope base": (CONFIG, LLAMA, {**LLAMA, "rope_theta": 1e6}, "rope_theta"),
    "Llama 2 and longer": (CONFIG, {"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1e6}, "rope_theta"),
    "rope base, by 5": (
        CONFIG, LLAMA, {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta",
    ),
    "Llama 3.1": (CONFIG, LLAMA, {**LLAMA, "rope_scaling": LLAMA_31}, "rope_scaling"),
    "YaRN switched on": (CONFIG, QWEN2, {**QWEN2, "rope_scaling": YARN}, "rope_scaling"),
    "YaRN's factor": (CONFIG, DEEPSEEK, {**DEEPSEEK, "rope_scaling": {**YARN, "factor": 20}}, "rope_scaling"),
    "longrope": (
        CONFIG, PHI3, within(PHI3, "rope_scaling", long_factor=[2.0, 3.0]), "rope_scaling",
    ),
    "local base": (
        CONFIG, GEMMA3, within(GEMMA3, "text_config", rope_local_base_freq=20000.0),
        "text_config.rope_local_base_freq",
    ),
    "Gemma 3's scaling lost": (
        CONFIG, GEMMA3, within(GEMMA3, "text_config", rope_scaling=None), "text_config.rope_scaling",
    ),
    "share": (
        CONFIG, {"model_type": "phi"}, {"model_type": "phi", "partial_rotary_factor": 0.4}, "partial_rotary_factor",
    ),
    "epsilon": (CONFIG, LLAMA, {**LLAMA, "rms_norm_eps": 1e-6}, "norm epsilon"),
    "epsilon by two words": (
        CONFIG, {**LLAMA, "layer_norm_eps": 1e-6}, {**LLAMA, "layer_norm_eps": 1e-12}, "layer_norm_eps",
    ),
    "the token of images": (
        CONFIG, {**QWEN2_VL, "image_token_id": 9}, {**QWEN2_VL, "image_token_id": 8}, "image_token_id",
    ),
    "the token of images by two names": (
        CONFIG, {**QWEN2_VL, "image_token_index": 9}, {**QWEN2_VL, "image_token_id": 8}, "image_token_id",
    ),
    "the first token of a decoder": (
        CONFIG, {**T5, "decoder_start_token_id": 0}, {**T5, "decoder_start_token_id": 2}, "decoder_start_token_id",
    ),
    "what a classifier looks before": (
        CONFIG, {**LLAMA, **SEQUENCE, "pad_token_id": 0}, {**LLAMA, **SEQUENCE, "pad_token_id": 2}, "pad_token_id",
    ),
    "BERT's epsilon": (CONFIG, BERT, {**BERT, "layer_norm_eps": 1e-5}, "norm epsilon"),
    "CLIP's epsilon": (
        CONFIG, CLIP, within(CLIP, "vision_config", layer_norm_eps=1e-6), "vision_config.norm epsilon",
    ),
    "a window that is switched off": (CONFIG, MISTRAL, {**MISTRAL, "sliding_window": None}, "sliding_window"),
    "window": (CONFIG, MISTRAL, {**MISTRAL, "sliding_window": 8192}, "sliding_window"),
    "pattern": (
        CONFIG, GEMMA3, within(GEMMA3, "text_config", sliding_window_pattern=4), "text_config.sliding_window_pattern",
    ),
    "order of layers": (
        CONFIG, GPT_OSS, {**GPT_OSS, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types",
    ),
    "activation": (CONFIG, GEMMA2, {**GEMMA2, "hidden_activation": "gelu"}, "activation"),
    "CLIP's activation": (CONFIG, CLIP, within(CLIP, "text_config", hidden_act="gelu"), "text_config.activation"),
    "where norms stand": (
        CONFIG, {**BERT, "do_stable_layer_norm": False}, {**BERT, "do_stable_layer_norm": True}, "do_stable_layer_norm",
    ),
    "labels of timm": (CONFIG, {"label_names": ["a", "b"]}, {"label_names": ["b", "a"]}, "label_names"),
    "colours of timm": (
        CONFIG, {"pretrained_cfg": {"mean": [0.485], "url": "x"}}, {"pretrained_cfg": {"mean": [0.5], "url": "x"}},
        "pretrained_cfg.mean",
    ),
    "a cross-encoder's activation": (
        CONFIG, {"sentence_transformers": {"activation_fn": "Sigmoid"}},
        {"sentence_transformers": {"activation_fn": "Identity"}}, "sentence_transformers.activation_fn",
    ),
    "weights that are rounded while they run": (
        CONFIG, BITNET, within(BITNET, "quantization_config", use_rms_norm=True), "quantization_config",
    ),
    "a projector's activation": (
        CONFIG, {**GEMMA3, "projector_hidden_act": "gelu"}, {**GEMMA3, "projector_hidden_act": "relu"},
        "projector_hidden_act",
    ),
    "what a class takes by default and tunes do not": (
        CONFIG, {"model_type": "opt"}, {"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before",
    ),
    "Mixtral and a smaller base": (
        CONFIG, {"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e4}, "rope_theta",
    ),
    "a window that Mistral has by default": (
        CONFIG, {"model_type": "mistral"}, {"model_type": "mistral", "sliding_window": None}, "sliding_window",
    ),
    "a mask of tunes alone": (CONFIG, BERT, {**BERT, "is_decoder": True}, "is_decoder"),
    "RWKV's heads": (HEADS, {"head_size": 4}, {"head_size": 8}, "head_size"),
    "DBRX's heads": (
        HEADS, {"attn_config": {"kv_n_heads": 4}}, {"attn_config": {"kv_n_heads": 8}},
        "attn_config.number of key-value heads",
    ),
    "heads of one of two models": (
        HEADS, {"decoder": {"decoder_attention_heads": 4}}, {"decoder": {"decoder_attention_heads": 8}},
        "decoder.decoder_attention_heads",
    ),
    "a VAE's scale": (CONFIG, {"scaling_factor": 0.13025}, {"scaling_factor": 0.18215}, "scaling_factor"),
    "a VAE's groups": (CONFIG, {"norm_num_groups": 4}, {"norm_num_groups": 8}, "norm_num_groups"),
    "axes of Flux": (CONFIG, {"axes_dims_rope": [16, 56]}, {"axes_dims_rope": [32, 40]}, "axes_dims_rope"),
    "ModernBERT's window": (CONFIG, {"local_attention": 128}, {"local_attention": 64}, "local_attention"),
    "soft caps": (CONFIG, GEMMA2, {**GEMMA2, "attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    "scale of queries": (CONFIG, GEMMA2, {**GEMMA2, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    "experts per token": (CONFIG, QWEN3_MOE, {**QWEN3_MOE, "num_experts_per_tok": 4}, "experts per token"),
    "router": (CONFIG, QWEN3_MOE, {**QWEN3_MOE, "norm_topk_prob": False}, "norm_topk_prob"),
    "groups of experts": (CONFIG, DEEPSEEK, {**DEEPSEEK, "topk_group": 3}, "topk_group"),
    "scaling of experts": (CONFIG, DEEPSEEK, {**DEEPSEEK, "routed_scaling_factor": 1.0}, "routed_scaling_factor"),
    "SwiGLU's limit": (CONFIG, GPT_OSS, {**GPT_OSS, "swiglu_limit": 10.0}, "swiglu_limit"),
    "Jamba's period": (CONFIG, JAMBA, {**JAMBA, "attn_layer_period": 4}, "attn_layer_period"),
    "buckets": (CONFIG, T5, {**T5, "relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
    "patches": (CONFIG, CLIP, within(CLIP, "vision_config", patch_size=16), "vision_config.patch_size"),
    "a cap that is switched off": (
        CONFIG, {"model_type": "gemma2"}, {"model_type": "gemma2", "attn_logit_softcapping": None},
        "attn_logit_softcapping",
    ),
    "a scale of one where the class has another": (
        CONFIG, {"model_type": "cohere"}, {"model_type": "cohere", "logit_scale": 1.0}, "logit_scale",
    ),
    "BART's scale": (CONFIG, {**T5, "scale_embedding": False}, {**T5, "scale_embedding": True}, "scale_embedding"),
    "labels": (CONFIG, BERT, {**BERT, "id2label": {"0": "positive", "1": "negative"}}, "id2label"),
    "Cohere's scale": (CONFIG, COHERE, {**COHERE, "logit_scale": 0.25}, "logit_scale"),
    "Granite's multiplier": (CONFIG, GRANITE, {**GRANITE, "embedding_multiplier": 1.0}, "embedding_multiplier"),
    "sections of mrope": (
        CONFIG, QWEN2_VL, {**QWEN2_VL, "rope_scaling": {"type": "mrope", "mrope_section": [8, 28, 28]}},
        "rope_scaling",
    ),
    "residuals of Mamba": (
        CONFIG, {"model_type": "mamba"}, {"model_type": "mamba", "residual_in_fp32": False}, "residual_in_fp32",
    ),
    "positions of RoBERTa": (
        CONFIG, {"model_type": "roberta"}, {"model_type": "roberta", "pad_token_id": 0},
        "positions are counted from it",
    ),
    "positions within CLAP": (
        CONFIG, {"text_config": {"model_type": "clap_text_model", "pad_token_id": 1}},
        {"text_config": {"model_type": "clap_text_model", "pad_token_id": 2}}, "text_config.pad_token_id",
    ),
    "where a classifier of BART looks": (
        CONFIG, {**T5, **SEQUENCE, "is_encoder_decoder": True, "eos_token_id": 2},
        {**T5, **SEQUENCE, "is_encoder_decoder": True, "eos_token_id": 3},
        "eos_token_id",
    ),
    "ESM's tokens that are dropped": (
        CONFIG, {"model_type": "esm", "token_dropout": True}, {"model_type": "esm"}, "token_dropout",
    ),
    "layers that share keys": (
        CONFIG, {"model_type": "gemma3n_text"}, {"model_type": "gemma3n_text", "num_kv_shared_layers": 10},
        "num_kv_shared_layers",
    ),
    "blocks of BigBird": (
        CONFIG, {"model_type": "big_bird"}, {"model_type": "big_bird", "block_size": 32}, "block_size",
    ),
    "windows of Longformer": (
        CONFIG, {"attention_window": [512, 512]}, {"attention_window": [256, 512]}, "attention_window",
    ),
    "a tuned temperature": (
        CONFIG, {"model_type": "llama4_text"}, {"model_type": "llama4_text", "attn_scale": 0.2}, "attn_scale",
    ),
    "a multiplier of outputs": (CONFIG, {"output_multiplier": 2.0}, {"output_multiplier": 3.0}, "output_multiplier"),
    "kinds of GPT-Neo's layers": (
        CONFIG, {"attention_layers": ["global", "local"]}, {"attention_layers": ["local", "global"]},
        "attention_layers",
    ),
    "Falcon's order of heads": (
        CONFIG, {"new_decoder_architecture": True}, {"new_decoder_architecture": False}, "new_decoder_architecture",
    ),
    "DBRX's routers": (
        CONFIG, {"ffn_config": {"moe_normalize_expert_weights": 1}},
        {"ffn_config": {"moe_normalize_expert_weights": 2}},
        "ffn_config.moe_normalize_expert_weights",
    ),
    "strides": (CONFIG, {"conv_stride": [5, 2]}, {"conv_stride": [5, 4]}, "conv_stride"),
    "heads of Kosmos": (HEADS, {"attention_heads": 16}, {"attention_heads": 32}, "attention_heads"),
    "the filling of a language model": (
        KEYS, {**LLAMA, "pad_token_id": 0}, {**LLAMA, "pad_token_id": 2}, "pad_token_id",
    ),
    "length": (LENGTH, LLAMA, {**LLAMA, "max_position_embeddings": 131072}, "context length"),
    "GPT-2's length": (LENGTH, {**GPT2, "n_positions": 1024}, {**GPT2, "n_positions": 2048}, "context length"),
    "what nobody knows": (KEYS, {**LLAMA, "flux": 1}, {**LLAMA, "flux": 2}, "flux"),
    "the first token": (KEYS, {**LLAMA, "bos_token_id": 1}, {**LLAMA, "bos_token_id": 0}, "bos_token_id"),
}  # fmt: skip
SEVERITIES = {ARCHITECTURE: "refusal", HEADS: "refusal", CONFIG: "warning", LENGTH: "note", KEYS: "note"}


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path).write(config={})


def give(merge: Merge, *configs: dict[str, Any]) -> None:
    for folder, config in zip(merge.folders, configs, strict=True):
        (folder / "config.json").write_text(json.dumps(config))


MODERNBERT = {"model_type": "modernbert", "num_hidden_layers": 2}
QUIET |= {
    "DeBERTa's kinds of attention": (
        {"model_type": "deberta-v2", "pos_att_type": "p2c|c2p"},
        {"model_type": "deberta-v2", "pos_att_type": ["c2p", "p2c"]},
    ),
    "longrope by its old name": (
        {**LLAMA, "rope_scaling": {"type": "su", "long_factor": [1.0, 2.0]}},
        {**LLAMA, "rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, 2.0]}},
    ),
    "DeBERTa's defaults": (
        {"model_type": "deberta-v2"},
        {"model_type": "deberta-v2", "pooler_hidden_act": "gelu", "legacy": True, "pad_token_id": 0},
    ),
    "CLIP's defaults": (
        {"vision_config": {"model_type": "clip_vision_model"}},
        {"vision_config": {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32, "top_k": 50}},
    ),
    "LLaVA's defaults": (
        {"model_type": "llava"},
        {"model_type": "llava", "ignore_index": -100, "image_seq_length": 576, "multimodal_projector_bias": True,
         "vision_config": {"num_channels": 3}},
    ),
    "Falcon's activation": ({"model_type": "falcon"}, {"model_type": "falcon", "activation": "gelu"}),
    "GPT-2's summaries": (
        {"model_type": "gpt2"},
        {"model_type": "gpt2", "summary_type": "cls_index", "summary_use_proj": True,
         "activation_function": "gelu_new"},
    ),
    "an adapter of wav2vec2 that is not there": (
        {"model_type": "wav2vec2"},
        {"model_type": "wav2vec2", "adapter_stride": 2, "feat_extract_activation": "gelu", "xvector_output_dim": 512},
    ),
    "ModernBERT's layers, counted and listed": (
        {**MODERNBERT, "global_attn_every_n_layers": 3, "position_embedding_type": "absolute"},
        {**MODERNBERT, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "Gemma's layers, counted and listed": (
        {"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window_pattern": 2},
        {"model_type": "gemma3_text", "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "T5 by its old name": (
        {**T5, "architectures": ["T5WithLMHeadModel"]}, {**T5, "architectures": ["T5ForConditionalGeneration"]},
    ),
}  # fmt: skip
LOUD |= {
    "DeBERTa's other kinds of attention": (
        CONFIG, {"pos_att_type": "p2c|c2p"}, {"pos_att_type": ["c2p"]}, "pos_att_type",
    ),
    "factors of longrope by its old name": (
        CONFIG, {**LLAMA, "rope_scaling": {"type": "su", "long_factor": [1.0, 2.0]}},
        {**LLAMA, "rope_scaling": {"type": "longrope", "long_factor": [1.0, 3.0]}}, "rope_scaling",
    ),
    "another activation than Falcon's": (
        CONFIG, {"model_type": "falcon"}, {"model_type": "falcon", "activation": "relu"}, "activation",
    ),
    "larger images than CLIP's": (
        CONFIG, {"vision_config": {"model_type": "clip_vision_model"}},
        {"vision_config": {"model_type": "clip_vision_model", "image_size": 336}}, "vision_config.image_size",
    ),
    "other summaries than GPT-2's": (
        CONFIG, {"model_type": "gpt2"}, {"model_type": "gpt2", "summary_type": "last"}, "summary_type",
    ),
    "steps of wav2vec2's adapter": (
        CONFIG, {"model_type": "wav2vec2"}, {"model_type": "wav2vec2", "adapter_stride": 3}, "adapter_stride",
    ),
    "ModernBERT's layers, counted and listed otherwise": (
        CONFIG, {**MODERNBERT, "global_attn_every_n_layers": 1},
        {**MODERNBERT, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types",
    ),
    "ModernBERT's layers, counted otherwise": (
        CONFIG, MODERNBERT, {**MODERNBERT, "global_attn_every_n_layers": 4}, "global_attn_every_n_layers",
    ),
    "an encoder of T5": (
        ARCHITECTURE, {**T5, "architectures": ["T5WithLMHeadModel"]}, {**T5, "architectures": ["T5EncoderModel"]},
        "architectures",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUIET)
def test_what_says_nothing_of_weights_and_other_spellings_are_quiet(merge: Merge, case: str) -> None:
    first, second = QUIET[case]
    give(merge, first, second, first)

    assert merge.plan(stockflow={"accept": []}).notes == ()


@pytest.mark.parametrize("case", LOUD)
def test_what_gives_equal_shapes_another_meaning_is_said_with_all_values(merge: Merge, case: str) -> None:
    code, first, second, name = LOUD[case]
    give(merge, first, second, second)
    accepted = ["architecture-differs", "heads-differ"]

    said = [each for each in merge.plan(stockflow={"accept": accepted}).remarks if name in each.text]

    (found,) = said
    assert (found.code, found.severity) == (code, SEVERITIES[code])
    base, one, two = map(str, merge.folders)
    assert f"in {base} (published), " in found.text
    assert f" in {one}, {two}" in found.text
    if code != "config-keys-differ":
        assert found.models == (base, one, two)
        assert len(set(found.values.values())) == 2
        assert found.values[one] == found.values[two]


ALONE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "an activation": (CONFIG, "warning", {"model_type": "x"}, {"model_type": "x", "hidden_act": "gelu"}, "activation"),
    "a flag that is on": (CONFIG, "warning", LLAMA, {**LLAMA, "use_qk_norm": True}, "use_qk_norm"),
    "a multiplier": (CONFIG, "warning", LLAMA, {**LLAMA, "residual_multiplier": 0.2}, "residual_multiplier"),
    "within a section": (CONFIG, "warning", CLIP, within(CLIP, "text_config", logit_scale=2.0), "text_config.logit"),
    "what is published": (CONFIG, "note", {**LLAMA, "scale_emb": 12}, LLAMA, "scale_emb"),
    "what newer versions write": (CONFIG, "note", LLAMA, {**LLAMA, "no_rope_layers": [0, 1]}, "no_rope_layers"),
    "what nobody knows": (KEYS, "note", LLAMA, {**LLAMA, "flux": 2}, "flux"),
    "what is named as something that is computed with": (
        CONFIG,
        "note",
        LLAMA,
        {**LLAMA, "output_multiplier": 2.0},
        "output_multiplier",
    ),
    "a token of images": (CONFIG, "warning", LLAMA, {**LLAMA, "image_token_id": 60}, "image_token_id"),
    "the first token": (KEYS, "note", LLAMA, {**LLAMA, "bos_token_id": 1}, "bos_token_id"),
    "the last tokens": (KEYS, "note", LLAMA, {**LLAMA, "eos_token_id": [0, 2]}, "eos_token_id"),
    "the filling": (KEYS, "note", GEMMA3, within(GEMMA3, "text_config", pad_token_id=0), "text_config.pad_token_id"),
    "the begin of a decoder": (CONFIG, "warning", T5, {**T5, "decoder_start_token_id": 0}, "decoder_start_token_id"),
    "a token that is forced": (CONFIG, "warning", T5, {**T5, "forced_bos_token_id": 1}, "forced_bos_token_id"),
    "tokens that are not chosen": (KEYS, "note", LLAMA, {**LLAMA, "suppress_tokens": [1]}, "suppress_tokens"),
    "that weights are rounded": (CONFIG, "warning", {"model_type": "bitnet"}, BITNET, "quantization_config"),
    "what code beside the model takes": (
        CONFIG,
        "note",
        {"auto_map": {"AutoConfig": "c.X"}},
        {"auto_map": {"AutoConfig": "c.X"}, "use_qk_norm": False},
        "use_qk_norm",
    ),
    "labels": (CONFIG, "warning", LLAMA, {**LLAMA, "id2label": {"0": "safe", "1": "unsafe"}}, "id2label"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_only_some_configs_say_is_said(merge: Merge, case: str) -> None:
    code, severity, first, second, name = ALONE[case]
    give(merge, first, second, second)

    (found,) = [each for each in merge.plan().remarks if name in each.text]

    assert (found.code, found.severity) == (code, severity)
    assert code == KEYS or "is said by some models only" in found.text


SILENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a default of most classes": (
        {"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1e6}, "rope_theta differs: 10000.0",
    ),
    "one of this class": (
        {"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e4}, "rope_theta differs: 1000000.0",
    ),
    "an epsilon": (
        {"model_type": "llama"}, {"model_type": "llama", "rms_norm_eps": 1e-5}, "norm epsilon differs: 1e-06",
    ),
    "a null that leaves it to the class": (
        {"model_type": "llama", "rope_theta": None}, {"model_type": "llama", "rope_theta": 1e6},
        "rope_theta differs: 10000.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_of_what_a_class_takes_it_is_said_that_no_file_says_it(merge: Merge, case: str) -> None:
    first, second, begin = SILENT[case]
    give(merge, first, second, second)
    (found,) = merge.plan().remarks

    base, one, two = map(str, merge.folders)
    silent = " (which its config does not say: its class takes that)"
    assert found.text.startswith(f"{begin}{silent} in {base} (published), ")
    assert found.text.count(silent) == 1
    assert found.values[base].endswith(silent)
    assert silent not in found.values[one] + found.values[two]


def test_a_null_that_switches_off_is_no_silence(merge: Merge) -> None:
    give(merge, {"model_type": "mistral"}, *[{"model_type": "mistral", "sliding_window": None}] * 2)

    (found,) = merge.plan().remarks
    assert "4096 (which its config does not say" in found.text
    assert f", 0 in {merge.folders[1]}, " in found.text


def test_names_of_labels_are_shown_where_only_some_models_have_them(merge: Merge) -> None:
    give(merge, LLAMA, *[{**LLAMA, "id2label": {"0": "safe", "1": "unsafe"}}] * 2)

    (found,) = merge.plan().remarks
    assert "{'0': 'safe', '1': 'unsafe'} in " in found.text


@pytest.mark.parametrize("window", [{}, {"sliding_window": 4096}], ids=["by default", "said"])
def test_a_text_model_says_what_the_section_of_its_multimodal_base_says(merge: Merge, window: dict[str, Any]) -> None:
    text = {"model_type": "gemma3_text", "eos_token_id": 2, "hidden_size": 8}
    tune = {**text, "architectures": ["Gemma3ForCausalLM"]}
    give(merge, {**GEMMA3, "text_config": {**text, **window}}, tune, tune)

    said = merge.plan(stockflow={"accept": ["architecture-differs"]}).remarks

    assert [each.text for each in said if each.code != "architecture-differs"] == []


@pytest.mark.parametrize("value", [None, False, 0, 1, 1.0, "", [], {}, "default", ["full_attention"] * 3])
def test_what_is_as_if_nothing_were_said_is_quiet(merge: Merge, value: object) -> None:
    give(merge, LLAMA, {**LLAMA, "logit_scale": value, "flux": value}, LLAMA)

    assert merge.plan().notes == ()


@pytest.mark.parametrize("case", [case for case in LOUD if SEVERITIES[LOUD[case][0]] == "refusal"])
def test_other_heads_and_architectures_are_refused_until_accepted(merge: Merge, case: str) -> None:
    code, first, second, name = LOUD[case]
    give(merge, first, first, second)

    assert f"{name} differs: " in merge.refusal()
    assert f"`stockflow: {{accept: [{code}]}}`" in merge.refusal()


def test_of_long_values_the_parts_that_differ_are_shown(merge: Merge) -> None:
    factors = [1.0] * 47
    give(merge, *({"rope_scaling": {"type": "longrope", "long_factor": [*factors, last]}} for last in (2.0, 3.0, 3.0)))

    (said,) = merge.plan().remarks
    assert list(said.values.values()) == ["{'long_factor': {'[47]': 2.0}}", *["{'long_factor': {'[47]': 3.0}}"] * 2]


def test_a_model_without_config_is_named(merge: Merge) -> None:
    (merge.folders[2] / "config.json").unlink()

    (said,) = merge.plan().remarks
    assert (said.code, said.severity, said.models) == ("no-config", "note", (str(merge.folders[2]),))


SPARSE = ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"]
CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
SOFTMAX, SIGMOID = {"problem_type": "single_label_classification"}, {"problem_type": "multi_label_classification"}
ONE = {"id2label": {"0": "LABEL_0"}}
SCORES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "sigmoid of tunes alone": (CLASSIFIER, CLASSIFIER | SIGMOID, True),
    "nothing of the base alone": (CLASSIFIER | {"problem_type": "regression"}, CLASSIFIER, True),
    "softmax and sigmoid": (CLASSIFIER | SOFTMAX, CLASSIFIER | SIGMOID, True),
    "one output that is a number": (CLASSIFIER | ONE, CLASSIFIER | ONE | {"problem_type": "regression"}, True),
    "softmax, said and meant": (CLASSIFIER, CLASSIFIER | SOFTMAX, False),
    "one output through sigmoid, said and meant": (CLASSIFIER | ONE, CLASSIFIER | ONE | SIGMOID, False),
    "null": (CLASSIFIER | {"problem_type": None}, CLASSIFIER, False),
    "no classifier": (
        {"architectures": ["LlamaForCausalLM"]}, {"architectures": ["LlamaForCausalLM"]} | SIGMOID, False,
    ),
    "what a head's function is": (
        CLASSIFIER | {"function_to_apply": "none"}, CLASSIFIER | {"function_to_apply": "sigmoid"}, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCORES)
def test_what_makes_scores_of_a_classifiers_outputs_is_compared(merge: Merge, case: str) -> None:
    base, tune, is_said = SCORES[case]
    give(merge, base, tune, tune)

    found = [each for each in merge.plan().remarks if each.code.startswith("config-")]
    assert [(each.code, each.severity) for each in found] == [("config-differs", "warning")] * is_said
    assert not is_said or "(published)" in found[0].text


BROKEN: dict[str, tuple[dict[str, Any], list[str], str | None]] = {
    "kept": ({"num_hidden_layers": 2}, ["model.layers.0.a", "model.layers.1.a"], None),
    "too few": ({"num_hidden_layers": 3}, ["model.layers.0.a", "model.layers.1.a"], "num_hidden_layers: 3"),
    "too many": ({"num_hidden_layers": 1}, ["model.layers.0.a", "model.layers.1.a"], "num_hidden_layers: 1"),
    "a gap": ({"num_hidden_layers": 2}, ["model.layers.0.a", "model.layers.2.a"], "num_hidden_layers: 2"),
    "GPT-2": ({"n_layer": 3}, ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"], "n_layer: 3"),
    "T5": (
        {"num_layers": 1, "num_decoder_layers": 2}, ["encoder.block.0.layer.0.a", "encoder.block.0.layer.1.a"], None,
    ),
    "Whisper": ({"encoder_layers": 1, "decoder_layers": 2}, ["model.encoder.layers.0.a"], "decoder_layers: 2"),
    "BERT": ({"num_hidden_layers": 1}, ["bert.encoder.layer.0.a"], None),
    "ALBERT": (
        {"num_hidden_layers": 12, "num_hidden_groups": 1}, ["albert.albert_layer_groups.0.albert_layers.0.a"], None,
    ),
    "names of another kind": ({"num_hidden_layers": 12}, ["trunk.a", "trunk.b"], None),
    "a tower that is gone": (
        {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 27}},
        ["language_model.model.layers.0.a"],
        "vision_config.num_hidden_layers: 27",
    ),
    "a tower whose layers lie deep": (
        {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 2}},
        ["git.encoder.layer.0.a", *(f"git.image_encoder.vision_model.encoder.layers.{each}.a" for each in range(2))],
        None,
    ),
    "prediction layers": (
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 1},
        ["model.layers.0.a", "model.layers.1.eh_proj.weight"],
        None,
    ),
    "prediction layers that are gone": (
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ["model.layers.0.a"], "num_nextn_predict_layers: 1",
    ),
    "kinds of layers": ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, ["model.layers.0.a"], None),
    "kinds of other layers": (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"] * 2}, ["model.layers.0.a"], "layer_types: 2 of them",
    ),
    "a dense layer": ({"num_hidden_layers": 2, "first_k_dense_replace": 1}, SPARSE, None),
    "two dense layers": ({"num_hidden_layers": 2, "first_k_dense_replace": 2}, SPARSE, "first_k_dense_replace: 2"),
    "Qwen's": ({"num_hidden_layers": 2, "decoder_sparse_step": 2, "num_experts": 4}, SPARSE, None),
    "Qwen's lists": (
        {"num_hidden_layers": 2, "decoder_sparse_step": 1, "num_experts": 4, "mlp_only_layers": [1]}, SPARSE,
        "mlp_only_layers: [1]",
    ),
    "Step's": ({"num_hidden_layers": 2, "moe_layers_enum": "0,2"}, SPARSE, "moe_layers_enum: 0,2"),
    "Step's own": ({"num_hidden_layers": 2, "moe_layers_enum": "1,2"}, SPARSE, None),
    "an encoder's": (
        {"encoder_layers": 2, "decoder_layers": 2}, ["encoder.layers.0.a", "decoder.layers.0.a", "decoder.layers.1.a"],
        "encoder_layers: 2",
    ),
    "a T5's": (
        {"num_layers": 1, "num_decoder_layers": 1}, ["encoder.block.0.a", "decoder.block.0.a", "decoder.block.1.a"],
        "num_decoder_layers: 1",
    ),
    "a pixel decoder's encoder": (
        {"encoder_layers": 1, "decoder_layers": 2},
        [f"{tower}layers.{n}.a" for tower in ("encoder.encoder.", "m.decoder.") for n in (0, 1)]
        + ["pixel.decoder.encoder.layers.0.a"],
        None,
    ),
    "an old T5's": (
        {"num_layers": 1, "is_encoder_decoder": True}, ["encoder.block.0.a", "decoder.block.0.a", "decoder.block.1.a"],
        "num_layers: 1",
    ),
    "an old T5's own": (
        {"num_layers": 1, "is_encoder_decoder": True}, ["encoder.block.0.a", "decoder.block.0.a"], None,
    ),
    "an encoder alone": ({"num_layers": 1, "num_decoder_layers": 3}, ["encoder.block.0.a"], None),
    "no experts": ({"num_hidden_layers": 2, "first_k_dense_replace": 0}, [*SPARSE[:1], "model.layers.1.a"], None),
    "MTP": ({"num_hidden_layers": 1, "mtp_num_hidden_layers": 1}, ["model.layers.0.a", "mtp.layers.0.a"], None),
    "MTP that is gone": (
        {"text_config": {"num_hidden_layers": 1, "mtp_num_hidden_layers": 1}}, ["model.language_model.layers.0.a"],
        "text_config.mtp_num_hidden_layers: 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_promises_that_no_tensor_keeps_are_said(tmp_path: Path, case: str) -> None:
    config, names, broken = BROKEN[case]
    merge = Merge(tmp_path)
    merge.models = [{name: torch.ones(3) for name in names} for _ in range(3)]
    for folder, tensors in zip(merge.folders, merge.models, strict=True):
        write_checkpoint(folder, tensors, config=config)

    said = merge.plan().remarks

    assert [remark.code for remark in said] == (["promise-unkept"] if broken else [])
    assert not broken or f"the published config says {broken}, as that of {merge.folders[0]} does, but " in said[0].text


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"vocab_size": 128}, "vocab_size: 128, which makes 128 where .* have 97"),
    "width": ({"hidden_size": 64}, "hidden_size: 64"),
    "inner": ({"intermediate_size": 81}, "intermediate_size: 81"),
    "groups": ({"num_key_value_heads": 4}, "num_key_value_heads: 4, which makes 48 where .* have 24"),
    "groups of a size": ({"head_dim": None}, ""),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("nested", [False, True])
def test_sizes_that_no_tensor_has_are_said(tmp_path: Path, case: str, nested: bool) -> None:
    changed, broken = LIES[case]
    config: dict[str, Any] = {**LLAMA_CONFIG, **changed}
    family = make_family(tmp_path, 2, llama_shapes(), buffers=False)
    for folder in (family.base, *family.tuned):
        (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))

    plan = stockflow.plan(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out").plan

    said = [remark for remark in plan.remarks if remark.code == "promise-unkept"]
    assert len(said) == bool(broken)
    assert not said or re.search(broken, said[0].text)
    assert not said or said[0].severity == "warning"


BIGGER = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 200, "head_dim": 24}
STRANGE: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "a bigger model's everywhere": (
        BIGGER, (0, 1, 2),
        "config.json of {0}, {1}, {2} is of another model than its tensors: vocab_size 200 for 97 of "
        "'model.embed_tokens.weight', hidden_size 96 for 48 of 'model.layers.1.input_layernorm.weight', "
        "intermediate_size 160 for 80 of 'model.layers.1.mlp.up_proj.weight', num_key_value_heads 2 (makes 48) for "
        "24 of 'model.layers.1.self_attn.k_proj.weight'; no loader takes the two together: give that folder the "
        "config.json that was saved with its tensors",
    ),
    "a bigger model's in a tune": (
        {key: BIGGER[key] for key in ("hidden_size", "intermediate_size", "vocab_size")}, (1,),
        "config.json of {1} is of another model than its tensors: ",
    ),
    "what one of two processes held": (
        {"intermediate_size": 160, "vocab_size": 194, "num_key_value_heads": 4}, (0, 1, 2),
        "they seem to be what one of 2 processes held of each tensor: save the model whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_a_config_of_which_most_is_of_other_weights_is_said_in_one_sentence(tmp_path: Path, case: str) -> None:
    changed, where, text = STRANGE[case]
    family = make_family(tmp_path, 2, llama_shapes(), buffers=False)
    folders = (family.base, *family.tuned)
    for number in where:
        (folders[number] / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **changed}))

    plan = stockflow.plan(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out").plan

    (said,) = (remark for remark in plan.remarks if remark.code == "promise-unkept")
    assert text.format(*folders) in said.text
    assert (said.severity, said.models) == ("warning", tuple(str(folders[number]) for number in where))
    assert said.values.items() >= {key: str(value) for key, value in changed.items() if key != "head_dim"}.items()


@pytest.mark.parametrize(
    ("config", "shapes"),
    {
        "a tower's embeddings": (
            {"hidden_size": 4, "vocab_size": 5, "num_attention_heads": 2},
            {"qformer.embeddings.word_embeddings.weight": (9, 7),
             "codec_model.layers.0.self_attn.k_proj.weight": (3, 3)},
        ),
        "an outer section that counts otherwise": (
            {"hidden_size": 8, "vocab_size": 4, "text_config": {"hidden_size": 3, "vocab_size": 5}},
            {"model.language_model.embed_tokens.weight": (5, 3)},
        ),
        "rows beside the vocabulary": (
            {"hidden_size": 3, "vocab_size": 5, "additional_vocab_size": 2}, {"model.embed_tokens.weight": (7, 3)},
        ),
        "keys of a latent vector": (
            {"kv_lora_rank": 2, "head_dim": 2, "num_key_value_heads": 2, "vocab_size": 5},
            {"model.layers.0.self_attn.k_proj.weight": (8, 4), "model.embed_tokens.weight": (5, 4)},
        ),
        "two facts alone": ({"hidden_size": 8, "vocab_size": 9}, {"text.word_embeddings.weight": (5, 3)}),
    }.values(),
)  # fmt: skip
def test_what_a_config_says_of_something_else_is_no_size_that_no_tensor_has(
    tmp_path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_checkpoint(folder, {name: torch.ones(shape) for name, shape in shapes.items()}, config=config)

    assert not [remark.text for remark in merge.plan().remarks if remark.code == "promise-unkept"]


LABELS = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts.0"
FURTHER: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "biases": ({"attention_bias": True}, {f"{ATTENTION}.q_proj.bias": (4,)}, ""),
    "biases that are denied": ({"attention_bias": False}, {f"{ATTENTION}.q_proj.bias": (4,)}, "_bias: False, but"),
    "biases that are not there": ({"attention_bias": True}, {f"{ATTENTION}.q_proj.weight": (4, 4)}, "_bias: True, but"),
    "biases of one tensor": ({"attention_bias": True}, {"gpt_neox.layers.0.attention.dense.bias": (4,)}, ""),
    "biases of an MLP": ({"mlp_bias": True}, {"model.layers.0.mlp.up_proj.bias": (4,)}, ""),
    "biases of an MLP that are denied": (
        {"mlp_bias": False}, {"model.layers.0.mlp.up_proj.bias": (4,)}, "mlp_bias: False, but 1",
    ),
    "biases of norms": ({"attention_bias": False}, {f"{ATTENTION}.q_norm.bias": (4,)}, ""),
    "biases of a tower": ({"attention_bias": False}, {"visual.blocks.0.attn.qkv.bias": (4,)}, ""),
    "experts": ({"num_experts": 8, "moe_intermediate_size": 3}, {"model.layers.0.mlp.gate.weight": (8, 4)}, ""),
    "number of experts": (
        {"n_routed_experts": 16, "moe_intermediate_size": 3},
        {"model.layers.0.mlp.gate.weight": (8, 4), f"{EXPERTS}.up_proj.weight": (3, 4)}, "n_routed_experts: 16",
    ),
    "a router that scores what all share": (
        {"n_routed_experts": 16, "n_shared_experts": 2, "vocab_size": 5},
        {"model.layers.0.mlp.gate.weight": (18, 4), "model.embed_tokens.weight": (5, 4)}, "",
    ),
    "two widths": (
        {"intermediate_size": 3, "dense_intermediate_size": 6, "vocab_size": 5},
        {"model.layers.0.mlp.up_proj.weight": (6, 4), "model.embed_tokens.weight": (5, 4)}, "",
    ),
    "size of experts": (
        {"num_experts": 8, "moe_intermediate_size": 6},
        {"model.layers.0.mlp.gate.weight": (8, 4), f"{EXPERTS}.up_proj.weight": (3, 4)}, "moe_intermediate_size: 6",
    ),
    "positions": (
        {"n_positions": 9, "vocab_size": 5}, {"transformer.wpe.weight": (8, 4), "transformer.wte.weight": (5, 4)},
        "n_positions: 9",
    ),
    "positions of a decoder": (
        {"max_target_positions": 9, "vocab_size": 5},
        {"model.decoder.embed_positions.weight": (8, 4), "model.decoder.embed_tokens.weight": (5, 4)},
        "max_target_positions: 9",
    ),
    "kinds of tokens": (
        {"type_vocab_size": 1, "vocab_size": 5},
        {"bert.embeddings.token_type_embeddings.weight": (2, 4), "bert.embeddings.word_embeddings.weight": (5, 4)},
        "type_vocab_size: 1",
    ),
    "size of Mixtral's experts": (
        {"num_local_experts": 8, "intermediate_size": 6},
        {"model.layers.0.block_sparse_moe.gate.weight": (8, 4),
         "model.layers.0.block_sparse_moe.experts.0.w1.weight": (3, 4)}, "intermediate_size: 6",
    ),
    "as many keys as queries": (
        {"hidden_size": 4, "num_attention_heads": 2},
        {f"{ATTENTION}.k_proj.weight": (4, 4), "model.embed_tokens.weight": (5, 4)}, "",
    ),
    "fewer keys than queries": (
        {"hidden_size": 4, "num_attention_heads": 2},
        {f"{ATTENTION}.k_proj.weight": (2, 4), "model.embed_tokens.weight": (5, 4)}, "num_attention_heads: 2",
    ),
    "labels": (
        {**LABELS, "vocab_size": 5},
        {"score.weight": (3, 4), "model.embed_tokens.weight": (5, 4)}, "id2label: {.*, which makes 2 where .* have 3",
    ),
    "as many labels": (LABELS, {"score.weight": (2, 4)}, ""),
    "labels of a head that has none": (
        {**LABELS, "architectures": ["BertForMultipleChoice"], "vocab_size": 5},
        {"classifier.weight": (1, 4), "model.embed_tokens.weight": (5, 4)}, "",
    ),
    "labels beside a router": (
        {**LABELS, "vocab_size": 5},
        {"model.layers.0.mlp.router.classifier.weight": (7, 4), "model.embed_tokens.weight": (5, 4),
         "score.weight": (2, 4)}, "",
    ),
    "two positions more": (
        {"max_position_embeddings": 6, "vocab_size": 5},
        {"yoso.embeddings.position_embeddings.weight": (8, 4), "yoso.embeddings.word_embeddings.weight": (5, 4)}, "",
    ),
    "embeddings narrower than the rest": (
        {"hidden_size": 9, "embedding_size": 4, "vocab_size": 5},
        {"albert.embeddings.word_embeddings.weight": (5, 4)}, "",
    ),
    "biases of convolutions": ({"attention_bias": False}, {f"{ATTENTION}.qkv_proj.conv_qk_depthwise.bias": (4,)}, ""),
    "biases that no config decides": (
        {"attention_bias": False, "model_type": "qwen2"}, {f"{ATTENTION}.q_proj.bias": (4,)}, "",
    ),
    "biases that a type means": (
        {"model_type": "qwen2"}, {f"{ATTENTION}.q_proj.weight": (4, 4), f"{ATTENTION}.q_proj.bias": (4,)}, "",
    ),
    "biases that a type means and that are not there": (
        {"text_config": {"model_type": "qwen2"}}, {f"{ATTENTION}.q_proj.weight": (4, 4)},
        "says text_config.model_type: 'qwen2', whose attention has biases, but none is written beside ",
    ),
    "biases that a type means, denied": (
        {"model_type": "qwen2_moe", "qkv_bias": False}, {f"{ATTENTION}.q_proj.weight": (4, 4)}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FURTHER)
def test_what_a_config_says_of_biases_experts_positions_and_labels_is_held_against_the_tensors(
    tmp_path: Path, case: str
) -> None:
    config, shapes, broken = FURTHER[case]
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_checkpoint(folder, {name: torch.ones(shape) for name, shape in shapes.items()}, config=config)

    said = [remark.text for remark in merge.plan().remarks if remark.code == "promise-unkept"]
    assert len(said) == bool(broken)
    assert not broken or re.search(broken, said[0])


TEXT, BERT = "language_model.model.layers.0.a", "bert.encoder.layer.0.a"
T5_HALVES = {"architectures": ["T5ForConditionalGeneration"], "num_decoder_layers": 1}
PARTS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a tower by its depth": ({"vision_config": {"depth": 4}}, [TEXT, "lm_head.weight"], "vision_config.depth: 4"),
    "an audio tower beside another": (
        {"audio_config": {"encoder_layers": 2}}, [TEXT, "visual.patch.weight"], "audio_config.encoder_layers: 2",
    ),
    "a tower": ({"vision_config": {"depth": 4}}, [TEXT, "visual.blocks.0.a"], ""),
    "a tower of other names": ({"vision_config": {"depth": 4}}, [TEXT, "eyes.a"], ""),
    "a tower of no layers": ({"vision_config": {"num_hidden_layers": 0}}, [TEXT], ""),
    "an encoder alone": (T5_HALVES, ["shared.weight", "encoder.block.0.a"], "num_decoder_layers: 1"),
    "an encoder and a decoder": (T5_HALVES, ["shared.weight", "encoder.block.0.a", "decoder.block.0.a"], ""),
    "shared experts": ({"n_shared_experts": 1}, [f"{EXPERTS}.a", "model.layers.0.mlp.shared_experts.a"], ""),
    "no shared experts": ({"n_shared_experts": 0}, [f"{EXPERTS}.a"], ""),
    "shared experts that are gone": ({"n_shared_experts": 1}, [f"{EXPERTS}.a"], "n_shared_experts: 1"),
    "a classifier that is gone": ({"architectures": ["BertForSequenceClassification"]}, [BERT], "no head is written"),
    "a classifier of which half is gone": (
        {"architectures": ["RobertaForSequenceClassification"]}, [BERT, "classifier.dense.weight"],
        "of its head only 'classifier.dense.weight' is written",
    ),
    "a whole classifier": (
        {"architectures": ["RobertaForSequenceClassification"]},
        [BERT, "classifier.dense.weight", "classifier.out_proj.weight"], "",
    ),
    "a head of another task": (
        {"architectures": ["LlamaForSequenceClassification"]}, ["model.layers.0.a", "lm_head.weight"], "no head is",
    ),
    "a bare backbone": (
        {"architectures": ["BertForTokenClassification"]}, ["embeddings.a", "encoder.layer.0.a"], "no head is written",
    ),
    "a head of an unknown name": ({"architectures": ["BertForTokenClassification"]}, [BERT, "crf.weight"], ""),
    "a head within": ({"architectures": ["XForSequenceClassification"]}, ["x.layers.0.a", "x.score.weight"], ""),
    "a head of speech that is gone": ({"architectures": ["Wav2Vec2ForCTC"]}, ["wav2vec2.a"], "no head is written"),
    "a head of speech": ({"architectures": ["Wav2Vec2ForCTC"]}, ["wav2vec2.a", "lm_head.weight"], ""),
    "a tied head": ({"architectures": ["LlamaForCausalLM"]}, ["model.layers.0.a"], ""),
    "a class that has none": ({"architectures": ["BertModel"]}, [BERT], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_the_config_promises_and_no_tensor_is_of_are_said(tmp_path: Path, case: str) -> None:
    config, names, missed = PARTS[case]
    merge = Merge(tmp_path)
    for folder in merge.folders:
        write_checkpoint(folder, {name: torch.ones(3) for name in names}, config=config)

    said = [remark.text for remark in merge.plan().remarks if remark.code == "promise-unkept"]

    assert len(said) == bool(missed)
    assert not missed or missed in said[0]


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_decoder_layers", "decoder_ffn_dim"])
def test_sizes_that_differ_over_equal_shapes_are_said(merge: Merge, key: str) -> None:
    give(merge, {**T5, key: 8}, {**T5, key: 4}, {**T5, key: 4})

    (found,) = merge.plan().remarks
    assert (found.code, found.severity) == ("promise-unkept", "warning")
    assert found.text.startswith(f"{key} differs: 8 in ")
    assert found.values == dict(zip(map(str, merge.folders), "844", strict=True))


@pytest.mark.parametrize("donor", [0, 1])
def test_a_language_model_is_compared_wherever_its_config_stands(merge: Merge, donor: int) -> None:
    """A tune of the language model alone says at the top what the whole model says in its text_config."""
    flat = {**LLAMA, "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "rope_theta": 1e4}
    whole = {key: flat[key] for key in ("model_type", "architectures")}
    nested = whole | {"text_config": {**LLAMA, "model_type": "qwen3_vl_text"}}
    give(merge, *((flat, nested, nested) if donor else (nested, flat, flat)))

    (found,) = merge.plan().remarks
    assert (found.code, found.severity) == ("config-differs", "warning")
    assert set(found.values.values()) == {"500000.0", "10000.0"}


@pytest.mark.parametrize("has_both", [False, True])
@pytest.mark.parametrize("donor", [0, 1])
@pytest.mark.parametrize("other", [5, 6, None])
def test_tokens_of_images_are_compared_wherever_the_language_model_stands(
    merge: Merge, donor: int, other: int | None, has_both: bool
) -> None:
    whole = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": 5}
    text = {**LLAMA, "model_type": "qwen2_5_vl_text", "image_token_id": 5 if has_both else None}
    text.pop("architectures")
    nested, flat = whole | {"text_config": text}, {**LLAMA, **whole}
    tune = {**(nested if donor else flat), "image_token_id": other}
    if donor:
        tune |= {"text_config": {**text, "image_token_id": other if has_both else None}}
    give(merge, flat if donor else nested, tune, flat)

    said = [each for each in merge.plan().remarks if "image_token_id" in each.text]
    assert bool(said) == (other != 5)
    assert {each.code for each in said} <= {"config-differs"}


@pytest.mark.parametrize("beams", [4, 2])
def test_keys_that_moved_to_the_config_for_generating_are_not_missing(tmp_path: Path, beams: int) -> None:
    family = make_family(tmp_path, 2, llama_shapes(), buffers=False)
    for folder in (family.base, *family.tuned):
        is_base = folder == family.base
        (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **({"num_beams": 4} if is_base else {})}))
        (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4 if is_base else beams}))

    plan = stockflow.plan(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out").plan

    said = {each.code for each in plan.remarks if "num_beams" in each.text}
    assert said == ({"config-keys-differ", "side-files-differ"} if beams == 2 else set())


INFINITE = '{"model_type": "mamba2", "time_step_limit": [0.0, %s]}'


@pytest.mark.parametrize("spelling", ["Infinity", '{"__float__": "Infinity"}'])
def test_infinity_goes_out_as_it_is_and_is_equal_to_itself_in_both_spellings(merge: Merge, spelling: str) -> None:
    for folder, text in zip(merge.folders, (spelling, "Infinity", '{"__float__": "Infinity"}'), strict=True):
        (folder / "config.json").write_text(INFINITE % text)
    plan = merge.plan()

    assert encode_config(plan.config or {}, []) == encode_config(json.loads(INFINITE % spelling), [])
    (said,) = plan.remarks
    assert (said.code, said.severity, said.values) == ("config-not-finite", "note", {"time_step_limit": "Infinity"})
    assert plan_file.parse(plan_file.encode(plan), "plan.json").plan.config == plan.config


def test_nan_in_a_config_is_warned_of_and_equal_to_itself(merge: Merge) -> None:
    for folder in merge.folders:
        (folder / "config.json").write_text('{"text_config": {"rms_norm_eps": NaN}}')

    (said,) = merge.plan().remarks
    assert (said.code, said.severity, said.values) == (
        "config-not-finite",
        "warning",
        {"text_config.rms_norm_eps": "NaN"},
    )
