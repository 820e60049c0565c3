"""Defaults of configs: what classes of models take where theirs says nothing, if that is not what most classes take.

Source: the configuration classes of transformers, of which versions 4.57 and 5 agree on these.
"""

from collections.abc import Mapping

_BY_TYPE: Mapping[str, Mapping[object, tuple[str, ...]]] = {
    "rope_theta": {
        1e6: ("mixtral", "phimoe", "minimax", "qwen2_vl_text", "qwen2_5_vl_text", "lfm2", "lfm2_moe", "cwm"),
        5e5: ("llama4_text", "mllama_text_model", "olmo3", "flex_olmo", "ernie4_5", "ernie4_5_moe", "bitnet", "csm"),
        1.5e5: ("gpt_oss",), 2e6: ("smollm3",), 1.2e7: ("apertus",), 1e5: ("helium",), 2.5e4: ("fuyu",),
        1e7: ("longcat_flash",),
    },
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
    "is_decoder": {True: ("blip_text_model", "pix2struct_text_model")},
}  # fmt: skip
"""By what a fact is called."""
_DEFAULTS = {
    (name, each): value for name, values in _BY_TYPE.items() for value, types in values.items() for each in types
}


def default_of(name: str, section: Mapping[str, object], usual: object) -> object:
    """Return what the class of a config's section takes for a fact of which it says nothing; ``usual`` for most."""
    return _DEFAULTS.get((name, str(section.get("model_type"))), usual)
