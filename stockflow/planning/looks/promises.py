"""Promises of the published config that no written tensor keeps: layers, prediction layers, a head of its own."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from stockflow.checkpoints.configs import Config, first, sections
from stockflow.checkpoints.heads import is_of_language
from stockflow.checkpoints.naming import MARKS_OF_PREDICTION, OF_ADAPTERS, OF_TRAINERS, TRAINING_WRAPPERS, LayerNames
from stockflow.checkpoints.spellings import nonfinite
from stockflow.planning.config.layers import numbers_of
from stockflow.planning.looks.parts import broken, is_plain, tower_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.optional import NUM_PREDICTED
from stockflow.planning.towers import OTHER_SIDE, side_of_count, sides_of
from stockflow.storage import redact
from stockflow.text.examples import some, such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

_WRAPPERS = tuple(f"{part}." for part in TRAINING_WRAPPERS)
_FEED_FORWARD = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.(?:mlp|feed_forward)\.(experts|gate_proj|gate_up_proj)\b")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_OF_SIDES = ("num_encoder_layers", "num_decoder_layers")
_LAYERS = LayerNames()
_OTHERWISE_COUNTED = ("num_hidden_groups", "depths")
"""Say that layers share tensors, or are counted otherwise."""
_MIXED = "weights trained for the one are mixed with weights for the other. Leave one sort of models out"


def stacks(begins: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of layers by what stands before them: ``model.layers.`` to 0, 1, 2."""
    found: dict[str, set[int]] = {}
    for begin in begins:
        if place := _LAYERS.place(begin):
            found.setdefault(place.stack, set()).add(place.number)
    return found


def missing_layers(proposal: Proposal) -> Iterator[Remark]:
    """Yield which sections of the published config speak of other numbers of layers than are written.

    Where the first parts of names tell of one, whole names decide: some layers lie deeper.
    """
    if any(_broken_layers(proposal, proposal.begins)):
        yield from _broken_layers(proposal, proposal.written)


def _broken_layers(proposal: Proposal, names: Iterable[str]) -> Iterator[Remark]:
    config = proposal.config or {}
    speaks = any(key in section for _, section in sections(config) for key in _NUM_LAYERS)
    found = stacks(names) if speaks else {}
    for path, section in sections(config) if found else ():
        ours = _of_its_tower(path, found)
        whole = {stack: len(numbers) for stack, numbers in ours.items() if max(numbers) + 1 == len(numbers)}
        of_sides = {side: {num for stack, num in whole.items() if side in sides_of(stack)} for side in OTHER_SIDE}
        has_sides = all(of_sides.values())
        counted_otherwise = any(each in section for each in _OTHERWISE_COUNTED)
        kinds = section.get("layer_types")
        for key in (*_NUM_LAYERS, *_OF_SIDES) if has_sides else _NUM_LAYERS:
            number, side = section.get(key), side_of_count(key, section) if has_sides else ""
            if counted_otherwise or not isinstance(number, int) or not ours:
                continue
            promised = {number, number + _num_predicted(section)}
            is_of_both = (
                side and side not in key and not any("decoder" in each and "layers" in each for each in section)
            )
            held = [of_sides.get(side, set(whole.values())), *(of_sides.values() if is_of_both else ())]
            if not all(promised & each for each in held):
                yield broken(proposal, path + key, number, f"the written tensors have {_described(ours)}")
            if isinstance(kinds, list) and len(kinds) not in promised:
                yield broken(proposal, f"{path}layer_types", f"{len(kinds)} of them", f"{number} layers are promised")


def _of_its_tower(path: str, found: Mapping[str, set[int]]) -> Mapping[str, set[int]]:
    """Return the layers that may be of what a section speaks of: those of its tower, none where only others are."""
    words = tower_of(path)
    ours = {before: each for before, each in found.items() if any(word in before for word in words)}
    return ours if ours or (words and all(map(is_plain, found))) else found


def _num_predicted(section: Config) -> int:
    number = NUM_PREDICTED(section)
    return number if isinstance(number, int) else 0


def layers_of_experts(proposal: Proposal) -> Iterator[Remark]:
    """Yield which layers have experts where the published config says that they have none, or the other way round."""
    for path, section in sections(proposal.config or {}):
        says, number = _says_experts(section), first(*_NUM_LAYERS)(section)
        if says is None or not isinstance(number, int) or not is_of_language(path):
            continue
        found = filter(None, map(_FEED_FORWARD.search, proposal.begins))
        held = dict(sorted({(int(each[1]), each[2] == "experts") for each in found}))
        key, has_experts = says
        wrong = [layer for layer, is_so in held.items() if layer < number and is_so != has_experts(layer)]
        if wrong and any(held.values()):
            kept = "has experts" if held[wrong[0]] else "has none"
            many = f"{counted(len(wrong), 'layer')} it is otherwise: layer {wrong[0]} {kept}"
            yield broken(proposal, path + key, section[key], f"by that, which layers have experts, in {many}")


def _says_experts(section: Config) -> tuple[str, Callable[[int], bool]] | None:
    """Return by which key a section says which layers have experts, and what it says; None if it does not.

    Source: the decoder layers of DeepSeek-V3, of Qwen's mixtures and of Step-3 in transformers.
    """
    dense, every = section.get("first_k_dense_replace"), section.get("moe_layer_freq", 1)
    if isinstance(dense, int) and isinstance(every, int) and every > 0:
        return "first_k_dense_replace", lambda layer: layer >= dense and layer % every == 0
    if numbers := numbers_of(section.get("moe_layers_enum")):
        return "moe_layers_enum", numbers.__contains__
    step, alone = section.get("decoder_sparse_step"), section.get("mlp_only_layers") or []
    if isinstance(step, int) and step > 0 and isinstance(alone, list) and section.get("num_experts"):
        key = "mlp_only_layers" if alone else "decoder_sparse_step"
        return key, lambda layer: layer not in alone and (layer + 1) % step == 0
    return None


def missing_predictions(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the config promises layers that predict further tokens, and no tensor is of one."""
    for path, section in sections(proposal.config or {}):
        number, layers = _num_predicted(section), first(*_NUM_LAYERS)(section)
        if not number or not isinstance(layers, int):
            continue
        extra = re.compile(rf"(^|\.)(mtp\w*\.|layers\.{layers}\.)")
        if not any(map(extra.search, proposal.written)):
            key = next(key for key in section if section[key] == number and ("nextn" in key or "mtp" in key))
            yield broken(proposal, path + key, number, "no written tensor is of a layer that predicts further tokens")


def wrapped_by_adapters(proposal: Proposal) -> Iterator[Remark]:
    """Yield that heads or layers go out under the names that PEFT gives what it wraps, beside what they replaced."""
    if names := _with_markers(proposal, OF_ADAPTERS):
        url = redact(proposal.donor.url)
        text = (
            f"{such(names)} {are(len(names))} named as within an adapter, in {url} and all others: loaders know no "
            "such tensors and make up the real ones; save the models after `model.merge_and_unload()`"
        )
        yield Remark("not-weights", text, "refusal", (url,), names)


def training_state(proposal: Proposal) -> Iterator[Remark]:
    """Yield that what a trainer keeps beside the weights would be merged as if it were weights."""
    names = _with_markers(proposal, OF_TRAINERS)
    if names and len(names) < len(proposal.jobs):
        markers = dict.fromkeys(next(filter(name.__contains__, OF_TRAINERS)) for name in names)
        rules = ", ".join(f"{{filter: {marker}, action: skip}}" for marker in markers)
        text = (
            f"{such(names)} {are(len(names))} what a trainer keeps (the state of an optimizer, or averages of "
            f"weights), no weights of the model; `stockflow: {{rules: [{rules}]}}` leaves "
            f"{'it' if len(names) == 1 else 'them'} out"
        )
        yield Remark("not-weights", text, "refusal", (redact(proposal.donor.url),), names)


def _with_markers(proposal: Proposal, markers: Sequence[str]) -> tuple[str, ...]:
    joined = "\n".join(proposal.written)
    found = [marker for marker in markers if marker in joined]
    return tuple(name for name in proposal.written if any(map(name.__contains__, found))) if found else ()


def mixed_predictions(proposal: Proposal) -> Iterator[Remark]:
    """Yield which of the models that are merged predict otherwise: by a tensor that others lack, or by schedulers."""
    marks = {mark for each in proposal.checkpoints for mark in MARKS_OF_PREDICTION if mark in each.specs}
    if not marks and not any(each.predicts for each in proposal.checkpoints):
        return
    merged = (job for job in proposal.jobs if not job.is_copy)
    numbers = sorted({operand.checkpoint for job in merged for operand in job.reading.operands})
    models = [proposal.checkpoints[number] for number in numbers]
    for mark in sorted(marks):
        holders = [redact(each.url) for each in models if mark in each.specs]
        others = [redact(each.url) for each in models if mark not in each.specs]
        if holders and others:
            goes = "" if mark in proposal.written else "not "
            text = (
                f"by the tensor {shown(mark)} loaders know that a model predicts otherwise (v for noise): in "
                f"{some(holders, quote=str)}, not in {some(others, quote=str)}; by a rule it is {goes}written, and "
                f"{_MIXED}"
            )
            yield Remark("predictions-differ", text, "warning", (*holders, *others), (mark,))
    said = {redact(each.url): each.predicts for each in models if each.predicts}
    if len(kinds := dict.fromkeys(said.values())) > 1:
        owners = {kind: [url for url, own in said.items() if own == kind] for kind in kinds}
        told = "; ".join(f"{shown(kind)} for {some(urls, quote=str)}" for kind, urls in owners.items())
        text = f"the schedulers beside these components say that they predict otherwise, {told}: {_MIXED}"
        yield Remark("predictions-differ", text, "warning", tuple(said), values=said)


def nonfinite_values(proposal: Proposal) -> Iterator[Remark]:
    """Yield what the published config says that is no finite number; some classes mean one, none means NaN."""
    found = dict(nonfinite(proposal.config or {}))
    if found:
        url, has_nan = redact(proposal.donor.url), "NaN" in found.values()
        said = ", ".join(f"{shown(key)}: {value}" for key, value in list(found.items())[:4])
        means = "no model computes with that; correct it there" if has_nan else "it goes out as it is"
        text = f"the config of {url} says {said}, which Python's loaders read and strict JSON parsers refuse: {means}"
        yield Remark("config-not-finite", text, "warning" if has_nan else "note", (url,), values=found)


def wrapped_names(proposal: Proposal) -> Iterator[Remark]:
    """Yield that tensors go out under names that say how the donor was trained, which loaders do not take off."""
    names = [
        name
        for name in proposal.written
        if name.startswith(_WRAPPERS) or ("._" in name and any(f".{each}" in name for each in _WRAPPERS))
    ]
    if names:
        url = redact(proposal.donor.url)
        text = (
            f"{counted(len(names), 'tensor')} {are(len(names))} written under names such as {shown(names[0])}, as "
            f"{url} has them: loaders do not know what wrapped a model in training, and make such tensors up; save it "
            "without that"
        )
        yield Remark("promise-unkept", text, "warning", (url,), tuple(names))


def _described(found: Mapping[str, set[int]]) -> str:
    return ", ".join(
        f"{counted(len(numbers), 'layer')} under {before}" for before, numbers in sorted(found.items())[:4]
    )
