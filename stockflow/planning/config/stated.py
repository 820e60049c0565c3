"""What a config says of quantised weights, made true of the tensors that are written."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from stockflow.checkpoints.configs import Config, quantization_keys, says_packed
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.scale_rules import kind_of
from stockflow.planning.formats import FP8_BLOCK, has_codes, in_codes
from stockflow.planning.job import TensorJob
from stockflow.recipe import Recipe

_PATTERN = "re:"
"""How a pattern begins in lists of compressed-tensors."""
_LEFT_PLAIN = ("ignore", "ignored_layers", "modules_to_not_convert")
"""Keys under which modules are listed that are no codes; the last is the usual one."""


def stated_quantization(config: Config, recipe: Recipe, donor: Checkpoint, jobs: Sequence[TensorJob]) -> Config:
    """Return the donor's config with what it says of quantised weights true of what the jobs write."""
    if not recipe.keeps_codes and any(job.result.rule for job in jobs):
        return {**_without(config), "quantization_config": _fp8_block(jobs)}
    if not any(quantization_keys(config)):
        return config
    if not has_codes(jobs):
        return _without(config)
    coded = {job.output.name for job in jobs if in_codes(job)}
    kinds = set(map(kind_of, {*coded, *donor.stored}))
    modules = set(map(_module, coded))
    others = [job.output.name for job in jobs if _module(job.output.name) not in modules]
    plain = [_module(name) for name in others if kind_of(name) in kinds]
    written = list(dict.fromkeys(map(_module, others)))
    return _mapped(config, lambda section: _listing(section, plain, written, sorted(modules)))


def _fp8_block(jobs: Iterable[TensorJob]) -> dict[str, object]:
    plain = [
        _module(job.output.name)
        for job in jobs
        if not job.result.rule and len(job.output.shape) == 2 and job.output.name.endswith(".weight")
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(FP8_BLOCK.block),
        "modules_to_not_convert": plain,
    }


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _listing(section: Config, plain: Sequence[str], others: Sequence[str], coded: Sequence[str]) -> dict[str, object]:
    """Return what is said of codes, with what is none listed and what is some not.

    Args:
        section: of the config.
        plain: modules that are none, and are some in other layers or models.
        others: all modules that are none, of which those are listed whose like is in another layer.
        coded: modules that are some, sorted; layers of a stack have other numbers than in the donor.
    """
    key = next((key for key in _LEFT_PLAIN if isinstance(section.get(key), list)), _LEFT_PLAIN[-1])
    known = section.get(key)
    listed = [entry for entry in known if not _names_any(entry, coded)] if isinstance(known, list) else []
    further = dict.fromkeys((*plain, *_like(listed, others, coded)))
    listed += [name for name in further if name not in listed]
    return {**section, key: listed} if listed or known else {**section}


def _like(listed: Sequence[object], modules: Sequence[str], coded: Sequence[str]) -> Iterator[str]:
    """Yield which modules, or modules these are in, are those of another layer that are listed by its number."""
    kinds = {kind_of(entry) for entry in listed if isinstance(entry, str) and re.search(r"\.\d+\.", entry)}
    for module in modules if kinds else ():
        parts = module.split(".")
        for stop in range(1, len(parts) + 1):
            name = ".".join(parts[:stop])
            if kind_of(name) in kinds and not _names_any(name, coded):
                yield name


def _names_any(entry: object, modules: Sequence[str]) -> bool:
    """Return whether an entry names one of these modules, or all within a module, by a layer's number.

    Args:
        entry: of a list of modules, perhaps a pattern.
        modules: sorted.
    """
    if not isinstance(entry, str) or not re.search(r"\d", entry):
        return False
    if entry.startswith(_PATTERN):
        with suppress(re.error):
            return any(map(re.compile(entry.removeprefix(_PATTERN)).match, modules))
        return False
    following = [modules[at] for end in ("", ".") if (at := bisect_left(modules, entry + end)) < len(modules)]
    return any(f"{module}.".startswith(f"{entry}.") for module in following)


def _mapped(config: Config, change: Callable[[Config], Config]) -> dict[str, object]:
    return {key: _changed(key, value, change) for key, value in config.items()}


def _changed(key: str, value: object, change: Callable[[Config], Config]) -> object:
    if isinstance(value, dict) and says_packed(key, value):
        return change(value)
    return _mapped(value, change) if isinstance(value, dict) and key.endswith("_config") else value


def _without(config: Config) -> dict[str, object]:
    return {
        key: _without(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if not says_packed(key, value)
    }
