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

_BIASES = {
    "attention_bias": re.compile(r"att\w*\.(?!.*norm).+\.bias$", re.IGNORECASE),
    "mlp_bias": re.compile(r"\bmlp\.(\w+_proj|W\w)\.bias$"),
}
_OTHER_TOWER = re.compile(r"vision|visual|audio|image|projector|encoder|mtp|per_layer")


class Size(NamedTuple):
    """Where a size shows."""

    ends: tuple[str, ...]
    """of the names of tensors"""
    axis: int
    keys: tuple[str, ...]

    def promised(self, section: Config) -> list[int]:
        """Return what a section says, or how many it names, by each key; nothing if it says it layer by layer."""
        if isinstance(first(*self.keys)(section), list):
            return []
        found = (section.get(key) for key in self.keys)
        said = (len(each) if isinstance(each, dict) else each for each in found)
        return [each for each in said if type(each) is int]


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
    Size((".experts.0.up_proj.weight", ".experts.0.w1.weight"), 0, ("moe_intermediate_size", "intermediate_size")),
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
        known = [(size, size.promised(section)) for size in SIZES] + [(_KEYS, _key_rows(section))]
        held = [(size, numbers, found) for size, numbers in known if numbers and (found := _found(size, shapes))]
        broken = {size.keys: (size, numbers[0], found) for size, numbers, found in held if found.isdisjoint(numbers)}
        if 2 * len(broken) <= len(held):
            yield from (_said(proposal, path, section, *each) for each in broken.values())


def broken_biases(proposal: Proposal) -> Iterator[Remark]:
    """Yield that there are biases which the published config denies, or promises and are not there."""
    names = [job.output.name for job in proposal.jobs if job.output.name.endswith(".bias")]
    for path, section in sections(proposal.config or {}):
        for key, of_kind in _BIASES.items():
            flag = section.get(key)
            ours = [name for name in names if of_kind.search(name) and not _OTHER_TOWER.search(name)]
            if is_of_language(path) and isinstance(flag, bool) and flag is not bool(ours):
                url = redact(proposal.donor.url)
                kept = f"{len(ours)} written, such as {shown(ours[0])}" if ours else "none written"
                then = f"loaders {'leave them out' if ours else 'make them up'}; correct the config of {url}"
                text = f"the published config says {path}{key}: {flag}, but {kept}: {then}"
                yield Remark("promise-unkept", text, "warning", (url,), values={f"{path}{key}": str(flag)})


def _key_rows(section: Config) -> list[int]:
    heads, size = _KEYS.promised(section)[:1], head_size(section)
    return [number * size for number in heads] if isinstance(size, int) else []


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
