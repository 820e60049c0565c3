"""Checks of slices and modules: one way of saying what is merged, ranges of equal length, each model once."""

from collections.abc import Iterator, Sequence

from stockflow.recipe.document import Problem
from stockflow.recipe.model import Recipe
from stockflow.recipe.slices import Slice, slices_of
from stockflow.recipe.wording import listed
from stockflow.storage import redact


def slice_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with what a recipe lists."""
    yield from _choice_problems(recipe)
    for each in slices_of(recipe):
        if each.recipe is not recipe:  # of plain models, `repeats` tells
            yield from _repeat_problems(each)
        if each.has_ranges:
            yield from _length_problems(each)


def _choice_problems(recipe: Recipe) -> Iterator[Problem]:
    given = [name for name in ("models", "slices", "modules") if getattr(recipe, name)]
    if not given:
        yield (
            ("models",),
            "expected at least one model under `models`, `slices` or `modules`, found none; list what to merge",
        )
    elif len(given) > 1:
        yield (given[1],), f"expected one of `models`, `slices` and `modules`, found {_listed(given)}; keep one"
    for name, module in recipe.modules.items():
        found = [key for key in ("models", "slices") if getattr(module, key)]
        if len(found) != 1:
            yield (
                ("modules", name),
                f"expected either `models` or `slices`, found {_listed(found) or 'neither'}; keep one",
            )


def _listed(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in names]) if names else ""


def _repeat_problems(each: Slice) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, entry in enumerate(each.recipe.models):
        earlier = first.setdefault(entry.model, index)
        if earlier != index:
            yield (
                each.within(("models", index, "model")),
                f"the same model as {each.listed_as}[{earlier}]: {redact(entry.model)}; list it once (mergekit refuses "
                "this, too; up to 0.1.4 it merged the last of them alone)",
            )


def _length_problems(each: Slice) -> Iterator[Problem]:
    start, stop = each.layers(0)
    for index in range(1, len(each.ranges)):
        own_start, own_stop = each.layers(index)
        if own_stop - own_start != stop - start:
            yield (
                each.within(("models", index, "layer_range")),
                f"{own_stop - own_start} layers, and {stop - start} of sources[0]; a slice takes as many of each model",
            )
