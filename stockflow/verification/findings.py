"""What verification has to say: findings, as many as a reader can take."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from stockflow.text.escaping import in_a_line

MAX_PER_FILE = 50
"""A file that is wrong altogether is wrong in every line; so many of them are named."""
MAX_FINDINGS = 5000
MAX_CHARACTERS = 1000
_QUOTED = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as the manifest says."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Return the finding as one line, safe for a terminal: its words may be a stranger's."""
        line = "; ".join(line.strip() for line in f"{self.where}: {self.problem}".splitlines())
        line = in_a_line(line)
        return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 3]}..."


class Findings:
    """Findings in the order they were made; the ones too many of a file are counted."""

    def __init__(self) -> None:
        """Begin with none."""
        self._kept: dict[Finding, None] = {}
        self._per_file: Counter[str] = Counter()
        self._num_dropped = 0

    def add(self, found: Iterable[Finding]) -> None:
        """Take findings; one that is known already says nothing more."""
        for finding in found:
            if finding in self._kept:
                continue
            if len(self._kept) == MAX_FINDINGS:
                self._num_dropped += 1
                continue
            self._per_file[finding.where] += 1
            if self._per_file[finding.where] <= MAX_PER_FILE:
                self._kept[finding] = None

    def all(self) -> tuple[Finding, ...]:
        """Return the findings, with one that counts the rest of a file where there were too many."""
        rest = (
            Finding(where, f"and {count - MAX_PER_FILE:,} more problems")
            for where, count in self._per_file.items()
            if count > MAX_PER_FILE
        )
        dropped = Finding("everywhere", f"{self._num_dropped:,} more problems")
        return (*self._kept, *rest, *([dropped] if self._num_dropped else []))


def quoted(name: object) -> str:
    """Return a name as findings quote it: at most a line of it."""
    text = repr(name[: _QUOTED + 1]) if isinstance(name, str) else repr(name)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."
