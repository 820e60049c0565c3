"""Lint: what is to be said of recipe files before any model is looked at, for one or for thousands."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from stockflow.errors import StockflowError
from stockflow.recipe.reading import Examination, examine, read_text, source_of
from stockflow.recipe.structure import NO_MERGE
from stockflow.recipe.wording import NOT_YET
from stockflow.text.records import as_plain
from stockflow.text.sizes import counted

Verdict = Literal["fine", "warned", "unsupported", "refused"]
"""``unsupported``: right as far as can be seen, and with something that only other tools do."""
_IN_WORDS = {"fine": "fine", "warned": "with warnings", "unsupported": "not supported yet", "refused": "refused"}
_SUFFIXES = (".yaml", ".yml")


def lint(locations: Iterable[str]) -> Iterator[Examination]:
    """Yield what each recipe holds; of a folder, each of its YAML files. An error of one stops no other."""
    for location in locations:
        for file in _files(location):
            yield _examined(file)


def _files(location: str) -> Sequence[str]:
    folder = os.path.expanduser(location)
    if location == "-" or "://" in location or not os.path.isdir(folder):
        return [location]
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(_SUFFIXES)]
    return [os.path.join(location, name) for name in names] or [location]


def _examined(location: str) -> Examination:
    source = source_of(location)
    try:
        return examine(read_text(location), source)
    except StockflowError as error:
        place, _, text = str(error).removeprefix(source).partition(": ")
        known = str(error).startswith(source) and place.startswith(":")
        return Examination(source, None, [(f"{source}{place}", text) if known else (source, str(error))], ())


def verdict_on(found: Examination) -> Verdict:
    """Return how a recipe fares."""
    if not found.problems:
        return "warned" if found.remarks else "fine"
    texts = [text for _, text in found.problems]
    return "unsupported" if all(NOT_YET in text or NO_MERGE in text for text in texts) else "refused"


def lines_of(found: Examination) -> list[str]:
    """Return what to print of a recipe."""
    told = [*(f"{place}: {text}" for place, text in found.problems), *(f"{each} (warning)" for each in found.remarks)]
    return [f"{found.source}: {_IN_WORDS[verdict_on(found)]}", *(f"  {line}" for line in told)]


def facts_of(found: Examination) -> dict[str, object]:
    """Return what programs want to know of a recipe, as plain JSON values."""
    return {
        "recipe": found.source,
        "verdict": verdict_on(found),
        "problems": [{"place": place, "text": text} for place, text in found.problems],
        "remarks": [as_plain(remark) for remark in found.remarks],
    }


def counts_of(found: Iterable[Examination]) -> dict[str, int]:
    """Return how many recipes there are of each verdict."""
    seen = Counter(map(verdict_on, found))
    return {verdict: seen[verdict] for verdict in _IN_WORDS}  # type: ignore[index]


def in_a_sentence(counts: dict[str, int]) -> str:
    """Return counts as the last line of a list tells them."""
    told = ", ".join(f"{number} {_IN_WORDS[verdict]}" for verdict, number in counts.items() if number)
    return f"{counted(sum(counts.values()), 'recipe')}: {told}"
