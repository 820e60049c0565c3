"""Rules and filters that no tensor's name contains, each with the part of a name that is nearest; and the seed."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.options import Rule
from stockflow.recipe.settings import Conditional, matches
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown

_CODE = "matches-nothing"
_MOST_PARTS = 3
_NUMBER = re.compile(r"\.\d+\.")


def unmatched_rules(proposal: Proposal) -> Iterator[Remark]:
    """Yield rules that are for no tensor: what they were to keep would be merged."""
    rules = proposal.recipe.stockflow.rules
    for text in _unmatched((rule.filter for rule in rules), proposal):
        said = f"no tensor's name contains {shown(text)}, the filter of a rule{_nearest(text, proposal)}"
        yield Remark(_CODE, said, "refusal", values={"filter": text}, place=proposal.recipe.filters.get(text, ""))


def unmatched_filters(proposal: Proposal) -> Iterator[Remark]:
    """Yield filters of parameters that are for no tensor; other tools pass them over."""
    recipe = proposal.recipe
    of_rules = {rule.filter for rule in recipe.stockflow.rules}
    for text in _unmatched((text for text in recipe.filters if text not in of_rules), proposal):
        said = f"no tensor's name contains {shown(text)}, the filter of a value{_nearest(text, proposal)}"
        yield Remark(_CODE, said, values={"filter": text}, place=recipe.filters[text])


def shadowed_filters(proposal: Proposal) -> Iterator[Remark]:
    """Yield rules and values that are never reached, as one before them is for the same tensors, and more."""
    recipe = proposal.recipe
    values = [each.values() for each in (recipe.parameters, *(model.parameters for model in recipe.models))]
    for text, before in _shadowed(recipe.stockflow.rules):
        yield _never_reached(proposal, "a rule", "refusal", text, before)
    for setting in (setting for settings in values for setting in settings):
        for text, before in _shadowed(setting):
            yield _never_reached(proposal, "a value", "warning", text, before)


def _shadowed(items: Sequence[Rule | Conditional]) -> Iterator[tuple[str, str]]:
    """Yield filters that one before them, empty where it is none, is for all tensors of, and says something else."""
    for number, item in enumerate(items):
        text = item.filter or "*"
        found = next((each for each in items[:number] if matches(each.filter, text)), None)
        if found and text != "*" and found != item.model_copy(update={"filter": found.filter}):
            yield text, found.filter or ""


def _never_reached(proposal: Proposal, what: str, severity: Severity, text: str, before: str) -> Remark:
    takes = f"{shown(before)} before it takes all its tensors" if before else "one without filter before it takes all"
    said = (
        f"{shown(text)}, the filter of {what}, is never reached: {takes}, and the first that matches counts; put it "
        "first, or remove it"
    )
    return Remark(_CODE, said, severity, values={"filter": text}, place=proposal.recipe.filters.get(text, ""))


def _unmatched(texts: Iterable[str], proposal: Proposal) -> list[str]:
    asked = [text for text in dict.fromkeys(texts) if text not in ("", "*")]
    written = "\n".join((*(job.stored_name for job in proposal.jobs), *proposal.skipped)) if asked else ""
    parts = {job.output.name for job in proposal.jobs if job.whole}
    held = {name for each in proposal.checkpoints for name in (*each.settled, *each.specs)} - parts if asked else ()
    return [text for text in asked if text not in written and not any(text in name for name in held)]


def _nearest(text: str, proposal: Proposal) -> str:
    parts: dict[str, None] = {}
    for run in dict.fromkeys(run for job in proposal.jobs for run in _NUMBER.split(job.stored_name)):
        words = run.split(".")
        for first in range(len(words)):
            for last in range(first + 1, min(first + _MOST_PARTS, len(words)) + 1):
                parts[".".join(words[first:last])] = None
    close = get_close_matches(text, parts, n=1)
    found = f"; did you mean {shown(close[0])}?" if close else "; remove it"
    return f" (a filter is a part of a name, `*` alone is all){found}" if "*" in text else found


def seed(proposal: Proposal) -> Iterator[Remark]:
    """Yield what methods that draw, draw by."""
    drawing = [
        method.name for method in proposal.recipe.methods if any(each.name == "seed" for each in method.parameters)
    ]
    if drawing:
        number = str(proposal.recipe.stockflow.seed)
        text = f"`{'`, `'.join(drawing)}` draws by the seed {number}; --random-seed gives another"
        yield Remark("seed", text, "note", values={"seed": number})
