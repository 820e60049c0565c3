"""The config that is published: the donor's, made true of what is written. The one place where it is derived.

The dtype keys alone are stated later, when it is known what was written (``output.publish``).
"""

from collections.abc import Sequence

from stockflow.checkpoints.configs import Config, quantization_keys, says_packed
from stockflow.checkpoints.heads import tie_flag, untied
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.packed import packed_weights
from stockflow.planning.job import TensorJob
from stockflow.planning.layer_config import restacked
from stockflow.planning.targets import Stacking
from stockflow.planning.ties import written_heads
from stockflow.recipe import Recipe


def output_config(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], jobs: Sequence[TensorJob], stackings: Sequence[Stacking] = ()
) -> Config | None:
    """Return the config to publish with what the jobs write; None if the donor has none."""
    donor = checkpoints[recipe.donor]
    config = donor.config
    if config is None:
        return None
    if any(quantization_keys(config)) and not packed_weights({job.output.name: job.output for job in jobs}):
        config = _without_quantization(config)
    for stacking in stackings:
        config = restacked(config, stacking, checkpoints)
    if tie_flag(config) is not False and any(head.is_parted(donor) for head in written_heads(checkpoints, jobs)):
        config = untied(config)
    return config


def _without_quantization(config: Config) -> dict[str, object]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if not says_packed(key, value)
    }
