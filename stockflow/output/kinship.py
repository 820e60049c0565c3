"""Kinship: what the products of whole models prove of them when all of it has been read: copies, and strangers."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from stockflow.planning.plan import MergePlan
from stockflow.storage import redact
from stockflow.text.remarks import Remark

Products = Sequence[Sequence[float]]
"""Of [w_0, d_1 .. d_N], over all tensors whose method needs them."""


def proved(plan: MergePlan, gram: Products) -> Iterator[Remark]:
    """Yield which models are the base, or each other, in every tensor that was merged by its statistics."""
    if plan.is_stacked or len(plan.models) != len(gram):
        return
    urls = [redact(each.url) for each in plan.models]
    tuned = range(1, len(gram))
    for index in tuned:
        if gram[index][index] == 0.0:
            yield _copy(urls[index], urls[0])
    for one, other in combinations(tuned, 2):
        if gram[one][one] == gram[other][other] == gram[one][other] != 0.0:
            yield _copy(urls[other], urls[one])


def _copy(url: str, original: str) -> Remark:
    text = f"{url} is equal to {original} in every tensor that was merged: it counts as a model of its own all the same"
    return Remark("copy", text, models=(url, original))
