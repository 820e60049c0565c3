"""Amending: a recipe with further options under `stockflow:`, as the command line gives them."""

import json

import yaml

from stockflow.errors import RecipeError
from stockflow.recipe.document import read_yaml
from stockflow.recipe.model import Recipe
from stockflow.recipe.reading import parse_recipe

_SOURCE = "<options>"


def amended(recipe: Recipe, **options: object) -> Recipe:
    """Return a recipe with options that stand before its own; its text, which is published, says them too.

    Args:
        recipe: what to amend.
        **options: of `stockflow:`, as plain values; a list is added to the recipe's own.

    Raises:
        RecipeError: a value cannot be.
    """
    if not options:
        return recipe
    plain = read_yaml(recipe.text, _SOURCE).plain()
    own = plain.get("stockflow")
    merged = dict(own) if isinstance(own, dict) else {}
    for name, value in options.items():
        merged[name] = [*merged.get(name, ()), *value] if isinstance(value, list) else value
    wanted = plain | {"stockflow": merged}
    text = f"{recipe.text.rstrip()}\n\nstockflow: {json.dumps(merged)}\n"
    if "stockflow" in plain or not _says(text, wanted):
        text = yaml.safe_dump(wanted, sort_keys=False)
    return parse_recipe(text, _SOURCE).with_remarks(recipe.remarks).with_filters(recipe.filters)


def _says(text: str, wanted: dict[str, object]) -> bool:
    """Return whether a text is YAML of these values: behind braces or an end of the document it is none."""
    try:
        return read_yaml(text, _SOURCE).plain() == wanted
    except RecipeError:
        return False
