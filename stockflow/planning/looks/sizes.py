"""Sizes that configs promise, held against the shapes of tensors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.configs import Config, first, head_size, sections
from stockflow.checkpoints.heads import is_in_a_layer, is_of_language
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

Shapes = Mapping[str, Sequence[int]]
"""by name of a tensor"""
_BIASES = {
    "attention_bias": re.compile(
        r"\b(self_attn|attention|attn)\.(q|k|v|o|q_a|kv_a|qkv|query_key_value|dense|W\w+)(_proj\w*)?\.bias$"
    ),
    "mlp_bias": re.compile(r"\bmlp\.(\w+_proj|W\w)\.bias$"),
}
_BIASED_ANYWAY = "qwen2"
"""models of this family have biases of q, k and v whatever their config says"""
_ALWAYS_BIASED = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
"""types of models whose queries have biases, unless the config denies it"""
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_MORE_ROWS = ("mllama", "moshi", "kyutai")
"""whose embeddings have more rows than the vocabulary"""
FEWEST = 3
"""facts that show that a config is of another model"""
_OTHER_TOWER = re.compile(
    r"vision|visual|audio|image|projector|encoder|mtp|per_layer|codec|speech|qformer|backbone|depth_decoder|detr"
)


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
_EMBEDDED = ("embedding_size", "input_embedding_size", "word_embed_proj_dim", "embedding_rank")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_ROUTERS = (".mlp.gate.weight", ".mlp.router.weight", ".block_sparse_moe.gate.weight")
SIZES = (
    Size(_EMBEDDINGS, 0, ("vocab_size",), beside="additional_vocab_size"),
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


class Promised(NamedTuple):
    """What a section says of sizes."""

    path: str
    section: Config
    said: Sequence[tuple[Size, str, list[int]]]
    """where each shows, by which key it is said, and which it may be"""


class Held(NamedTuple):
    """What of a section could be held against shapes."""

    path: str
    section: Config
    num_keys: int
    broken: Mapping[str, tuple[int, Mapping[int, str]]]
    """by key: what is promised, and the sizes that are there, each with a tensor that has it"""

    @property
    def is_slip(self) -> bool:
        """Whether most of it is right."""
        return 2 * len(self.broken) <= self.num_keys

    @property
    def is_of_another(self) -> bool:
        """Whether so much of it is broken that it is no slip; one or two facts alone are no evidence."""
        return len(self.broken) >= FEWEST and not self.is_slip

    def values(self) -> dict[str, str]:
        """Return what is said, by the whole key."""
        return {self.path + key: shown(self.section[key]) for key in self.broken}

    def told(self) -> str:
        """Return what is said for what is there, and what to do."""
        facts = list[str]()
        for key, (number, found) in self.broken.items():
            means = f"{self.path}{key} {shown(self.section[key])}"
            made = "" if self.section[key] == number else f" (makes {number:,})"
            rows = " and ".join(f"{each:,}" for each in sorted(found)[:3])
            facts.append(f"{means}{made} for {rows} of {shown(found[min(found)])}")
        shares = {number / rows for number, found in self.broken.values() for rows in found}
        is_slice = len(shares) == 1 and min(shares) in range(2, 1025) and self.broken.keys().isdisjoint(_WIDTH)
        mend = "give that folder the config.json that was saved with its tensors"
        if is_slice:
            mend = f"they seem to be what one of {min(shares):.0f} processes held of each tensor: save the model whole"
        return f"{', '.join(facts)}; no loader takes the two together: {mend}"


def broken_sizes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which sizes of the published config no written tensor has, and which configs are of other weights."""
    written = {name: job.output.shape for name, job in proposal.written.items() if name.endswith(_ENDS)}
    promised = _promised(proposal.config or {})
    published = [*_held(promised, written)]
    others = dict[str, tuple[Held, list[str]]]()
    for one in proposal.checkpoints if proposal.config else ():
        own = promised if one is proposal.donor else _promised(one.config or {})
        shapes = (
            {name: spec.shape for name, spec in one.specs.items() if name.endswith(_ENDS)} if own != promised else {}
        )
        for each in published if own == promised else _held(own, shapes):
            if each.is_of_another:
                others.setdefault(each.told(), (each, []))[1].append(redact(one.url))
    for text, (each, urls) in others.items():
        said = f"config.json of {some(urls, quote=str)} is of another model than its tensors: {text}"
        yield Remark("promise-unkept", said, "warning", tuple(urls), values=each.values())
    for each in published:
        for key, found in each.broken.items() if each.is_slip else ():
            yield _said(proposal, each.path + key, each.section[key], *found)


def _promised(config: Config) -> list[Promised]:
    """Return what each section of a language model says of sizes; none that an inner section says, too.

    In the outer one that may be of something else.
    """
    classes = _classes(config)
    sizes = (*SIZES, _LABELS) if any(each.endswith(_CLASSIFIERS) for each in classes) else SIZES
    found, ours = list[Promised](), [each for each in sections(config) if is_of_language(each[0])]
    for path, whole in ours:
        inner = {key for at, own in ours if at.startswith(path) and at != path for key in own}
        section = {key: value for key, value in whole.items() if key not in inner}
        if not str(whole.get("model_type")).startswith(_MORE_ROWS):
            known = [*((size, size.promised(section)) for size in sizes), (_KEYS, _key_rows(section))]
            said = [(size, size.key(section), numbers) for size, numbers in known if numbers]
            found.append(Promised(path, {key: section[key] for _, key, _ in said}, said))
    return found


def _held(promised: Iterable[Promised], telling: Shapes) -> Iterator[Held]:
    """Yield what sections say otherwise than tensors that have elements."""
    shapes = {name: shape for name, shape in telling.items() if 0 not in shape and not _OTHER_TOWER.search(name)}
    for path, section, said in promised:
        held = [(size, key, numbers, found) for size, key, numbers in said if (found := _found(size, shapes))]
        broken = {key: (numbers[0], found) for size, key, numbers, found in held if not size.fits(numbers, found)}
        yield Held(path, section, len({key for _, key, *_ in held}), broken)


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


def missing_biases(proposal: Proposal) -> Iterator[Remark]:
    """Yield that no query has a bias where the type of the published config's model means one."""
    for path, section in sections(proposal.config or {}):
        denied = False in (section.get("attention_bias"), section.get("qkv_bias"))
        if section.get("model_type") in _ALWAYS_BIASED and is_of_language(path) and not denied:
            queries = (name for name in proposal.written if name.endswith(".self_attn.q_proj.weight"))
            ours = [name for name in queries if not _OTHER_TOWER.search(name)]
            if ours and not any(f"{name.removesuffix('weight')}bias" in proposal.written for name in ours):
                url, means = redact(proposal.donor.url), shown(section["model_type"])
                text = (
                    f"the published config says {path}model_type: {means}, whose attention has biases, but none is "
                    f"written beside {shown(ours[0])}: loaders make them up, not all of them as zeros; save zeros "
                    f"there if the models of {url} were trained without"
                )
                yield Remark("promise-unkept", text, "warning", (url,), values={f"{path}model_type": means})
                return


def _key_rows(section: Config) -> list[int]:
    """Return how many rows the keys of attention have; nothing where they come of a latent vector."""
    if section.get("kv_lora_rank"):
        return []
    heads, size = _KEYS.promised(section)[:1], head_size(section)
    return [number * size for number in heads] if isinstance(size, int) else []


def _found(size: Size, shapes: Shapes) -> dict[int, str]:
    """Return the sizes that are written, each with a tensor that has it."""
    ours = [name for name in shapes if name.endswith(size.ends) and len(shapes[name]) > size.axis]
    return {shapes[name][size.axis]: name for name in ours if size is not _LABELS or not is_in_a_layer(name)}


def _said(proposal: Proposal, key: str, value: object, number: int, found: Mapping[int, str]) -> Remark:
    url, rows = redact(proposal.donor.url), " and ".join(f"{each:,}" for each in sorted(found)[:3])
    means = shown(value)
    text = (
        f"the published config says {key}: {means}, which makes {number:,} where tensors such as "
        f"{shown(found[min(found)])} have {rows}: loaders will not take them; correct the config of {url}"
    )
    return Remark("promise-unkept", text, "warning", (url,), values={key: means})
