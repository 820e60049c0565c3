"""Experts that a base has in one tensor and an adapter one by one: the tensors of the base with these cut apart.

``gate_up_proj`` is ``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``, so that each matrix is a run of bytes.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from stockflow.checkpoints.adapters.names import BaseNames
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import Extent
from stockflow.checkpoints.naming import EXPERT_WORDS

_COMMON, _MIXTRAL = zip(*EXPERT_WORDS.values(), strict=True)
"""Of gate, up and down."""
_OF_EXPERT = re.compile(rf"(?P<root>.+)\.\d+\.(?P<word>{'|'.join(_COMMON + _MIXTRAL)})")


class PlainTensors(NamedTuple):
    """Tensors that lie in files as plain numbers."""

    specs: Mapping[str, TensorSpec]
    extents: Mapping[str, Extent]


def with_experts_apart(
    base: PlainTensors, names: BaseNames, coded: Collection[str], modules: Collection[str]
) -> PlainTensors:
    """Return a base's tensors, those cut into matrices whose experts some modules are of; else the base itself.

    Args:
        base: its tensors.
        names: theirs.
        coded: those that are not plain.
        modules: what an adapter changes.
    """
    found = {module: match for module in modules if (match := _OF_EXPERT.fullmatch(module))}
    missing = {match["root"]: match["word"] for module, match in found.items() if not names.find(f"{module}.weight")}
    cuts = {name: cut for root, word in missing.items() for name, cut in _cuts(base, names, root, word).items()}
    if not cuts or cuts.keys() & set(coded):
        return base
    specs, extents = dict[str, TensorSpec](), dict(base.extents)
    for name, spec in base.specs.items():
        if name not in cuts:
            specs[name] = spec
            continue
        file, start = extents.pop(name)
        for part in cuts[name]:
            specs[part.name], extents[part.name] = part, Extent(file, start)
            start += part.num_bytes
    return PlainTensors(specs, extents)


def _cuts(base: PlainTensors, names: BaseNames, root: str, word: str) -> dict[str, list[TensorSpec]]:
    """Return the matrices in the two tensors that hold a layer's experts, in the order of their bytes."""
    found = [names.find(f"{root}.{own}") for own in ("gate_up_proj", "down_proj")]
    gate_up, down = (base.specs.get(name or "") for name in found)
    if not gate_up or not down or len(down.shape) != 3 or not down.num_elems:
        return {}
    num, hidden, inner = down.shape
    if gate_up.shape != (num, 2 * inner, hidden):
        return {}
    gate, up, out = _MIXTRAL if word in _MIXTRAL else _COMMON
    return {
        gate_up.name: list(_matrices(gate_up, num, (gate, up), (inner, hidden))),
        down.name: list(_matrices(down, num, (out,), (hidden, inner))),
    }


def _matrices(whole: TensorSpec, num: int, words: tuple[str, ...], shape: tuple[int, int]) -> Iterator[TensorSpec]:
    stem = whole.name.rpartition(".")[0]
    for expert in range(num):
        for word in words:
            yield whole._replace(name=f"{stem}.{expert}.{word}.weight", shape=shape)
