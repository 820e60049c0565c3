"""Repeats: models that a recipe lists twice; and revisions of folders, which have none."""

from collections.abc import Iterator

from stockflow.recipe.document import Document, Notice, Path, Problem
from stockflow.recipe.locations import ignored_revision, parts_of, written
from stockflow.recipe.model import Recipe
from stockflow.recipe.settings import parameters_of
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line

_NAME_MODELS = ("model", "base_model")


def repeated_models(recipe: Recipe, document: Document) -> Iterator[Notice | Problem]:
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
        line = document.line(("models", earlier))
        text = f"the same model as models[{earlier}] on line {line}: {redact(entry.model)}"
        if names := weighed.get(entry.model):
            added = " (add up the two weights)" if "weight" in names else ""
            yield path, f"{text}; list it once{added}"
        else:
            yield Notice(path, "repeated-model", f"{text}; it counts once")


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
