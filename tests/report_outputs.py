"""A merge whose report has everything to show: 32 layers, ratios that change with depth and kind, clamped tensors."""

import math
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import Family, make_tensors, write_checkpoint, write_recipe

HIDDEN, INNER, VOCABULARY = 48, 128, 320
NAMES = ("llama-3-base", "tulu-style-chat", "coder-sft", "math-instruct")


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the float tensors of a small Llama."""
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    layers = {
        f"model.layers.{layer}.{part}.weight": shape for layer in range(num_layers) for part, shape in per_layer.items()
    }
    ends = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **layers, **ends}


def cosine_of(name: str, num_layers: int) -> float:
    """Return what the task vectors of a tensor have in common: more in the middle layers, less in attention's keys."""
    if not name.startswith("model.layers."):
        return 0.25 if "embed" in name else 0.7
    layer = int(name.split(".")[2])
    depth = layer / max(num_layers - 1, 1)
    hill = math.exp(-(((depth - 0.55) / 0.28) ** 2))
    lowered = {"q_proj": 0.05, "k_proj": 0.16, "v_proj": 0.02, "gate_proj": -0.05, "down_proj": 0.04}
    part = next((value for key, value in lowered.items() if key in name), 0.0)
    if layer in (1, 2) and "k_proj" in name:
        return -0.2
    return min(0.22 + 0.55 * hill - part + 0.03 * math.sin(7.3 * layer), 0.95)


def make_varied_family(folder: Path, num_layers: int = 32) -> Family:
    """Write a base and three models tuned from it, whose task vectors agree more or less by layer and kind."""
    models: list[dict[str, torch.Tensor]] = [{} for _ in NAMES]
    sizes = (1.0, 1.35, 0.75)
    for number, (name, shape) in enumerate(shapes(num_layers).items()):
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        scale = 1.2e-3 * (1.0 + 1.6 * (layer / num_layers) ** 2)
        base, *tuned = make_tensors(
            name, shape, len(NAMES) - 1, cosine=cosine_of(name, num_layers), delta_scale=scale, seed=number
        )
        models[0][name] = base.to(torch.float32)
        for place, (tensor, size) in enumerate(zip(tuned, sizes, strict=True), start=1):
            # The last model swings with depth, the second has left the norms of the first layers as they were.
            swing = 1.0 + 0.5 * math.sin(layer / 4.0) if place == 3 else 1.0
            unchanged = place == 2 and "layernorm" in name and layer < 2
            models[place][name] = (base + (0.0 if unchanged else size * swing) * (tensor - base)).to(torch.float32)
    folders = [
        write_checkpoint(folder / name, tensors, num_shards=1 + place, seed=place)
        for place, (name, tensors) in enumerate(zip(NAMES, models, strict=True))
    ]
    return Family(folders[0], tuple(folders[1:]))


def write_varied_recipe(folder: Path, num_layers: int = 32, **top_level: Any) -> Path:
    """Make the family below ``folder`` and return the recipe that merges it by Model Stock."""
    family = make_varied_family(folder, num_layers)
    return write_recipe(folder / "recipe.yaml", "model_stock", family, dtype="float32", **top_level)
