"""What page and terminal both say, in words; and names and numbers as they show them."""

from collections.abc import Iterator
from datetime import UTC, datetime

from stockflow.reports.charts import Geometry
from stockflow.reports.course import LATEST
from stockflow.reports.report import Report
from stockflow.text.escaping import in_a_line

METHOD_NAMES = {
    "model_stock": "Model Stock",
    "linear": "linear averaging",
    "slerp": "SLERP",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
}
COPIES = ("copy", "copy_equal")
MAX_NAME = 160
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def printable(text: object, most: int = MAX_NAME) -> str:
    """Return a stranger's text as it is shown: one line, cut, without what is not printable, such as terminal codes."""
    shown = in_a_line(str(text)[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def number(value: float | None, digits: int = 3) -> str:
    """Return a number of moderate size; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.2e}"


def share(value: float | None) -> str:
    """Return a share as percent."""
    if value is None:
        return "-"
    return f"{100 * value:.3g} %" if value < 100 else f"{100 * value:.2e} %"


def seconds(value: float | None) -> str:
    """Return a time for people."""
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.3g} s" if value < 10 else f"{value:.0f} s"
    minutes, hours = value / 60, value / 3600
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def moment(value: float | None) -> str:
    """Return a time of day in UTC."""
    if value is None or not 0 < value < LATEST:
        return "-"
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def amount(value: float) -> str:
    """Return a large count for people: 8.03 B parameters."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def method_name(method: str) -> str:
    """Return how people call a method."""
    return METHOD_NAMES.get(method, printable(method, 40))


def main_method(report: Report) -> str:
    """Return the method of most tensors."""
    return next((use.method for use in report.evidence.methods if use.method not in COPIES), "copy")


def headline(report: Report) -> str:
    """Return what was done, in one line."""
    evidence = report.evidence
    num_models = len(evidence.tuned) if evidence.has_base else len(evidence.models)
    count = NUMBER_WORDS[num_models] if num_models < len(NUMBER_WORDS) else f"{num_models:,}"
    models = "model" if num_models == 1 else "models"
    method = main_method(report)
    if method == "copy":
        return f"{count.capitalize()} {models}, copied"
    return f"{count.capitalize()} {models}, merged by {method_name(method)}"


def verdict(report: Report) -> Iterator[str]:
    """Yield what there is to know first, sentence by sentence."""
    geometry = report.geometry
    total = geometry.all_tensors
    if total.ratio:
        yield (
            f"On the median tensor {share(total.ratio.median)} of the models' average change was kept "
            f"(t = {number(total.ratio.median)}); half of the tensors lie between {number(total.ratio.lower)} and "
            f"{number(total.ratio.upper)}."
        )
    cosine = geometry.mean_model_cosine
    if cosine is not None:
        average = " on average" if len(geometry.letters) > 2 else ""
        yield f"As wholes, the models' changes have a cosine of {number(cosine)}{average}."
    if total.num_clamped:
        yield (
            f"{counted(total.num_clamped, 'tensor')} kept the base in whole or part, because there the models pull in "
            "opposite directions."
        )
    elif total.ratio:
        yield "No tensor had to be clamped to the base."
    if total.num_zero_delta:
        yield f"{counted(total.num_zero_delta, 'tensor')} {_is(total.num_zero_delta)} unchanged in at least one model."
    if not total.ratio and not total.cosine:
        yield "This method decides without looking at the models' geometry, so cosines and ratios are not on record."


def formula_note(geometry: Geometry) -> str | None:
    """Say what the two-model formula would have made of this merge, if it matters."""
    gaps = [
        abs(row.ratio - row.legacy_ratio)
        for row in geometry.listed
        if row.ratio is not None and row.legacy_ratio is not None
    ]
    if len(geometry.letters) < 3 or not gaps or max(gaps) < 0.01:
        return None
    return (
        f"The two-model formula t = 2 cos / (1 + cos), which mergekit first used for any number of models, would be "
        f"off by up to {number(max(gaps))} here."
    )


def _is(count: int) -> str:
    return "is" if count == 1 else "are"
