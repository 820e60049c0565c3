"""Stacked factors: those of all experts in tensors of three dimensions, as Tinker saves them, cut into one per expert.

``experts.w1.lora_A`` is ``[E, rank, in]``, ``lora_B`` ``[E, out, rank]``; one for all experts is ``[1, ...]``.
Source: https://github.com/thinking-machines-lab/tinker-cookbook, ``weights``.
"""

from collections.abc import Iterator, Mapping

from stockflow.checkpoints.adapters.keys import PREFIX, KeyPlace, place_of
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.naming import EXPERT_WORDS

_WORDS = frozenset[str]().union(*EXPERT_WORDS.values())
Placed = tuple[TensorSpec, Extent]


def one_by_one(placed: Mapping[str, Placed]) -> dict[str, Placed]:
    """Return the tensors of an adapter by key, stacked factors as those of each expert."""
    stacks = {key: place for key, (spec, _) in placed.items() if (place := _stack_of(key, spec))}
    if not stacks:
        return dict(placed)
    sizes: dict[str, int] = {}
    for key, place in stacks.items():
        sizes[place.module] = max(sizes.get(place.module, 1), placed[key][0].shape[0])
    found: dict[str, Placed] = {}
    for key, (spec, extent) in placed.items():
        if key in stacks and spec.shape[0] in (1, num := sizes[stacks[key].module]):
            found |= {each[0].name: each for each in _cut(stacks[key], spec, extent, num)}
        else:
            found[key] = spec, extent
    return found


def _stack_of(key: str, spec: TensorSpec) -> KeyPlace | None:
    if len(spec.shape) != 3 or not spec.num_elems:
        return None
    place = place_of(key)
    is_factor = place.part in ("lora_A", "lora_B")
    return place if is_factor and place.module.rpartition(".")[2] in _WORDS and ".experts." in place.module else None


def _cut(place: KeyPlace, spec: TensorSpec, extent: Extent, num_experts: int) -> Iterator[Placed]:
    (root, _, word), own = place.module.rpartition("."), spec._replace(shape=spec.shape[1:])
    for expert in range(num_experts):
        start = extent.start + own.num_bytes * (expert if spec.shape[0] > 1 else 0)
        yield own._replace(name=f"{PREFIX}{root}.{expert}.{word}.{place.part}.weight"), Extent(extent.file, start)
