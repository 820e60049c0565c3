"""Cutting: how a tokenizer cuts texts into tokens and what it puts around them, in a form that can be compared."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from stockflow.text.strictjson import shown

Cutting = Mapping[str, str]
"""Digests of what decides how texts are cut, by part of a ``tokenizer.json``; flags in words."""

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
"""of ``tokenizer_config.json``"""
LENGTHS = ("truncation", "padding")
"""of every text, which transformers sets anew at each call and other loaders obey"""
MOST = "model_max_length"
"""of every text, where whoever asks for texts to be cut says no length"""
_NO_LENGTH = 1e12
"""what newer versions write where there is none is larger"""
SIDES = ("padding_side", "truncation_side")
_ANY_CLASS = ("", "PreTrainedTokenizer", "TokenizersBackend")
"""What goes by its files alone."""
ADDED = "the added token"
_SAYS_NOTHING = {"use_regex": True, "split": True, "trim_offsets": True}
"""what newer versions write of what older ones do, too"""


def cutting_of(document: Mapping[str, object]) -> Cutting:
    """Return how a ``tokenizer.json`` cuts texts, and to which length; what is off or absent says nothing."""
    model = document.get("model")
    options = dict(model) if isinstance(model, dict) else {}
    vocab, merges = options.pop("vocab", None), options.pop("merges", None)
    return {
        **{step: _digest(document.get(step)) for step in STEPS},
        **{key: _length(document.get(key)) for key in LENGTHS},
        "model": _digest(options),
        "merges": _of_lines(each if isinstance(each, str) else " ".join(map(str, each)) for each in _list(merges)),
        "scores": _of_lines(str(each[1:]) for each in _list(vocab) if isinstance(each, list)),
        **dict(_flags(entry) for entry in _list(document.get("added_tokens")) if isinstance(entry, dict)),
    }


def merges_of(payload: bytes) -> Cutting:
    """Return how a ``merges.txt`` cuts texts, comparable to the merges of a ``tokenizer.json``."""
    lines = payload.decode(errors="replace").splitlines()
    return {"merges": _of_lines(line for line in lines if line.strip() and not line.startswith("#version"))}


def flags_of(settings: Mapping[str, object]) -> Cutting:
    """Return what a ``tokenizer_config.json`` says of it in so many words."""
    said = {flag: str(settings[flag]) for flag in FLAGS if isinstance(settings.get(flag), bool)}
    sides = {key: str(settings[key]) for key in SIDES if isinstance(settings.get(key), str)}
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    most, decoder = settings.get(MOST), settings.get("added_tokens_decoder")
    length = {MOST: str(most) if most < _NO_LENGTH else "none"} if isinstance(most, int | float) else {}
    added = decoder.values() if isinstance(decoder, dict) else ()
    flags = dict(_flags(entry) for entry in added if isinstance(entry, dict) and "special" in entry)
    return {**said, **sides, **length, **flags, **({} if kind in _ANY_CLASS else {"tokenizer_class": kind})}


def _flags(entry: Mapping[str, object]) -> tuple[str, str]:
    """Return what an added token is called, and how it is found in texts, in words."""
    words = " ".join(sorted(key for key, value in entry.items() if value is True))
    return f"{ADDED} {shown(entry.get('content'))}", words


def _length(said: object) -> str:
    """Return to how many tokens texts are cut, or filled."""
    own = said if isinstance(said, dict) else {}
    strategy = own.get("strategy")
    found = own.get("max_length", strategy.get("Fixed") if isinstance(strategy, dict) else None)
    return "none" if found is None else shown(found)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(value: object) -> object:
    """Return a value without what says nothing, older spellings by the newer one."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    own = dict(value)
    if own.get("type") == "Metaspace" and "prepend_scheme" not in own:
        own["prepend_scheme"] = "always" if own.get("add_prefix_space", True) else "never"
    if own.get("type") == "Metaspace":
        own.pop("add_prefix_space", None)
    return {
        key: _plain(each)
        for key, each in own.items()
        if each is not None and each is not False and _SAYS_NOTHING.get(key) is not each and key != "trim_offsets"
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
