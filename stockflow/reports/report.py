"""The report on a finished merge: what was merged, what it did to the models, how it ran.

``evidence`` reads an output's records with suspicion; ``geometry`` and ``course`` turn them into the numbers that are
shown; ``lines`` writes them for a terminal, ``html`` as one page that needs nothing else. No weight is read.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

from stockflow.errors import NotFoundError
from stockflow.reports.charts import geometry_of
from stockflow.reports.course import Course, course_of
from stockflow.reports.evidence import Evidence, gather
from stockflow.reports.figures import MergeGeometry, Spread
from stockflow.reports.lines import report_lines
from stockflow.reports.words import headline, verdict
from stockflow.storage import StorageConfig, check_slashes, open_store, redact
from stockflow.text import notebook
from stockflow.text.records import as_plain
from stockflow.verification.verify import Finding

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """What the records of an output say, summed up."""

    evidence: Evidence
    storage: StorageConfig

    @cached_property
    def geometry(self) -> MergeGeometry:
        """Of the models, and of what the merge made of them."""
        return geometry_of(self.evidence)

    @cached_property
    def course(self) -> Course:
        """How the merge ran."""
        return course_of(self.evidence.receipts, self.evidence.manifest.summary)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Records that are not what the manifest says; the report does without them."""
        return self.evidence.findings

    def facts(self) -> dict[str, object]:
        """Return what ``stockflow report --json`` prints."""
        evidence = self.evidence
        return {
            "output": evidence.url,
            "plan_id": evidence.manifest.plan_id,
            "merge_id": evidence.manifest.merge_id,
            "models": [asdict(model) for model in evidence.models],
            "methods": [asdict(use) for use in evidence.methods],
            "remarks": [as_plain(remark) for remark in evidence.remarks],
            "summary": dict(evidence.manifest.summary),
            "geometry": self.geometry.facts(),
            "course": self.course.facts(),
            "checks": [asdict(check) for check in evidence.checks],
            "findings": [asdict(finding) for finding in evidence.findings],
        }

    def lines(self) -> Iterator[str]:
        """Yield the summary for a terminal, line by line."""
        return report_lines(self.evidence, self.geometry, self.course)

    def html(self) -> str:
        """Return the page: one file that needs no other and no network."""
        from stockflow.reports.html import render

        return render(self.evidence, self.geometry, self.course)

    def save(self, place: str) -> None:
        """Write the page to a file or URL, whole or not at all.

        Raises:
            UserError: the place is none, or may not be written to.
            StorageError: writing failed after retries.
        """
        check_slashes(place)
        is_local = "://" not in place
        folder, _, name = place.rpartition("/")
        if not name or folder.endswith(":/") or (is_local and os.path.isdir(place)):
            raise NotFoundError(f"{redact(place)!r} names no file; expected one for the page, such as report.html")
        where = os.path.dirname(os.path.abspath(place)) if is_local else folder
        open_store(where, self.storage, writable=True).put(name, self.html().encode())

    def _repr_html_(self) -> str:
        """Return tables for a notebook: ratio and cosine by kind, and the cosines between models."""
        kinds = [
            [kind.kind, kind.num_tensors, *_median_least_largest(kind.ratio), *_median_least_largest(kind.cosine)]
            for kind in self.geometry.kinds
        ]
        measures = [f"{which} {of}" for of in ("t", "cos") for which in ("median", "least", "largest")]
        cosines = [[letter, *row] for letter, row in zip(self.geometry.letters, self.geometry.matrix, strict=False)]
        return notebook.block(
            headline(self.evidence),
            notebook.facts({"output": self.evidence.url, "in short": " ".join(verdict(self.geometry))}),
            notebook.table(("kind", "tensors", *measures), kinds),
            notebook.table(("cosines", *self.geometry.letters), cosines),
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _median_least_largest(found: Spread | None) -> tuple[float | None, float | None, float | None]:
    return (found.median, found.low, found.high) if found else (None, None, None)


def report(location: str, config: StorageConfig, on_bytes: Callable[[int], None] = lambda _: None) -> Report:
    """Return the report on the output at ``location``.

    Args:
        location: a folder or URL.
        config: how to reach it.
        on_bytes: told of bytes read, from several threads.

    Raises:
        NotFoundError: there is no finished output.
        DamagedOutputError: manifest or table are not what was published.
        StorageError: reading failed after retries.
    """
    return Report(gather(location, config, on_bytes), config)
