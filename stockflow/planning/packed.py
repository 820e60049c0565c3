"""Packed weights in a recipe's models: carried over whole, left out by rules, or refused; never merged as numbers."""

from collections.abc import Sequence

from stockflow.checkpoints.configs import quantization_keys
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.packed import UNPACKED, PackedWeights, packed_weights
from stockflow.checkpoints.weights import TWO_SETS
from stockflow.recipe import Recipe
from stockflow.recipe.slices import slices_of
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import counted

_CAST = (
    "if they were cast as they were (`model.to(torch.float8_e4m3fn)`, ComfyUI's fp8 files), cast each file back, which "
    "changes no number: `save_file({k: v.bfloat16() if 'float8' in str(v.dtype) else v for k, v in "
    "load_file(FILE).items()}, OUTPUT)` (safetensors.torch); else their scales are lost"
)


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
    if sets := next((each.text for each in checkpoint.remarks if each.code == TWO_SETS), ""):
        read = in_a_line(checkpoint.extents[packed[0].codes[0]].file)
        return f"{sets.partition('; accepted')[0]}. {read} holds {formats} weights, which are not read: take the other"
    num_codes = sum(len(each.codes) for each in packed)
    held = f"{redact(checkpoint.url)} holds {formats} weights ({counted(num_codes, 'tensor')}, such as "
    if {each.format for each in packed} == {"FP8"} and not _has_scales(checkpoint, packed):
        says_so = next(quantization_keys(checkpoint.config or {}), "")
        why = f"its config has `{in_a_line(says_so)}`, so there were some, and they are lost" if says_so else _CAST
        return f"{held}{in_a_line(packed[0].codes[0])}), and no scale of them: {why}. {UNPACKED}"
    return (
        f"{held}{in_a_line(packed[0].codes[0])}), whose codes are numbers only with their scales; they are not read. "
        f"{UNPACKED}"
    )


def _has_scales(checkpoint: Checkpoint, packed: Sequence[PackedWeights]) -> bool:
    """Return whether anything may be a scale of codes; the ``scale`` of a norm, as Flux calls its weight, is none."""
    parts = {name for each in packed for name in each.parts}
    return any("scale" in name and (not name.endswith(".scale") or name in parts) for name in checkpoint.specs)
