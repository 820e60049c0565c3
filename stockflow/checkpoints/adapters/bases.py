"""Bases: whether two names, as adapters, recipes and disks give them, are of one model."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from stockflow.storage import JoinedStore, redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

Likeness = Literal["one", "alike", "apart"]
"""``alike``: folders in different places whose last name tells a model."""

_CACHED = re.compile(r".*(?:^|/)models--([^/]+)(?:/snapshots(?:/[^/]+)?)?")
_HUB = r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
_ON_HUB = re.compile(rf"{_HUB}(?!\.)([\w.-]+/[\w.-]+)(?:@.*|/tree/[^/]+)?", re.ASCII)
_REVISION = re.compile(r"@[^/@]+$")
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:/|[a-z][a-z0-9+.-]*://")
_OF_ANY_MODEL = re.compile(
    r"((adapt(er|ed)|base|best|bf16|bfloat16|checkpoints?|ckpts?|current|data|default|dpo|epochs?|exp(eriments?)?|export(ed)?"
    r"|final|fine|float16|float32|fp16|fp32|full|fused?|global|hf|huggingface|iter(ation)?|last|latest|lora|main|merged?"
    r"|models?|new|old|orig(inal)?|out(puts?)?|pretrained|release|results?|rl|runs?|safetensors|saved?|sft|snapshots?|stage"
    r"|steps?|te?mp|test|train(ed|ing)?|(fine)?tuned?|weights|work|v)?\d*([ ._-]|$))+"
)
"""Names that scripts and trainers give to the folder of any model."""


def likeness(one: str, other: str) -> Likeness:
    """Return whether two names are of one base; a last name that any model's folder may have says nothing."""
    left, right = _plain(one), _plain(other)
    if left == right or (_is_on_disk(left) and _is_on_disk(right) and _followed(left) == _followed(right)):
        return "one"
    name = _last(left)
    if name != _last(right) or _OF_ANY_MODEL.fullmatch(name):
        return "apart"
    return "alike" if _ABSOLUTE.match(left) and _ABSOLUTE.match(right) else "one"


def on_base(store: JoinedStore, named: str | None) -> Iterator[Remark]:
    """Yield that an adapter says it belongs to another model, or another place, than the one it is put on."""
    base = store.model.where()
    if named and likeness(named, base) != "one" and not _leads_to(named, base, store.adapter.where()):
        text = (
            f"{store.adapter.where()} says that its base is {shown(redact(named))}, and is put on {base}: if these are "
            "not the same weights, what it adds means nothing"
        )
        yield Remark("adapter-elsewhere", text, "note", (store.url,))


def _leads_to(named: str, base: str, adapter: str) -> bool:
    """Return whether a relative path is that of the base, from here or from a folder that the adapter lies in."""
    if _ABSOLUTE.match(named) or not _is_on_disk(base):
        return False
    above = Path(adapter).parents if _is_on_disk(adapter) else ()
    return any(_followed(os.path.join(folder, named)) == _followed(base) for folder in (Path(), *above))


def _plain(location: str) -> str:
    """Return a location without its revision; of the hub, its pages and its cache the model's name, without case."""
    text = redact(location).replace("\\", "/").rstrip("/")
    if cached := _CACHED.fullmatch(text):
        return cached[1].replace("--", "/").lower()
    if on_hub := _ON_HUB.fullmatch(text):
        return on_hub[1].lower()
    return _REVISION.sub("", text)


def _last(location: str) -> str:
    return location.rpartition("/")[2].lower()


def _is_on_disk(location: str) -> bool:
    return location.startswith(("/", "~", "./", "../"))


def _followed(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
