"""JSON that others wrote, read strictly: UTF-8, no key twice, nested within bounds; and how messages quote it."""

import json
import reprlib

MAX_DEPTH = 100
"""Levels of lists and mappings; configs of models have less than ten."""
MAX_SHOWN = 80
"""characters of a found value in a message"""


def parse_json(payload: bytes, *, allows_constants: bool) -> object:
    """Return what a JSON text holds.

    Args:
        payload: UTF-8; a byte order mark is skipped.
        allows_constants: whether NaN, Infinity and -Infinity are numbers, as Python writes them into configs.

    Raises:
        ValueError: it is not JSON, names a key twice or is nested deeper than ``MAX_DEPTH``; in one short line.
    """
    try:
        parsed: object = json.loads(
            payload.decode("utf-8-sig"),
            object_pairs_hook=_mapping,
            parse_constant=float if allows_constants else _refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _is_deep(parsed):
        raise ValueError("it is nested too deeply")
    return parsed


def parse_text_json(payload: bytes, *, allows_constants: bool) -> object:
    """Return what ``parse_json`` does, if all of its texts are Unicode and can be written again.

    Raises:
        ValueError: as for ``parse_json``; or an escape spells half of a surrogate pair.
    """
    parsed = parse_json(payload, allows_constants=allows_constants)
    if b"\\u" in payload:
        json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def check_num_values(payload: bytes, most: int) -> None:
    """Bound how many values a JSON text can hold, before any of them exists: each takes at least 60 bytes.

    Raises:
        ValueError: it may hold more.
    """
    upper_bound = 1 + payload.count(b",") + payload.count(b"[") + payload.count(b"{")
    if upper_bound > most:
        raise ValueError(f"it holds up to {upper_bound:,} values; at most {most:,} are read")


def shown(found: object) -> str:
    """Return a value as messages quote it: on one line, cut after ``MAX_SHOWN`` characters."""
    text = _QUOTE.repr(found[:MAX_SHOWN] if isinstance(found, str) else found)
    if isinstance(found, str) and len(found) > MAX_SHOWN:
        text += "..."
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _quoting() -> reprlib.Repr:
    """Return what quotes the beginning of a large value without quoting all of it first."""
    quote = reprlib.Repr()
    quote.maxlist = quote.maxdict = quote.maxtuple = MAX_SHOWN // 2
    quote.maxstring = quote.maxother = quote.maxlong = 2 * MAX_SHOWN
    quote.maxlevel = 4
    return quote


_QUOTE = _quoting()


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(name)} occurs twice")
    return mapping


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not a number the format allows")


def _is_deep(parsed: object) -> bool:
    """Whether there are more than ``MAX_DEPTH`` levels; level by level, as recursion is what must be spared."""
    level = [parsed]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
