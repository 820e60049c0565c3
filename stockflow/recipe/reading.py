"""Recipes from files, URLs, standard input and text, and the JSON schema that editors check them with."""

import json
import os
import sys
from collections.abc import Mapping

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.recipe.checks import find_problems
from stockflow.recipe.document import read_yaml
from stockflow.recipe.locations import normalized
from stockflow.recipe.model import Recipe
from stockflow.recipe.structure import parse_structure
from stockflow.storage import StorageConfig, open_store, read_small, redact

MAX_RECIPE_BYTES = 1 << 20

RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, object]
"""A recipe, its location, its YAML, or what its YAML says as plain Python."""


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe that a YAML text holds; ``source`` names it in messages.

    Raises:
        RecipeError: with every problem found (the first 20, then the count), each with its line and column.
    """
    document = read_yaml(text, source)
    recipe, problems = parse_structure(document.plain(), text)
    if recipe is not None:
        problems += find_problems(recipe)
    if problems or recipe is None:
        raise document.error(problems)
    return recipe


def load_recipe(location: str) -> Recipe:
    """Return the recipe in a file, at a URL, or on standard input (``-``).

    Raises:
        RecipeError: as for ``parse_recipe``; a folder, larger than 1 MiB or not UTF-8.
        NotFoundError: there is no such file.
    """
    source = redact(location)
    if location == "-":
        source, payload = "<stdin>", sys.stdin.buffer.read(MAX_RECIPE_BYTES + 1)
    elif "://" not in location and os.path.isdir(os.path.expanduser(location)):
        raise RecipeError(f"{source} is a folder; expected a YAML file, its URL, or `-` for stdin")
    else:
        folder, _, name = normalized(location).rpartition("/")
        payload = read_small(open_store(folder or "/", StorageConfig()), name, max_bytes=MAX_RECIPE_BYTES)
    if len(payload) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source} is larger than 1 MiB; expected a recipe, give its YAML file")
    try:
        return parse_recipe(payload.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        column = error.start - payload.rfind(b"\n", 0, error.start)
        place = f"{source}:{line}:{column}"
        raise RecipeError(f"{place}: expected UTF-8, found an {error.reason}; save it as UTF-8") from None


def recipe_of(given: RecipeLike) -> Recipe:
    """Return the recipe that is meant: a text of several lines is YAML, one of one line is a location.

    Raises:
        RecipeError: as for ``parse_recipe`` and ``load_recipe``; or a mapping that no YAML could give.
        NotFoundError: there is no such file.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        try:
            text = json.dumps(dict(given), indent=1, default=os.fspath)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the recipe is a mapping that no YAML could give: {error}") from None
        return parse_recipe(text, "<mapping>")
    text = os.fspath(given)
    return parse_recipe(text, "<text>") if "\n" in text else load_recipe(text)


def recipe_schema() -> dict[str, object]:
    """Return the JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    for part in (schema, schema["$defs"]["Rule"]):
        part["properties"]["merge_method"] |= {"type": "string", "enum": list(METHODS)}
        part["properties"]["merge_method"].pop("anyOf", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
