"""What must hold of a recipe beyond the types of its values; every problem, not the first."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from stockflow.errors import RecipeError
from stockflow.methods.parameters import Parameter, Scalar
from stockflow.methods.protocol import Method
from stockflow.recipe.adapter_checks import adapter_problems
from stockflow.recipe.document import Path, Problem
from stockflow.recipe.locations import resolve_location
from stockflow.recipe.model import Recipe
from stockflow.recipe.options import Rule
from stockflow.recipe.resolve import Resolver
from stockflow.recipe.settings import UNDER_STOCKFLOW, Settings, as_kind, parameters_of
from stockflow.recipe.slice_checks import slice_problems
from stockflow.recipe.slices import Slice, slices_of
from stockflow.recipe.templates import BUILTIN
from stockflow.recipe.values import OUTPUT_DTYPES
from stockflow.recipe.wording import nearest, shown
from stockflow.storage import redact
from stockflow.text.chat_templates import fault_in
from stockflow.text.escaping import in_a_line


@dataclass(frozen=True, slots=True)
class _Use:
    """A method in use: the recipe's own, or a rule's."""

    method: Method
    rule: Rule | None
    path: Path
    """of its name in the recipe"""

    def declared(self, name: str) -> Parameter | None:
        found = [parameter for parameter in self.method.parameters if parameter.name == name]
        return found[0] if found else None


def find_problems(recipe: Recipe, unread: Collection[str] = ()) -> Iterator[Problem]:
    """Yield what is wrong with a recipe whose types are right, each with its path in the recipe.

    Args:
        recipe: to check.
        unread: names of parameters that are given where they could not be read.
    """
    problems = [*_location_problems(recipe), *_vocabulary_problems(recipe), *_template_problems(recipe)]
    problems += [*_rule_problems(recipe), *_format_problems(recipe), *slice_problems(recipe), *adapter_problems(recipe)]
    slices = tuple(_distinct(slices_of(recipe)))
    for each in slices:
        problems += [(each.within(path), text) for path, text in _problems_of(each, unread)]
    # Values that are wrong one by one need not be taken together.
    if not problems and not unread:
        for each in slices:
            problems += [(each.within(path), text) for path, text in _combination_problems(each.recipe)]
    yield from problems


def _distinct(slices: Iterable[Slice]) -> Iterator[Slice]:
    """Yield slices that differ in more than layers: of those that do not, one tells what is wrong with all."""
    seen = set()
    for each in slices:
        models = [(entry.model, entry.parameters) for entry in each.recipe.models]
        key = repr((models, each.base, each.recipe.base_model, each.recipe.parameters))
        if key not in seen:
            seen.add(key)
            yield each


def _problems_of(each: Slice, unread: Collection[str]) -> Iterator[Problem]:
    recipe = each.recipe
    uses = _uses(recipe)
    for use in uses:
        yield from _count_problems(each, use)
        yield from _scope_problems(recipe, use)
    yield from _parameter_problems(recipe, uses, unread)


def _uses(recipe: Recipe) -> list[_Use]:
    uses = [_Use(recipe.method_for(None), None, ("merge_method",))]
    for index, rule in enumerate(recipe.stockflow.rules):
        if rule.merge_method is not None:
            path = ("stockflow", "rules", index, "merge_method")
            uses.append(_Use(recipe.method_for(rule), rule, path))
    return uses


def _location_problems(recipe: Recipe) -> Iterator[Problem]:
    chosen = recipe.stockflow.side_files_from
    if chosen and chosen not in recipe.checkpoints:
        yield (
            ("stockflow", "side_files_from"),
            f"expected the base or one of the models, found {redact(chosen)}; name one of them",
        )


def _vocabulary_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.tokenizer_source and recipe.tokenizer:
        yield ("tokenizer_source",), "the vocabulary is said by `tokenizer`, too; keep one of them"
    for token, entry in recipe.vocabulary.tokens.items() if recipe.vocabulary else ():
        of, path = entry.source, ("tokenizer", "tokens", token, "source")
        if of.kind != "zero" and of.model not in recipe.checkpoints:
            found = redact(of.model) if of.model else "none"
            yield path, f"expected one of the models, found {found}; name one"
        if of.kind == "model_token" and (of.token is None) == (of.token_id is None):
            found = "neither" if of.token is None else "both"
            yield path, f"expected either `token` or `token_id`, found {found}; keep one"
        elif of.kind != "model_token" and (of.token, of.token_id) != (None, None):
            yield path, f"`token` and `token_id` go with `kind: model_token`, found `kind: {of.kind}`; change one"
        elif of.token_id is not None and of.token_id < 0:
            yield (*path, "token_id"), f"expected the id of a token, found {of.token_id}; correct it"


def _format_problems(recipe: Recipe) -> Iterator[Problem]:
    asked, given = recipe.stockflow.output_format, recipe.out_dtype or recipe.dtype
    if given and asked in OUTPUT_DTYPES and asked != given:
        key = "out_dtype" if recipe.out_dtype else "dtype"
        yield (
            ("stockflow", "output_format"),
            f"`{asked}` here and `{key}: {given}` in line {recipe.line((key,))} cannot both be; keep one of them",
        )


def _template_problems(recipe: Recipe) -> Iterator[Problem]:
    asked, known = recipe.chat_template, ("auto", *BUILTIN)
    if asked is not None and "{" not in asked and asked not in known and _located(asked) not in recipe.checkpoints:
        yield (
            ("chat_template",),
            f"{shown(asked)} is no template, no model, and none of the known ones; {nearest(asked, known)}",
        )
    if asked is not None and "{" in asked and (fault := fault_in(asked)):
        yield ("chat_template",), f"no template that can be read: {in_a_line(fault)}; correct it"


def _located(text: str) -> str | None:
    """Return the location that a text names, None if it can be none."""
    try:
        return resolve_location(text)
    except RecipeError:
        return None


def _rule_problems(recipe: Recipe) -> Iterator[Problem]:
    for index, rule in enumerate(recipe.stockflow.rules):
        path: Path = ("stockflow", "rules", index)
        if (rule.action is None) == (rule.merge_method is None):
            found = "neither" if rule.action is None else "both"
            yield path, f"expected either `action` or `merge_method`, found {found}; keep one"
        elif rule.action and rule.parameters:
            yield (
                (*path, "parameters"),
                f"no effect with `action: {rule.action}`; remove them",
            )


def _count_problems(each: Slice, use: _Use) -> Iterator[Problem]:
    recipe, method = each.recipe, use.method
    if each.lacks_base and method.base != "ignored":
        base = redact(str(each.base))
        text = f"`{method.name}` needs the base {base} among the sources; add its layers, or let a source be the base"
        yield use.path, text
        return
    besides = " besides the base" if recipe.anchors(method) else ""
    if method.base == "required" and recipe.base_model is None:
        yield use.path, f"`{method.name}` needs a base, found no `base_model`; add it"
        return  # how many models are beside it is not known
    num_tuned = len(recipe.counted(method))
    most = method.max_tuned
    if num_tuned < method.min_tuned or (most is not None and num_tuned > most):
        low, high = method.min_tuned, most
        expected = str(low) if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        yield (
            use.path,
            (
                f"`{method.name}` needs {expected} model{'s' * (expected != '1')}{besides}, "
                f"found {num_tuned}{_with_the_base(recipe, method)}; change `{each.listed_as}` or the method"
            ),
        )


def _with_the_base(recipe: Recipe, method: Method) -> str:
    if recipe.anchors(method) and recipe.lists_base and len(recipe.counted(method)) < method.min_tuned:
        return f", as one of those listed is the base, {redact(str(recipe.base_model))}, by this name or through a link"
    return ", as a base that is not listed counts like them" if recipe.base_counts(method) else ""


def _scope_problems(recipe: Recipe, use: _Use) -> Iterator[Problem]:
    scope = recipe.stockflow.scope
    path: Path = ("stockflow", "scope")
    # A rule's method that lacks the scope uses "tensor": the scope is meant for the recipe's own.
    if use.rule is None and scope not in (None, "tensor", *use.method.scopes):
        yield (
            path,
            f"`{use.method.name}` knows the scope {' | '.join(use.method.scopes)}, found {scope}; change one",
        )
    name, asks = use.method.rows_if or ("", None)
    settings = (use.rule.parameters if use.rule else {}, recipe.parameters)
    flag = use.declared(name)
    by_row = flag and any(
        as_kind(flag, value) is asks for level in settings for item in level.get(name, ()) for value in item.value
    )
    if by_row and scope not in (None, "row"):
        yield path, f"`{name}: {str(asks).lower()}` means the scope row, found `scope: {scope}`; keep one of them"


def _parameter_problems(recipe: Recipe, uses: list[_Use], unread: Collection[str]) -> Iterator[Problem]:
    """Check what some method in use hears; of the rest `dead_keys` tells."""
    by_method = list({use.method.name: use for use in reversed(uses)}.values())[::-1]  # of many rules, a few methods
    counted = {use.method.name: {id(entry) for entry in recipe.counted(use.method)} for use in by_method}
    yield from _setting_problems(recipe.parameters, by_method, ("parameters",))
    for index, entry in enumerate(recipe.models):
        hearing = [use for use in by_method if id(entry) in counted[use.method.name]]
        own = {name: given for name, given in entry.parameters.items() if _is_own(name, hearing)}
        yield from _setting_problems(own, hearing, ("models", index, "parameters"))
    for use in uses:
        if use.rule:
            path: Path = (*use.path[:-1], "parameters")
            yield from _unknown_problems(use.rule.parameters, use, path)
            yield from _setting_problems(use.rule.parameters, [use], path)
        yield from _missing_problems(recipe, use, unread)


def _is_own(name: str, uses: list[_Use]) -> bool:
    return any(parameter.per_model for use in uses if (parameter := use.declared(name)))


def _unknown_problems(settings: Settings, use: _Use, path: Path) -> Iterator[Problem]:
    known = parameters_of(use.method)
    for name in settings.keys() - known.keys():
        if name in UNDER_STOCKFLOW:
            yield (*path, name), "not a parameter in a recipe; write it under `stockflow:`"
        else:
            yield (*path, name), f"`{use.method.name}` has no such parameter; {nearest(name, known)}"


def _setting_problems(settings: Settings, uses: list[_Use], path: Path) -> Iterator[Problem]:
    for name, items in settings.items():
        kinds = [parameters_of(use.method)[name] for use in uses if name in parameters_of(use.method)]
        for index, item in enumerate(items):
            for number, value in enumerate(item.value):
                wrong = {_value_problem(parameter, as_kind(parameter, value)) for parameter in kinds}
                yield from (((*path, name, index, "value", number), text) for text in wrong if text)


def _value_problem(parameter: Parameter, value: Scalar) -> str | None:
    low, high = parameter.minimum, parameter.maximum
    found = f"found {shown(value)}; correct it"
    if parameter.kind == "flag":
        words = "".join(f" or {word}" for word in parameter.choices)
        return (
            None if isinstance(value, bool) or value in parameter.choices else f"expected true or false{words}, {found}"
        )
    if parameter.kind == "word":
        allowed = parameter.choices
        return None if value in allowed else f"expected one of {', '.join(allowed)}, {found}"
    if isinstance(value, bool) or not isinstance(value, float):
        return f"expected a number, {found}"
    if parameter.kind == "integer" and not value.is_integer():
        return f"expected an integer, {found}"
    if low is not None and value < low:
        return f"expected at least {low:g}, {found}"
    if high is not None and value > high:
        return f"expected at most {high:g}, {found}"
    return None


def _combination_problems(recipe: Recipe) -> Iterator[Problem]:
    for use in _uses(recipe):
        found = Resolver(use.method.name, recipe.slots(use.method, use.rule)).anywhere()
        text = next((text for parameters in found if (text := use.method.refuses(parameters))), None)
        if text:
            yield _place_of(recipe, use, text), text


def _place_of(recipe: Recipe, use: _Use, text: str) -> Path:
    """Return where the first value stands that a text is about, that of the method where none is."""
    levels = [((*use.path[:-1], "parameters"), use.rule.parameters)] if use.rule else []
    levels += [(("models", index, "parameters"), entry.parameters) for index, entry in enumerate(recipe.models)]
    levels.append((("parameters",), recipe.parameters))
    for name, number in re.findall(r"`(\w+)` ([-\d.e+]+)", text):
        for path, settings in levels:
            values = [value for item in settings.get(name, ()) for value in item.value]
            if any(isinstance(value, int | float) and f"{value:g}" == number for value in values):
                return *path, name
    return use.path


def _missing_problems(recipe: Recipe, use: _Use, unread: Collection[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, entry in enumerate(recipe.models):
        first.setdefault(entry.model, index)
    for slot in recipe.slots(use.method, use.rule):
        if not slot.candidates and slot.parameter.name not in unread:
            path: Path = ("models", first[slot.model]) if slot.model else use.path
            yield (
                path,
                f"`{use.method.name}` needs the parameter `{slot.parameter.name}`; add it",
            )
