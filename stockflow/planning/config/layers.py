"""Config of a model whose layers are stacked: the number of layers, and every list with an entry per layer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.planning.targets import Stacking
from stockflow.planning.towers import NUM_LAYERS_KEYS, OTHER_SIDE, side_of_count
from stockflow.storage import redact

Config = Mapping[str, object]

_NO_LAYERS = (
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Keys whose lists may have as many entries as there are layers, and say nothing of them."""
_NUMBERS = re.compile(r"\s*\d{1,6}(\s*,\s*\d{1,6})+\s*")
_OTHER_TOWERS = ("vision", "visual", "audio")


def restacked(config: Config, stacking: Stacking, checkpoints: Sequence[Checkpoint]) -> Config:
    """Return the first checkpoint's config with what it says of the layers of a tower made true of the output.

    Raises:
        PlanError: the config of a model that gives layers does not say of them what the first one's does.
    """
    num_before = stacking.num_layers[0]
    other_side = OTHER_SIDE.get(stacking.side, "\0")
    changed = dict(config)
    for path in _sections(config, stacking):
        section = _at(config, path)
        own: dict[str, object] = {key: len(stacking.layers) for key in _num_keys(config, path, stacking)}
        for key, value in section.items():
            if len(listed(key, value)) == num_before and key not in _NO_LAYERS and other_side not in key:
                entries = [_entry(checkpoints[number], path, key, layer) for number, layer in stacking.layers]
                own[key] = "".join(map(str, entries)) if isinstance(value, str) else entries
        changed = _with(changed, path, own)
    return changed


def sections_of(config: Config, stacking: Stacking) -> Iterator[Config]:
    """Yield the sections of a config that say how many layers the tower has."""
    return (_at(config, path) for path in _sections(config, stacking))


def listed(key: str, value: object) -> Sequence[object]:
    """Return the entries of a list, or of a pattern with a letter per layer; none of anything else."""
    return value if isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern")) else ()


def numbers_of(value: object) -> Sequence[int]:
    """Return the integers of a list, of a list of lists or of a text (``1,2,3``); none of anything else."""
    if isinstance(value, str):
        return [int(each) for each in value.split(",")] if _NUMBERS.fullmatch(value) else ()
    parts = value if isinstance(value, list) else []
    found = [each for part in parts for each in (part if isinstance(part, list) else (part,))]
    return found if all(type(each) is int for each in found) else ()


def _sections(config: Config, stacking: Stacking) -> Iterator[tuple[str, ...]]:
    """Yield where the config speaks of a tower of so many layers; an empty path is the config itself."""
    paths: list[tuple[str, ...]] = [(), *((key,) for key, value in config.items() if isinstance(value, dict))]
    others = [path for path in paths if any(word in part for part in path for word in _OTHER_TOWERS)]
    if any(word in stacking.module for word in _OTHER_TOWERS):
        paths = others
    elif any(word in stacking.stack for word in _OTHER_TOWERS):
        paths = others or [()]
    else:
        paths = [path for path in paths if path not in others]
    return (path for path in paths if any(_num_keys(config, path, stacking)))


def _num_keys(config: Config, path: tuple[str, ...], stacking: Stacking) -> Iterator[str]:
    """Yield which keys of a section count the layers of the tower, not those of an encoder or decoder beside it."""
    section, side = _at(config, path), stacking.side
    for key in NUM_LAYERS_KEYS:
        is_its = not side or side_of_count(key, section, ".".join(path)) in ("", side)
        if is_its and section.get(key) == stacking.num_layers[0]:
            yield key


def _at(config: Config, path: Sequence[str]) -> Config:
    for key in path:
        config = cast(Config, config[key])
    return config


def _with(config: dict[str, object], path: Sequence[str], own: Config) -> dict[str, object]:
    if not path:
        return {**config, **own}
    key, *rest = path
    return {**config, key: _with(cast(dict[str, object], config[key]), rest, own)}


def _entry(checkpoint: Checkpoint, path: Sequence[str], key: str, layer: int) -> object:
    try:
        found = cast(Sequence[object], _at(checkpoint.config or {}, path)[key])
        return found[layer]
    except (KeyError, IndexError, TypeError):
        raise PlanError(
            f"config.json of {redact(checkpoint.url)} says nothing in {'.'.join((*path, key))!r} of layer {layer}, "
            "which a slice takes; the config of the output has an entry per layer there, so add it"
        ) from None
