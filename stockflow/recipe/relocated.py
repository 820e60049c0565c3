"""A recipe with other locations for its models, wherever it names one."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

from stockflow.errors import RecipeError
from stockflow.recipe.locations import resolve_location
from stockflow.recipe.model import ModelEntry, ModuleEntry, Recipe, SliceEntry
from stockflow.recipe.tokens import TokenEntry, TokenizerEntry

Entry = TypeVar("Entry", bound=ModelEntry)
Relocate = Callable[[str], str]
"""Returns the location that stands for another; words that are none are their own."""


def relocated(recipe: Recipe, relocate: Relocate) -> Recipe:
    """Return a recipe with other locations; nothing that was found of the earlier ones is kept."""
    other = recipe.model_copy(
        update={
            "base_model": _perhaps(recipe.base_model, relocate),
            "models": _entries(recipe.models, relocate),
            "slices": _slices(recipe.slices, relocate),
            "modules": {name: _module(each, relocate) for name, each in recipe.modules.items()},
            "tokenizer_source": _perhaps(recipe.tokenizer_source, relocate),
            "tokenizer": _tokenizer(recipe.tokenizer, relocate) if recipe.tokenizer else None,
            "chat_template": _template(recipe.chat_template, relocate),
            "stockflow": recipe.stockflow.model_copy(
                update={"side_files_from": _perhaps(recipe.stockflow.side_files_from, relocate)}
            ),
        }
    )
    for name, value in vars(Recipe).items():
        if isinstance(value, cached_property):
            other.__dict__.pop(name, None)
    return other


def _perhaps(location: str | None, relocate: Relocate) -> str | None:
    return None if location is None else relocate(location)


def _entries(entries: tuple[Entry, ...], relocate: Relocate) -> tuple[Entry, ...]:
    return tuple(each.model_copy(update={"model": relocate(each.model)}) for each in entries)


def _slices(slices: tuple[SliceEntry, ...], relocate: Relocate) -> tuple[SliceEntry, ...]:
    return tuple(
        each.model_copy(
            update={
                "sources": _entries(each.sources, relocate),
                "base_model": _perhaps(each.base_model, relocate),
            }
        )
        for each in slices
    )


def _module(module: ModuleEntry, relocate: Relocate) -> ModuleEntry:
    moved = {"models": _entries(module.models, relocate), "slices": _slices(module.slices, relocate)}
    return module.model_copy(update=moved)


def _tokenizer(entry: TokenizerEntry, relocate: Relocate) -> TokenizerEntry:
    tokens = {token: _token(each, relocate) for token, each in entry.tokens.items()}
    return entry.model_copy(update={"source": relocate(entry.source), "tokens": tokens})


def _token(entry: TokenEntry, relocate: Relocate) -> TokenEntry:
    source = entry.source.model_copy(update={"model": _perhaps(entry.source.model, relocate)})
    return entry.model_copy(update={"source": source})


def _template(asked: str | None, relocate: Relocate) -> str | None:
    """Return the location that stands for a model whose template is asked for; a template as it is."""
    if asked is None or "{" in asked:
        return asked
    try:
        location = resolve_location(asked)
    except RecipeError:
        return asked
    moved = relocate(location)
    return asked if moved == location else moved
