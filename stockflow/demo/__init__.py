"""Real checkpoints to merge, made on the spot without network: a small language model, tuned several ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stockflow.demo import training
from stockflow.demo.checkpoints import load_model, save_model

__all__ = ["DemoInputs", "held_out_loss", "make_checkpoints"]

# Every checkpoint is cut differently, as those of strangers are.
_BASE_SHARD_BYTES = 2_000_000
_TUNED_SHARD_BYTES = (500_000, 700_000, 1_000_000, 1_500_000)


@dataclass(frozen=True)
class DemoInputs:
    """Folders of the checkpoints to merge; the base is float32, the tuned ones are bfloat16."""

    base: Path
    tuned: Mapping[str, Path]
    """by name, in the order of the recipe"""


def make_checkpoints(folder: Path, on_progress: Callable[[str], None]) -> DemoInputs:
    """Train a base model, fine-tune it several ways and save each as a sharded checkpoint.

    About a minute on two cores. Seeds and numbers of steps are fixed, so one machine and one torch
    give the same weights again.

    Args:
        folder: where the checkpoints' folders are made.
        on_progress: called with one line every few seconds.

    Raises:
        NotFoundError: this Python comes without the sources of its standard library.
    """
    inputs = DemoInputs(folder / "base", {tuning.name: folder / tuning.name for tuning in training.TUNINGS})
    with training.fixed_threads():
        base = training.train_base(on_progress)
        save_model(base, inputs.base, dtype=torch.float32, max_shard_bytes=_BASE_SHARD_BYTES)
        for tuning, shard_bytes in zip(training.TUNINGS, _TUNED_SHARD_BYTES, strict=True):
            tuned = training.fine_tune(base, tuning, on_progress)
            save_model(tuned, inputs.tuned[tuning.name], dtype=torch.bfloat16, max_shard_bytes=shard_bytes)
    return inputs


def held_out_loss(folder: Path) -> float:
    """Return the loss of a checkpoint in nats per byte, on text that none of the demo's models has read."""
    with training.fixed_threads():
        return training.evaluate(load_model(folder))
