"""The report as text, for a terminal."""

from collections.abc import Iterator

from stockflow.reports.course import Course
from stockflow.reports.evidence import Evidence
from stockflow.reports.figures import MergeGeometry, Spread
from stockflow.reports.words import (
    fact_name,
    formula_note,
    headline,
    method_name,
    moment,
    number,
    printable,
    remarks_in_order,
    share,
    verdict,
)
from stockflow.text.sizes import counted, elapsed, gb, mib
from stockflow.text.tables import grid

NUM_NOTABLE = 12
NUM_REMARKS = 12
MAX_MATRIX = 10
NUM_CHECKED = 10
BAR = 24


def report_lines(evidence: Evidence, geometry: MergeGeometry, course: Course) -> Iterator[str]:
    """Yield the summary of a finished merge, line by line."""
    yield headline(evidence)
    yield f"  {printable(evidence.url, 300)}"
    yield ""
    yield from verdict(geometry)
    if note := formula_note(geometry):
        yield note
    yield ""
    yield "inputs"
    for model in evidence.models:
        role = "" if model.role == "model" else f" ({model.role})"
        size = f"{counted(model.num_files, 'file')}, {gb(model.num_bytes)}"
        yield f"  {model.letter}  {printable(model.url, 200)}{role}: {size}"
    yield "methods"
    for use in evidence.methods[:10]:
        parameters = f" ({printable(use.parameters, 120)})" if use.parameters else ""
        decided = f"per {printable(use.scope, 20)}{parameters}"
        yield f"  {counted(use.num_tensors, 'tensor')} by {method_name(use.method)}, {decided}"
    yield from _remark_lines(evidence)
    yield from _geometry_lines(geometry)
    yield from _fact_lines(evidence, geometry)
    yield from _course_lines(course)
    yield ""
    yield "records"
    for check in evidence.checks:
        yield f"  {'ok  ' if check.is_good else 'not '} {check.what}"
    for finding in evidence.findings[:NUM_CHECKED]:
        yield f"  {printable(finding, 400)}"


def _geometry_lines(geometry: MergeGeometry) -> Iterator[str]:
    total = geometry.all_tensors
    yield ""
    heads = ("kind", "tensors", "parameters", "median t", "least t", "largest t", "median cos", "change", "clamped")
    rows = [
        (
            kind.kind,
            f"{kind.num_tensors:,}",
            f"{kind.num_elems:,}",
            *_three(kind.ratio),
            number(kind.cosine.median if kind.cosine else None),
            share(kind.change.median if kind.change else None),
            f"{kind.num_clamped:,}",
        )
        for kind in geometry.kinds
    ]
    yield from grid([heads, *rows])
    if geometry.matrix:
        yield ""
        yield "cosines between whole models"
        shown = geometry.letters[:MAX_MATRIX]
        cells = [
            (letter, *(number(cosine) for cosine in row[: len(shown)]))
            for letter, row in zip(shown, geometry.matrix, strict=False)
        ]
        yield from grid([("", *shown), *cells])
        if len(geometry.letters) > len(shown):
            yield f"  and {len(geometry.letters) - len(shown)} more models"
    if geometry.notable and (total.ratio or total.cosine):
        yield ""
        yield "tensors worth a look"
        named = [
            (printable(row.name, 60), number(row.ratio, 4), number(row.mean_cosine, 4), ", ".join(one.reasons))
            for one in geometry.notable[:NUM_NOTABLE]
            for row in (one.row,)
        ]
        yield from grid([("tensor", "t", "cos", "why"), *named], left=(0, 3))


def _remark_lines(evidence: Evidence) -> Iterator[str]:
    remarks = remarks_in_order(evidence)
    if remarks:
        yield "said of recipe and inputs"
    for remark in remarks[:NUM_REMARKS]:
        said = "accepted" if remark.severity == "refusal" else remark.severity
        yield f"  {said}: {printable(remark, 400)} [{remark.code}]"
    if len(remarks) > NUM_REMARKS:
        yield f"  and {len(remarks) - NUM_REMARKS:,} more, in manifest.json"


def _fact_lines(evidence: Evidence, geometry: MergeGeometry) -> Iterator[str]:
    if geometry.method_facts:
        yield ""
        spreads = [(fact_name(fact.name, evidence.counted), fact.values) for fact in geometry.method_facts]
        measured = [(name, f"{values.count:,}", *_three(values)) for name, values in spreads]
        yield from grid([("fact", "tensors", "median", "least", "largest"), *measured])


def _three(found: Spread | None) -> tuple[str, str, str]:
    return (number(found.median), number(found.low), number(found.high)) if found else ("-", "-", "-")


def _course_lines(course: Course) -> Iterator[str]:
    yield ""
    if course.began is not None:
        rate = f", {gb(course.mean_rate)}/s" if course.mean_rate else ""
        workers = counted(len(course.lanes), "worker")
        worked = f"{elapsed(course.working_s)} at work on {workers}{rate}"
        yield f"ran {moment(course.began)} to {moment(course.ended)}: {worked}"
    for pause in course.pauses:
        yield f"  {elapsed(pause.seconds)} without work after {elapsed(pause.at)}"
    most = max((stage.seconds for stage in course.stages), default=0.0)
    for stage in course.stages:
        bar = "#" * round(BAR * (stage.seconds / most)) if most else ""
        yield f"  {stage.name:<20}{stage.seconds:>10,.2f} s  {bar}".rstrip()
    allowed = f" of {mib(course.memory_bytes)} allowed" if course.memory_bytes else ""
    yield f"  peak memory {mib(course.peak_bytes)}{allowed}"
    yield f"  {counted(course.num_retries, 'request')} repeated" if course.num_retries else "  no request was repeated"
