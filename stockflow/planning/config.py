"""The config that is published: the donor's, made true of what is written. The one place where it is derived.

The dtype keys alone are stated later, when it is known what was written (``output.publish``).
"""

from collections.abc import Iterator, Mapping, Sequence

from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.packed import packed_weights
from stockflow.planning.job import TensorJob
from stockflow.recipe import Recipe

Config = Mapping[str, object]

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "expert_dtype")
"""Say how packed weights are stored: the usual one, that of older compressed-tensors, of MLX, of DeepSeek-V4."""


def output_config(recipe: Recipe, checkpoints: Sequence[Checkpoint], jobs: Sequence[TensorJob]) -> Config | None:
    """Return the config to publish with what the jobs write; None if the donor has none."""
    config = checkpoints[recipe.donor].config
    if config is None:
        return None
    if any(quantization_keys(config)) and not packed_weights({job.output.name: job.output for job in jobs}):
        config = _without_quantization(config)
    return config


def sections(config: Config, path: str = "") -> Iterator[tuple[str, Config]]:
    """Yield a config and those within it, such as ``text_config``, each with its path, which ends in a dot."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in QUANTIZATION_KEYS:
            yield from sections(value, f"{path}{key}.")


def quantization_keys(config: Config) -> Iterator[str]:
    """Yield the keys, with their paths, that say that weights are packed."""
    for path, section in sections(config):
        yield from (path + key for key, value in section.items() if _says_packed(key, value))


def _says_packed(key: str, value: object) -> bool:
    if key == "expert_dtype":
        return str(value).startswith(("fp4", "fp8"))
    return key in QUANTIZATION_KEYS and isinstance(value, dict) and bool(value)


def _without_quantization(config: Config) -> dict[str, object]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if not _says_packed(key, value)
    }
