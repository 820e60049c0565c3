"""Keys of adapter_model.safetensors: which module of the model a tensor belongs to, and what it is there.

Source: the keys that PEFT 0.21 writes; https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from stockflow.text.strictjson import shown

PREFIX = "base_model.model."
_FACTORS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(\.\w+)??(?P<end>\.weight|\.bias)?"
)
_OWN = re.compile(
    r"(?P<module>.+?)(\.token_adapter)?\.(?P<part>base_layer|modules_to_save|original_module)(\.\w+)??"
    r"(?P<end>\.weight|\.bias)"
)
_PARTS = {"base_layer": "base", "modules_to_save": "", "original_module": "original"}
_SHORT = {"token_adapter.trainable_tokens_delta": "tokens", "lora_magnitude_vector": "lengths"}
ORIGINAL = "original."
NESTED = ".base_layer"
"""End of the name of a module that wraps another parameter of the same experts."""


class KeyPlace(NamedTuple):
    """What a key says."""

    module: str
    """as the model calls it"""
    part: str
    """``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_embedding_A`` and ``_B``, ``lengths``, ``tokens``,
    ``base.weight``, ``base.bias``, ``original.weight`` of what was trained in another's place, or the name of a
    parameter that is replaced"""


def place_of(key: str) -> KeyPlace:
    """Return what a key says."""
    name = key.removeprefix(PREFIX)
    if found := _FACTORS.fullmatch(name):
        part = _SHORT.get(found["part"], found["part"])
        return KeyPlace(found["module"], f"{part}.bias" if found["end"] == ".bias" else part)
    if found := _OWN.fullmatch(name):
        return KeyPlace(found["module"], f"{_PARTS[found['part']]}{found['end']}".removeprefix("."))
    module, _, parameter = name.rpartition(".")
    return KeyPlace(module, parameter)


def by_module(keys: Iterable[str]) -> Mapping[str, Mapping[str, str]]:
    """Return the keys of each module, by what they are there.

    Of more tokens than the base has, PEFT writes what was trained twice, and beside it what it began as: no parts.

    Raises:
        ValueError: two keys say the same.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        place = place_of(key)
        parts = modules.setdefault(place.module, {})
        other = parts.setdefault(place.part, key)
        if other != key and _is_saved(other) == _is_saved(key):
            raise ValueError(f"{shown(other)} and {shown(key)} are two of one tensor; remove one")
        if _is_saved(key):
            parts[place.part] = key
    return {
        module: {part: parts[part] for part in parts if not _is_original(part, parts)}
        for module, parts in modules.items()
    }


def _is_saved(key: str) -> bool:
    return ".modules_to_save." in key


def _is_original(part: str, parts: Collection[str]) -> bool:
    return part.startswith(ORIGINAL) and part.removeprefix(ORIGINAL) in parts
