"""Pages of the documentation as tests read them: sections, headings, anchors."""

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_HEADING = re.compile(r"(#+) (.+)")


def section(page: str, heading: str = "") -> str:
    """Return a page of ``docs/``, or what stands there below a heading, up to the next one of its level or above."""
    lines = (REPOSITORY / "docs" / page).read_text().splitlines(keepends=True)
    found = [(number, level) for number, level, words in headings(lines) if not heading or words == heading]
    assert found, f"docs/{page} has no heading {heading!r}"
    start, own = found[0]
    ends = (number for number, level, _ in headings(lines) if number > start and level <= own)
    return "".join(lines[start : next(ends, len(lines))])


def headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield number, level and words of every line that is a heading, and no line of code."""
    is_code = False
    for number, line in enumerate(lines):
        is_code ^= line.startswith("```")
        matched = _HEADING.fullmatch(line.rstrip("\n"))
        if matched and not is_code:
            yield number, len(matched[1]), matched[2]


def anchor(heading: str) -> str:
    """Return what a link names a heading by: lower case, hyphens for spaces, nothing else that is not a letter."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> list[str]:
    return [anchor(words) for _, _, words in headings(page.read_text().splitlines())]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
