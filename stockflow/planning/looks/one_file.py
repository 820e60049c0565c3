"""One file: models whose loaders read no shards."""

from collections.abc import Iterator

from stockflow.checkpoints.files.candidates import MISTRAL_STEM, OPEN_CLIP_STEM, SUFFIXES, naming_of, written_stem
from stockflow.checkpoints.opening import Checkpoint
from stockflow.storage import redact
from stockflow.text.remarks import Remark

_USUAL = ("model", "pytorch_model")


def is_read_from_one(donor: Checkpoint) -> bool:
    """Return whether the loader of a model reads no shards: open_clip's, timm's and Mistral's do not.

    Nor do those of a file of a name of its own that has no config, such as of a whole diffusion model.
    """
    if written_stem(donor.files) in (OPEN_CLIP_STEM, MISTRAL_STEM):
        return True
    if donor.config is not None:
        return "pretrained_cfg" in donor.config and "model_type" not in donor.config
    named = [naming_of(file) for file in donor.files]
    said = named[0] if len(named) == 1 else None
    return said is not None and not said.number and said.suffix == SUFFIXES[0] and said.stem not in _USUAL


def cut(donor: Checkpoint, num_shards: int) -> Iterator[Remark]:
    """Yield that the size that is asked for cuts what is read from one file."""
    if num_shards > 1:
        url = redact(donor.url)
        text = (
            f"the output is cut into {num_shards:,} files, and what loads models like {url} (open_clip, timm, "
            "Mistral's own library, programs that take a single file) finds no shards; leave the shard size out"
        )
        yield Remark("one-file", text, models=(url,))
