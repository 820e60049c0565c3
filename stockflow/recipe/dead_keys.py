"""Dead keys: what the usual tool reads past without a word, each with what was meant and where it belongs."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from stockflow.methods import METHODS
from stockflow.methods.parameters import Parameter
from stockflow.methods.protocol import Method
from stockflow.recipe.document import Notice, Path
from stockflow.recipe.model import Recipe
from stockflow.recipe.options import Options
from stockflow.recipe.settings import UNDER_STOCKFLOW, Settings, parameters_of
from stockflow.recipe.structure import keys_at
from stockflow.recipe.wording import listed, meant, named

_INT8_MASK = "int8_mask"
"""The dtype of mergekit's masks: a parameter that changes no result."""
_WITH_INT8_MASK = frozenset({
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
    "sce",
})  # fmt: skip
"""mergekit's methods that have it."""
_BELONGS = {
    "name": "it names a stage for mergekit-multi, and nothing here reads it; remove it",
    "revision": "write it behind the model: `org/name@revision`",
    "layer_range": "it belongs to the `sources` of `slices`; remove it",
    "residual_weight": "no tool reads it; remove it",
    "pad_to_multiple_of": "did you mean `tokenizer.pad_to_multiple_of`?",
    "tokens": "did you mean `tokenizer.tokens`?",
    "adapter": "write it behind the model: `model+adapter`",
    "lora": "write it behind the model: `model+adapter`",
    "random_seed": "did you mean `stockflow.seed`?",
}
"""What to say of keys of other places, and of none."""
_OPTIONS = frozenset({"memory", "workers", "device", "executor", "strict", "overwrite", "verify_inputs"})
_OF_COMMANDS = frozenset({
    "allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda", "lazy_unpickle", "lora_merge_cache",
    "low_cpu_memory", "multi_gpu", "out_shard_size", "read_to_gpu", "safe_serialization", "transformers_cache",
    "trust_remote_code", "write_model_card",
})  # fmt: skip
"""Options of mergekit's commands."""


def unknown_keys(
    unknown: Mapping[Path, Collection[str]], methods: Sequence[Method], given: Settings
) -> Iterator[Notice]:
    """Yield what to say of keys that are unknown where they stand.

    Args:
        unknown: where, and which keys are beside each.
        methods: in use, as far as they are known.
        given: the recipe's own parameters.
    """
    declared = _declared(methods)
    for path, beside in unknown.items():
        name = str(path[-1])
        used = _default(declared.get(name), given) if len(path) == 1 else ""
        text = f"`{named(name)}` has no effect here{used}; {_advice(path, beside, methods, declared)}"
        yield Notice(path, "unknown-key", text)


def _advice(path: Path, beside: Collection[str], methods: Sequence[Method], declared: Mapping[str, Parameter]) -> str:
    name = "_".join(re.findall(r"\w+", str(path[-1])))
    if "parameters" in path:
        return _meant(name, keys_at(path), beside)
    if name in declared:
        return f"did you mean `parameters.{name}`?"
    if name in _BELONGS:
        return _BELONGS[name]
    if name in _OF_COMMANDS:
        return "it is an option of mergekit's commands; remove it"
    if name in _OPTIONS:
        return f"did you mean the command's option --{name}? remove it here"
    if name in Options.model_fields:
        return f"did you mean `stockflow.{name}`?"
    if name == _INT8_MASK or name in _declared(METHODS.values()):
        whose = f"{_who(methods)} no parameter of this name" if methods else "it is a parameter of some methods"
        return f"{whose}; remove it"
    here = {key: key for key in keys_at(path)} | {key: f"parameters.{key}" for key in declared}
    if len(path) > 1 and not meant(name, here) and (top := meant(name, Recipe.model_fields)):
        return f"did you mean `{top}` at the top of the recipe?"
    return _meant(name, here, beside, here)


def dead_parameters(recipe: Recipe) -> Iterator[Notice]:
    """Yield what to say of parameters, the recipe's own and the models', that no method reads where they stand."""
    using = recipe.methods
    counted = [(method, {entry.model for entry in recipe.counted(method)}) for method in using]
    yield from _foreign(recipe.parameters, using, recipe, ("parameters",))
    for index, entry in enumerate(recipe.models):
        path: Path = ("models", index, "parameters")
        if hearing := [method for method, locations in counted if entry.model in locations]:
            shared = [name for name in entry.parameters if _is_shared(name, using)]
            yield from _shared(shared, recipe, path)
            rest = {name: items for name, items in entry.parameters.items() if name not in shared}
            yield from _foreign(rest, hearing, recipe, path)
        else:
            for name in entry.parameters:
                text = f"`{named(name)}` has no effect, as this model is the base; remove it"
                yield Notice((*path, name), "no-effect", text)


def _shared(names: Iterable[str], recipe: Recipe, path: Path) -> Iterator[Notice]:
    for name in names:
        kept = "remove it" if name in recipe.parameters else f"did you mean the recipe's own `parameters.{name}`?"
        text = f"`{name}` is one for the merge, so it has no effect of one model; {kept}"
        yield Notice((*path, name), "no-effect", text)


def _is_shared(name: str, methods: Iterable[Method]) -> bool:
    found = [known[name] for method in methods if name in (known := parameters_of(method))]
    return bool(found) and not any(each.per_model for each in found)


def _foreign(settings: Settings, methods: Sequence[Method], recipe: Recipe, path: Path) -> Iterator[Notice]:
    declared = _declared(methods)
    is_quiet = len(path) == 1 and any(method.name in _WITH_INT8_MASK for method in methods)
    for name, items in settings.items():
        if name in declared and not items:
            yield Notice((*path, name), "no-effect", f"`{name}` is an empty list, which gives no value; remove it")
        elif name not in declared and not (name == _INT8_MASK and is_quiet):
            text = f"{_who(methods)} no parameter `{named(name)}`, so it has no effect"
            yield Notice((*path, name), "no-effect", text + _instead(name, declared, settings, recipe))


def _instead(name: str, declared: Mapping[str, Parameter], settings: Settings, recipe: Recipe) -> str:
    """Say what is used for a parameter that is unknown, and what it is taken for."""
    if name in UNDER_STOCKFLOW:
        return f"; did you mean `stockflow.{name}`?"
    if name in type(recipe).model_fields:
        return f"; did you mean `{name}` at the top of the recipe?"
    close = meant(name, declared.keys() - settings.keys())
    return f"{_default(declared[close], recipe.parameters)}; did you mean `{close}`?" if close else "; remove it"


def _default(parameter: Parameter | None, given: Collection[str]) -> str:
    if parameter is None or parameter.default is None or parameter.name in given:
        return ""
    value = parameter.default
    return f", and {str(value).lower() if isinstance(value, bool) else f'{value:g}'} is used"


def _declared(methods: Iterable[Method]) -> dict[str, Parameter]:
    return {name: each for method in methods for name, each in parameters_of(method).items()}


def _who(methods: Sequence[Method]) -> str:
    return f"{listed([f'`{method.name}`' for method in methods])} {'has' if len(methods) == 1 else 'have'}"


def _meant(name: str, known: Iterable[str], beside: Collection[str], places: Mapping[str, str] | None = None) -> str:
    close = meant(name, known)
    if close in beside:
        return f"`{close}` is there as well; remove it"
    return f"did you mean `{(places or {}).get(close, close)}`?" if close else "remove it"
