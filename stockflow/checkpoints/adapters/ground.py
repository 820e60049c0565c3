"""The base of an adapter, as far as adapting it goes: its tensors, how they are stored, and what its config says."""

from collections.abc import Mapping
from dataclasses import dataclass

from stockflow.checkpoints.adapters.names import BaseNames
from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.decodes.stored import plain
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import head_beside, is_head, original_of, tie_flag, tied_names
from stockflow.checkpoints.quantised import Stored

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear layers store weights as ``[in, out]``."""


def stores_turned(config: Config | None) -> bool:
    """Return whether a model's linear layers store weights as ``[in, out]``."""
    return (config or {}).get("model_type") in _CONV1D


@dataclass(frozen=True, slots=True)
class Ground:
    """What is known of a base."""

    where: str
    specs: Mapping[str, TensorSpec]
    stored: Mapping[str, Stored]
    """of its tensors that are not plain"""
    names: BaseNames
    config: Config | None

    def stored_as(self, name: str) -> Stored:
        """Return how a tensor is stored."""
        return self.stored.get(name) or Stored(plain(self.specs[name].dtype), (self.specs[name],))

    def head_beside(self, embedding: str) -> str:
        """Return what a head is called that would be stored beside an embedding."""
        return head_beside(embedding, self.specs, self.config)

    def tied_original(self, head: str) -> str | None:
        """Return the embedding that a head stands for which the base does not store; None if there is none."""
        if not is_head(head) or tie_flag(self.config) is False:
            return None
        names = tied_names(self.specs)
        found = [each for each in names.embeddings if self.specs[each].shape]
        return original_of(head, self.specs[found[0]].shape, names, self.specs) if found and not names.heads else None
