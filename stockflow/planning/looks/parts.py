"""Parts that the published config promises and of which no tensor is written: towers, decoders, heads of tasks."""

import re
from collections.abc import Iterator

from stockflow.checkpoints.configs import Config, first, sections
from stockflow.checkpoints.heads import is_head, is_in_a_layer, is_of_language
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are
from stockflow.text.strictjson import shown

TOWERS = {"vision_config.": ("vision", "visual"), "audio_config.": ("audio", "speech")}
"""Parts of names of tensors, by where a config speaks of their tower."""
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "n_layers", "layers")
_PLAIN = re.compile(r"((model|language_model|thinker|transformer)\.)*(embed_tokens|wte|layers|h|norm|ln_f|lm_head)\.")
_HALVES = {
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
}
_SHARED_EXPERTS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_TASKS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|ImageClassification"
    r"|VideoClassification|AudioClassification|AudioFrameClassification|XVector|CTC)$"
)
"""How classes end whose head no embedding stands for."""
_BARE = {
    "embeddings", "embed_tokens", "word_embeddings", "embed_in", "wte", "wpe", "shared", "embeddings_project",
    "encoder", "model", "transformer", "layers", "layer", "h", "blocks", "pooler", "norm", "layernorm", "layer_norm",
    "LayerNorm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "word_embeddings_layernorm",
    "feature_extractor", "feature_projection", "masked_spec_embed", "embedder",
}  # fmt: skip
"""What names begin with in a model that was saved without its head and the module's name around the rest."""
_OF_HEADS = re.compile(
    r"(^|\.)(?!lm_head|.*norm)\w*(head|classif|score|logit|qa_|label|reward|regress|rank)\w*\.|\.(out|final_layer)\."
)
_INNER = re.compile(r"^(classifier|classification_head)\.dense\.")


def tower_of(path: str) -> tuple[str, ...]:
    """Return which words names of the tower have of which a section speaks; none if it is of no tower."""
    return next((words for key, words in TOWERS.items() if f".{key}" in f".{path}"), ())


def is_plain(name: str) -> bool:
    """Return whether a name is one of a decoder or its head, and of nothing beside them."""
    return _PLAIN.match(name) is not None


def missing_towers(proposal: Proposal) -> Iterator[Remark]:
    """Yield which towers the published config promises of which rules leave all tensors out, or no model has any."""
    skipped, written = "\n".join(proposal.skipped).lower(), None
    for path, section in sections(proposal.config or {}):
        key, words = f"{path}{_depth(section)}", tower_of(path)
        if not words or not (skipped or _depth(section)):
            continue
        written = "\n".join(proposal.written).lower() if written is None else written
        if any(word in written for word in words):
            continue
        if any(word in skipped for word in words):
            yield broken(proposal, path.rstrip("."), "a tower", "rules leave all tensors of it out")
        elif _depth(section) and all(map(is_plain, _beside_towers(proposal))):
            kept = "no written tensor is of that tower, and a loader makes a random one up"
            yield broken(proposal, key, section[_depth(section)], kept)


def _depth(section: Config) -> str:
    """Return by which key a section says that there are layers."""
    return next((key for key in _DEPTHS if type(number := section.get(key)) is int and number > 0), "")


def _beside_towers(proposal: Proposal) -> Iterator[str]:
    known = [word for words in TOWERS.values() for word in words]
    return (name for name in proposal.written if not any(word in name for word in known))


def missing_halves(proposal: Proposal) -> Iterator[Remark]:
    """Yield that an encoder has no decoder, or the other way round, where the published config promises both."""
    config = proposal.config or {}
    if not _class(config).endswith("ForConditionalGeneration") or not first(*_HALVES["decoder"])(config):
        return
    names = "\n".join(proposal.written)
    for half, other in (("decoder", "encoder"), ("encoder", "decoder")):
        key = next((key for key in _HALVES[half] if config.get(key)), None)
        if key and f"{other}." in names and f"{half}." not in names:
            kept = f"no written tensor is of {'an' if half == 'encoder' else 'a'} {half}, and a loader makes it up"
            yield broken(proposal, key, config[key], kept)


def missing_shared_experts(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the published config promises experts that all tokens pass, and there are only others."""
    for path, section in sections(proposal.config or {}):
        key = next((key for key in _SHARED_EXPERTS if type(said := section.get(key)) is int and said > 0), None)
        if key and is_of_language(path):
            names = "\n".join(proposal.written)
            if ".experts." in names and "shared" not in names:
                kept = "no written tensor is of a shared expert, and a loader makes random ones up"
                yield broken(proposal, path + key, section[key], kept)


def missing_heads_of_tasks(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the class which the published config names has a head, and only its backbone is written."""
    config = proposal.config or {}
    task = _TASKS.search(_class(config))
    if not task or not proposal.written or config.get("classifier_from_token"):
        return
    others = task[1] != "CTC"
    names = [name for name in sorted(proposal.begins) if not (others and _is_of_language_head(name))]
    heads = [name for name in names if _OF_HEADS.search(name) and not is_in_a_layer(name)]
    begins = {name.split(".", 1)[0] for name in names if name not in heads}
    if all(map(_INNER.match, heads)) and (len(begins) == 1 or begins <= _BARE):
        url = redact(proposal.donor.url)
        has = f"of its head only {some(heads)} {are(len(heads))} written" if heads else "no head is written"
        text = (
            f"the published config names the class {shown(_class(config))}, as that of {url} does, but {has}: a "
            "loader makes a random one up; keep the head, or name the class that the tensors are of"
        )
        yield Remark("promise-unkept", text, "warning", (url,), values={"architectures": _class(config)})


def _is_of_language_head(name: str) -> bool:
    return name.startswith(("lm_head.", "cls.predictions.")) or (is_head(name) and not is_in_a_layer(name))


def _class(config: Config) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def broken(proposal: Proposal, key: str, promised: object, kept: str) -> Remark:
    """Return that the published config promises something, and what is written instead."""
    url = redact(proposal.donor.url)
    text = (
        f"the published config says {key}: {promised}, as that of {url} does, but {kept}; correct it there if the "
        "model is whole as it is, else a loader misses something"
    )
    return Remark("promise-unkept", text, "warning", (url,), values={key: str(promised)})
