"""Rounding to codes: what it proved to do to the changes of models when all of them had been read."""

from collections.abc import Iterator, Sequence
from statistics import median

from stockflow.output.receipts import TensorFacts
from stockflow.planning.plan import MergePlan
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted

QUARTER_OF_A_STEP = (0.2, 0.3)
"""Where the median change lies, in steps between codes, if models come from what the base was before it was rounded."""


def proved_of_codes(plan: MergePlan, rows: Sequence[TensorFacts]) -> Iterator[Remark]:
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
