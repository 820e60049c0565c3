"""Recomputed buffers: what loaders make anew from the config, and older files hold beside the weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.opening import Checkpoint
from stockflow.recipe import Recipe
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

_RECOMPUTED = re.compile(
    r"(^|\.)inv_freq$|(^|\.)rope\.freqs$|\.rotary_emb\.(cos|sin)_cached$|(^|\.)embeddings\.position_ids$|\.(attn|attention)\.(masked_bias|bias)$|\.attn\.embed_positions$"
    r"|\._extra_state$"
)
"""Rotary frequencies, the numbers of positions, causal masks: of a bias there is one row per head, not a mask; and
what TransformerEngine measured to scale FP8 by, which it measures anew.
"""


def without_recomputed(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints without the buffers that only some hold, or not all alike, and with a remark.

    Those that all hold, and those that a rule names, are kept.
    """
    first = checkpoints[0].specs
    others = [each.specs for each in checkpoints if each.specs is not first]
    uneven = {name for specs in others for name in (*(first.keys() ^ specs.keys()), *_stored_otherwise(first, specs))}
    uneven = set(filter(_RECOMPUTED.search, uneven))
    uneven = {
        name for name in uneven if all(_is_buffer(each.specs[name]) for each in checkpoints if name in each.specs)
    }
    dropped = {name for name in uneven if recipe.rule_for(name) is None}
    return [_without(each, dropped) for each in checkpoints] if dropped else list(checkpoints)


def _stored_otherwise(first: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    held = (name for name in first if name.endswith(("bias", "_cached", "_extra_state")) and name in specs)
    yield from (name for name in held if specs[name][1:] != first[name][1:])


def _is_buffer(spec: TensorSpec) -> bool:
    """Return whether a tensor that is named as a buffer is one: a causal mask has four axes, a bias has one."""
    return not spec.name.endswith(".bias") or (len(spec.shape) == 4 and spec.shape[:2] == (1, 1))


def _without(checkpoint: Checkpoint, names: set[str]) -> Checkpoint:
    held = [name for name in checkpoint.specs if name in names]
    if not held:
        return checkpoint
    url = redact(checkpoint.url)
    them = "it" if len(held) == 1 else "them"
    text = (
        f"{counted(len(held), 'buffer')} of {url} such as {shown(held[0])} {are(len(held))} left out: not every model "
        f"has {them} alike, and loaders compute {them}"
    )
    remark = Remark("recomputed", text, "note", models=(url,), tensors=tuple(held))
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in names}
    return replace(checkpoint, specs=specs, remarks=(*checkpoint.remarks, remark))
