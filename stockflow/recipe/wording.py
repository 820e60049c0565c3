"""How messages about a recipe are worded: values without secrets, the nearest name, phrases used twice."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from stockflow.text.redaction import redact_urls
from stockflow.text.strictjson import MAX_SHOWN
from stockflow.text.strictjson import shown as quoted

NOT_YET = "is not supported by stockflow yet"
_KNOWN = "Known here: "
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_MEANS = dict.fromkeys(("path", "checkpoint", "url", "repo", "folder", "input", "name", "id"), "model") | {
    "precision": "dtype"
}


def named(text: str) -> str:
    """Return a key or a name as messages show it: without secrets, on one line, cut if it is long."""
    name = repr(redact_urls(text))[1:-1]
    return name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN - 3]}..."


def shown(found: object) -> str:
    """Return a value as messages show it: short, in YAML's words, without secrets."""
    match found:
        case None:
            return "nothing"
        case bool():
            return str(found).lower()
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return quoted(redact_urls(found) if isinstance(found, str) else found)


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is nearest: spelt otherwise, misspelt, or with fewer or more words."""
    names = {each: _words(each) for each in known}
    asked = _words(name)
    said = list(dict.fromkeys(_MEANS.get(word, word) for word in asked))
    same = [each for each, words in names.items() if "".join(words) == "".join(said)]
    close = get_close_matches(name, names, n=1, cutoff=0.8)
    part = [each for each, words in names.items() if {*said} <= {*words}]
    less = [each for each, words in names.items() if {*asked} >= {*words}]
    part += sorted(less, key=lambda each: (-len(names[each]), asked.index(names[each][0])))
    near = get_close_matches(name, [each for each in names if each[:1] == name[:1].lower()], n=1)
    return next(iter([*same, *close, *part, *near]), None)


def _words(name: str) -> list[str]:
    return [word.lower().removesuffix("s") for word in _WORD.findall(name)] or [name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint that follows an unknown name: the nearest known one, and all of them."""
    names = list(known)
    close = meant(name, names)
    hint = f"did you mean `{close}`? " if close else ""
    return f"{hint}{_KNOWN}{', '.join(names) or 'nothing'}"


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def each_hint_once(messages: Iterable[str]) -> Iterator[str]:
    """Yield messages, those of `nearest` without the known names where an earlier one listed the same."""
    listed: set[str] = set()
    for message in messages:
        told, _, names = message.partition(_KNOWN)
        yield told.rstrip("; ") if names in listed else message
        listed |= {names} - {""}
