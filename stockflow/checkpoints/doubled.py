"""Facts that one config tells twice and differently: in words of two versions or classes, outside and within."""

from collections.abc import Iterator, Mapping, Sequence

from stockflow.checkpoints.configs import HEADS, MEANING, Config, Trait, first, rope, sections
from stockflow.checkpoints.heads import is_of_language
from stockflow.checkpoints.spellings import WORDS, comparable

_ROPE = ("rope_parameters", "rope_scaling")
"""Hold what is said of rotary positions: from transformers 5 on, and before."""
_KINDS = ("full_attention", "sliding_attention")
"""Parts of them, of models that tell their layers apart."""
_ROPE_FACTS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("rope_theta", ("rope_theta", "rotary_emb_base", "rope_base", "global_rope_theta")),
    ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct")),
    ("original_max_position_embeddings", ("original_max_position_embeddings",)),
)
"""What stands within, and what it is called beside."""
_LOCAL = ("rope_local_base_freq", "local_rope_theta")
_ALIASES: Sequence[tuple[str, ...]] = (
    ("num_attention_heads", "n_head", "n_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    ("head_dim", "kv_channels", "d_kv"),
    ("rms_norm_eps", "rms_norm_epsilon"),
    ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    ("norm_eps", "norm_epsilon"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
)  # fmt: skip
_SAME_TYPES = {"mrope": "default", "su": "longrope"}
_OF_A_WHOLE = frozenset({"is_decoder", "is_encoder_decoder", "is_causal", "problem_type", "id2label"})
"""Are said of a model and of its language model, of each for itself."""
_WIDTH = first("hidden_size", "n_embd", "d_model")
"""What an outer section that tells of the same language model has equal."""
_OF_BOTH = tuple(each for each in (*HEADS, *MEANING) if each.name not in _OF_A_WHOLE)


def contradictions(config: Config) -> Iterator[Mapping[str, object]]:
    """Yield each fact of which a config says different things: these, by the whole keys."""
    for path, section in sections(config):
        words = _in_two_words(section) if is_of_language(path) else ()
        for said in (*words, *_of_rope(section)):
            if _differ(said):
                yield {path + key: value for key, value in said.items()}
        is_again = path and is_of_language(path) and _WIDTH(section) is not None and _WIDTH(section) == _WIDTH(config)
        for each in _OF_BOTH if is_again else ():
            outer, inner = _said(each, config), _said(each, section)
            if outer and inner and _differ(dict(enumerate((outer[1], inner[1])))):
                yield {outer[0]: outer[1], path + inner[0]: inner[1]}


def _differ(said: Mapping[str, object] | Mapping[int, object]) -> bool:
    values = [comparable(value) for value in said.values()]
    return any(value != values[0] for value in values)


def _said(each: Trait, section: Config) -> tuple[str, object] | None:
    value = each.read(section)
    key = next((key for key in each.keys if key in section and not isinstance(section[key], dict)), each.name)
    return None if value is None or value == {} else (key, value)


def _given(section: Config, keys: Sequence[str], before: str = "") -> dict[str, object]:
    return {before + key: section[key] for key in keys if section.get(key) is not None}


def _in_two_words(section: Config) -> Iterator[dict[str, object]]:
    """Yield what a section says of each fact that versions or classes have several words for."""
    words: dict[str, tuple[str, ...]] = {}
    for key, word in WORDS.items():
        if word == "rope_theta":
            continue
        words[word] = (*words.get(word, (word,)), key)
    tokens = [(key, f"{key.removesuffix('_index')}_id") for key in section if key.endswith("_token_index")]
    for keys in (*_ALIASES, *words.values(), *tokens):
        yield _given(section, keys)


def _of_rope(section: Config) -> Iterator[dict[str, object]]:
    """Yield what a section says of rotary positions, beside the mappings that gather it and within."""
    whole, local = dict[str, Config](), dict[str, Config]()
    for key in _ROPE:
        held = section.get(key)
        if isinstance(held, dict):
            full, sliding = (held.get(kind) for kind in _KINDS)
            if isinstance(sliding, dict):
                local[f"{key}.{_KINDS[1]}."] = sliding
            if isinstance(full, dict) or not isinstance(sliding, dict):
                whole |= {f"{key}.{_KINDS[0]}.": full} if isinstance(full, dict) else {f"{key}.": held}
    for parts, name, keys in (*((whole, *fact) for fact in _ROPE_FACTS), (local, "rope_theta", _LOCAL)):
        said = _given(section, keys)
        for at, part in parts.items():
            said |= _given(part, (name,), at)
        yield said
    for at, part in whole.items():
        types = _given(part, ("rope_type", "type"), at)
        if _differ({key: _SAME_TYPES.get(str(value), value) for key, value in types.items()}):
            yield types
    if whole and all(key in section for key in _ROPE):
        yield {at.rstrip("."): rope({_ROPE[0]: part})["scaling"] for at, part in whole.items()} | (
            {} if section[_ROPE[1]] else {_ROPE[1]: {}}
        )
