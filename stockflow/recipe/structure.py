"""What pydantic refuses in a recipe, as problems in the recipe's own words."""

import re
from typing import cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stockflow.recipe.document import Path, Problem
from stockflow.recipe.model import ModelEntry, Options, Recipe, Rule, StorageEntry
from stockflow.recipe.settings import Conditional
from stockflow.recipe.wording import NOT_YET, nearest, shown
from stockflow.text.redaction import FROM_ENVIRONMENT

_MERGEKIT_KEYS = frozenset({"slices", "modules", "tokenizer", "chat_template", "name"})
_SECRET_WORD = re.compile(r"key|secret|token|passw|credential|signature|account|sas|user", re.IGNORECASE)


def parse_structure(plain: dict[str, object], text: str) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe and no problems, or all problems and the recipe without its unknown keys, if it is one.

    Args:
        plain: the document; unknown keys are removed from it.
        text: what the recipe was read from, which it keeps.
    """
    try:
        return Recipe.model_validate(plain, context=text), []
    except ValidationError as error:
        found = error.errors()
    problems = [_problem(detail) for detail in found]
    if any(detail["type"] != "extra_forbidden" for detail in found):
        return None, problems
    for detail in found:
        _remove(plain, detail["loc"])
    return Recipe.model_validate(plain, context=text), problems


def _remove(plain: object, path: Path) -> None:
    for step in path[:-1]:
        if isinstance(step, int) and not isinstance(plain, list):
            continue
        plain = cast(dict[str | int, object], plain)[step]
    del cast(dict[str | int, object], plain)[path[-1]]


def _problem(detail: ErrorDetails) -> Problem:
    path, found = detail["loc"], shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return path, _unknown_key(path)
        case "missing":
            return path[:-1], f"the required key `{path[-1]}` is missing; add it"
        case "value_error":
            return path, str(detail["ctx"]["error"])
        case "literal_error":
            return path, f"expected {detail['ctx']['expected']}, found {found}; choose one"
        case "model_type" | "dict_type" | "model_attributes_type":
            return path, f"expected a mapping, found {found}; write `key: value`"
        case "tuple_type":
            return path, f"expected a list, found {found}; start each item with `- `"
        case "too_short":
            return path, "expected at least one model, found none; list what to merge"
        case "too_long":
            return path, f"expected at most {detail['ctx']['max_length']:,} of them, found more; shorten the list"
        case "string_type":
            return path, f"expected a text, found {found}; put it in quotes if it is meant"
        case "bool_type":
            return path, f"expected true or false, found {found}; choose one"
    return path, f"{detail['msg']}, found {found}; correct it"


def _unknown_key(path: Path) -> str:
    name = str(path[-1])
    if len(path) == 1 and name in _MERGEKIT_KEYS:
        return f"mergekit's `{name}` {NOT_YET}; remove it"
    part: type[BaseModel] = Options
    if "parameters" in path:
        part = Conditional
    elif "rules" in path:
        part = Rule
    elif "storage" in path:
        part = StorageEntry
        if _SECRET_WORD.search(name):
            return f"a recipe never holds secrets; {FROM_ENVIRONMENT}"
    elif "models" in path:
        part = ModelEntry
    elif len(path) == 1:
        part = Recipe
    return f"unknown key; {nearest(name, part.model_fields)}"
