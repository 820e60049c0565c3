"""Ties: names under which a model knows a tensor that its files hold once, under another name.

transformers writes such a tensor once; indexes of older conversions list all its names. Source: ``_tied_weights_keys``
of the models there.
"""

import re
from collections.abc import Collection, Iterable, Mapping

_SHARED = re.compile(r"((?:model\.|transformer\.)?)(?:shared|(?:encoder|decoder)\.embed_tokens)\.weight")
"""The embedding of an encoder and a decoder, whatever ``tie_word_embeddings`` says of the head."""
_SHARED_ENDS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
_HEAD = re.compile(
    r"(.+\.)?(lm_head|embed_out|proj_out|vocab_projector|cls\.predictions\.decoder|lm_head\.decoder"
    r"|generator_lm_head|pred_layer\.proj)\.weight"
)
_EMBEDDING = re.compile(r"(.+\.)?(shared|embed_tokens|wte|embed_in|(word|tok|token)_embeddings?)\.weight")
_BIASES = {"cls.predictions.decoder.bias": "cls.predictions.bias", "lm_head.decoder.bias": "lm_head.bias"}


def aliases_of(names: Iterable[str], stored: Collection[str], config: Mapping[str, object] | None) -> Mapping[str, str]:
    """Return those of ``names`` that are other names of stored tensors, each with the stored one.

    Args:
        names: of tensors that no file holds.
        stored: names of those that files hold.
        config: of the model; a head whose config unties it is no alias.
    """
    embeddings = [] if _is_untied(config or {}) else sorted(filter(_EMBEDDING.fullmatch, stored), key=len)[:1]
    found = {name: _alias_of(name, stored, embeddings) for name in names}
    return {name: alias for name, alias in found.items() if alias}


def _alias_of(name: str, stored: Collection[str], embeddings: list[str]) -> str:
    if _BIASES.get(name) in stored:
        return _BIASES[name]
    if match := _SHARED.fullmatch(name):
        shared = (f"{prefix}{end}.weight" for prefix in (match[1], "", "model.") for end in _SHARED_ENDS)
        return next((each for each in shared if each in stored), "")
    return embeddings[0] if embeddings and _HEAD.fullmatch(name) else ""


def _is_untied(config: Mapping[str, object]) -> bool:
    nested = [each for each in config.values() if isinstance(each, dict)]
    return any(each.get("tie_word_embeddings") is False for each in (config, *nested))
