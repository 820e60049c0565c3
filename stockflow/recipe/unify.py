"""One model under several names: the recipe as if each model had been named in one way."""

from collections.abc import Mapping

from stockflow.errors import RecipeError
from stockflow.recipe.checks import find_problems
from stockflow.recipe.model import ModelEntry, Recipe
from stockflow.recipe.relocated import relocated
from stockflow.recipe.repeats import same_model
from stockflow.storage import redact
from stockflow.text.remarks import Remark


def unified(recipe: Recipe, same: Mapping[str, str]) -> Recipe:
    """Return the recipe with each model under its first location, and a remark for each other one.

    The base among the tunes is so the base; a tune that is listed twice is merged once, in slices it is refused.

    Args:
        recipe: names a model by several locations.
        same: the first location of a model, by the later ones.

    Raises:
        RecipeError: each of the two would have values of its own, or too few models are left.
    """
    for entry in recipe.listed:
        if entry.model in same:
            _check_no_values(recipe, entry, same[entry.model])
    remarks = [_said(recipe, location, same[location]) for location in recipe.checkpoints if location in same]
    unique = relocated(recipe, lambda location: same.get(location, location))
    unique = unique.model_copy(update={"models": unique.listed}).with_remarks((*recipe.remarks, *remarks))
    problems = [text for _, text in find_problems(unique)]
    if problems:
        raise RecipeError("; ".join((*map(str, remarks), *dict.fromkeys(problems))))
    return unique


def _check_no_values(recipe: Recipe, entry: ModelEntry, location: str) -> None:
    """Refuse a tune that is listed twice with values of its own: which of them is meant is not said."""
    twin = [other for other in recipe.listed if other.model == location]
    if location != recipe.base_model and twin and _per_model(recipe):
        raise RecipeError(
            f"{redact(entry.model)} and {redact(location)} are one model, and `{recipe.merge_method}` has "
            "values for each; list it once, with the weights added up"
        )


def _per_model(recipe: Recipe) -> bool:
    return any(parameter.per_model for parameter in recipe.method_for(None).parameters)


def _said(recipe: Recipe, location: str, known: str) -> Remark:
    names = recipe.name_of(location), recipe.name_of(known)
    text = same_model(recipe, names, known, of_slices=not recipe.models)
    return Remark("same-model", text, models=(redact(location), redact(known)))
