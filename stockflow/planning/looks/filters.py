"""Rules and filters that no tensor's name contains, each with the part of a name that is nearest; and the seed."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from stockflow.planning.looks.proposal import Proposal
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

_CODE = "matches-nothing"
_MOST_PARTS = 3


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


def _unmatched(texts: Iterable[str], proposal: Proposal) -> list[str]:
    asked = [text for text in dict.fromkeys(texts) if text not in ("", "*")]
    written = "\n".join((*(job.stored_name for job in proposal.jobs), *proposal.skipped)) if asked else ""
    parts = {job.output.name for job in proposal.jobs if job.whole}
    held = {name for each in proposal.checkpoints for name in (*each.settled, *each.specs)} - parts if asked else ()
    return [text for text in asked if text not in written and not any(text in name for name in held)]


def _nearest(text: str, proposal: Proposal) -> str:
    parts: dict[str, None] = {}
    for name in dict.fromkeys(job.stored_name for job in proposal.jobs):
        words = [word for word in name.split(".") if not word.isdigit()]
        for first in range(len(words)):
            for last in range(first + 1, min(first + _MOST_PARTS, len(words)) + 1):
                parts[".".join(words[first:last])] = None
    close = get_close_matches(text, parts, n=1)
    return f"; did you mean {shown(close[0])}?" if close else "; remove it"


def seed(proposal: Proposal) -> Iterator[Remark]:
    """Yield what methods that draw, draw by."""
    drawing = [
        method.name for method in proposal.recipe.methods if any(each.name == "seed" for each in method.parameters)
    ]
    if drawing:
        number = str(proposal.recipe.stockflow.seed)
        text = f"`{'`, `'.join(drawing)}` draws by the seed {number}; --random-seed gives another"
        yield Remark("seed", text, "note", values={"seed": number})
