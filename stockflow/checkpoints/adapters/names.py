"""Names of modules in an adapter and of tensors in its base, which differ in what wraps the model."""

from collections.abc import Iterator, Mapping

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import EXPERT_WORDS, WRAPPERS

_OTHERWISE = (
    (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."), (".attn.", ".self_attn."),
    ("unembed_tokens.", "lm_head."), ("lm_head.", "embed_out."), (".mlp.", ".block_sparse_moe."),
)  # fmt: skip
"""What Tinker, and for GPT-NeoX and Mixtral transformers 5, calls modules, and what files of most bases do."""
_OF_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Which of an expert's matrices are fused, in this order."""


def unwrapped(name: str) -> str:
    """Return a name without the parts at its begin that say what held the model as it was saved."""
    parts = name.split(".")
    first = next((number for number, part in enumerate(parts) if part not in WRAPPERS), len(parts) - 1)
    return ".".join(parts[first:])


class BaseNames:
    """The names of a base's tensors, found by what an adapter calls them."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        """Take the tensors of the base."""
        self._specs = specs
        self._alike: dict[str, list[str]] = {}
        for name in specs:
            self._alike.setdefault(unwrapped(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the name that a tensor has in the base: the same, or the only one that differs in wrappers alone."""
        if name in self._specs:
            return name
        alike = self._alike.get(unwrapped(name), ())
        if len(alike) == 1:
            return alike[0]
        others = (name.replace(ours, theirs) for ours, theirs in _OTHERWISE if ours in name)
        return next((found for other in others if (found := self.find(other))), None)

    def experts(self, module: str, fused: str) -> Iterator[tuple[int, int, str]]:
        """Yield the matrices that a base stores one by one where a model has them fused.

        Each comes with its expert, its place among those that are fused, and its name.
        """
        expert = 0
        while found := self._expert(f"{module}.{expert}", fused):
            yield from ((expert, place, name) for place, name in enumerate(found))
            expert += 1

    def _expert(self, module: str, fused: str) -> list[str]:
        names = [
            next(filter(None, (self.find(f"{module}.{word}.weight") for word in EXPERT_WORDS[role])), None)
            for role in _OF_FUSED.get(fused, ())
        ]
        return [name for name in names if name] if all(names) else []
