"""config.json as models have it: its sections, one word for what families call differently, and what it promises."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from stockflow.checkpoints.defaults import WRITTEN
from stockflow.checkpoints.problems import labels, problem, usual_problem

Config = Mapping[str, object]
Read = Callable[[Config], object]

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "expert_dtype")
"""Say how packed weights are stored: the usual one, that of older compressed-tensors, of MLX, of DeepSeek-V4."""


_SECTIONS = ("_config", "_cfg", "sentence_transformers")
"""Ends of the keys of what is a config within one; the last two are of timm and of cross-encoders."""


def sections(config: Config, path: str = "") -> Iterator[tuple[str, Config]]:
    """Yield a config and those within it, such as ``text_config``, each with its path, which ends in a dot."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith(_SECTIONS) and key not in QUANTIZATION_KEYS:
            yield from sections(value, f"{path}{key}.")


def quantization_keys(config: Config) -> Iterator[str]:
    """Yield the keys, with their paths, that say that weights are packed."""
    for path, section in sections(config):
        yield from (path + key for key, value in section.items() if says_packed(key, value))


def says_packed(key: str, value: object) -> bool:
    """Return whether a key of a config says that weights are packed."""
    if key == "expert_dtype":
        return str(value).startswith(("fp4", "fp8"))
    return key in QUANTIZATION_KEYS and isinstance(value, dict) and bool(value) and not _rounds_while_running(value)


def _rounds_while_running(said: Config) -> bool:
    """Return whether weights of 16 bits are meant, which each step rounds anew: BitNet's master weights."""
    is_online = said.get("quantization_mode") == "online" or said.get("linear_class") == "autobitlinear"
    return said.get("quant_method") == "bitnet" and is_online


def rounding(section: Config) -> object:
    """Return how a model rounds its weights while it runs; None if it does not."""
    said = section.get(QUANTIZATION_KEYS[0])
    return dict(said) if isinstance(said, dict) and _rounds_while_running(said) else None


def first(*keys: str) -> Read:
    """Return what reads the first of these keys that a section gives."""
    return lambda section: next((section[key] for key in keys if section.get(key) is not None), None)


class Trait(NamedTuple):
    """Something that configs say and shapes do not."""

    name: str
    keys: tuple[str, ...]
    read: Read
    """of a section; None where it says nothing"""
    default: object = None
    """what it is if a config says nothing of it, or what finds that; None: that depends on the model's class"""
    aliases: tuple[str, ...] = ()
    """the keys, if any of them tells it; a config may have several, for several parts of a model"""

    def usual(self, section: Config) -> object:
        """Return what it is where a section says nothing of it."""
        return self.default(section) if callable(self.default) else self.default

    def is_said(self, value: object) -> bool:
        """Return whether a value says something; of a token every id does."""
        is_usual = says_nothing(value) or (self.name in WRITTEN and value == WRITTEN[self.name])
        return value is not None and (is_of_tokens(self.name) or not is_usual)


def trait(name: str, *keys: str, read: Read | None = None, default: object = None) -> Trait:
    """Return a fact that the first of these keys tells, or of its own name, or ``read`` of them."""
    named = keys or (name,)
    return Trait(name, named, read or first(*named), default, keys if read is None else ())


def head_size(section: Config) -> object:
    """Return the size of an attention head: given, or what the number of heads makes of the width."""
    given = first("head_dim", "kv_channels", "d_kv", "attention_head_dim")(section)
    width, heads = first("hidden_size", "n_embd", "d_model", "dim")(section), first(*_NUM_HEADS_KEYS)(section)
    if given is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return width // heads if width % heads == 0 else None
    return given


def rope(section: Config) -> Config:
    """Return base, scaling, local base and rotated share, as transformers 4 spreads and 5 gathers them."""
    gathered = section.get("rope_parameters")
    own = dict(gathered) if isinstance(gathered, dict) else {}
    local = own.get("sliding_attention")
    whole = own.get("full_attention", {} if isinstance(local, dict) else own)
    parts = dict(whole) if isinstance(whole, dict) else {}
    scaling = section.get("rope_scaling")
    parts = (dict(scaling) if isinstance(scaling, dict) else {}) | parts
    share = parts.pop("partial_rotary_factor", None) or first("partial_rotary_factor", "rotary_pct")(section)
    base = parts.pop("rope_theta", None) or first("rope_theta", "rotary_emb_base", "rope_base")(section)
    local_base = local.get("rope_theta") if isinstance(local, dict) else None
    return {
        "base": base,
        "local": local_base or first("rope_local_base_freq", "local_rope_theta")(section),
        "scaling": _scaling(parts),
        "share": share,
    }


_OLD_KINDS: Config = {"su": "longrope"}
_NO_SCALING = ("rope_type", "type", "original_max_position_embeddings")


def _scaling(parts: Config) -> dict[str, object]:
    kind = parts.get("rope_type") or parts.get("type")
    rest = {key: value for key, value in parts.items() if key not in _NO_SCALING and value is not None}
    return (
        rest if kind in (None, "default", "mrope", "axial") else {"rope_type": _OLD_KINDS.get(str(kind), kind), **rest}
    )


def original_length(section: Config) -> object:
    """Return the context length that scaling starts from, wherever it stands."""
    parts = [section.get("rope_parameters"), section.get("rope_scaling"), section]
    return next((found for part in parts if isinstance(part, dict) and (found := part.get(_NO_SCALING[2]))), None)


def sliding_window(section: Config) -> object:
    """Return the width of the attention window, 0 where none is used; None if nothing is said of it."""
    is_off = section.get("use_sliding_window") is False or section.get("sliding_window", 0) is None
    return 0 if is_off else first("sliding_window", "window_size")(section)


def layers_with_window(section: Config) -> object:
    """Return how many layers come before the first with a window, where one is used."""
    return section.get("max_window_layers") if sliding_window(section) else None


_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function", "dense_act_fn", "act_fn", "activation")
_SAME_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_python": "gelu"}


def activation(section: Config) -> object:
    """Return the activation, by one name where functions are equal."""
    found = first("hidden_activation", "hidden_act", "activation_function", "dense_act_fn", "act_fn", "activation")(
        section
    )
    if found is None and isinstance(of_t5 := section.get("feed_forward_proj"), str):
        found = of_t5.removeprefix("gated-") if of_t5 != "gated-gelu" else "gelu_new"
    return _SAME_ACTIVATIONS.get(found, found) if isinstance(found, str) else found


def is_gated(section: Config) -> object:
    """Return whether the inner layers of T5 are gated, said by itself or by the name of what they are."""
    said, name = section.get("is_gated_act"), section.get("feed_forward_proj")
    return name.startswith("gated-") if said is None and isinstance(name, str) else said


_NUM_HEADS_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "heads")
_ROPE = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rope_base",
    "rotary_pct",
    "local_rope_theta",
)


_OLD_CLASSES = {
    "t5withlmheadmodel": "t5forconditionalgeneration",
    "speech2texttransformerforconditionalgeneration": "speech2textforconditionalgeneration",
}
"""What classes were called in older configs."""


def architectures(section: Config) -> object:
    """Return the classes of a model, as they are called without what a trainer wrapped around them."""
    given = section.get("architectures")
    named = [str(name).lower().removeprefix("fsdp") for name in given] if isinstance(given, list) else []
    return sorted(_OLD_CLASSES.get(name, name) for name in named) or None


ARCHITECTURE = (trait("model_type"), trait("architectures", read=architectures), trait("_class_name"))
HEADS = (
    trait("number of attention heads", *_NUM_HEADS_KEYS),
    trait("number of key-value heads", "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads",
          "multi_query_group_num"),
    trait("size of an attention head", "head_dim", "kv_channels", "d_kv", "attention_head_dim", read=head_size),
    *map(trait, (
        "decoder_attention_heads", "num_decoder_attention_heads", "num_global_key_value_heads", "global_head_dim",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "linear_num_key_heads",
        "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "mamba_num_heads", "mamba_head_dim",
        "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "n_groups", "ssm_state_size", "state_size", "mamba_d_state",
        "head_size", "attention_heads", "attention_head_size", "dim_head", "d_head", "n_mamba_heads",
        "linear_num_heads", "linear_head_dim", "encoder_num_attention_heads", "decoder_num_attention_heads",
        "num_encoder_attention_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads",
        "cross_num_attention_heads", "cross_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads",
    )),
)  # fmt: skip
"""Decide into which parts tensors of equal shapes are cut."""
MEANING = (
    trait("rope_theta", *_ROPE, read=lambda section: rope(section)["base"], default=10000.0),
    trait("rope_local_base_freq", read=lambda section: rope(section)["local"]),
    trait("rope_scaling", read=lambda section: rope(section)["scaling"], default={}),
    trait("partial_rotary_factor", read=lambda section: rope(section)["share"], default=1.0),
    trait("original_max_position_embeddings", read=original_length),
    trait("norm epsilon", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps",
         "norm_epsilon", "rms_norm_epsilon"),
    trait("sliding_window", "sliding_window", "use_sliding_window", read=sliding_window),
    trait("max_window_layers", read=layers_with_window),
    trait("activation", *_ACTIVATION_KEYS, "mlp_hidden_act", read=activation),
    trait("is_gated_act", read=is_gated),
    trait("id2label", read=labels),
    Trait("problem_type", ("problem_type",), problem, default=usual_problem),
    trait("quantization_config", read=rounding),
    trait("is_causal", default=True),
    trait("is_decoder", default=False),
    trait("use_bidirectional_attention", default=False),
    trait("experts per token", "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    *map(trait, (
        "layer_types", "layers_block_type", "full_attention_interval", "sliding_window_pattern",
        "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size", "attn_layer_period", "attn_layer_offset",
        "expert_layer_period", "expert_layer_offset", "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step",
        "mlp_only_layers", "interleave_moe_layer_step", "hybrid_override_pattern", "norm_topk_prob", "n_group",
        "topk_group", "routed_scaling_factor", "scoring_func", "topk_method", "router_logit_softcapping", "index_topk",
        "swiglu_limit", "swiglu_alpha", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
        "logit_scale", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
        "lm_head_multiplier", "scale_emb", "scale_depth", "dim_model_base", "use_qk_norm", "qk_norm", "qk_layernorm",
        "clip_qkv", "rope_interleave", "position_embedding_type", "alibi", "use_parallel_residual", "parallel_attn",
        "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "relative_attention_num_buckets",
        "relative_attention_max_distance", "time_step_min", "time_step_max", "time_step_limit", "time_step_floor",
        "chunk_size", "image_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "window_size",
        "fullatt_block_indexes", "vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio",
        "mm_tokens_per_image", "classifier_pooling", "feed_forward_proj", "layer_norm_type",
        "is_encoder_decoder", "scale_embedding", "scale_decoder_outputs", "classifier_activation",
        "apply_residual_connection_post_layernorm", "normalize_before", "do_layer_norm_before",
    )),
)  # fmt: skip
"""What gives equal tensors another meaning; the published config decides it for all."""
FOUND_LATER = frozenset({
    "layer_types", "layers_block_type", "sliding_window_pattern", "full_attention_interval", "no_rope_layers",
    "no_rope_layer_interval", "rope_local_base_freq", "original_max_position_embeddings", "rope_interleave",
    "scale_attn_weights", "use_parallel_residual", "global_attn_every_n_layers",
})  # fmt: skip
"""What newer versions of a class write, some in the place of others, and older ones left to it."""
NEVER_ALONE = frozenset({"max_window_layers"})
"""What says nothing without other keys."""
CONTEXT = (
    trait("context length", "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length",
         "max_seq_len", "model_max_length"),
)  # fmt: skip
"""How far a model was trained or is let go; its tensors know nothing of it."""
_KNOWN = frozenset(key for each in (*ARCHITECTURE, *HEADS, *MEANING, *CONTEXT) for key in each.keys)
_QUIET = re.compile(
    r"_.*|.*dropout.*|drop_path.*|.*layerdrop|initializer_.*|init_std|output_.*|.*_loss.*|.*_config|.*_cfg|sentence_transformers|.*version.*"
    r"|.*_size|n_(embd|inner|vocab|layers?|head)|d_(model|ff|inner)|num_.*layers|num_labels|label2id|use_(cache|return_dict)"
    r"|torch_dtype|dtype|auto_map|pretraining_tp|ep_size|return_dict.*|gradient_checkpointing|unsloth.*|tie_.*|expert_dtype"
    r"|quantization|task_specific_params|finetuning_task|.*attn_implementation|use_flash_attn.*|seq_aux|freeze.*|tune_.*"
    r"|cache_implementation|(en|de)coder|.*name_or_path|model_name|license|num_nextn_predict_layers|num_key_value_groups|id2label"
)
"""Keys that say nothing of how a model computes, or what shapes and other looks show."""


TOKEN_IDS = r".*_token_(ids?|index)|(begin_)?suppress_tokens|bad_words_ids"
"""keys of ids of tokens"""
_OF_TOKENS = re.compile(rf"{TOKEN_IDS}|forced_decoder_ids")
_COUNT_FROM_PADDING = frozenset({
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "xmod", "ibert",
    "longformer", "luke", "mpnet", "esm", "layoutlmv3", "lilt", "markuplm", "bridgetower_text_model", "clap_text_model",
    "altclip_text_model", "kosmos_2_text_model", "kosmos_2_5_text_model", "fsmt", "m2m_100", "nllb-moe", "trocr",
    "speech_to_text", "seamless_m4t", "seamless_m4t_v2", "prophetnet", "xlm-prophetnet",
})  # fmt: skip
"""Types of models whose positions are counted from the id of the filling: each takes another row for another id."""
_OF_TEXTS = re.compile(r"(bos|eos|pad|unk|sep|cls)_.*")
_FORBIDDEN = re.compile(r"(begin_)?suppress_tokens|bad_words_ids")
"""keys of tokens that decoding does not choose, whatever a model was trained with"""


def is_of_tokens(key: str) -> bool:
    """Return whether a key names tokens by their ids."""
    return bool(_OF_TOKENS.fullmatch(key))


def token_keys(section: Config) -> list[str]:
    """Return which keys name a token that stands for something: an image, the begin of a decoder's text.

    What begins, ends and fills texts is left to tokenizers, but for classifiers, which look before the filling or, with
    an encoder and a decoder, at the end, and for models whose positions are counted from the filling.
    """
    classes = section.get("architectures")
    classifies = "SequenceClassification" in str(classes[0]) if isinstance(classes, list) and classes else False
    fills = classifies or section.get("model_type") in _COUNT_FROM_PADDING
    kept = {"pad_token_id": fills, "eos_token_id": classifies and section.get("is_encoder_decoder") is True}
    own = [key for key in section if is_of_tokens(key) and not _FORBIDDEN.fullmatch(key)]
    return [key for key in own if kept.get(key) or not _OF_TEXTS.fullmatch(key)]


_SIZE = re.compile(
    r"(\w+_)?(hidden|intermediate|inner|vocab|embedding|ffn)_size|n_(embd|inner|vocab|layers?)|d_(model|ff|inner)"
    r"|num_(hidden_|encoder_|decoder_)?layers|(encoder|decoder)_(layers|ffn_dim)|(\w+_)?lora_rank|projection_dim"
)


def size_keys(section: Config) -> list[str]:
    """Return which keys are sizes that shapes show."""
    return [key for key in section if _SIZE.fullmatch(key)]


def says_nothing(value: object) -> bool:
    """Return whether a value is as if nothing were said: off, none, a factor of one, the same kind of every layer."""
    if isinstance(value, list):
        return all(item == value[0] for item in value)
    return value is not True and (value is None or value in (False, 0, 1, "", {}, "default"))


_COMPUTES = re.compile(
    r"(.*_)?(act|activation|activation_function|activation_fn|act_fn)|(.*_)?(eps|epsilon)|.*(multiplier|soft_?cap\w*)s?"
    r"|.*(rope_theta|rope_base|base_freq\w*)|.*(pre|post|stable_layer)_norm|.*norm_(type|before|after|first)|norm_after"
    r"|feat_extract_norm|(.*_)?pool(ing|er)?_(type|mode|method)|summary_type|.*(attention|attn|pos_att|embeddings?)_type"
    r"|(attention|logits?|scores?|residual|embed(ding)?|depth|route(r)?|moe_routed)_(value_)?scal(e|ing)(_factor)?"
    r"|scale_\w+|(.*_)?(alpha|beta)_factor|gelu_activation|label_names|(image_|norm_)?(mean|std)|interpolation|crop_\w+"
    r"|tokenizer_kwargs|(.*_)?rope(_\w+)?|guidance_embeds|causal|local_attention|global_attn_every_n_layers"
    r"|rotary\w*|head_size_divisor|position_biased_input|(scaling|shift)_factor|norm_num_groups|latents_(mean|std)"
    r"|flip_sin_to_cos|freq_shift|residual_in_fp32|(\w+_)?residual_weights?|\w+logit_cap|attn_(scale|temperature_tuning)"
    r"|softmax_scale|alibi_bias_max|floor_scale|qk_scale_factor|log_scaling_\w+|attention_(window|types|layers)|local_radius"
    r"|(\w+_)?attention_context_(left|right)|(local|lsh)_\w*attn_chunk_length|num_hashes|relative_attention|position_buckets"
    r"|max_relative_positions|(relative_)?max_(bucket_)?distance|new_decoder_architecture|mup_enabled|rescale_embeddings"
    r"|activation_sparsity_pattern|altup_\w+|\w+norm_(before|after)_\w+|\w+_normalize_before|linear_allow_neg_eigval"
    r"|moe_(normalize_\w+|norm_min|top_k|layers|layer_\w+|apply_\w+|router_scaling_factor)|mlp_layer_types|swiglu_limits\w*"
    r"|expert_(selection_fn|capacity)|shared_expert_combination_strategy|second_expert_policy|normalize_router_prob\w*"
    r"|(zero_expert|hc)_(num|type|sinkhorn_iters)|[HL]_cycles|leaky_relu_slope|(\w+_)?(strides?|dilations?)"
    r"|(up|down)sampl\w+_(rates?|ratios)|tokens_per_second|position_id_per_seconds|seconds_per_chunk|n_window(_infer)?"
    r"|deepstack_\w+|(out_indices|feature_layer)|\w+_block_ind\w+|global_attn_indexes|vision_aspect_ratio|pixel_shuffle_\w+"
    r"|image_grid_pinpoints|use_mean_pooling|function_to_apply|(score|similarity)_f(unctio)?n\w*|normalize(_\w+)?"
)
"""Keys by whose names a model computes with them, whatever its class."""
_COMPUTES_THOUGH = re.compile(
    r"token_dropout|num_kv_shared_layers|(global_|index_)?block_size|context_size|keep_window_size"
    r"|(\w+_)?(attention|encoder)_chunk_size|output_(multiplier|logit_soft_cap|gate_type|stride)"
)
"""Those that are named as what says nothing; what they decide, no shape shows."""


def computing_keys(section: Config) -> list[str]:
    """Return which keys of no known meaning are of what a model computes."""
    return [key for key in further_keys(section) if _COMPUTES.fullmatch(key) or _COMPUTES_THOUGH.fullmatch(key)]


def further_keys(section: Config) -> Config:
    """Return what nobody knows the meaning of: no fact, not known to mean nothing; and how texts begin and end."""
    known = (*_KNOWN, *size_keys(section), *token_keys(section))
    quiet = {key for key in section if _QUIET.fullmatch(key) and not _COMPUTES_THOUGH.fullmatch(key)}
    return {key: value for key, value in section.items() if key not in known and key not in quiet}
