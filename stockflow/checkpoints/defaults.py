"""Defaults of configs: what classes of models take where theirs says nothing, if that is not what most classes take.

Source: the configuration classes of transformers, of which versions 4.57 and 5 agree on these.
"""

from collections.abc import Mapping

_BY_TYPE: Mapping[str, Mapping[object, tuple[str, ...]]] = {
    "rope_theta": {
        1e6: (
            "mixtral", "phimoe", "minimax", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "lfm2",
            "lfm2_moe", "cwm", "gemma3_text", "gemma3n_text", "qwen2_5_omni_text", "qwen3_omni_moe_text",
            "gemma4_text", "t5gemma2_text", "ministral3",
        ),
        5e5: (
            "llama4_text", "mllama_text_model", "olmo3", "flex_olmo", "ernie4_5", "ernie4_5_moe", "bitnet", "csm",
            "evolla",
        ),
        1.5e5: ("gpt_oss",), 2e6: ("smollm3",), 1.2e7: ("apertus",), 1e5: ("helium",), 2.5e4: ("fuyu",),
        1e7: ("longcat_flash",), 5e6: ("minimax_m2",), 1.6e5: ("modernbert", "modernbert-decoder"),
    },
    "rope_local_base_freq": {1e4: ("gemma3_text", "gemma3n_text", "modernbert", "modernbert-decoder")},
    "partial_rotary_factor": {
        0.5: ("phi", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "nemotron", "persimmon", "bamba"),
        0.25: ("gpt_neox", "stablelm", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma4_text"),
    },
    "activation": {
        "silu": (
            "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl", "qwen2_vl_text",
            "qwen2_5_vl", "qwen2_5_vl_text", "phi3", "cohere", "cohere2", "deepseek_v3",
        ),
        "gelu_pytorch_tanh": (
            "mt5", "umt5", "gemma2", "gemma3_text", "gemma3n_text", "siglip_vision_model", "siglip_text_model",
            "gpt2", "gpt_neo", "gptj", "codegen", "phi",
        ),
        "gelu": (
            "falcon", "distilbert", "roberta", "xlm-roberta", "camembert", "deberta", "deberta-v2", "modernbert",
            "modernbert-decoder", "wav2vec2", "hubert", "wavlm", "whisper", "bart", "mbart", "gpt_neox",
        ),
        "relu": ("t5", "longt5", "switch_transformers", "opt", "m2m_100", "nllb-moe"),
        "quick_gelu": ("clip_text_model", "clip_vision_model"),
    },
    "norm epsilon": {
        1e-6: (
            "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
            "gemma3n_text", "siglip_vision_model", "siglip_text_model",
        ),
        1e-5: ("mixtral", "phi3", "qwen2_vl", "qwen2_vl_text", "clip_vision_model", "clip_text_model"),
    },
    "sliding_window_pattern": {6: ("gemma3_text",)},
    "feed_forward_proj": {"relu": ("t5", "longt5", "switch_transformers"), "gated-gelu": ("mt5", "umt5")},
    "is_gated_act": {True: ("mt5", "umt5")},
    "relative_attention_num_buckets": {32: ("t5", "mt5", "umt5", "longt5", "switch_transformers")},
    "relative_attention_max_distance": {128: ("t5", "mt5", "umt5", "longt5", "switch_transformers")},
    "global_attn_every_n_layers": {3: ("modernbert", "modernbert-decoder")},
    "image_size": {224: ("clip_vision_model", "siglip_vision_model")},
    "patch_size": {32: ("clip_vision_model",), 16: ("siglip_vision_model",)},
    "pooler_hidden_act": {"gelu": ("deberta", "deberta-v2")},
    "legacy": {True: ("deberta", "deberta-v2")},
    "summary_type": {
        "cls_index": ("gpt2", "openai-gpt"), "first": ("electra", "xlm", "flaubert"), "last": ("xlnet",),
    },
    "feat_extract_activation": {"gelu": ("wav2vec2", "hubert", "wavlm")},
    "adapter_stride": {2: ("wav2vec2", "wavlm")},
    "local_attention": {128: ("modernbert", "modernbert-decoder")},
    "logit_scale": {0.0625: ("cohere", "cohere2")},
    "query_pre_attn_scalar": {256: ("gemma2", "gemma3_text")},
    "attn_logit_softcapping": {50.0: ("gemma2",)},
    "final_logit_softcapping": {30.0: ("gemma2", "gemma3n_text")},
    "routed_scaling_factor": {2.5: ("deepseek_v3",)},
    "residual_in_fp32": {True: ("mamba", "mamba2", "falcon_mamba")},
    "sliding_window": {
        4096: ("mistral", "ministral", "gemma2", "gemma3_text", "cohere2", "exaone4", "vaultgemma"), 128: ("gpt_oss",),
    },
    "norm_topk_prob": {
        True: ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4v_moe_text", "qwen3_next", "exaone_moe", "lfm2_moe"),
        False: ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "dots1", "deepseek_v2"),
    },
    "scale_embedding": {
        True: (
            "seamless_m4t", "seamless_m4t_v2", "pegasus_x", "fsmt", "biogpt", "bigbird_pegasus", "nllb-moe", "xglm",
            "m2m_100", "plbart", "speech_to_text",
        ),
    },
    "use_qk_norm": {True: ("llama4_text",)},
    "use_parallel_residual": {True: ("gpt_neox",), False: ("stablelm",)},
    "do_layer_norm_before": {True: ("opt",)},
    "parallel_attn": {True: ("falcon",)},
    "scale_attn_weights": {True: ("gpt2", "gpt_bigcode", "imagegpt", "decision_transformer")},
    "rope_interleave": {True: ("deepseek_v3", "glm4_moe_lite", "mistral4")},
    "position_biased_input": {True: ("deberta", "deberta-v2")},
    "token_dropout": {False: ("esm",)},
    "block_size": {64: ("big_bird", "bigbird_pegasus"), 512: ("pegasus_x",)},
    "attention_window": {512: ("longformer", "led")},
    "relative_attention": {False: ("deberta", "deberta-v2")},
    "num_kv_shared_layers": {15: ("gemma3n_text",), 0: ("gemma4_text",)},
    "attn_scale": {0.1: ("llama4_text",)},
    "floor_scale": {8192: ("llama4_text",)},
    "pad_token_id": {
        1: (
            "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "xmod",
            "ibert", "longformer", "luke", "mpnet", "layoutlmv3", "bridgetower_text_model", "clap_text_model",
            "altclip_text_model", "kosmos_2_text_model", "kosmos_2_5_text_model", "fsmt", "m2m_100", "nllb-moe",
            "trocr", "speech_to_text",
        ),
        0: (
            "deberta", "deberta-v2", "lilt", "markuplm", "seamless_m4t", "seamless_m4t_v2", "prophetnet",
            "xlm-prophetnet",
        ),
    },
    "is_decoder": {True: ("blip_text_model", "pix2struct_text_model")},
}  # fmt: skip
"""By what a fact is called."""
WRITTEN: Mapping[str, object] = {
    "top_k": 50, "max_length": 20, "position_embedding_type": "absolute", "num_channels": 3, "ignore_index": -100,
    "image_seq_length": 576, "multimodal_projector_bias": True, "summary_use_proj": True, "xvector_output_dim": 512,
}  # fmt: skip
"""What all classes that know a key take where nothing is said, and write."""
_DEFAULTS = {
    (name, each): value for name, values in _BY_TYPE.items() for value, types in values.items() for each in types
}
_KNOWN_TYPES = {each for _, each in _DEFAULTS}


def default_of(name: str, section: Mapping[str, object], usual: object) -> object:
    """Return what the class of a config's section takes for a fact of which it says nothing; ``usual`` for most.

    A null in the place of what it takes otherwise switches that off.
    """
    own = _DEFAULTS.get((name, str(section.get("model_type"))), usual)
    return "null" if name in section and own is not usual else own


def is_of_own_code(config: Mapping[str, object]) -> bool:
    """Return whether code beside a model says what it takes where its config says nothing, which nobody knows here."""
    code = config.get("auto_map")
    return isinstance(code, dict) and "AutoConfig" in code and config.get("model_type") not in _KNOWN_TYPES
