"""Sizes that the published config promises, held against the shapes that are written."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.configs import Config, first, head_size, sections
from stockflow.checkpoints.heads import is_of_language
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_OF_ATTENTION = re.compile(r"att\w*\.(?!.*norm).+\.bias$", re.IGNORECASE)
_OTHER_TOWER = re.compile(r"vision|visual|audio|image|projector|encoder|mtp|per_layer")


class Size(NamedTuple):
    """Where a size shows."""

    ends: tuple[str, ...]
    """of the names of tensors"""
    axis: int
    keys: tuple[str, ...]

    def promised(self, section: Config) -> int | None:
        """Return what a section says, or how many it names; None if nothing, or another thing for each layer."""
        found = first(*self.keys)(section)
        return found if type(found) is int else len(found) if isinstance(found, dict) else None


_WIDTH = ("hidden_size", "n_embd", "d_model")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_ROUTERS = (".mlp.gate.weight", ".mlp.router.weight", ".block_sparse_moe.gate.weight")
SIZES = (
    Size(_EMBEDDINGS, 0, ("vocab_size",)),
    Size(_EMBEDDINGS, 1, _WIDTH),
    Size((".mlp.up_proj.weight", ".mlp.gate_proj.weight"), 0, ("intermediate_size",)),
    Size((".input_layernorm.weight",), 0, _WIDTH),
    Size((".experts.0.up_proj.weight",), 0, ("moe_intermediate_size",)),
    Size((".experts.0.w1.weight",), 0, ("moe_intermediate_size", "intermediate_size")),
    Size((".mlp.shared_expert.up_proj.weight",), 0, ("shared_expert_intermediate_size",)),
    Size(_ROUTERS, 0, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    Size((".wpe.weight", ".embeddings.position_embeddings.weight"), 0, ("n_positions", "max_position_embeddings")),
    Size((".decoder.embed_positions.weight",), 0, ("max_target_positions",)),
    Size((".embeddings.token_type_embeddings.weight",), 0, ("type_vocab_size",)),
    Size(("score.weight", "classifier.weight", "classifier.out_proj.weight"), 0, ("id2label",)),
)
_KEYS = Size((".self_attn.k_proj.weight",), 0, ("num_key_value_heads", "num_attention_heads"))
"""of which configs without the former have as many as the latter says"""
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


def broken_biases(proposal: Proposal) -> Iterator[Remark]:
    """Yield that attention has biases which the published config denies, or promises, and loaders go by it."""
    names = (job.output.name for job in proposal.jobs if job.output.name.endswith(".bias"))
    ours = [name for name in names if _OF_ATTENTION.search(name) and not _OTHER_TOWER.search(name)]
    for path, section in sections(proposal.config or {}):
        flag = section.get("attention_bias")
        if is_of_language(path) and isinstance(flag, bool) and flag is not bool(ours):
            url = redact(proposal.donor.url)
            kept = f"{len(ours)} written, such as {shown(ours[0])}" if ours else "none written"
            then = f"loaders {'leave them out' if ours else 'make them up'}; correct the config of {url}"
            text = f"the published config says {path}attention_bias: {flag}, but {kept}: {then}"
            yield Remark("promise-unkept", text, "warning", (url,), values={f"{path}attention_bias": str(flag)})


def _key_rows(section: Config) -> Iterator[int]:
    heads, size = _KEYS.promised(section), head_size(section)
    if heads is not None and isinstance(size, int):
        yield heads * size


def _found(size: Size, shapes: Mapping[str, Sequence[int]]) -> set[int]:
    return {shape[size.axis] for name, shape in shapes.items() if name.endswith(size.ends) and len(shape) > size.axis}


def _said(proposal: Proposal, path: str, section: Config, size: Size, number: int, found: set[int]) -> Remark:
    key = path + next(key for key in size.keys if section.get(key) is not None)
    url, rows = redact(proposal.donor.url), " and ".join(f"{each:,}" for each in sorted(found)[:3])
    means = shown(section[key.removeprefix(path)])
    text = (
        f"the published config says {key}: {means}, which makes {number:,} where tensors such as *{size.ends[0]} "
        f"have {rows}: loaders will not take them; correct the config of {url}"
    )
    return Remark("promise-unkept", text, "warning", (url,), values={key: means})
