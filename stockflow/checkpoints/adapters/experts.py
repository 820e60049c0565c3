"""Factors of all experts of a layer at once, as PEFT keeps them for parameters that hold the experts' matrices.

``A`` is ``[experts * rank, in]``, expert by expert; ``B`` is ``[out, rank * experts]``, rank by rank.
Source: ``ParamWrapper`` of PEFT 0.21.
"""

from collections.abc import Callable, Iterator
from typing import Any

from stockflow.checkpoints.adapters.config import ModuleScales
from stockflow.checkpoints.adapters.ground import Ground
from stockflow.checkpoints.adapters.keys import NESTED
from stockflow.checkpoints.adapters.opening import Adapter
from stockflow.checkpoints.decodes.low_rank import LowRank
from stockflow.checkpoints.decodes.stored import Decode
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.errors import CheckpointError
from stockflow.text.strictjson import shown

LAYOUT = "peft"
_DECLARED = f'"moe_lora_layout": "{LAYOUT}"'
TURNED = frozenset({"gpt_oss"})
"""Families whose experts' matrices are ``[in, out]``."""
_SWAPS = (0, 19)
"""The first version of PEFT that takes matrices of ``[out, in]`` for such."""


Change = Callable[[Decode], LowRank]
"""Returns how a tensor is stored that factors change, given how its base is."""


def expert_factors(
    ground: Ground, adapter: Adapter, scales: ModuleScales, module: str, keys: tuple[str, str]
) -> list[tuple[str, Change]]:
    """Return the tensors of the base that two factors change; none if the module holds no parameters of experts.

    Raises:
        CheckpointError: they do not fit, or nothing says how they are laid out.
    """
    root = module.removesuffix(NESTED)
    targets = _targets(adapter, root)
    depth = int(module != root)
    if not targets or depth >= len(targets) or root.endswith(NESTED):
        return []
    parameter = targets[len(targets) - 1 - depth]  # the one that is declared first is wrapped first
    _check_layout(adapter, module)
    a, b = (adapter.specs[key] for key in keys)
    name = ground.names.find(f"{root}.{parameter}")
    if name is not None and len(ground.specs[name].shape) == 3:
        num_experts, rows, columns = ground.specs[name].shape
        rank = a.shape[0] // num_experts if len(a.shape) == 2 and num_experts else 0
        turned = _is_turned(ground, adapter, name, (a, b), rank * num_experts)
        scale = _scale(adapter, scales, root, parameter, rank)
        return [(name, _change(rank, scale, (a, b), (rows, columns), num_experts, is_transposed=turned))]
    return list(_one_by_one(ground, adapter, scales, (root, parameter), (a, b)))


def _one_by_one(
    ground: Ground,
    adapter: Adapter,
    scales: ModuleScales,
    place: tuple[str, str],
    factors: tuple[TensorSpec, TensorSpec],
) -> Iterator[tuple[str, Change]]:
    """Yield what the factors are to matrices that the base stores expert by expert."""
    (root, parameter), (a, b) = place, factors
    found = list(ground.names.experts(root, parameter))
    num_experts = max((expert for expert, _, _ in found), default=-1) + 1
    if not num_experts or len(a.shape) != 2 or len(b.shape) != 2:
        return
    rank, first_row = a.shape[0] // num_experts, 0
    scale = _scale(adapter, scales, root, parameter, rank)
    for expert, place_within, name in found:
        rows, columns = ground.specs[name].shape
        first_row = first_row if place_within else 0
        fits = columns == a.shape[1] and first_row + rows <= b.shape[0]
        if not fits or (rank * num_experts,) != a.shape[:1] or b.shape[1] != rank * num_experts:
            raise CheckpointError(_misfit(adapter, name, [rows, columns], factors))
        matrix = rows, columns
        yield name, _change(rank, scale, factors, matrix, num_experts, expert=expert, first_row=first_row)
        first_row += rows


def _change(
    rank: int, scale: float, factors: tuple[TensorSpec, TensorSpec], matrix: tuple[int, int], num: int, **more: Any
) -> Change:
    dtypes = factors[0].dtype, factors[1].dtype
    return lambda inner: LowRank(inner, rank, scale, dtypes, matrix, num_experts=num, **more)


def _targets(adapter: Adapter, root: str) -> list[str]:
    """Return the parameters of a module that are adapted, in the order in which models declare them."""
    found = adapter.config.parameters_of(root)
    return sorted(found, key=lambda name: ("down" in name or name.endswith("output_linear"), name))


def _check_layout(adapter: Adapter, module: str) -> None:
    config = adapter.config
    if config.expert_layout != LAYOUT and (config.expert_layout is not None or not config.version):
        what = f"that of {shown(config.expert_layout)}" if config.expert_layout else "not said"
        raise CheckpointError(
            f"{adapter.where}: the layout of the factors of {shown(module)}, for all experts, is {what}; trainers "
            f"differ there with equal shapes. If it is PEFT's, say so in adapter_config.json: {_DECLARED}"
        )


def _is_turned(
    ground: Ground, adapter: Adapter, name: str, factors: tuple[TensorSpec, TensorSpec], stacked: int
) -> bool:
    """Return whether the base stores its matrices as ``[in, out]``; of square ones, family and version tell it."""
    rows, columns = ground.specs[name].shape[1:]
    found = tuple(each.shape for each in factors)
    straight, turned = ((stacked, columns), (rows, stacked)), ((stacked, rows), (columns, stacked))
    if not stacked or found not in (straight, turned):
        raise CheckpointError(_misfit(adapter, name, [rows, columns], factors))
    if straight == turned:
        is_turned = (ground.config or {}).get("model_type") in TURNED or adapter.config.version < _SWAPS
        return is_turned != ground.stored_as(name).is_in_blocks
    return found == turned


def _scale(adapter: Adapter, scales: ModuleScales, root: str, parameter: str, rank: int) -> float:
    whole = f"{root}.{parameter}"
    expected = scales.ranks_of(whole) | scales.ranks_of(root)
    if rank not in expected:
        raise CheckpointError(
            f"{adapter.where}: the factors of {shown(whole)} have the rank {rank} per expert, and "
            f"adapter_config.json says {' or '.join(map(str, sorted(expected)))}; the two do not belong together"
        )
    return scales.scale_of(whole, rank)


def _misfit(adapter: Adapter, name: str, sizes: list[int], factors: tuple[TensorSpec, TensorSpec]) -> str:
    shapes = " and ".join(str(list(each.shape)) for each in factors)
    return (
        f"{adapter.where}: factors of {shapes} for all experts make no change of {shown(name)}, whose matrices "
        f"are {sizes}; name the base the adapter was trained on"
    )
