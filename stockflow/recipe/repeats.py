"""Repeats: models that a recipe lists twice, or names in several ways; and revisions of folders, which have none."""

from collections.abc import Iterator, Mapping

from stockflow.recipe.document import Document, Notice, Path, Problem
from stockflow.recipe.locations import ignored_revision, parts_of, resolve_location, written
from stockflow.recipe.model import Recipe
from stockflow.recipe.settings import parameters_of
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line

_NAME_MODELS = ("model", "base_model")
_MERGED = ("base_model", "models", "slices", "modules")
"""Keys under which models are named whose tensors are merged, that of the base first."""
Names = Mapping[Path, str]
"""Models as they are written, by where."""


def names_in(plain: Mapping[str, object]) -> Names:
    """Return how a document names the models it merges, the base first."""
    return dict(pair for key in _MERGED for pair in _names_below((key,), plain.get(key)))


def _names_below(path: Path, value: object) -> Iterator[tuple[Path, str]]:
    is_name = path[-1] in _NAME_MODELS or (path[-2:-1] == ("models",) and isinstance(value, str))
    text = written(value) if is_name else None
    if isinstance(text, str):
        yield path, text
    elif isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _names_below((*path, key), child)


def models_under_other_names(recipe: Recipe, names: Names) -> Iterator[Notice]:
    """Yield each further name of a model, such as a link to it, but for those that `repeated_models` tells of."""
    first: dict[str, str] = {}
    told = set()
    for path, text in names.items():
        location = resolve_location(text)
        known = first.setdefault(location, text)
        is_base = location == recipe.base_model
        if text == known or text in told or (path[0] == "models" and not is_base):
            continue
        told.add(text)
        said = same_model(recipe, (text, known), location, of_slices="slices" in path)
        yield Notice(path, "same-model", said, (redact(location),))


def same_model(recipe: Recipe, names: tuple[str, str], location: str, *, of_slices: bool) -> str:
    """Say that the first of two names is the second, and what becomes of the model."""
    if of_slices:
        becomes = "the layers of both are those of one model"
    elif location == recipe.base_model and recipe.anchors(recipe.method_for(None)):
        becomes = "it is not counted as a model that was tuned from it"
    else:
        becomes = "it is merged once"
    one, other = map(redact, names)
    return f"{one} is {other} under another name: {becomes}"


def repeated_models(recipe: Recipe, document: Document, names: Names) -> Iterator[Notice | Problem]:
    """Yield models that are listed again: a problem where each entry has parameters of its own, else a notice."""
    weighed: dict[str, list[str]] = {}
    for method in recipe.methods:
        own = [name for name, parameter in parameters_of(method).items() if parameter.per_model]
        for entry in recipe.counted(method) if own else ():
            weighed.setdefault(entry.model, []).extend(own)
    first: dict[str, int] = {}
    for index, entry in enumerate(recipe.models):
        earlier = first.setdefault(entry.model, index)
        if earlier == index:
            continue
        path: Path = ("models", index, "model")
        one, other = (names.get(("models", place, "model"), names.get(("models", place))) for place in (earlier, index))
        line = document.line(("models", earlier))
        linked = f", here as {redact(str(other))}" if one != other else ""
        text = f"the same model as models[{earlier}] on line {line}: {redact(entry.model)}{linked}"
        if own_values := weighed.get(entry.model):
            added = " (add up the two weights)" if "weight" in own_values else ""
            yield path, f"{text}; list it once{added}"
        else:
            yield Notice(path, "repeated-model", f"{text}; it counts once", (redact(entry.model),))


def local_revisions(value: object, path: Path = ()) -> Iterator[Notice]:
    """Yield revisions of models that are folders on this machine, at any depth of a document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        text = written(child) if key in _NAME_MODELS else child if path[-1:] == ("models",) else None
        folder = next(filter(None, map(ignored_revision, parts_of(text) if isinstance(text, str) else ())), None)
        if folder:
            asked = f"the folder '{in_a_line(folder)}' is taken as it is"
            said = f"{asked}, as folders have no revisions; leave the revision out"
            yield Notice((*path, key), "local-revision", said)
        else:
            yield from local_revisions(child, (*path, key))
