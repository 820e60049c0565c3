"""YAML mistakes: where the parser gives up, what was written there, and what to write instead."""

import re
from collections.abc import Sequence
from contextlib import suppress

import yaml

MAX_PARSER_CHARS = 200
"""of what PyYAML says, which may quote a name of any length"""
_COLON = re.compile(r":(?=\s|$)")
_WIDE_SPACE = re.compile("^[ -]*([\u00a0\u2000-\u200b\u202f\u3000])", re.MULTILINE)
_QUOTE_IT = "put the whole value in quotes"
_FENCE = "character '`'"
_TAB = r"'\t'"

Spot = tuple[int, int]
"""Line and column, from 1."""


def wide_space(text: str) -> Spot | None:
    """Return where a space that is none to YAML indents a line or stands behind a dash."""
    spots = [found.start(1) for found in _WIDE_SPACE.finditer(text)]
    texts = _texts(text) if spots else []
    for spot in spots:
        if not any(start <= spot < stop for start, stop in texts):
            return text.count("\n", 0, spot) + 1, spot - text.rfind("\n", 0, spot)
    return None


def _texts(text: str) -> list[tuple[int, int]]:
    """Return where texts stand that may hold any space: quoted ones and blocks, as far as the parser gets."""
    found: list[tuple[int, int]] = []
    with suppress(yaml.YAMLError):
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.ScalarToken) and token.style:
                found.append((token.start_mark.index, token.end_mark.index))
    return found


def is_about_tab(error: yaml.MarkedYAMLError) -> bool:
    """Return whether a tab is what the parser stopped at."""
    return _TAB in (error.problem or "")


def explained(error: yaml.MarkedYAMLError, text: str) -> tuple[Spot, str]:
    """Return where the mistake is, and what to do about it."""
    found, began = _spot(error.problem_mark or error.context_mark), _spot(error.context_mark)
    lines, problem = text.split("\n"), error.problem or ""
    line = lines[found[0] - 1] if found[0] <= len(lines) else ""
    if is_about_tab(error):
        return found, "a tab indents this line; write spaces instead, as many as the keys beside it have"
    if _FENCE in problem and line.lstrip().startswith("```"):
        return found, f"{problem}; lines of backticks are Markdown's, remove them"
    if "could not find expected ':'" in problem:
        return began, "this key has no `: ` behind it; write `key: value`, with a space after the colon"
    if "mapping values are not allowed" in problem:
        return found, _misplaced_colon(found, line)
    if problem.startswith(("expected <block end>", "expected '<document start>'")):
        return found, _misplaced_line(found, line)
    if problem.startswith("expected ',' or"):
        place = f"line {found[0]}, column {found[1]}"
        return began, f"the `{_at(lines, began)}` here is not closed, or a comma is missing before {place}"
    if problem.startswith("found unexpected end of stream"):
        return began, "the quote that opens here is not closed"
    return found, _other(problem, error.context, _at(lines, found), _at(lines, began))


def _misplaced_colon(found: Spot, line: str) -> str:
    first = _COLON.search(line)
    if first and first.start() == found[1] - 1:
        return "this line is indented as if it went on the one above; begin its key in the column of the keys beside it"
    return f"a second `: ` in one line; {_QUOTE_IT}"


def _misplaced_line(found: Spot, line: str) -> str:
    if line[: found[1] - 1].strip():
        return f"text goes on behind a closing quote or bracket; {_QUOTE_IT}"
    return "this line begins in a column of its own; begin it in that of the keys, or of the dashes, beside it"


def _other(problem: str, context: str | None, character: str, opening: str) -> str:
    if "cannot start any token" in problem:
        return f"a value cannot begin with `{character}`; {_QUOTE_IT}"
    if "expected alphabetic or numeric" in problem:
        return f"a value that begins with `{opening}` is an alias or anchor, and this one has no name; {_QUOTE_IT}"
    if "escape" in problem:
        return "a backslash in double quotes begins an escape; write single quotes, or double the backslash"
    if "chomping" in problem:
        return f"a text is behind `|` or `>`, which begin one of several lines; {_QUOTE_IT}"
    return problem[:MAX_PARSER_CHARS] + (f" ({context})" if context else "")[:MAX_PARSER_CHARS]


def _spot(mark: yaml.Mark | None) -> Spot:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _at(lines: Sequence[str], spot: Spot) -> str:
    return lines[spot[0] - 1][spot[1] - 1 : spot[1]] if spot[0] <= len(lines) else ""
