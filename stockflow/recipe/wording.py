"""How messages about a recipe are worded: values without secrets, the nearest name, phrases used twice."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

NOT_YET = "is not supported by stockflow yet"
FROM_ENVIRONMENT = "remove them, credentials come from the environment (AWS_PROFILE, ...)"

_USERINFO_AND_QUERY = re.compile(r"(?<=://)[^\s'\"]*@|\?[^\s'\"]*(?=['\"]|$)")


def masked(text: str) -> str:
    """Return ``text`` without what URLs hide in user information and query."""
    return _USERINFO_AND_QUERY.sub("", text) if "://" in text else text


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
    text = masked(repr(found))
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint that follows an unknown name: the nearest known one, and all of them."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean `{close[0]}`? " if close else ""
    return f"{hint}Known here: {', '.join(names) or 'nothing'}"
