"""Rounding, and what else the facts of all tensors prove of a merge: changes within codes, losses, strangers."""

from collections.abc import Iterator, Sequence
from statistics import median

from stockflow.checkpoints.samples import is_of_a_norm
from stockflow.output.receipts import ENDS_OF_ZEROS, TensorFacts
from stockflow.planning.plan import MergePlan
from stockflow.storage import redact
from stockflow.text.examples import some, such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted

MOST_COLLAPSED = 0.5
"""Share of its elements from which on a small tensor is said to have lost its distinct values."""
MOST_ROUNDED_AWAY = 0.9
"""Share of the elements looked at which a model changes, from which on the output is said to be the base."""
STRANGER = 1.0
"""Norm of a difference by that of the base; of two unrelated tensors it is sqrt(2)."""
MIN_STRANGER_ELEMS = 64
QUARTER_OF_A_STEP = (0.2, 0.3)
"""Where the median change lies, in steps between codes, if models come from what the base was before it was rounded."""


def proved_of_tensors(plan: MergePlan, rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    """Yield what the facts of all tensors prove."""
    yield from _proved_of_codes(plan, rows)
    yield from _losses(rows)
    yield from _rounded_away(rows)
    yield from _strangers(plan, rows)
    yield from _ends_of_zeros(plan, rows)


def _losses(rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    lossy = [row for row in rows if row.facts.get("zeroed") or row.facts.get("subnormal")]
    if lossy:
        zeroed, subnormal = (sum(int(row.facts.get(key, 0)) for row in lossy) for key in ("zeroed", "subnormal"))
        names = tuple(row.name for row in lossy)
        text = (
            f"in {such(names)} {counted(zeroed, 'element')} {are(zeroed)} written as 0 where a source is not, and "
            f"{subnormal:,} with fewer digits: the range of {lossy[0].dtype} is smaller than that of the sources"
        )
        yield Remark("narrower-range", text, tensors=names)
    coarse = [row for row in rows if row.facts.get("collapsed", 0) >= MOST_COLLAPSED * row.num_elems > 0]
    if coarse:
        names = tuple(row.name for row in coarse)
        text = (
            f"{such(names)} {'has' if len(coarse) == 1 else 'have'} lost at least half of the distinct values by "
            f"rounding to {coarse[0].dtype}; where small differences decide (a router's bias), ask for a finer dtype"
        )
        yield Remark("values-collapsed", text, "note", tensors=names)
    negative = [row for row in rows if row.facts.get("below_zero")]
    if negative:
        names = tuple(row.name for row in negative)
        text = (
            f"{such(names)} {are(len(negative))} variances, and some of them came out below zero, of which loaders "
            "take the root: the model gives NaN. Take averages with weights that are not negative, or a rule with "
            "`action: copy`"
        )
        yield Remark("running-statistics", text, tensors=names)


def _rounded_away(rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    """Yield that nearly nothing of what models change is left by rounding to the output's dtype."""
    held = [row for row in rows if row.facts.get("changed") and "clamped" not in row.flags]
    changed, lost = (sum(int(row.facts[key]) for row in held) for key in ("changed", "rounded_away"))
    if lost and lost >= MOST_ROUNDED_AWAY * changed:
        names = tuple(row.name for row in held if row.facts["rounded_away"])
        dtypes = sorted({row.dtype for row in held})
        text = (
            f"the output is {'' if lost == changed else 'nearly '}the base again: of {counted(changed, 'element')} "
            f"looked at in {counted(len(held), 'tensor')} that models change, {lost:,} came out as the base's, as what "
            f"is added is smaller than the steps of {' and '.join(dtypes)}; `dtype: "
            f"{'float64' if 'F32' in dtypes else 'float32'}` keeps it"
        )
        yield Remark("rounded-away", text, tensors=names)


def _strangers(plan: MergePlan, rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    """Yield which tensors of a model differ from the base as if they were others: swapped, or made anew."""
    urls = [redact(each.url) for each in plan.models]
    known = {url for remark in plan.remarks if remark.code == "stranger" for url in remark.models}
    measured = [row for row in rows if len(row.delta_norms) == len(urls) - 1 and _is_told(row)]
    for number, url in enumerate(urls[1:]):
        if url not in known and (names := tuple(row.name for row in measured if _is_strange(row, number))):
            text = (
                f"{url} differs from {urls[0]} by at least the weights' own size in {some(names, 1)}: made "
                "anew, or stored under another name or another way round, though of equal shape"
            )
            yield Remark("stranger", text, models=(url,), tensors=names)


def _ends_of_zeros(plan: MergePlan, rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    """Yield which tensors of a model end in zeros where others have numbers, as in a file that was cut."""
    found = {row.name: int(row.facts[ENDS_OF_ZEROS]) for row in rows if ENDS_OF_ZEROS in row.facts}
    for number, model in enumerate(plan.models):
        if names := tuple(name for name, bits in found.items() if bits >> number & 1):
            text = (
                f"{redact(model.url)} has zeros at the end of {some(names, 1)}, where another model has numbers: a "
                "download or copy that did not finish, or rows of padding; compare its files with their source"
            )
            yield Remark("zeros", text, models=(redact(model.url),), tensors=names)


def _is_told(row: TensorFacts) -> bool:
    """Return whether a change as large as the tensor itself is no tune's: of large matrices and weights of norms."""
    is_matrix = len(row.shape) > 1 and row.num_elems >= MIN_STRANGER_ELEMS
    return is_matrix or (len(row.shape) == 1 and is_of_a_norm(row.name))


def _is_strange(row: TensorFacts, number: int) -> bool:
    return row.delta_norms[number] >= STRANGER * (row.base_norm or float("inf"))


def _proved_of_codes(plan: MergePlan, rows: Sequence[TensorFacts]) -> Iterator[Remark]:
    """Yield in how many tensors changes are within the error of codes, and if models seem to be of another base."""
    coded = [row for row in rows if "median_step" in row.facts]
    noisy = [row.name for row in coded if "rounding_noise" in row.flags]
    if noisy:
        text = (
            f"in {len(noisy):,} of {counted(len(coded), 'tensor')} in codes a model differs from the base by less than "
            "the error of rounding to them: their cosines and t say little, and most of the change is lost"
        )
        yield Remark("rounding-noise", text, models=(), tensors=tuple(noisy))
    shares = [row.facts["median_step"] for row in coded]
    if shares and _has_plain_tunes(plan) and QUARTER_OF_A_STEP[0] <= median(shares) <= QUARTER_OF_A_STEP[1]:
        urls = [redact(each.url) for each in plan.models]
        text = (
            f"the changes of {', '.join(urls[1:])} from {urls[0]} lie at a quarter of the distance between its codes, "
            "as if they had been tuned from what it was before it was rounded: that error "
            f"{are(1)} in every task vector. Give the 16-bit base that they were tuned from"
        )
        yield Remark("other-master", text, models=tuple(urls[1:]))


def _has_plain_tunes(plan: MergePlan) -> bool:
    """Return whether the base has codes where the models that are measured from it have plain numbers."""
    for job in plan.jobs:
        anchor, *tuned = job.reading.operands
        if not anchor.decode.is_plain and tuned and all(operand.decode.is_plain for operand in tuned):
            return True
    return False
