"""Remarks: what the reader of a plan should know of its recipe and inputs, or must accept before anything is merged."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Severity = Literal["note", "warning", "refusal"]
"""``note``: a fact to know; ``warning``: probably not meant; ``refusal``: an error until accepted."""
AS_ASKED = frozenset({"adapters", "expert-units", "not-copied", "quantised", "seed", "skipped", "token-ids"})
"""Codes whose notes say what the recipe asks for; ``--strict`` refuses every other remark that is not accepted."""

CODES: Mapping[str, str] = {
    "adapter-base": "an adapter that is named alone, and the base that it names",
    "adapters": "adapters of one base, and what need not be read for their geometry",
    "adapter-biases": "biases that an adapter says were trained, where no model has any",
    "adapter-part": "modules that were trained with an adapter, and of which it has nothing",
    "adapter-task": "an adapter for a class of models with another head than the class that its base names",
    "adapter-tokenizer": "a tokenizer or template beside an adapter, which goes before its base's",
    "adapter-elsewhere": "an adapter on another model than it says it belongs to, or merged with one of another",
    "architecture-differs": "models of several architectures",
    "base-not-listed": "a base that no model of the recipe is, with a method that needs none",
    "config-contradicts": "a config that tells one fact twice and differently",
    "config-differs": "other facts of configs that give equal tensors another meaning",
    "config-keys-differ": "keys of configs that differ and are not known",
    "config-layers": "what config.json says of layers that slices stack, and cannot be made true",
    "config-not-finite": "numbers of the published config that are not finite",
    "context-length-differs": "models that are said to take texts of several lengths",
    "copy": "a model that proved to be another one when all of it was read",
    "damaged-file": "files to copy that are git-lfs pointers, web pages, empty or no JSON",
    "doubled-tensors": "tensors in several files of a checkpoint, of which the one the index names is read",
    "dtypes-differ": "tensors whose sources have several dtypes",
    "far-values": "weights or factors that no merge is likely to mean",
    "factors-inside": "factors of adapters beside the weights of a model, which are no weights by themselves",
    "heads-differ": "attention heads of several numbers or sizes over equal shapes",
    "expert-units": "experts that are decided one by one, where mergekit decides all of a layer together",
    "expert-layouts": "experts that are stored one by one in some models and all of a layer together in others",
    "head-untied": "a head of its own where other models, or the published config, tie it to the embedding",
    "index-data": "indices, masks and frequencies that are stored as floats",
    "index-disagrees": "tensors that an index lists and no file holds, or that files hold and the index does not list",
    "left-out": "files of a model that stay behind, by kind",
    "leftover-scales": "scales beside weights of plain numbers, or without the weights they belong to",
    "local-revision": "the revision of a model that is a folder, which has none",
    "longer-numbers": "filters that end or begin with a number, and are for longer ones, too",
    "matches-nothing": "a rule, or a filter of a parameter, for no tensor, or for none that those before it leave",
    "missing-files": "code and modules that the configs which go out name, and that are not there",
    "missing-module": "modules of a model for sentence embeddings that are not there",
    "module-left-out": "tensors that belong to no module of the recipe",
    "narrower-range": "numbers that are written in a narrower range than that of their sources",
    "no-config": "the model that gives the config has none",
    "no-effect": "a parameter that no method in use reads where it stands",
    "no-tensors": "values in files of weights that are no tensors of the model",
    "no-tokenizer": "a model without tokenizer beside others that have one",
    "not-copied": "files of the model that gives the side files which stay behind",
    "not-finite": "models that hold NaN or infinity where the merge would need numbers",
    "not-taken": "side files that only models have which do not give them",
    "not-weights": "what a trainer or an adapter keeps beside weights, in the place of weights",
    "other-master": "models that seem to be tuned from what a quantised base was before",
    "other-framework": "weights that lie as another framework than PyTorch has them",
    "other-names": "a model whose tensors are the base's under other names",
    "part-of-a-model": "a file that was named, beside numbered ones that hold the same names",
    "part-kept": "layers that predict further tokens, or a tower, that some models lack and the output has of the base",
    "one-file": "shards of a model whose loader reads one file",
    "over-http": "models that are read without TLS",
    "placeholders": "tensors of no elements where names or other models say that there are some",
    "pair-parted": "head and embedding that are one tensor and are treated in two ways",
    "predictions-differ": "diffusion models that predict noise among such that say they predict otherwise",
    "precision-kept": "tensors that stay finer than the recipe's dtype",
    "promise-unkept": "what the published config promises and no tensor keeps",
    "quantization-removed": "what speaks of quantised weights where the output's are plain numbers",
    "quantised": "models of codes and scales, and how they are read",
    "quantised-tunes": "quantised models beside a base of plain numbers",
    "recomputed": "buffers that only some models hold, and loaders compute",
    "repeated-key": "a key that is there twice with one value",
    "repeated-model": "a model that is listed twice",
    "routers-merged": "what chooses among experts, merged by a method that adds models up",
    "rounded-away": "changes that rounding to the output's dtype loses, so that the output is the base",
    "rounding-noise": "changes that are within the error of the codes they are stored in",
    "running-statistics": "running statistics that are averaged",
    "same-model": "a model that the recipe names in several ways",
    "same-samples": "models that hold the same numbers wherever they were looked at",
    "seed": "what methods that draw, draw by",
    "side-files-differ": "a chat template, special token, generation config, processor or pooling that tunes have not",
    "skipped": "tensors that rules leave out",
    "snapshot": "a model in the hub's cache, of which a snapshot is read",
    "static-scales": "fixed scales of activations: the base's, or not published",
    "square-experts": "tensors of all experts that do not tell rows from columns, where others have one each",
    "stranger": "a model as far from the base as if it had nothing to do with it",
    "template-unread": "a chat template that cannot be parsed, or writes words that are no tokens",
    "tie-flags-disagree": "a config that says both, that head and embedding are one tensor and that they are two",
    "tied-names": "names in an index of a tensor that is stored under another one",
    "tokenizers-differ": "tokenizers of equal tokens that cut texts in different ways",
    "token-ids": "ids of tokens in configs, which follow the vocabulary that is written",
    "tokens-beyond-rows": "tokens for which an embedding has no row",
    "tokens-disagree": "tokens and templates of which the files of one model say different things",
    "padding-of-zeros": "rows beyond all vocabularies, which no model has",
    "tokens-missing": "tokens that some models have and others lack",
    "tied-head": "a head that is stored beside its embedding in some models only",
    "two-sets-of-weights": "two sets of weights in one folder, either of which may be the model",
    "unknown-key": "a key that no part of a recipe has where it stands",
    "unlisted-weights": "weights in files that neither index nor modules name",
    "unmerged": "a merge in which every tensor, or all that are in layers, come from one model",
    "values-collapsed": "small tensors of which rounding leaves few distinct values",
    "unfinished-output": "a model that is the output of a merge which has not finished",
    "vocabularies-differ": "token ids that stand for different tokens in models whose rows are merged",
    "vocabularies-unread": "tokenizers that cannot be compared",
    "weights-chosen": "which of a folder's files are read as its weights, where that was not plain",
    "zeros": "tensors of zeros alone where another model has numbers, or an adapter that adds nothing",
}
"""What each code is about; `stockflow: {accept: [CODE]}` takes those of refusals."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing to know, in a sentence that says what to do, and for programs by its code and what it is about."""

    code: str
    text: str
    severity: Severity = "warning"
    models: tuple[str, ...] = ()
    """locations, without secrets"""
    tensors: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    """what was found, by model or by key"""
    place: str = ""
    """in the recipe, as ``recipe.yaml:7:3``"""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is no code of a remark")
        if self.severity not in get_args(Severity):
            raise ValueError(f"{self.severity!r} is no severity of a remark")

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


def objections(remarks: Iterable[Remark], accepted: Collection[str], *, strict: bool) -> list[str]:
    """Return what stands against a merge: refusals not accepted and, if ``strict``, all that was not asked for."""
    against = []
    for remark in remarks:
        if remark.code in accepted:
            continue
        accept = f"; or accept it: `stockflow: {{accept: [{remark.code}]}}`"
        if remark.severity == "refusal":
            against.append(f"{remark}{accept}")
        elif strict and (remark.severity == "warning" or remark.code not in AS_ASKED):
            against.append(f"{remark} [{remark.code}, refused by --strict]{accept}")
    return against
