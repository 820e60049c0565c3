"""Slices: runs of layers of the output, each as a recipe of the layers that are merged into it.

Models without layers of their own are one slice, the recipe itself.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from stockflow.recipe.document import Path
from stockflow.recipe.model import ModelEntry, ModuleEntry, Recipe, SliceEntry
from stockflow.recipe.settings import Settings
from stockflow.recipe.values import LayerRange

DEFAULT_MODULE = "default"
"""The name of the only part of a model that has one."""


@dataclass(frozen=True)
class Level:
    """Values that a recipe gives in one place."""

    settings: Settings
    path: Path


@dataclass(frozen=True)
class Slice:
    """A run of layers of the output."""

    recipe: Recipe
    """its sources as models, its base, and the values that hold for it"""
    ranges: tuple[LayerRange | None, ...]
    """the layers of each model as listed; None: all"""
    module: str
    path: Path
    """in the document; empty for the recipe itself"""
    levels: tuple[Level, ...]
    """where the values of its recipe come from, first the ones that win"""
    base: str | None
    """the base that is asked for, which its recipe has only if it is among the sources"""

    @property
    def lacks_base(self) -> bool:
        """Whether its base is not among the sources."""
        return self.base is not None and self.recipe.base_model is None

    @property
    def has_ranges(self) -> bool:
        """Whether layers of the models are given, rather than whole models."""
        return None not in self.ranges

    @property
    def listed_as(self) -> str:
        """The key of the list of its models."""
        return "sources" if self.has_ranges else "models"

    def layers(self, index: int) -> LayerRange:
        """Return the layers of a model, by its place in the list."""
        found = self.ranges[index]
        assert found is not None
        return found

    def layers_of(self, location: str) -> LayerRange:
        """Return the layers of a model."""
        return self.layers([entry.model for entry in self.recipe.models].index(location))

    def within(self, path: Path) -> Path:
        """Return where something of its recipe stands in the document."""
        if path[:1] == ("models",):
            return (*self.path, self.listed_as, *path[1:])
        if path[:1] == ("merge_method",):
            return self.path or path
        if path[:1] == ("parameters",):
            name, index = str(path[1]), int(path[2]) if len(path) > 2 else 0
            for level in self.levels:
                num = len(level.settings.get(name, ()))
                if index < num or (name in level.settings and len(path) == 2):
                    return (*level.path, "parameters", name, *([index] if len(path) > 2 else []), *path[3:])
                index -= num
        return path


def slices_of(recipe: Recipe) -> tuple[Slice, ...]:
    """Return the slices of a recipe in the order of the output, those of its modules one after the other."""
    own = Level(recipe.parameters, ())
    if recipe.models:
        return (Slice(recipe, (None,) * len(recipe.models), DEFAULT_MODULE, (), (own,), recipe.base_model),)
    found = list(_runs(recipe, recipe.slices, DEFAULT_MODULE, (), (own,)))
    for name, module in recipe.modules.items():
        found += _of_module(recipe, name, module, own)
    return tuple(found)


def _of_module(recipe: Recipe, name: str, module: ModuleEntry, own: Level) -> Iterator[Slice]:
    path: Path = ("modules", name)
    levels = (Level(module.parameters, path), own)
    if module.models:
        part = _part(recipe, module.models, recipe.base_model, levels)
        yield Slice(part, (None,) * len(module.models), name, path, levels, recipe.base_model)
    yield from _runs(recipe, module.slices, name, path, levels)


def _runs(
    recipe: Recipe, entries: Sequence[SliceEntry], module: str, path: Path, outer: tuple[Level, ...]
) -> Iterator[Slice]:
    for index, entry in enumerate(entries):
        here = (*path, "slices", index)
        levels = (Level(entry.parameters, here), *outer)
        base = entry.base_model or recipe.base_model
        is_listed = any(source.model == base for source in entry.sources)
        part = _part(recipe, entry.sources, base if is_listed else None, levels)
        yield Slice(part, tuple(source.layer_range for source in entry.sources), module, here, levels, base)


def _part(recipe: Recipe, models: Sequence[ModelEntry], base: str | None, levels: Sequence[Level]) -> Recipe:
    names = dict.fromkeys(name for level in levels for name in level.settings)
    settings = {name: tuple(item for level in levels for item in level.settings.get(name, ())) for name in names}
    same = {name: getattr(recipe, name) for name in Recipe.model_fields.keys() - {"slices", "modules"}}
    own = {"models": tuple(models), "base_model": base, "parameters": settings}
    return Recipe.model_construct(**same | own)


_REST = (DEFAULT_MODULE, "text_decoder", "language_model", "decoder")
"""Modules that tensors belong to which are in none of the others."""
_OTHER_TOWER = re.compile(r".*(vision|visual|audio|image|projector|connector).*|encoder")


def module_of(tensor_name: str, modules: Collection[str]) -> str | None:
    """Return the module that a tensor belongs to: one that is a part of its name, else the language model."""
    parts = tensor_name.split(".")
    named = next((module for module in modules if module in parts), None)
    if named or (DEFAULT_MODULE not in modules and any(map(_OTHER_TOWER.fullmatch, parts))):
        return named
    return next((module for module in _REST if module in modules), None)
