"""Packed weights in a recipe's models: carried over whole, left out by rules, or refused; never merged as numbers."""

from collections.abc import Sequence

from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.packed import UNPACKED, PackedWeights, packed_weights
from stockflow.recipe import Recipe
from stockflow.recipe.slices import slices_of
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import counted


def unread_models(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return a sentence for each model with packed weights, or their scales, that rules neither copy nor leave out."""
    found: dict[int, tuple[PackedWeights, ...]] = {}
    return [
        _sentence(checkpoint, packed)
        for checkpoint in checkpoints
        if (packed := [each for each in _packed(checkpoint, found) if not _is_kept(recipe, checkpoint, each)])
    ]


def _packed(checkpoint: Checkpoint, found: dict[int, tuple[PackedWeights, ...]]) -> tuple[PackedWeights, ...]:
    """Checkpoints of equal headers share their specs."""
    key = id(checkpoint.specs)
    if key not in found:
        found[key] = packed_weights(checkpoint.specs)
    return found[key]


def _is_kept(recipe: Recipe, checkpoint: Checkpoint, weights: PackedWeights) -> bool:
    """Return whether codes and scales all are copied, by rules or by the method, or left out."""
    return all(
        ((rule := recipe.rule_for(name)) is not None and rule.action is not None)
        or all(each.recipe.carries_over(name, checkpoint.specs[name].dtype) for each in slices_of(recipe))
        for name in weights.parts
    )


def _sentence(checkpoint: Checkpoint, packed: Sequence[PackedWeights]) -> str:
    formats = " and ".join(each.format for each in packed)
    num_codes = sum(len(each.codes) for each in packed)
    held = f"{redact(checkpoint.url)} holds {formats} weights ({counted(num_codes, 'tensor')}, such as "
    if {each.format for each in packed} == {"FP8"} and not any("scale" in name for name in checkpoint.specs):
        return (
            f"{held}{in_a_line(packed[0].codes[0])}), and no scale of them. If they were cast to eight bits as they "
            "were (`torch_dtype=torch.float8_e4m3fn`), cast them back, which changes no number: load the model with "
            f"`torch_dtype=torch.bfloat16` and save it; else their scales are lost. {UNPACKED}"
        )
    return (
        f"{held}{in_a_line(packed[0].codes[0])}), whose codes are numbers only with their scales; they are not read. "
        f"{UNPACKED}"
    )
