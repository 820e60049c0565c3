"""Checks of adapters: what config.json and adapter_config.json say, held against the tensors that are there."""

import re
from collections.abc import Iterator, Mapping, Sequence

from stockflow.checkpoints.adapters.ground import Ground
from stockflow.checkpoints.adapters.opening import NUM_NAMED, Adapter
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import may_be_tied, tied_names
from stockflow.errors import CheckpointError
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

Parts = Mapping[str, str]
"""Keys of a module, by what they are there."""
_CLASS_OF_TASK = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Ends of the names of classes with the heads that tasks of PEFT train, by the task."""

_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_promises(ground: Ground, adapter: Adapter, modules: Mapping[str, Parts]) -> None:
    """Hold what a config says is there against the tensors: what is lost would leave the base as it is."""
    config = adapter.config
    has_lengths = any("lengths" in parts for parts in modules.values())
    if has_lengths != config.has_lengths:
        problem = (
            "the config does not say `use_dora`, and some tensors are `lora_magnitude_vector`s, which PEFT would leave "
            "out; say it if the adapter is of DoRA"
            if has_lengths
            else "the config says `use_dora`, and no tensor is a `lora_magnitude_vector`; fetch it again"
        )
        raise CheckpointError(f"{adapter.where}: {problem}")
    for name in config.modules_to_save:
        is_there = any(f".{tensor}".endswith((f".{name}.weight", f".{name}.bias")) for tensor in ground.specs)
        if is_there and not any(f".{module}".endswith(f".{name}") for module in modules):
            raise CheckpointError(
                f"{adapter.where}: the config says that {shown(name)} is saved whole (`modules_to_save`), and no "
                "tensor is of it; fetch it again"
            )


def check_vocabulary(ground: Ground, adapter: Adapter, made: Mapping[str, TensorSpec]) -> None:
    """Hold the rows of embedding and head against each other where an adapter has more, or fewer, than its base."""
    if not any(map(may_be_tied, made)):
        return
    specs = {**ground.specs, **made}
    names = tied_names(specs)
    for head in names.heads:
        others = [name for name in names.embeddings if specs[name].shape[1:] == specs[head].shape[1:]]
        own = ground.specs.get(head)
        was_alike = own is None or any(own.shape == ground.specs[name].shape for name in others if name in ground.specs)
        if others and was_alike and all(specs[name].shape != specs[head].shape for name in others):
            rows = (
                f"{shown(others[0])} has {specs[others[0]].shape[0]:,} rows and {shown(head)} {specs[head].shape[0]:,}"
            )
            raise CheckpointError(
                f"{adapter.where}: with it {rows}, which no loader takes: it was trained on a model of another number "
                "of tokens, and holds one of the two whole; save both (`modules_to_save`), or resize the base first"
            )


def on_biases(ground: Ground, adapter: Adapter, modules: Mapping[str, Parts]) -> Iterator[Remark]:
    """Yield that biases are said to be trained where there are none.

    Raises:
        CheckpointError: the base has some, and the adapter none.
    """
    said = adapter.config.biases
    if said == "none" or any(part.rpartition(".")[2] == "bias" for parts in modules.values() for part in parts):
        return
    trained = list(modules) if said == "lora_only" else [name.removesuffix(".bias") for name in ground.specs]
    if lost := next((name for module in trained if (name := ground.names.find(f"{module}.bias"))), None):
        raise CheckpointError(
            f"{adapter.where}: the config says that biases were trained (`bias: {said}`), as {shown(lost)} of "
            f"{ground.where}, and no tensor is one; fetch it again"
        )
    text = f"{adapter.where} says that biases were trained (`bias: {said}`); neither it nor {ground.where} has any"
    yield Remark("adapter-biases", text, "note", (adapter.where,))


def on_targets(ground: Ground, adapter: Adapter, modules: Mapping[str, Parts]) -> Iterator[Remark]:
    """Yield that matrices of the base are said to be trained for which nothing is there.

    Those of experts only where some are there, one by one, then also of layers that no list names: libraries that hold
    all experts of a layer in one parameter train none of them by such names.
    """
    ends = tuple(f".{target}.weight" for target in adapter.config.targets)
    held = {ground.names.find(f"{module}.weight") or "" for module in modules}
    experts = {_of_any_expert(name) for name in held if ".experts." in name}
    matrices = (name for name, spec in ground.specs.items() if len(spec.shape) == 2)
    said = [
        name
        for name in matrices
        if (f".{name}".endswith(ends) and (experts or ".experts." not in name))
        or (experts and _of_any_expert(name) in experts)
    ]
    lost = [name for name in said if name not in held]
    if lost:
        was = "was" if len(said) == 1 else "were"
        text = (
            f"{adapter.where} says that {counted(len(said), 'weight')} of {ground.where} {was} trained (its "
            f"`target_modules`, or other experts), and has nothing for {len(lost)} of them, such as {shown(lost[0])}: "
            "they stay as they are; fetch it again, or save it whole"
        )
        yield Remark("adapter-part", text, "warning", (adapter.where,), tuple(lost))


def _of_any_expert(name: str) -> str:
    return _EXPERT.sub(".experts.*.", name)


def on_task(ground: Ground, adapter: Adapter, brought: Sequence[TensorSpec]) -> Iterator[Remark]:
    """Yield that an adapter was trained for a class of models with another head than the one that its base names."""
    task, said = adapter.config.task, (ground.config or {}).get("architectures")
    classes = list(map(str, said)) if isinstance(said, list) else []
    end = _CLASS_OF_TASK.get(task or "")
    if any(each.endswith(end) for each in classes) if end else not brought:
        return
    if not brought and not classes:
        return
    heads = ", ".join(f"{shown(spec.name)} {list(spec.shape)}" for spec in brought[:NUM_NAMED])
    named, loaded = (f"is of {shown(classes[0])}", "as that") if classes else ("names no class", "by its type alone")
    lost = f"loaded {loaded}, the output is without {heads}" if brought else "the head that was trained is not there"
    trained = f"was trained for {shown(task)}" if task else "does not say for which task it was trained"
    text = (
        f"{adapter.where} {trained}, and {ground.where} {named}: {lost}. "
        "Put the adapter on a model of the class that it was trained on; accept this if the output is loaded as one"
    )
    yield Remark("adapter-task", text, "refusal", (adapter.where,), tuple(spec.name for spec in brought))
