"""Misfits: tensors that checkpoints lack, have besides or hold otherwise; grouped before they are told."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stockflow.checkpoints.configs import first
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.layout import folder_of
from stockflow.checkpoints.heads import has_head, is_head, said_of_language
from stockflow.checkpoints.modules import MODULES_FILE
from stockflow.checkpoints.naming import MARKS_OF_PREDICTION, OF_ADAPTERS, OF_TRAINERS, layer_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.quantised import STATIC_SCALES
from stockflow.checkpoints.tokens.token_rows import has_tokens, stated_sizes, vocabulary_rows
from stockflow.checkpoints.values import INDEX_DATA
from stockflow.planning.optional import OptionalParts
from stockflow.planning.targets import OutputTensor, Stretch, Unplanned
from stockflow.planning.ties import missing_head_remedy
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

MOST = 0.5
"""A share of a model's elements beyond which no rule is proposed: what would be left is no merge."""
MAX_FILTERS = 4
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor that stands against a merge."""

    name: str
    predicate: str
    """what is said of it behind ``is``"""
    remedy: str = ""
    """what can be done, with THEM for ``it`` or ``them``"""
    action: str = ""
    """of the rules that do it"""


THEM = "{them}"
_PACKED_REMEDY = (
    "codes are numbers only with their scales, and here one is without the other; fetch the checkpoint again, or name "
    f"{THEM} in a rule with `action: copy`"
)
_UNWRAP = "PEFT wrapped the model: save it after `model.merge_and_unload()`"
_MARKED = (
    f"by {THEM} loaders know that a model predicts otherwise (v for noise): weights trained for the one are not to be "
    "mixed with weights for the other; leave one sort of models out"
)
_MEASURED = (
    "fixed scales of activations or of the cache of keys and values are measured on one model, and what announces them "
    f"is not published with plain numbers: a rule with `action: skip` leaves {THEM} out"
)
_NO_BIAS = (
    f"a model without a bias computes as if it were zeros: write zeros for {THEM} into that model, and say so in its "
    "config; a rule with `action: copy` would publish one model's whole bias beside averaged weights"
)
_NUM_LAYERS = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_STACK = re.compile(r"(?:.*?\.)??(?=\d+\.)")
_NEEDLESS = ("scale", "inv_freq")
"""Ends of the names of what a layer computes without."""


def extra_tensors(unplanned: Iterable[Unplanned], explained: Collection[int]) -> Iterator[Misfit]:
    """Yield what stands against tensors that donors lack, unless the layout of a checkpoint says it already."""
    stacks: dict[int, Collection[str]] = {}
    for each in unplanned:
        stretch, name = each.stretch, each.spec.name
        if id(stretch) not in stacks:
            stacks[id(stretch)] = _stacks(stretch)
        holders = [index for index in each.holders if stretch.numbers[index] not in explained]
        if not holders:
            continue
        urls, remedy, action = stretch.urls(holders), f"a rule with `action: skip` leaves {THEM} out", "skip"
        if any(marker in name for marker in OF_TRAINERS):
            remedy = f"that is what a trainer keeps; {remedy}"
        elif any(marker in name for marker in OF_ADAPTERS):
            remedy, action = _UNWRAP, ""
        elif name in MARKS_OF_PREDICTION:
            remedy, action = _MARKED, ""
        elif _is_measured(name, stretch):
            remedy = _MEASURED
        elif len(holders) == len(stretch.checkpoints) - 1:
            remedy = f"take a base that has {THEM}, or average the others without it"
            if is_head(name) and not has_head(stretch.checkpoints[0].config):
                remedy += (
                    f"; or, as the class of {stretch.urls([0])} has none, a rule with `action: skip` leaves {THEM} out"
                )
            trained = f"{urls} was" if len(holders) == 1 else "all others were"
            remedy, action = f"{trained} trained with {THEM}: {remedy}", ""
        elif _is_of_a_layer(name, stacks[id(stretch)]) and not OptionalParts(stretch.checkpoints[holders[0]]).of(name):
            remedy, action = f"its layers compute with {THEM}: leave {urls} out of the recipe", ""
        lacking = f"but not in {stretch.urls([0])}, which gives the output its names"
        yield of_a_head(Misfit(name, f"in {urls} {lacking}", remedy, action), stretch, [0])


def _stacks(stretch: Stretch) -> Collection[str]:
    """Return what stands before the numbers of layers in the names of its donor."""
    found = (_STACK.match(name) for name in stretch.checkpoints[0].specs)
    return {each[0] for each in found if each}


def _is_of_a_layer(name: str, stacks: Collection[str]) -> bool:
    stack = _STACK.match(name)
    return stack is not None and stack[0] in stacks and not name.endswith(_NEEDLESS)


def _is_measured(name: str, stretch: Stretch) -> bool:
    """Return whether a tensor is a fixed scale beside plain numbers."""
    return name.rpartition(".")[2] in STATIC_SCALES and not stretch.checkpoints[0].stored


def of_a_head(misfit: Misfit, stretch: Stretch, lacking: Sequence[int]) -> Misfit:
    """Return the same, with what can be done if it is a head over the vocabulary, for which no rule is right."""
    remedy = missing_head_remedy(misfit.name, stretch.urls(lacking), stretch.checkpoints[lacking[0]].config)
    return replace(misfit, remedy=remedy, action="") if remedy else misfit


def of_missing(misfit: Misfit, stretch: Stretch, lacking: Sequence[int]) -> Misfit:
    """Return the same, with what can be done if it is a head, or is there within what PEFT wrapped."""
    if any(marker in misfit.name for marker in OF_TRAINERS):
        remedy = f"that is what the trainer of one model keeps: a rule with `action: skip` leaves {THEM} out"
        return replace(misfit, remedy=remedy, action="skip")
    if _is_measured(misfit.name, stretch):
        return replace(misfit, remedy=_MEASURED, action="skip")
    if misfit.name in MARKS_OF_PREDICTION:
        return replace(misfit, remedy=_MARKED, action="")
    if dropped := _of_a_dropped_module(misfit.name, stretch, lacking):
        return replace(misfit, remedy=dropped, action="")
    for index in lacking:
        if fewer := _of_fewer_layers(misfit.name, stretch, index):
            return replace(misfit, remedy=fewer, action="")
    if misfit.name.endswith(".bias") and layer_of(misfit.name) is not None:
        return replace(misfit, remedy=_NO_BIAS, action="")
    module, _, own = misfit.name.rpartition(".")
    wrapped = [f"{prefix}{module}.original_module.{own}" for prefix in ("", "base_model.model.")]
    if any(name in stretch.checkpoints[index].specs for index in lacking for name in wrapped):
        return replace(misfit, remedy=_UNWRAP, action="")
    return of_a_head(misfit, stretch, lacking)


def _of_a_dropped_module(name: str, stretch: Stretch, lacking: Sequence[int]) -> str:
    """Return how a module of sentence-transformers is left out that no other model than the donor has."""
    folder, others = folder_of(name), stretch.checkpoints[1:]
    if not folder or len(lacking) < len(others) or not all(_dropped(each, folder) for each in others):
        return ""
    taken = f"side_files_from: {json.dumps(stretch.urls(lacking[:1]))}"
    return (
        f"none of them has the module {shown(folder)}, so none was trained with it: `stockflow: {{{taken}, rules: "
        f"[{{filter: {json.dumps(folder + '/')}, action: skip}}]}}` leaves it out"
    )


def _dropped(checkpoint: Checkpoint, folder: str) -> bool:
    """Return whether a model has modules, and nothing of it names the one in this folder."""
    files = checkpoint.side_files
    is_named = folder in checkpoint.missing_files or any(key.startswith(f"{folder}/") for key in files)
    return MODULES_FILE in files and not is_named


def _of_fewer_layers(name: str, stretch: Stretch, index: int) -> str:
    """Return that a model has fewer layers than the donor by its own config, and so need not have its first ones."""
    num_layers, most = (_NUM_LAYERS(said_of_language(stretch.checkpoints[each].config)) for each in (index, 0))
    layer = layer_of(name)
    if layer is None or not isinstance(num_layers, int) or not isinstance(most, int) or not num_layers <= layer < most:
        return ""
    return (
        f"its config says {counted(num_layers, 'layer')}, that of {stretch.urls([0])} {most:,}: which ones were taken "
        "out, and so which layers of the two are the same, nothing says; leave that model out, or name its layers by "
        "`slices`"
    )


def mismatches(target: OutputTensor, indices: Sequence[int], by_row: str) -> list[Misfit]:
    """Return in which checkpoints a tensor is stored otherwise than in the first of them.

    Args:
        target: what is written.
        indices: of the checkpoints of its stretch.
        by_row: what to do where they have rows for different numbers of tokens.
    """
    stretch, spec = target.stretch, target.spec
    donor_url = stretch.urls(indices[:1])

    def unlike(where: str, found: object, expected: object, remedy: str = "") -> Misfit:
        return Misfit(spec.name, f"{found} in {where}, expected {expected} as in {donor_url}", remedy)

    misfits = []
    for index in indices:
        found, where = target.source(index), stretch.urls([index])
        if found.kind == "packed":
            misfits.append(Misfit(spec.name, f"{found.dtype} in {where}", _PACKED_REMEDY))
        elif found.shape != spec.shape:
            remedy = _remedy_of_rows(target, index, by_row) if found.shape[1:] == spec.shape[1:] else ""
            if spec.name.endswith(INDEX_DATA):
                remedy = f"indices are counted, not trained: a rule with `action: copy` takes {THEM} from {donor_url}"
            misfits.append(unlike(where, list(found.shape), list(spec.shape), remedy))
        elif found.kind != spec.kind or (spec.kind != "float" and found.dtype != spec.dtype):
            misfits.append(unlike(where, found.dtype, spec.dtype))
    return list(dict.fromkeys(misfits))


def _remedy_of_rows(target: OutputTensor, index: int, by_row: str) -> str:
    """Return what to do where a tensor has another number of rows: a row per token, or per something else."""
    if not has_tokens(target.spec.name):
        return ""
    checkpoints = (target.stretch.checkpoints[0], target.stretch.checkpoints[index])
    shapes = (target.spec.shape, target.source(index).shape)
    rows = (vocabulary_rows(each.specs, {*stated_sizes(each.config)}) for each in checkpoints)
    if any(shape[0] == number for shape, number in zip(shapes, rows, strict=True)):
        return by_row
    return "a row is of something else than a token there, such as a label: merge the models that agree on them"


@dataclass(frozen=True, slots=True)
class _Cluster:
    """Tensors that share a misfit and a place in the tree of names."""

    names: tuple[str, ...]
    where: str = ""
    """what they share, in words"""


def told(misfits: Sequence[Misfit], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield a sentence per group of misfits, in the order of their first ones.

    Args:
        misfits: what was found.
        specs: every tensor of every checkpoint by name, for what a filter would match and how much a group is.
    """
    alike: dict[Misfit, list[str]] = {}
    for each in misfits:
        alike.setdefault(replace(each, name=""), []).append(each.name)
    for misfit, names in alike.items():
        for cluster in _clusters(names, specs):
            yield "; ".join(filter(None, _sentences(misfit, cluster, specs)))


def _sentences(misfit: Misfit, cluster: _Cluster, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    names = cluster.names
    if len(names) == 1:
        yield f"{shown(names[0])} is {misfit.predicate}"
        yield misfit.remedy.replace(THEM, "it")
        return
    yield f"{counted(len(names), 'tensor')} {cluster.where} are {misfit.predicate}"
    if misfit.action and _share(names, specs) > MOST:
        yield "that is most of a model, so no rule makes a merge of it: are these the models you mean?"
        return
    yield misfit.remedy.replace(THEM, "them")
    if misfit.action and (found := _filters(names, specs)):
        rules = ", ".join(f"{{filter: {json.dumps(text)}, action: {misfit.action}}}" for text in found)
        yield f"to paste: `stockflow: {{rules: [{rules}]}}`"


def _share(names: Collection[str], specs: Mapping[str, TensorSpec]) -> float:
    whole = sum(spec.num_elems for spec in specs.values())
    return sum(specs[name].num_elems for name in names) / whole if whole else 0.0


def _clusters(names: Sequence[str], universe: Collection[str]) -> Iterator[_Cluster]:
    """Yield whole branches of the tree of names, and single tensors; those that differ in numbers together."""
    if len(names) == 1:
        yield _Cluster((names[0],))
        return
    branches: dict[str, list[str]] = {}
    part, whole = _branch_sizes(names), _branch_sizes(universe)
    for name in names:
        whole_branch = next((each for each in _branches(name) if part[each] == whole[each] > 1), name)
        branches.setdefault(_NUMBER.sub("*", whole_branch), []).append(name)
    for pattern, members in branches.items():
        yield _Cluster(tuple(members), _where(pattern, members))


def _where(pattern: str, members: Sequence[str]) -> str:
    if not pattern.endswith(".") and pattern:
        return f"like {shown(members[0])}"
    if "*" not in pattern:
        return f"of {shown(pattern)}" if pattern else "of it, all there are,"
    depth = pattern.index("*")
    numbers = sorted({int(number[0]) for name in members if (number := re.match(r"\d+", name[depth:]))})
    between = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"of {shown(pattern)} ({between})"


def _branches(name: str) -> Iterator[str]:
    """Yield the branches that a tensor is on, from the root: ``""``, ``model.``, ``model.layers.`` ..."""
    yield ""
    yield from (name[: dot.end()] for dot in re.finditer(r"\.", name))


def _branch_sizes(names: Iterable[str]) -> Counter[str]:
    return Counter(branch for name in names for branch in _branches(name))


def _filters(names: Sequence[str], universe: Collection[str]) -> list[str]:
    """Return parts of names that match these tensors and no others, as few as there are; [] where there are none."""
    wanted = frozenset(names)
    for found in (_shared_parts(names), sorted({_longest_branch([name]) for name in names})):
        if len(found) > MAX_FILTERS:
            continue
        singly = [[text] for text in found]
        for texts in (*singly, found):
            if all(texts) and {name for name in universe if any(text in name for text in texts)} == wanted:
                return texts
    return []


def _shared_parts(names: Sequence[str]) -> list[str]:
    """Return what all names share between their numbers, the longest first."""
    first = names[0]
    parts = [part for part in (_longest_branch(names), *_NUMBER.split(first)) if len(part) > 1]
    shared = [part for part in parts if all(part in name for name in names)]
    return sorted(dict.fromkeys(shared), key=len, reverse=True)[:MAX_FILTERS]


def _longest_branch(names: Sequence[str]) -> str:
    candidates = [branch for branch in _branches(names[0]) if all(name.startswith(branch) for name in names)]
    return candidates[-1]
