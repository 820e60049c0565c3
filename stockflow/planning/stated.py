"""What a config says of quantised weights, made true of the tensors that are written."""

from collections.abc import Callable, Iterable, Sequence

from stockflow.checkpoints.configs import Config, quantization_keys, says_packed
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.formats import FP8_BLOCK, has_codes, in_codes
from stockflow.planning.job import TensorJob
from stockflow.recipe import Recipe

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
    coded = {_module(job.output.name) for job in jobs if in_codes(job)}
    written = {_module(job.output.name) for job in jobs}
    plain = [module for module in map(_module, donor.stored) if module in written - coded]
    return _mapped(config, lambda section: _listing(section, plain)) if plain else config


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


def _listing(section: Config, plain: Sequence[str]) -> dict[str, object]:
    """Return what is said of codes, with these modules among those that are none."""
    key = next((key for key in _LEFT_PLAIN if isinstance(section.get(key), list)), _LEFT_PLAIN[-1])
    known = section.get(key)
    listed = list(known) if isinstance(known, list) else []
    return {**section, key: listed + [name for name in dict.fromkeys(plain) if name not in listed]}


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
