"""What configs spell in several ways, in one: keys, sets of words, and what is no finite number."""

import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite

Config = Mapping[str, object]

WORDS = {
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts", "moe_num_experts": "num_experts",
    "num_shared_experts": "n_shared_experts", "num_expert_group": "n_group", "moe_renormalize": "norm_topk_prob",
    "route_scale": "routed_scaling_factor", "global_rope_theta": "rope_theta",
    "sliding_window_size": "sliding_window", "attention_window_size": "sliding_window",
}  # fmt: skip
"""What versions of one class call otherwise, and the word that most use; source: `attribute_map` of transformers."""


_JOINED = frozenset({"pos_att_type"})
"""Sets of words, which older versions of DeBERTa join by bars."""


def _as_list(said: object) -> object:
    words = said.lower().split("|") if isinstance(said, str) else said
    return sorted(str(each).strip() for each in words if each) if isinstance(words, list) else said


def reworded(section: Config) -> Config:
    """Return what a section says, of keys that versions of a class call in several ways under one of them."""
    section = {**section, **{key: _as_list(section[key]) for key in _JOINED.intersection(section)}}
    words = {key: WORDS.get(key) or re.sub("_token_index$", "_token_id", key) for key in section}
    return {words[key]: section[key] for key in sorted(section, key=lambda key: words[key] == key)}


_MAX_LAYERS = 10_000
COUNTED = {"global_attn_every_n_layers": 0, "sliding_window_pattern": 1}
"""Keys by which older versions count layers without a window, and how many a count begins after."""


def layer_types(section: Config) -> object:
    """Return which layers have a window: as newer versions list them, or older ones count; None: that is not said."""
    given, layers = section.get("layer_types"), section.get("num_hidden_layers")
    for key, first in COUNTED.items():
        every = section.get(key)
        if given is None and isinstance(layers, int) and layers < _MAX_LAYERS and isinstance(every, int) and every > 0:
            kinds = ("sliding_attention", "full_attention")
            return [kinds[(layer + first) % every == 0] for layer in range(layers)]
    return given


_FLOAT_TAG = "__float__"
_TAGGED = {name: {_FLOAT_TAG: name} for name in ("NaN", "Infinity", "-Infinity")}


def comparable(value: object) -> object:
    """Return a value of a config with what is no finite number in the one spelling that equals itself.

    transformers writes ``Infinity`` up to 4.57, ``{"__float__": "Infinity"}`` from 5.0 on.
    """
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return value if not isinstance(value, float) or isfinite(value) else _TAGGED[spelled(value)]


def spelled(value: float) -> str:
    """Return what is no finite number as JSON texts of Python have it."""
    return json.dumps(value)


def nonfinite(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield what is no finite number in a config: its path, and how it is spelled."""
    if isinstance(value, dict) and value.keys() == {_FLOAT_TAG}:
        yield path, str(value[_FLOAT_TAG])
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from nonfinite(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for each in value:
            yield from nonfinite(each, path)
    elif isinstance(value, float) and not isfinite(value):
        yield path, spelled(value)
