"""Checkpoints of any size, made fast: base plus tuned models of a Llama-like shape, each sharded differently."""

from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN = 2048
ROWS_PER_LAYER = 12_288


def layer_shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes whose BF16 tensors take about ``num_bytes``."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, HIDDEN)}
    per_layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (ROWS_PER_LAYER // 2, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, ROWS_PER_LAYER // 2),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    size = 2 * 32_000 * HIDDEN
    layer = 0
    while size < num_bytes:
        for name, shape in per_layer.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
            size += 2 * torch.Size(shape).numel()
        layer += 1
    return shapes


def make(folder: Path, *, num_tuned: int, num_bytes: int, seed: int = 0) -> list[Path]:
    """Write base and tuned checkpoints (cosine of task vectors about 0.5) and return their folders, base first."""
    shapes = layer_shapes(num_bytes)
    folders = [folder / "base", *(folder / f"tuned-{index}" for index in range(1, num_tuned + 1))]
    for index, path in enumerate(folders):
        path.mkdir(parents=True, exist_ok=True)
        _write(path, shapes, index, num_shards=2 + index, seed=seed)
    recipe = "".join(f"  - model: {path}\n" for path in folders[1:])
    (folder / "recipe.yaml").write_text(f"merge_method: model_stock\nbase_model: {folders[0]}\nmodels:\n{recipe}")
    return folders


def _write(path: Path, shapes: dict[str, tuple[int, ...]], index: int, *, num_shards: int, seed: int) -> None:
    names = list(shapes)
    per_shard = -(-len(names) // num_shards)
    groups = [names[start : start + per_shard] for start in range(0, len(names), per_shard)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(
            {name: _tensor(names.index(name), shapes[name], index, seed) for name in group},
            path / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(group, file)
    import json

    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')


def _tensor(number: int, shape: tuple[int, ...], index: int, seed: int) -> torch.Tensor:
    """``base``, or ``base + common + own``: the common and the own part of a task vector have equal norms."""

    def noise(stream: int, scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number * 101 + stream)
        return torch.randn(shape, generator=generator) * scale

    tensor = noise(0, 0.02)
    if index:
        tensor += noise(1, 1e-3)
        tensor += noise(1 + index, 1e-3)
    return tensor.bfloat16()
