"""Small models with experts, the same numbers in every layout that families and library versions store them in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import Family, make_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What experts have of everything."""

    num_experts: int = 3
    hidden: int = 6
    inner: int = 4
    num_layers: int = 2


SMALL = Sizes()


def separate(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Qwen3-MoE and DeepSeek have them."""
    roles = {"down_proj": down, "gate_proj": gate, "up_proj": up}
    return {
        f"{layer}.mlp.experts.{number}.{role}.weight": of_all[number].clone()
        for number in range(len(gate))
        for role, of_all in roles.items()
    }


def mixtral(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Mixtral and MiniMax have them."""
    roles = {"w1": gate, "w2": down, "w3": up}
    return {
        f"{layer}.block_sparse_moe.experts.{number}.{role}.weight": of_all[number].clone()
        for number in range(len(gate))
        for role, of_all in roles.items()
    }


def fused(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Qwen3.5 has them, and transformers 5 within."""
    return {f"{layer}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.mlp.experts.down_proj": down}


def granite(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As GraniteMoE has them."""
    return {
        f"{layer}.block_sparse_moe.input_linear.weight": torch.cat([gate, up], 1),
        f"{layer}.block_sparse_moe.output_linear.weight": down,
    }


def llama4(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Llama 4 has them, but for the name of the block; Qwen3-VL-MoE with this one."""
    gate_up = torch.cat([gate, up], 1).transpose(1, 2).contiguous()
    return {
        f"{layer}.feed_forward.experts.gate_up_proj": gate_up,
        f"{layer}.feed_forward.experts.down_proj": down.transpose(1, 2).contiguous(),
    }


def qwen_vl(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Qwen3-VL-MoE has them."""
    found = llama4(layer, gate, up, down)
    return {name.replace("feed_forward", "mlp"): value for name, value in found.items()}


def gpt_oss(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As gpt-oss has them in BF16: gate and up by turns."""
    gate_up = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()
    stem = f"{layer}.mlp.experts"
    return {
        f"{stem}.gate_up_proj": gate_up,
        f"{stem}.gate_up_proj_bias": torch.ones(gate.shape[0], 2 * gate.shape[1], dtype=gate.dtype),
        f"{stem}.down_proj": down.transpose(1, 2).contiguous(),
        f"{stem}.down_proj_bias": torch.ones(down.shape[:2], dtype=down.dtype),
    }


def step(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As Step has them."""
    roles = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{layer}.moe.{role}.weight": value.clone() for role, value in roles.items()}


def turned_step(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """The same, transposed."""
    return step(layer, *(each.transpose(1, 2).contiguous() for each in (gate, up, down)))


def dbrx(layer: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """As DBRX has them."""
    roles = {"w1": gate, "v1": up, "w2": down.transpose(1, 2)}
    return {f"{layer}.ffn.experts.mlp.{role}": value.flatten(0, 1).contiguous() for role, value in roles.items()}


Layout = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], Tensors]
LAYOUTS: Mapping[str, Layout] = {
    each.__name__: each
    for each in (separate, mixtral, fused, granite, llama4, qwen_vl, gpt_oss, step, turned_step, dbrx)
}


def models(
    num_tuned: int, layouts: Mapping[int, str] | str, sizes: Sizes = SMALL, prefix: str = "model."
) -> list[Tensors]:
    """Return a base and models tuned from it in BF16, each in its layout."""
    named = {number: layouts if isinstance(layouts, str) else layouts[number] for number in range(num_tuned + 1)}
    of_family = {"mixtral": "block_sparse_moe", "granite": "block_sparse_moe", "llama4": "feed_forward"}
    of_family |= {"step": "moe", "turned_step": "moe", "dbrx": "ffn"}
    blocks = {number: of_family.get(name, "mlp") for number, name in named.items()}
    found: list[Tensors] = [{} for _ in named]
    for number, each in enumerate(_drawn("embed_tokens", num_tuned, (11, sizes.hidden))):
        found[number][f"{prefix}embed_tokens.weight"] = each
    for layer in range(sizes.num_layers):
        place = f"{prefix}layers.{layer}"
        shape = (sizes.num_experts, sizes.inner, sizes.hidden)
        gates, ups = (_drawn(f"{layer}.{role}", num_tuned, shape) for role in ("gate", "up"))
        downs = _drawn(f"{layer}.down", num_tuned, (shape[0], shape[2], shape[1]))
        routers = _drawn(f"{layer}.router", num_tuned, (sizes.num_experts, sizes.hidden))
        for number, layout in named.items():
            found[number][f"{place}.{blocks[number]}.gate.weight"] = routers[number]
            found[number] |= LAYOUTS[layout](place, gates[number], ups[number], downs[number])
    return found


def _drawn(name: str, num_tuned: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [each.to(torch.bfloat16) for each in make_tensors(name, shape, num_tuned)]


def family(folder: Path, num_tuned: int, layouts: Mapping[int, str] | str, sizes: Sizes = SMALL) -> Family:
    """Write a base and models tuned from it."""
    config: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": sizes.num_layers,
        "hidden_size": sizes.hidden,
    }
    config |= {"ffn_config": {"moe_num_experts": sizes.num_experts}}
    folders = [
        write_checkpoint(folder / (f"tuned-{number}" if number else "base"), each, num_shards=1 + number, config=config)
        for number, each in enumerate(models(num_tuned, layouts, sizes))
    ]
    return Family(folders[0], tuple(folders[1:]))
