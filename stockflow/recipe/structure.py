"""The structure of a recipe: what pydantic refuses, as problems in the recipe's own words, and unknown keys."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stockflow.methods import METHODS
from stockflow.recipe.document import Path, Problem
from stockflow.recipe.model import ModelEntry, ModuleEntry, Recipe, SliceEntry, SourceEntry
from stockflow.recipe.options import Options, Rule, StorageEntry
from stockflow.recipe.settings import Conditional
from stockflow.recipe.tokens import TokenEntry, TokenizerEntry, TokenSource
from stockflow.recipe.wording import meant, nearest, shown
from stockflow.text.redaction import FROM_ENVIRONMENT

_OTHER_FILES = {"experts": "mergekit-moe", "genome": "mergekit-evolve", "layer_slices": "bakllama"}
"""Tools by a key that only their files have."""
_BUILDS = {"mergekit-moe": "builds a mixture of experts", "mergekit-evolve": "searches for a recipe"}
NO_MERGE = "that is no merge"
_LISTS = ("models", "slices", "modules")
_SECRET_WORD = re.compile(r"key|secret|token|passw|credential|signature|account|sas|user", re.IGNORECASE)
_MOST_MENDS = 4
_ANY_RULE = {"filter": "*", "action": "skip"}
"""Stands for one that could not be read."""
_LOCATIONS = ("model", "base_model", "side_files_from")


@dataclass(slots=True)
class Structure:
    """What of a document is a recipe."""

    recipe: Recipe | None = None
    """without the keys and values that could not be read; None where too little is left"""
    problems: list[Problem] = field(default_factory=list)
    unknown: dict[Path, frozenset[str]] = field(default_factory=dict)
    """keys that no part of a recipe has, outside of `stockflow:`, each with those beside it"""
    unread: set[str] = field(default_factory=set)
    """names of parameters some value of which could not be read"""


def parse_structure(plain: dict[str, object], text: str) -> Structure:
    """Return the recipe in a document, and all that stands against it or is unknown.

    Args:
        plain: the document; what cannot be read is taken out of it.
        text: what the recipe was read from, which it keeps.
    """
    found = Structure()
    if tool := next((tool for key, tool in _OTHER_FILES.items() if key in plain and "merge_method" not in plain), None):
        found.problems.append(((), f"a file of {tool}, which {_BUILDS.get(tool, 'stacks layers')}: {NO_MERGE}"))
        return found
    _name_list(found, plain)
    for _ in range(_MOST_MENDS):
        try:
            found.recipe = Recipe.model_validate(plain, context=text)
        except ValidationError as error:
            mended = [_take(found, plain, detail) for detail in _relevant(error.errors())]
            if not all(mended):
                break
        else:
            break
    return found


def _name_list(found: Structure, plain: dict[str, object]) -> None:
    """Find what is to be merged under a misspelt name."""
    lists = [key for key, value in plain.items() if isinstance(value, list)]
    close = {name: [key for key in lists if meant(key, [name])] for name in _LISTS}
    for name, keys in close.items() if not plain.keys() & close.keys() else ():
        if keys:
            found.problems.append(((keys[0],), f"the required key `{name}` is missing, is this it? rename it"))
            plain[name] = plain.pop(keys[0])
            return


def _relevant(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out what another detail says better: that no model is left where each is wrong, or a key that is meant."""
    meant = {(*each["loc"][:-1], _misspelt(each)) for each in details if each["type"] == "missing"}
    return [
        each
        for each in details
        if not (each["type"] == "too_short" and cast(Sequence[object], each["input"]))
        if not (each["type"] == "extra_forbidden" and each["loc"] in meant)
    ]


def _misspelt(detail: ErrorDetails) -> str | None:
    """Return the key that is there for one that is missing: of no other use, and near it, or with a method's name."""
    given, missing = cast(Mapping[str, object], detail["input"]), str(detail["loc"][-1])
    unknown = [key for key in given if key not in keys_at(detail["loc"])]
    methods = [key for key in unknown if missing == "merge_method" and str(given[key]) in METHODS]
    return next((key for key in [*methods, *unknown] if key in methods or meant(key, [missing])), None)


def _take(found: Structure, plain: dict[str, object], detail: ErrorDetails) -> bool:
    """Note what is wrong and take it out of the document; return whether a recipe can be made of the rest."""
    path, is_missing = detail["loc"], detail["type"] == "missing"
    if detail["type"] == "extra_forbidden" and _is_passed_over(path):
        beside = _parent(plain, path)
        found.unknown[path] = frozenset(beside) if isinstance(beside, dict) else frozenset()
        return _remove(plain, path)
    found.problems.append(_problem(detail))
    if is_missing and (key := _misspelt(detail)):
        return _put(plain, path, cast(dict[str, object], _parent(plain, path)).pop(key))
    if path[0] == "stockflow":
        return _put(plain, path[:3], _ANY_RULE) if path[1:2] == ("rules",) and path[2:] else _remove(plain, path[:2])
    if path[-1] in _LOCATIONS:
        return _put(plain, path, f"/{len(found.problems)}")
    if "parameters" in path[:-1]:
        setting = path[: path.index("parameters") + 2]
        found.unread.add(str(setting[-1]))
        return _remove(plain, setting)
    is_needed = path in (("models",), ("merge_method",)) or path[0] in ("slices", "modules")
    return not is_missing and not is_needed and _remove(plain, path)


def _is_passed_over(path: Path) -> bool:
    """Return whether the usual tool reads past an unknown key; who writes `stockflow`, or nearly so, means us."""
    return path[0] != "stockflow" and not (len(path) == 1 and _is_refused(str(path[0])))


def _is_refused(name: str) -> bool:
    return nearest(name, ["stockflow"]).startswith("did you mean")


def _remove(plain: object, path: Path) -> bool:
    parent = _parent(plain, path)
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    return _put(plain, path, {"model": f"/{path[-1]}"}) if isinstance(parent, list) else True


def _put(plain: object, path: Path, value: object) -> bool:
    parent, last = _parent(plain, path), path[-1]
    if isinstance(parent, dict) or (isinstance(parent, list) and isinstance(last, int)):
        cast(dict[str | int, object], parent)[last] = value
    return True


def _parent(plain: object, path: Path) -> object:
    """Return what holds the end of a path, None where it is gone with something else."""
    for step in path[:-1]:
        if isinstance(plain, dict) and not isinstance(step, int):
            plain = plain.get(step)
        elif isinstance(plain, list) and isinstance(step, int):
            plain = plain[step]
    return plain


def _problem(detail: ErrorDetails) -> Problem:
    path, found = detail["loc"], shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return path, _unknown_key(path)
        case "missing":
            key = _misspelt(detail)
            text = f"the required key `{path[-1]}` is missing"
            return ((*path[:-1], key), f"{text}, is this it? rename it") if key else (path[:-1], f"{text}; add it")
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
        case "int_type" | "greater_than_equal" | "less_than":
            return path, f"expected an integer from 0 to 2^63 - 1, found {found}; correct it"
        case "bool_type":
            return path, f"expected true or false, found {found}; choose one"
    return path, f"{detail['msg']}, found {found}; correct it"


def _unknown_key(path: Path) -> str:
    name = str(path[-1])
    if "storage" in path and _SECRET_WORD.search(name):
        return f"a recipe never holds secrets; {FROM_ENVIRONMENT}"
    return f"unknown key; {nearest(name, keys_at(path))}"


def keys_at(path: Path) -> list[str]:
    """Return the keys that are known where a path leads."""
    part: type[BaseModel] = Options
    if "parameters" in path:
        part = Conditional
    elif "rules" in path:
        part = Rule
    elif "storage" in path:
        part = StorageEntry
    elif "sources" in path:
        part = SourceEntry
    elif "models" in path:
        part = ModelEntry
    elif "slices" in path:
        part = SliceEntry
    elif "modules" in path:
        part = ModuleEntry
    elif path[0] == "tokenizer" and len(path) > 1:
        part = TokenizerEntry if len(path) == 2 else TokenEntry if len(path) == 4 else TokenSource
    elif len(path) == 1:
        part = Recipe
    return list(part.model_fields)
