"""The config that is published: the donor's, made true of what is written. The one place where it is derived.

The dtype keys alone are stated later, when it is known what was written (``output.publish``).
"""

from collections.abc import Sequence

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.heads import LANGUAGE_PARTS, is_head, tie_flag, tie_flags, with_tie_flag
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.token_rows import vocabulary_rows
from stockflow.planning.config.layers import restacked
from stockflow.planning.config.stated import stated_quantization
from stockflow.planning.job import TensorJob
from stockflow.planning.targets import Stacking
from stockflow.planning.ties import written_heads
from stockflow.recipe import Recipe
from stockflow.storage import halves_of


def output_config(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    jobs: Sequence[TensorJob],
    stackings: Sequence[Stacking] = (),
    num_rows: int | None = None,
) -> Config | None:
    """Return the config to publish with what the jobs write; None if the donor has none.

    Args:
        recipe: names the donor.
        checkpoints: what its models say.
        jobs: what is written.
        stackings: how layers are put together.
        num_rows: of the embedding, if they are others than the donor's. A donor with an adapter may have others, too.
    """
    donor = checkpoints[recipe.donor]
    config = donor.config
    if config is None:
        return None
    config = stated_quantization(config, recipe, donor, jobs)
    for stacking in stackings:
        config = restacked(config, stacking, checkpoints)
    heads = [each for each in written_heads(checkpoints, jobs) if is_head(each.head.output.name)]
    if tie_flag(config) is not False and any(head.is_parted(donor) for head in heads):
        config = with_tie_flag(config, False)
    elif tie_flag(config) is None and tie_flags(config):  # it says both: what is written decides
        config = with_tie_flag(config, not any(head.own for head in heads))
    rows = num_rows or (vocabulary_rows(donor.specs) if len(halves_of(donor.url)) > 1 else 0)
    return _with_vocab_size(config, rows) if rows else config


def _with_vocab_size(config: Config, num_rows: int) -> dict[str, object]:
    """Return a config with the size of its vocabulary, at the top or in the config of the language model."""
    sized = {
        key: _with_vocab_size(value, num_rows) if key in LANGUAGE_PARTS and isinstance(value, dict) else value
        for key, value in config.items()
    }
    return sized | {"vocab_size": num_rows} if "vocab_size" in config else sized
