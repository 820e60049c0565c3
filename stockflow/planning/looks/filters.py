"""Rules and filters that no tensor's name contains, or that those before them leave none; and the seed."""

import re
from collections.abc import Iterable, Iterator, Sequence

from stockflow.planning.looks.nearest import MEANS, lines_with, nearest
from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.options import Rule
from stockflow.recipe.settings import Conditional
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown

_CODE = "matches-nothing"
_ALL = (None, "", "*")
"""Filters that are for every tensor."""
_MOST_NAMED = 3


def unmatched_rules(proposal: Proposal) -> Iterator[Remark]:
    """Yield rules that are for no tensor: what they were to keep would be merged."""
    rules = proposal.recipe.stockflow.rules
    for text, instead in nearest(_unmatched((rule.filter for rule in rules), proposal), proposal).items():
        said = f"no tensor's name contains {shown(text)}, the filter of a rule{instead}"
        yield Remark(_CODE, said, "refusal", values={"filter": text}, place=proposal.recipe.filters.get(text, ""))


def unmatched_filters(proposal: Proposal) -> Iterator[Remark]:
    """Yield filters of parameters that are for no tensor: mistakes where names are nearly the same, else for others.

    Recipes have filters for architectures of other names, and other tools pass them over.
    """
    recipe = proposal.recipe
    of_rules = {rule.filter for rule in recipe.stockflow.rules}
    of_values = _unmatched((text for text in recipe.filters if text not in of_rules), proposal)
    for text, instead in nearest(of_values, proposal).items():
        said = f"no tensor's name contains {shown(text)}, the filter of a value{instead}"
        severity: Severity = "refusal" if MEANS in instead else "warning"
        yield Remark(_CODE, said, severity, values={"filter": text}, place=recipe.filters[text])


def shadowed_filters(proposal: Proposal) -> Iterator[Remark]:
    """Yield rules and values that are never reached, as ones before them take all their tensors."""
    recipe = proposal.recipe
    for text, before in _shadowed([recipe.stockflow.rules], proposal):
        yield _never_reached(proposal, "a rule", "refusal", text, before)
    for text, before in _shadowed((setting for level in recipe.levels for setting in level.values()), proposal):
        yield _never_reached(proposal, "a value", "warning", text, before)
    yield from _behind_models(proposal)


def _behind_models(proposal: Proposal) -> Iterator[Remark]:
    """Yield filters of the recipe's own values all of whose tensors have values of every model."""
    recipe = proposal.recipe
    models = [each.parameters for each in recipe.entries if each.model != recipe.base_model]
    for name, setting in recipe.parameters.items():
        texts = {item.filter: None for item in setting if item.filter not in _ALL}
        if not texts or not all(name in given for given in models):
            continue
        found = [dict(_shadowed([(*given[name], *setting)], proposal)) for given in models]
        for text in (each for each in texts if each and all(each not in of_one.get(each, [each]) for of_one in found)):
            said = (
                f"{shown(text)}, the filter of a value for all models, is never reached: each model has its own "
                f"`{name}` for these tensors, which comes first; put it among those"
            )
            yield Remark(_CODE, said, values={"filter": text}, place=recipe.filters.get(text, ""))


def _shadowed(lists: Iterable[Sequence[Rule | Conditional]], proposal: Proposal) -> Iterator[tuple[str, list[str]]]:
    """Yield filters that take no tensor, with those before them that take theirs, one of which says something else."""
    known: dict[tuple[str, ...], dict[int, list[int]]] = {}
    yielded = set[tuple[str, ...]]()
    for items in lists:
        texts = tuple("" if item.filter in _ALL else item.filter or "" for item in items)
        if not any(texts[1:]):
            continue
        if texts not in known:
            known[texts] = _without_tensors(texts, proposal)
        for number, takers in known[texts].items():
            alike = {"filter": items[number].filter}
            are_alike = all(items[each].model_copy(update=alike) == items[number] for each in takers)
            told = (texts[number], *(texts[each] for each in takers))
            if not are_alike and told not in yielded:
                yielded.add(told)
                yield texts[number], list(told[1:])


def _without_tensors(texts: Sequence[str], proposal: Proposal) -> dict[int, list[int]]:
    """Return, by the place of each filter that is left no tensor, the places of those that take the ones it is for."""
    found: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        takers: dict[int | None, None] = {}
        for name in lines_with(text, proposal.filtered) if text else ():
            takers[next((place for place, before in enumerate(texts[:number]) if before in name), None)] = None
            if None in takers:
                break
        if not takers or None in takers:
            continue
        if not any(text in name and not _is_in(texts[:number], name) for name in proposal.held):
            found[number] = sorted(place for place in takers if place is not None)
    return found


def filters_within_numbers(proposal: Proposal) -> Iterator[Remark]:
    """Yield filters that end or begin with a number, and are for longer numbers, too: layer 1, and 10 and 11."""
    for text, place in proposal.recipe.filters.items():
        longer, alone = _longer(text, proposal.filtered)
        if longer:
            instead = f"; {shown(alone)} is for that number alone" if alone else ""
            said = f"the filter {shown(text)} is for {some(longer, _MOST_NAMED)}, too{instead}"
            yield Remark("longer-numbers", said, "note", values={"filter": text}, place=place)


def _longer(text: str, written: str) -> tuple[list[str], str]:
    """Return what a filter is for beside the number that it ends or begins with, and the filter for that alone."""
    before, behind = text[:1].isdecimal(), text[-1:].isdecimal()
    if not before and not behind:
        return [], ""
    number, other, own = r"\d*", r"[^\d\n]", re.escape(text)
    found = re.findall(f"{number * before}{own}{number * behind}", written)
    longer = [each for each in dict.fromkeys(found) if each != text]
    alone = re.search(f"{other * before}{own}{other * behind}", written)
    return longer if text in found else [], alone[0] if alone else ""


def _is_in(texts: Sequence[str], name: str) -> bool:
    return any(text in name for text in texts)


def _never_reached(proposal: Proposal, what: str, severity: Severity, text: str, before: Sequence[str]) -> Remark:
    takes = f"{some(before, _MOST_NAMED)} before it {'takes' if len(before) == 1 else 'take'} all its tensors"
    if "" in before:
        takes = "one without filter before it takes all"
    said = f"is never reached: {takes}, and the first that matches counts; put it first, or remove it"
    if _is_for_the_rest(text, before, proposal.filtered):
        said, severity = f"is left no tensor, as {takes}; remove it, if these are meant", "note"
    values, place = {"filter": text}, proposal.recipe.filters.get(text, "")
    return Remark(_CODE, f"{shown(text)}, the filter of {what}, {said}", severity, values=values, place=place)


def _is_for_the_rest(text: str, before: Sequence[str], written: str) -> bool:
    """Return whether several filters take its tensors that are each for some of these alone, as exceptions are."""
    return len(before) > 1 and all(each and all(text in name for name in lines_with(each, written)) for each in before)


def _unmatched(texts: Iterable[str], proposal: Proposal) -> list[str]:
    asked = [text for text in dict.fromkeys(texts) if text not in _ALL]
    return [text for text in asked if text not in proposal.filtered and not any(text in name for name in proposal.held)]


def seed(proposal: Proposal) -> Iterator[Remark]:
    """Yield what methods that draw, draw by."""
    drawing = [
        method.name for method in proposal.recipe.methods if any(each.name == "seed" for each in method.parameters)
    ]
    if drawing:
        number = str(proposal.recipe.stockflow.seed)
        text = f"`{'`, `'.join(drawing)}` draws by the seed {number}; --random-seed gives another"
        yield Remark("seed", text, "note", values={"seed": number})
