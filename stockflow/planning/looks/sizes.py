"""Sizes that the published config promises, held against the shapes that are written."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.configs import Config, first, head_size, sections
from stockflow.checkpoints.heads import is_in_a_layer, is_of_language
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_BIASES = {
    "attention_bias": re.compile(
        r"\b(self_attn|attention|attn)\.(q|k|v|o|q_a|kv_a|qkv|query_key_value|dense|W\w+)(_proj\w*)?\.bias$"
    ),
    "mlp_bias": re.compile(r"\bmlp\.(\w+_proj|W\w)\.bias$"),
}
_BIASED_ANYWAY = "qwen2"
"""models of this family have biases of q, k and v whatever their config says"""
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_MORE_ROWS = "mllama"
"""whose embedding has eight rows more than the vocabulary"""
_OTHER_TOWER = re.compile(r"vision|visual|audio|image|projector|encoder|mtp|per_layer")


class Size(NamedTuple):
    """Where a size shows."""

    ends: tuple[str, ...]
    """of the names of tensors"""
    axis: int
    keys: tuple[str, ...]
    spare: int = 0
    """rows that there may be more"""
    beside: str = ""
    """key of how many there may be more exactly"""

    def promised(self, section: Config) -> list[int]:
        """Return what a section says, or how many it names, by each key; nothing if it says it layer by layer."""
        if isinstance(first(*self.keys)(section), list):
            return []
        found = (section.get(key) for key in self.keys)
        said = (len(each) if isinstance(each, dict) else each for each in found)
        numbers, more = [each for each in said if type(each) is int], section.get(self.beside)
        return [*numbers, *(each + more for each in numbers if type(more) is int)]

    def key(self, section: Config) -> str:
        """Return by which key a section says it first."""
        return next(key for key in self.keys if section.get(key) is not None)

    def fits(self, numbers: Sequence[int], found: Mapping[int, str]) -> bool:
        """Return whether one of the sizes that are promised is there."""
        return any(number <= rows <= number + self.spare for number in numbers for rows in found)


_WIDTH = ("hidden_size", "n_embd", "d_model")
_EMBEDDED = ("embedding_size", "input_embedding_size", "word_embed_proj_dim")
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
    Size(_EMBEDDINGS, 1, (*_EMBEDDED, *_WIDTH)),
    Size((".mlp.up_proj.weight", ".mlp.gate_proj.weight"), 0, ("intermediate_size", "dense_intermediate_size")),
    Size((".input_layernorm.weight",), 0, _WIDTH),
    Size((".experts.0.up_proj.weight", ".experts.0.w1.weight"), 0, ("moe_intermediate_size", "intermediate_size")),
    Size((".mlp.shared_expert.up_proj.weight",), 0, ("shared_expert_intermediate_size",)),
    Size(
        _ROUTERS,
        0,
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        beside="n_shared_experts",
    ),
    Size((".wpe.weight", ".embeddings.position_embeddings.weight"), 0, ("n_positions", "max_position_embeddings"), 2),
    Size((".decoder.embed_positions.weight",), 0, ("max_target_positions",)),
    Size((".embeddings.token_type_embeddings.weight",), 0, ("type_vocab_size",)),
)
_LABELS = Size(("score.weight", "classifier.weight", "classifier.out_proj.weight"), 0, ("id2label",))
_KEYS = Size((".self_attn.k_proj.weight",), 0, ("num_key_value_heads", "num_attention_heads"))
"""of which configs without the former have as many as the latter says"""
_ENDS = tuple(end for size in (*SIZES, _KEYS, _LABELS) for end in size.ends)


def broken_sizes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which sizes of the published config no written tensor has, if most that it names are right."""
    config = proposal.config or {}
    telling = [job.output for name, job in proposal.written.items() if name.endswith(_ENDS)]
    shapes = {each.name: each.shape for each in telling if not _OTHER_TOWER.search(each.name)}
    classes = _classes(config)
    sizes = (*SIZES, _LABELS) if any(each.endswith(_CLASSIFIERS) for each in classes) else SIZES
    for path, section in sections(config):
        if not is_of_language(path) or str(section.get("model_type")).startswith(_MORE_ROWS):
            continue
        known = [(size, size.promised(section)) for size in sizes] + [(_KEYS, _key_rows(section))]
        held = [(size, numbers, found) for size, numbers in known if numbers and (found := _found(size, shapes))]
        wrong = [each for each in held if not each[0].fits(*each[1:])]
        broken = {size.key(section): (size, numbers[0], found) for size, numbers, found in wrong}
        if 2 * len(broken) <= len({size.key(section) for size, *_ in held}):
            yield from (_said(proposal, path, section, *each) for each in broken.values())


def _classes(config: Config) -> list[str]:
    named = config.get("architectures")
    return [each for each in named if isinstance(each, str)] if isinstance(named, list) else []


def broken_biases(proposal: Proposal) -> Iterator[Remark]:
    """Yield that there are biases which the published config denies, or promises and are not there."""
    names = [name for name in proposal.written if name.endswith(".bias")]
    for path, section in sections(proposal.config or {}):
        for key, of_kind in _BIASES.items():
            flag = section.get(key)
            ours = [name for name in names if of_kind.search(name) and not _OTHER_TOWER.search(name)]
            is_told = isinstance(flag, bool) and not str(section.get("model_type")).startswith(_BIASED_ANYWAY)
            if is_of_language(path) and is_told and flag is not bool(ours):
                url = redact(proposal.donor.url)
                kept = f"{len(ours)} written, such as {shown(ours[0])}" if ours else "none written"
                then = f"loaders {'leave them out' if ours else 'make them up'}; correct the config of {url}"
                text = f"the published config says {path}{key}: {flag}, but {kept}: {then}"
                yield Remark("promise-unkept", text, "warning", (url,), values={f"{path}{key}": str(flag)})


def _key_rows(section: Config) -> list[int]:
    heads, size = _KEYS.promised(section)[:1], head_size(section)
    return [number * size for number in heads] if isinstance(size, int) else []


def _found(size: Size, shapes: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """Return the sizes that are written, each with a tensor that has it."""
    ours = [name for name in shapes if name.endswith(size.ends) and len(shapes[name]) > size.axis]
    return {shapes[name][size.axis]: name for name in ours if size is not _LABELS or not is_in_a_layer(name)}


def _said(proposal: Proposal, path: str, section: Config, size: Size, number: int, found: Mapping[int, str]) -> Remark:
    key = path + size.key(section)
    url, rows = redact(proposal.donor.url), " and ".join(f"{each:,}" for each in sorted(found)[:3])
    means = shown(section[key.removeprefix(path)])
    text = (
        f"the published config says {key}: {means}, which makes {number:,} where tensors such as "
        f"{shown(found[min(found)])} have {rows}: loaders will not take them; correct the config of {url}"
    )
    return Remark("promise-unkept", text, "warning", (url,), values={key: means})
