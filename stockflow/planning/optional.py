"""Optional parts: layers that predict further tokens, towers for images and sound; tunes mostly come without them."""

import re
from collections.abc import Iterable

from stockflow.checkpoints.configs import Config, first, sections
from stockflow.checkpoints.heads import COPIES_IN_LAYERS
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.towers import NUM_LAYERS_KEYS

PREDICTION = "layers that predict further tokens"
_TOWERS = {
    "the vision tower": r"vis(ion|ual)(_(tower|model|encoder|embed_tokens|adapter|projection|language_adapter))?"
    r"|(multi_modal|mm|vision)_projector|mm_vision_tower|embed_vision|image_(encoder|newline)|patch_merger",
    "the audio tower": r"(audio|speech)(_(tower|model|encoder|projector|projection|adapter|bit_audio_tower))?"
    r"|embed_audio|audio_multi_modal_projector",
}
_NAMED_PREDICTION = r"mtp(_\w+)?|nextn|multi_token_prediction\w*"
NUM_PREDICTED = first("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_NUM_LAYERS = first(*NUM_LAYERS_KEYS)
MAX_BEYOND = 64


class OptionalParts:
    """The optional parts of a checkpoint, and who lacks them."""

    def __init__(self, donor: Checkpoint) -> None:
        """Take the checkpoint that has them."""
        patterns = {**_TOWERS, PREDICTION: _prediction(donor.config or {})}
        self._parts = {noun: re.compile(rf"(^|\.)({pattern})(\.|$)") for noun, pattern in patterns.items()}
        self._held: dict[int, frozenset[str | None]] = {}

    def of(self, name: str) -> str | None:
        """Return which part a tensor of the donor's belongs to, None if to none."""
        return next((noun for noun, pattern in self._parts.items() if pattern.search(name)), None)

    def is_lacked(self, name: str, checkpoints: Iterable[Checkpoint]) -> bool:
        """Return whether a tensor of the donor's is of a part of which none of these has any tensor."""
        part = self.of(name)
        return part is not None and all(part not in self._held_by(each) for each in checkpoints)

    def _held_by(self, checkpoint: Checkpoint) -> frozenset[str | None]:
        layout = id(checkpoint.specs)
        if layout not in self._held:
            self._held[layout] = frozenset(
                self.of(name) for name in checkpoint.specs if not name.endswith(COPIES_IN_LAYERS)
            )
        return self._held[layout]


def _prediction(config: Config) -> str:
    """What is in names of layers that predict further tokens: layers beyond the last, where a config counts any."""
    beyond = [
        number
        for _, section in sections(config)
        if isinstance(count := NUM_PREDICTED(section), int) and isinstance(last := _NUM_LAYERS(section), int)
        for number in range(last, last + min(count, MAX_BEYOND))
    ]
    return "|".join([_NAMED_PREDICTION, *(rf"layers\.{number}" for number in beyond)])
