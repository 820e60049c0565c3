"""What page and terminal both say, in words; and names and numbers as they show them."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import get_args

from stockflow.reports.course import LATEST
from stockflow.reports.evidence import Evidence, Model
from stockflow.reports.figures import MergeGeometry
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import are, counted

METHOD_NAMES = {
    "model_stock": "Model Stock",
    "linear": "linear averaging",
    "slerp": "SLERP",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE with an election of signs",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs with an election of signs",
    "della": "DELLA",
    "della_linear": "DELLA without an election",
    "sce": "SCE",
    "ram": "RAM",
    "ramplus_tl": "RAM+",
    "nearswap": "NearSwap",
    "nuslerp": "NuSLERP",
    "multislerp": "Multi-SLERP",
    "karcher": "the Karcher mean",
    "geometric_median": "the geometric median",
    "arcee_fusion": "Arcee Fusion",
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


def moment(value: float | None) -> str:
    """Return a time of day in UTC."""
    if value is None or not 0 < value < LATEST:
        return "-"
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def method_name(method: str) -> str:
    """Return how people call a method."""
    return METHOD_NAMES.get(method, printable(method, 40))


def fact_name(name: str, models: Sequence[Model]) -> str:
    """Return what a fact is called; one of a model, which ends in its number, with its letter."""
    stem, _, number = name.rpartition("_")
    is_of_model = bool(stem) and number.isdecimal() and 1 <= int(number) <= len(models)
    said = f"{stem} {models[int(number) - 1].letter}" if is_of_model else name
    return printable(said.replace("_", " "), 40)


def remarks_in_order(evidence: Evidence) -> list[Remark]:
    """Return what was said of recipe and inputs: what was accepted, what was warned of, then what was noted."""
    order = get_args(Severity)[::-1]
    return sorted(evidence.remarks, key=lambda remark: order.index(remark.severity))


def main_method(evidence: Evidence) -> str:
    """Return the method of most tensors."""
    return next((use.method for use in evidence.methods if use.method not in COPIES), "copy")


def headline(evidence: Evidence) -> str:
    """Return what was done, in one line."""
    num_models = len(evidence.counted)
    count = NUMBER_WORDS[num_models] if num_models < len(NUMBER_WORDS) else f"{num_models:,}"
    models = "model" if num_models == 1 else "models"
    method = main_method(evidence)
    if method == "copy":
        return f"{count.capitalize()} {models}, copied"
    return f"{count.capitalize()} {models}, merged by {method_name(method)}"


def verdict(geometry: MergeGeometry) -> Iterator[str]:
    """Yield what there is to know first, sentence by sentence."""
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
        yield f"{counted(total.num_zero_delta, 'tensor')} {are(total.num_zero_delta)} unchanged in at least one model."
    if not total.ratio and not total.cosine:
        yield "Cosines and ratios are not on record: the method does without them."


def formula_note(geometry: MergeGeometry) -> str | None:
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
