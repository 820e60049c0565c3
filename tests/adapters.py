"""Adapters as PEFT writes them, and what they make of a base in float64: numpy, no code of the product or of PEFT.

Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); the keys and layouts that PEFT 0.21
saves, which `test_adapters_peft.py` holds against PEFT itself.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Floats = np.ndarray[Any, np.dtype[np.float64]]
Shapes = Mapping[str, tuple[int, ...]]
PREFIX = "base_model.model."
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 5, 8.0


@dataclass
class Adapter:
    """Tensors by key, what the config says, and what becomes of the tensors of a base."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Callable[[Floats], Floats]] = field(default_factory=dict)
    """by the name of a tensor of the base"""

    def of(self, base: Mapping[str, Floats]) -> dict[str, Floats]:
        """Return the tensors of a base with this adapter."""
        return {name: self.changes[name](values) if name in self.changes else values for name, values in base.items()}

    def draw(self, key: str, shape: tuple[int, ...], random: np.random.Generator) -> Floats:
        """Add a tensor of float32 and return its values."""
        values = (0.1 * random.standard_normal(shape)).astype(np.float32)
        self.tensors[f"{PREFIX}{key}"] = torch.from_numpy(values)
        return values.astype(np.float64)


def write_adapter(folder: Path, adapter: Adapter, **said: Any) -> Path:
    """Write the folder of an adapter and return it; ``said`` stands before its own config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in adapter.tensors.items()}, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **adapter.config, **said}))
    return folder


def linear(shapes: Shapes, modules: Sequence[str] = PROJECTIONS, *, seed: int = 0, **config: Any) -> Adapter:
    """Return plain factors for every weight of these modules; ``r``, ``lora_alpha`` and ``use_rslora`` count."""
    random, made = np.random.default_rng([11, seed]), Adapter(config=config)
    rank, alpha = config.get("r", RANK), config.get("lora_alpha", ALPHA)
    scale = alpha / np.sqrt(rank) if config.get("use_rslora") else alpha / rank
    for name, shape in shapes.items():
        if len(shape) == 2 and name.split(".")[-2] in modules:
            module = name.removesuffix(".weight")
            a = made.draw(f"{module}.lora_A.weight", (rank, shape[1]), random)
            b = made.draw(f"{module}.lora_B.weight", (shape[0], rank), random)
            made.changes[name] = lambda w, a=a, b=b: w + scale * (b @ a)
    return made


def patterned(shapes: Shapes) -> Adapter:
    """Return factors whose rank and alpha follow patterns, each looked up by itself."""
    config = {
        "rank_pattern": {r"^model.layers.1.mlp.up_proj": 2, "k_proj": 3},
        "alpha_pattern": {r"layers\.0\..*v_proj": 16, "k_proj": 1, "self_attn.k_proj": 99, "roj": 50},
    }
    made = Adapter(config=config)
    for name in (each for each in shapes if each.split(".")[-2] in PROJECTIONS):
        rank = 2 if name == "model.layers.1.mlp.up_proj.weight" else 3 if "k_proj" in name else RANK
        alpha = 16.0 if "layers.0." in name and "v_proj" in name else 1.0 if "k_proj" in name else ALPHA
        one = linear({name: shapes[name]}, seed=len(name), r=rank, lora_alpha=alpha)
        made.tensors |= one.tensors
        made.changes |= one.changes
    return made


def turned(shapes: Shapes) -> Adapter:
    """Return factors of weights that are stored as ``[in, out]``: Conv1D."""
    straight = linear({name: shape[::-1] for name, shape in shapes.items() if len(shape) == 2})
    straight.config["fan_in_fan_out"] = True
    straight.changes = {name: lambda w, c=change: c(w.T).T for name, change in straight.changes.items()}
    return straight


def embedded(shapes: Shapes) -> Adapter:
    """Return factors of the embedding and the head, with a copy of the former that is another than the base's."""
    random, made = np.random.default_rng(12), Adapter()
    rows, columns = shapes["model.embed_tokens.weight"]
    copy = made.draw("model.embed_tokens.base_layer.weight", (rows, columns), random)
    a = made.draw("model.embed_tokens.lora_embedding_A", (RANK, rows), random)
    b = made.draw("model.embed_tokens.lora_embedding_B", (columns, RANK), random)
    made.changes["model.embed_tokens.weight"] = lambda w: copy + ALPHA / RANK * (b @ a).T
    head = linear({"lm_head.weight": (rows, columns)}, ["lm_head"], seed=1)
    return Adapter(made.tensors | head.tensors, {}, made.changes | head.changes)


def saved(shapes: Shapes) -> Adapter:
    """Return modules that are saved whole beside factors."""
    random, made = np.random.default_rng(13), linear(shapes, ["q_proj"])
    made.config["modules_to_save"] = ["embed_tokens", "lm_head", "model.norm"]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        values = made.draw(name, shapes[name], random)
        made.changes[name] = lambda w, values=values: values
    return made


def tokens(shapes: Shapes) -> Adapter:
    """Return rows that stand in for those of some tokens."""
    made, indices = linear(shapes, ["q_proj"]), [5, 0, shapes["model.embed_tokens.weight"][0] - 1]
    made.config["trainable_token_indices"] = indices
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = made.draw(key, (3, shapes["model.embed_tokens.weight"][1]), np.random.default_rng(14))

    def replaced(w: Floats) -> Floats:
        w = w.copy()
        w[indices] = rows
        return w

    made.changes["model.embed_tokens.weight"] = replaced
    return made


def with_lengths(shapes: Shapes) -> Adapter:
    """Return factors whose sums have rows of given lengths: DoRA."""
    random, made = np.random.default_rng(15), linear(shapes)
    made.config["use_dora"] = True
    for name, change in list(made.changes.items()):
        lengths = made.draw(f"{name.removesuffix('.weight')}.lora_magnitude_vector", shapes[name][:1], random)

        def scaled(w: Floats, change: Any = change, lengths: Floats = lengths) -> Floats:
            summed = change(w)
            return lengths[:, np.newaxis] * summed / np.linalg.norm(summed, axis=1, keepdims=True)

        made.changes[name] = scaled
    return made


def biased(shapes: Shapes) -> Adapter:
    """Return biases that were trained along (`bias: all`), and in one layer what LoRA adds to one (`lora_bias`)."""
    random, made = np.random.default_rng(16), linear(shapes)
    made.config |= {"bias": "all", "lora_bias": True}
    for name in (each for each in shapes if each.endswith(".bias")):
        if "layers.0" in name:
            values = made.draw(name, shapes[name], random)
            made.changes[name] = lambda w, values=values: values
        else:
            values = made.draw(f"{name.removesuffix('.bias')}.lora_B.bias", shapes[name], random)
            made.changes[name] = lambda w, values=values: w + ALPHA / RANK * values
    return made


def of_experts(
    module: str,
    shapes: Mapping[str, tuple[int, int, int]],
    targets: Sequence[str],
    *,
    is_turned: bool = False,
    seed: int = 0,
) -> Adapter:
    """Return factors of all experts of a module at once; of two targets the first is the inner one.

    ``shapes`` are ``[experts, out, in]``, of the matrices as they are applied; ``is_turned``: stored as ``[in, out]``.
    """
    random, made = np.random.default_rng([17, seed]), Adapter()
    made.config["target_parameters"] = [f"{module.split('.', 3)[-1]}.{target}" for target in targets]
    for depth, target in enumerate(reversed(targets)):
        num_experts, rows, columns = shapes[target]
        wrapper = module + depth * ".base_layer"
        a = made.draw(f"{wrapper}.lora_A.weight", (RANK * num_experts, columns), random)
        b = made.draw(f"{wrapper}.lora_B.weight", (rows, RANK * num_experts), random)
        of_each = np.einsum("ore,eri->eoi", b.reshape(rows, RANK, num_experts), a.reshape(num_experts, RANK, columns))
        delta = ALPHA / RANK * (of_each.swapaxes(1, 2) if is_turned else of_each)
        made.changes[f"{module}.{target}"] = lambda w, delta=delta: w + delta
    return made
