"""Recomputed buffers: what loaders make anew from the config, and older files hold beside the weights."""

from collections.abc import Sequence
from dataclasses import replace

from stockflow.checkpoints.opening import Checkpoint
from stockflow.recipe import Recipe
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted

_RECOMPUTED = ".rotary_emb.inv_freq"


def without_recomputed(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints without the rotary frequencies that only some hold, and with what is to be said of that.

    Frequencies that all hold, and those that a rule names, are kept.
    """
    first = checkpoints[0].specs.keys()
    uneven = {name for each in checkpoints[1:] for name in first ^ each.specs.keys() if name.endswith(_RECOMPUTED)}
    dropped = {name for name in uneven if recipe.rule_for(name) is None}
    return [_without(each, dropped) for each in checkpoints] if dropped else list(checkpoints)


def _without(checkpoint: Checkpoint, names: set[str]) -> Checkpoint:
    held = [name for name in checkpoint.specs if name in names]
    if not held:
        return checkpoint
    url = redact(checkpoint.url)
    text = f"{counted(len(held), 'buffer')} `rotary_emb.inv_freq` of {url} are left out: not every model has them"
    remark = Remark("recomputed", f"{text}, and loaders compute them", "note", models=(url,), tensors=tuple(held))
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in names}
    return replace(checkpoint, specs=specs, remarks=(*checkpoint.remarks, remark))
