"""Heads over the vocabulary and copies of embeddings: which of them is, or may be, an embedding under another name.

Whether two names are one tensor follows from the config, and from which of them are stored with which values.
transformers writes such a tensor once; indexes of older conversions list all its names. Source: ``_tied_weights_keys``
of the models there.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from stockflow.checkpoints.configs import Config, sections
from stockflow.checkpoints.files.header import TensorSpec

Specs = Mapping[str, TensorSpec]

TIE_KEY = "tie_word_embeddings"
_HEADS = (
    "lm_head.weight", "embed_out.weight", "proj_out.weight", "predictions.decoder.weight", "lm_head.decoder.weight",
    "vocab_projector.weight", "output_projection.weight", "output_layer.weight", "generator_lm_head.weight",
    "pred_layer.proj.weight", "output.weight", "lm_loss.weight", "decoder.weight", "lm_head.out_proj.weight",
    "transformer.ff_out.weight",
)  # fmt: skip
_EMBEDDINGS = (
    "shared.weight", "embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight",
    "embed_in.weight", "word_embedding.weight", "token_embeddings.weight", "token_embedding.weight",
    "tok_embedding.weight", "embeddings.weight", "embedding.weight",
)  # fmt: skip
_ONE_TENSOR = (
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ("predictions.bias", "predictions.decoder.bias"),
    ("lm_head.bias", "lm_head.decoder.bias"),
)
"""Always one tensor, whatever the config says, where several are there; the first is the one that others copy."""
_COPIES = {copy: original for original, *copies in _ONE_TENSOR for copy in copies}
_WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
"""How classes end whose models have a head."""
_PARTS_OF_HEADS = (
    ("predictions.bias", "predictions.decoder.weight"),
    ("lm_head.dense.weight", "lm_head.decoder.weight"),
    *(
        (f"{head}.bias", f"{head}.weight")
        for head in ("vocab_projector", "generator_lm_head", "pred_layer.proj", "lm_loss")
    ),
)
"""What is stored beside a head even where the embedding stands for its weight, and the weight."""
_HEADS_BY_TYPE = {
    "gpt_neox": "embed_out.weight", "gpt_neox_japanese": "embed_out.weight",
    "biogpt": "output_projection.weight", "trocr": "output_projection.weight", "git": "output.weight",
    **dict.fromkeys(("whisper", "moonshine", "moonshine_streaming", "cohere_asr", "canary"), "proj_out.weight"),
}  # fmt: skip
"""Of types of models whose heads have no other parts."""
_PREFIXES = ("", "model.")
"""of a stored name, where that of another name of the tensor is none"""
_ENDS = (*_HEADS, *_EMBEDDINGS, *_COPIES, *_COPIES.values(), ".shared_head.head.weight")
MAX_DOTS = 5
"""``base_model.model.model.embed_tokens.weight``; what lies in layers mostly has more."""
UNTIED_TYPES = frozenset({
    "llama", "llama4_text", "mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "qwen3_next", "qwen2_vl", "qwen2_5_vl", "deepseek_v2", "deepseek_v3", "phi", "phi3", "phimoe", "olmo", "olmo2",
    "olmo3", "olmoe", "stablelm", "gpt_neox", "gptj", "codegen", "glm", "glm4", "glm4_moe", "gpt_oss", "granite",
    "granitemoe", "jamba", "mamba2", "nemotron", "nemotron_h", "persimmon", "minimax", "seed_oss", "dbrx",
    "exaone4", "kimi_linear",
})  # fmt: skip
"""Types of models with a head of its own unless their config ties it."""
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")
COPIES_IN_LAYERS = (".embed_tokens.weight", ".shared_head.head.weight")
"""Ends of names by which a layer that predicts further tokens has the embedding, and the head, once more."""
_COPY_IN_A_LAYER = re.compile(r"(?:^|\.)layers\.\d+(\.embed_tokens|\.shared_head\.head)\.weight$")
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Keys under which a config has that of its language model."""


@dataclass(frozen=True, slots=True)
class TiedNames:
    """The names of a checkpoint that may stand for one tensor; few of them."""

    heads: tuple[str, ...]
    copies: tuple[str, ...]
    embeddings: tuple[str, ...]

    @property
    def ties(self) -> tuple[str, ...]:
        """Those that may stand for another."""
        return (*self.heads, *self.copies)


def tied_names(names: Iterable[str]) -> TiedNames:
    """Return which names of a checkpoint are heads, copies of embeddings, and embeddings."""
    likely = list(filter(may_be_tied, names))
    found = [name for name in likely if not is_in_a_layer(name)]
    return TiedNames(
        heads=tuple(name for name in found if is_head(name)),
        copies=(
            *(name for name in found if _of_kind(name, tuple(_COPIES))),
            *filter(is_copy_in_a_layer, likely),
        ),
        embeddings=tuple(filter(_is_embedding, found)),
    )


def may_be_tied(name: str) -> bool:
    """Return whether a name is as those of heads, copies and embeddings are; for most names it is quick to say no."""
    return name.count(".") <= MAX_DOTS and name.endswith(_ENDS)


def is_copy_in_a_layer(name: str) -> bool:
    """Return whether a layer that predicts further tokens has the embedding or the head under this name."""
    return name.endswith(COPIES_IN_LAYERS) and _COPY_IN_A_LAYER.search(name) is not None


def is_in_a_layer(name: str) -> bool:
    """Return whether a tensor is of a layer that has a number."""
    return _IN_A_LAYER.search(name) is not None


def is_head(name: str) -> bool:
    """Return whether a tensor is named as a head over the vocabulary is."""
    return _of_kind(name, _HEADS) and not is_in_a_layer(name)


def original_of(name: str, shape: tuple[int | None, ...], names: TiedNames, specs: Specs) -> str | None:
    """Return which tensor of a checkpoint the head or copy ``name`` of this shape would stand for.

    A first size of None is any number of tokens.
    """
    if is_copy_in_a_layer(name):
        return _original_of_a_layers(name, shape, names, specs)
    for copy, partner in _COPIES.items():
        original = f"{name.removesuffix(copy)}{partner}"
        if _of_kind(name, (copy,)) and original in specs and _fits(specs[original].shape, shape):
            return original
    alike = [each for each in names.embeddings if _fits(specs[each].shape, shape) and each != name]
    return max(alike, key=lambda each: _nearness(name, each), default=None) if is_head(name) else None


def _original_of_a_layers(name: str, shape: tuple[int | None, ...], names: TiedNames, specs: Specs) -> str | None:
    """Return the embedding, or for a copy of the head the head, or the embedding that is one with it."""
    these = names.embeddings if name.endswith(COPIES_IN_LAYERS[0]) else (*names.heads, *names.embeddings)
    return next((each for each in these if _fits(specs[each].shape, shape)), None)


def aliases_of(names: Iterable[str], stored: Collection[str], config: Config | None) -> Mapping[str, str]:
    """Return those of ``names`` that are other names of stored tensors, each with the stored one.

    Args:
        names: of tensors that no file holds.
        stored: names of those that files hold.
        config: of the model; a head whose config unties it is no alias.
    """
    is_untied = tie_flag(config) is False
    embeddings = [] if is_untied else [each for each in stored if may_be_tied(each) and _is_embedding(each)]
    found = {name: _alias_of(name, stored, embeddings) for name in names if may_be_tied(name)}
    return {name: alias for name, alias in found.items() if alias}


def _alias_of(name: str, stored: Collection[str], embeddings: Sequence[str]) -> str | None:
    for ends in _ONE_TENSOR:
        for end in ends:
            prefixes = (name.removesuffix(end), *_PREFIXES) if _of_kind(name, (end,)) else ()
            alias = next((p + other for other in ends for p in prefixes if p + other in stored), None)
            if alias:
                return alias
    return max(embeddings, key=lambda each: _nearness(name, each), default=None) if is_head(name) else None


def head_beside(embedding: str, stored: Iterable[str], config: Config | None) -> str:
    """Return what a head is called that transformers would save beside an embedding.

    Args:
        embedding: name of it.
        stored: names of the tensors of its model, among which other parts of the head may be.
        config: of the model.
    """
    parts = tuple(part for part, _ in _PARTS_OF_HEADS)
    by_part = (
        f"{name.removesuffix(part)}{head}"
        for name in stored
        if name.endswith(parts)
        for part, head in _PARTS_OF_HEADS
        if _of_kind(name, (part,))
    )
    of_type = _HEADS_BY_TYPE.get(str((config or {}).get("model_type")), "lm_head.weight")
    *outer, _, _ = ("", *embedding.split("."))
    default = ".".join([*outer[1:-1], of_type]) if outer[-1:] == ["model"] else of_type
    return next(by_part, default)


def is_of_language(path: str) -> bool:
    """Return whether the section of a config at a path (``""``, ``text_config.``) may be that of its language model."""
    return {*path.split(".")[:-1]} <= {*LANGUAGE_PARTS}


def said_of_language(config: Config | None) -> Config:
    """Return what the sections of a config say that are of a language model, the outermost first."""
    found = [section for path, section in sections(config or {}) if is_of_language(path)]
    return {key: value for section in reversed(found) for key, value in section.items()}


def tie_flag(config: Config | None) -> bool | None:
    """Return whether a config says that head and embedding are one tensor; None if it says both, or neither."""
    said = tie_flags(config)
    ours = {flag for path, flag in said.items() if is_of_language(path)}
    return None if len(ours) > 1 else next(iter(ours or said.values()), None)


def unties(config: Config | None) -> bool:
    """Return whether a config says that the head is a tensor of its own, or says nothing and its type means that."""
    of_language = (section for path, section in sections(config or {}) if is_of_language(path))
    is_meant = any(section.get("model_type") in UNTIED_TYPES for section in of_language)
    return tie_flag(config) is False or (is_meant and not tie_flags(config))


def tie_flags(config: Config | None) -> dict[str, bool]:
    """Return what each section of a config, by its path, says of head and embedding."""
    given = ((path, section.get(TIE_KEY)) for path, section in sections(config or {}))
    return {path: flag for path, flag in given if isinstance(flag, bool)}


def has_head(config: Config | None) -> bool:
    """Return whether the class that a config names has a head over the vocabulary, or none is named."""
    classes = (config or {}).get("architectures")
    return not isinstance(classes, list) or not classes or str(classes[0]).endswith(_WITH_HEADS)


def with_tie_flag(config: Config, flag: bool) -> dict[str, object]:
    """Return a config that says whether head and embedding are one tensor, in each of its sections that spoke of it."""
    return {**{key: _with_flag_within(value, flag) for key, value in config.items()}, TIE_KEY: flag}


def _with_flag_within(value: object, flag: bool) -> object:
    if isinstance(value, dict) and any(TIE_KEY in section for _, section in sections(value)):
        return with_tie_flag(value, flag)
    return value


def _is_embedding(name: str) -> bool:
    return _of_kind(name, _EMBEDDINGS) and not is_in_a_layer(name)


def _of_kind(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _fits(found: tuple[int, ...], asked: tuple[int | None, ...]) -> bool:
    return found == asked or (asked[:1] == (None,) and found[1:] == asked[1:] and len(found) == len(asked))


def _nearness(head: str, embedding: str) -> tuple[int, bool, int]:
    """How likely an embedding is that of a head: under the same module, of no encoder, by its name."""
    rank = next(number for number, end in enumerate(_EMBEDDINGS) if _of_kind(embedding, (end,)))
    alike = (a == b for a, b in zip(head.split("."), embedding.split("."), strict=False))
    return sum(takewhile(bool, alike)), "encoder." not in embedding, -rank
