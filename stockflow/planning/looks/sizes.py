"""Sizes that the published config promises, held against the shapes that are written."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.configs import Config, first, head_size, sections
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark

_OTHER_TOWER = re.compile(r"vision|visual|audio|image|projector|encoder|mtp|per_layer")


class Size(NamedTuple):
    """Where a size shows."""

    ends: tuple[str, ...]
    """of the names of tensors"""
    axis: int
    keys: tuple[str, ...]

    def promised(self, section: Config) -> int | None:
        """Return what a section says; None if nothing, or another thing for each layer."""
        found = first(*self.keys)(section)
        return found if type(found) is int else None


_WIDTH = ("hidden_size", "n_embd", "d_model")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
SIZES = (
    Size(_EMBEDDINGS, 0, ("vocab_size",)),
    Size(_EMBEDDINGS, 1, _WIDTH),
    Size((".mlp.up_proj.weight", ".mlp.gate_proj.weight"), 0, ("intermediate_size",)),
    Size((".input_layernorm.weight",), 0, _WIDTH),
)
_KEYS = Size((".self_attn.k_proj.weight",), 0, ("num_key_value_heads",))
_ENDS = tuple(end for size in (*SIZES, _KEYS) for end in size.ends)


def broken_sizes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which sizes of the published config no written tensor has, if most that it names are right."""
    telling = [job.output for job in proposal.jobs if job.output.name.endswith(_ENDS)]
    shapes = {each.name: each.shape for each in telling if not _OTHER_TOWER.search(each.name)}
    for path, section in sections(proposal.config or {}):
        known = [(size, number) for size in SIZES if (number := size.promised(section)) is not None]
        known += [(_KEYS, number) for number in _key_rows(section)]
        held = [(size, number, found) for size, number in known if (found := _found(size, shapes))]
        broken = {size.keys: (size, number, found) for size, number, found in held if number not in found}
        if 2 * len(broken) <= len(held):
            yield from (_said(proposal, path, section, *each) for each in broken.values())


def _key_rows(section: Config) -> Iterator[int]:
    heads, size = _KEYS.promised(section), head_size(section)
    if heads is not None and isinstance(size, int):
        yield heads * size


def _found(size: Size, shapes: Mapping[str, Sequence[int]]) -> set[int]:
    return {shape[size.axis] for name, shape in shapes.items() if name.endswith(size.ends) and len(shape) > size.axis}


def _said(proposal: Proposal, path: str, section: Config, size: Size, number: int, found: set[int]) -> Remark:
    key = path + next(key for key in size.keys if section.get(key) is not None)
    url, rows = redact(proposal.donor.url), " and ".join(f"{each:,}" for each in sorted(found)[:3])
    means = f"{section[key.removeprefix(path)]}"
    text = (
        f"the published config says {key}: {means}, which makes {number:,} where tensors such as *{size.ends[0]} "
        f"have {rows}: loaders will not take them; correct the config of {url}"
    )
    return Remark("promise-unkept", text, "warning", (url,), values={key: means})
