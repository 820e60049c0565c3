"""Recipes from files, URLs, standard input and text, and the JSON schema that editors check them with."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.recipe.checks import find_problems
from stockflow.recipe.dead_keys import dead_parameters, unknown_keys
from stockflow.recipe.document import MAX_REPORTED, Notice, read_yaml
from stockflow.recipe.locations import normalized, resolve_location
from stockflow.recipe.model import Recipe
from stockflow.recipe.repeats import local_revisions, models_under_other_names, names_in, repeated_models
from stockflow.recipe.slices import slices_of
from stockflow.recipe.structure import parse_structure
from stockflow.storage import StorageConfig, open_store, read_small, redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted

MAX_RECIPE_BYTES = 1 << 20

RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, object]
"""A recipe, its location, its YAML, or what its YAML says as plain Python."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What reading a recipe gave: what stands against it, or the recipe, and in any case what else is to be said."""

    source: str
    recipe: Recipe | None
    problems: Sequence[tuple[str, str]]
    """place and text"""
    remarks: tuple[Remark, ...]

    def result(self) -> Recipe:
        """Return the recipe.

        Raises:
            RecipeError: with every problem (the first 20, then the count), and then what has no effect.
        """
        if self.recipe is not None and not self.problems:
            return self.recipe
        lines = [f"{place}: {text}" for place, text in self.problems]
        if len(lines) == 1 and not self.remarks:
            raise RecipeError(lines[0])
        shown = [*lines, *(f"{remark.place}: warning: {remark.text}" for remark in self.remarks)]
        hidden = [f"... and {len(shown) - MAX_REPORTED} more"] if len(shown) > MAX_REPORTED else []
        listed = "\n  ".join([*shown[:MAX_REPORTED], *hidden])
        warned = f" and {counted(len(self.remarks), 'warning')}" if self.remarks else ""
        raise RecipeError(f"{self.source}: {counted(len(lines), 'problem')}{warned} in this recipe\n  {listed}")


def examine(text: str, source: str) -> Examination:
    """Return what a YAML text holds; ``source`` names it in messages.

    Raises:
        RecipeError: it is not the YAML of one mapping.
    """
    document = read_yaml(text, source)
    plain = document.plain()
    found = parse_structure(plain, text)
    recipe, problems = found.recipe, list(found.problems)
    named = METHODS.get(str(plain.get("merge_method")))
    methods = recipe.methods if recipe else (named,) if named else ()
    notices = list(unknown_keys(found.unknown, methods, recipe.parameters if recipe else {}))
    if recipe is not None:
        problems += find_problems(recipe, found.unread)
        names = names_in(plain)
        recipe = recipe.with_names({resolve_location(text): text for text in reversed(tuple(names.values()))})
        notices += [*local_revisions(plain), *models_under_other_names(recipe, names)]
        for each in slices_of(recipe):
            notices += [replace(dead, path=each.within(dead.path)) for dead in dead_parameters(each.recipe)]
        for repeat in repeated_models(recipe, document, names):
            (notices if isinstance(repeat, Notice) else problems).append(repeat)  # type: ignore[arg-type]
    remarks = document.remarks(notices)
    return Examination(
        source,
        recipe and recipe.with_remarks(remarks).with_filters(document.filters()),
        document.problems(problems),
        remarks,
    )


def parse_recipe(text: str, source: str) -> Recipe:
    """Return the recipe that a YAML text holds; ``source`` names it in messages.

    Raises:
        RecipeError: with every problem found (the first 20, then the count), each with its line and column.
    """
    return examine(text, source).result()


def load_recipe(location: str) -> Recipe:
    """Return the recipe in a file, at a URL, or on standard input (``-``).

    Raises:
        RecipeError: as for ``parse_recipe``; a folder, larger than 1 MiB or not UTF-8.
        NotFoundError: there is no such file.
    """
    return parse_recipe(read_text(location), source_of(location))


def read_text(location: str) -> str:
    """Return the text of a recipe in a file, at a URL, or on standard input (``-``).

    Raises:
        RecipeError: a folder, larger than 1 MiB or not UTF-8.
        NotFoundError: there is no such file.
    """
    source = source_of(location)
    if location == "-":
        payload = sys.stdin.buffer.read(MAX_RECIPE_BYTES + 1)
    elif "://" not in location and os.path.isdir(os.path.expanduser(location)):
        raise RecipeError(f"{source} is a folder; expected a YAML file, its URL, or `-` for stdin")
    else:
        folder, _, name = normalized(location).rpartition("/")
        payload = read_small(open_store(folder or "/", StorageConfig()), name, max_bytes=MAX_RECIPE_BYTES)
    if len(payload) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source} is larger than 1 MiB; expected a recipe, give its YAML file")
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        column = error.start - payload.rfind(b"\n", 0, error.start)
        place = f"{source}:{line}:{column}"
        raise RecipeError(f"{place}: expected UTF-8, found an {error.reason}; save it as UTF-8") from None


def source_of(location: str) -> str:
    """Return how messages name a recipe by its location."""
    return "<stdin>" if location == "-" else redact(location)


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
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else given
    if not isinstance(text, str):
        raise RecipeError(
            f"the recipe is of type {type(given).__name__}: expected a path, a URL, YAML as a text, or a mapping"
        )
    return parse_recipe(text, "<text>") if "\n" in text else load_recipe(text)


def recipe_schema() -> dict[str, object]:
    """Return the JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    for part in (schema, schema["$defs"]["Rule"]):
        part["properties"]["merge_method"] |= {"type": "string", "enum": list(METHODS)}
        part["properties"]["merge_method"].pop("anyOf", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
