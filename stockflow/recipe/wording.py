"""How messages about a recipe are worded: values without secrets, the nearest name, phrases used twice."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from stockflow.text.redaction import redact_urls
from stockflow.text.strictjson import MAX_SHOWN
from stockflow.text.strictjson import shown as quoted

NOT_YET = "is not supported by stockflow yet"
_KNOWN = "Known here: "


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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint that follows an unknown name: the nearest known one, and all of them."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean `{close[0]}`? " if close else ""
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
