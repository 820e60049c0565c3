"""Values of parameters that no merge is likely to mean: far off, cancelling, or such that nothing is merged."""

import math
from collections.abc import Iterator

from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Method
from stockflow.planning.job import TensorJob
from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.slices import slices_of
from stockflow.text.remarks import Remark

MERGED = "merged"
SMALL_SUM = 0.01
"""Of the weights' sizes."""


def far_values(proposal: Proposal) -> Iterator[Remark]:
    """Yield weights and factors that no merge is likely to mean, such as percentages; of each kind the first."""
    said: dict[str, str] = {}
    for method, parameters in proposal.methods:
        for name, text in _far_off(method, parameters):
            said.setdefault(name, text)
    for text in said.values():
        yield Remark("far-values", text)


def _far_off(method: Method, given: Parameters) -> Iterator[tuple[str, str]]:
    divided_by = method.weights_divided_by(given)
    for each in method.parameters:
        low, high = each.usual or (-math.inf, math.inf)
        for value in () if divided_by and each.per_model else given.values(each):
            if isinstance(value, float) and not low <= value <= high:
                usual = f"`{each.name}: {value:g}` is not between {low:g} and {high:g}, as merges have it"
                yield each.name, f"{usual}: for a percentage write {value / 100:g}" if high > 1 else usual
    yield from _odd_sums(method, given, divided_by)


def _odd_sums(method: Method, given: Parameters, divided_by: str | None) -> Iterator[tuple[str, str]]:
    weights = given.per_model.get("weight", ())
    total, sizes = sum(weights), sum(map(abs, weights))
    if divided_by == "sum" and 0 < abs(total) < SMALL_SUM * sizes:
        most = max(map(abs, weights)) / abs(total)
        text = f"the weights sum to {total:g}, by which all are divided: single ones count up to {most:.3g} times"
        yield "sum", f"{text}; change them{_or_divide_not(method)}"
    flags = [each.name for each in method.parameters if each.role == "sum"]
    if method.base == "ignored" and flags and not divided_by and not 0.8 <= total <= 1.25:
        text = f"the weights sum to {total:g} and are not normalized (`{flags[0]}: false`): so much is the result"
        yield "sum", f"{text} of an average"


def _or_divide_not(method: Method) -> str:
    return next((f", or `{each.name}: false`" for each in method.parameters if each.role == "sum"), "")


def unmerged(proposal: Proposal) -> Iterator[Remark]:
    """Yield that a merge of several models would take every tensor from one, by rules or for want of others."""
    recipe = proposal.recipe
    method = recipe.method_for(None)
    num_sources = max(len(set(each.recipe.sources(method))) for each in slices_of(recipe))
    if num_sources < 2 or not proposal.jobs or any(_reads_several(job) for job in proposal.jobs):
        return
    text = f"nothing is merged: every tensor comes from one model, though `{method.name}` is to merge {num_sources}"
    yield Remark("unmerged", f"{text}; change the rules or the models (--allow-unmerged obeys them)", "refusal")


def without_effect(proposal: Proposal) -> Iterator[Remark]:
    """Yield that by the values of the recipe every tensor that is merged comes from one model."""
    causes: set[str] = set()
    for job in proposal.jobs:
        cause = None if job.is_copy or not _reads_several(job) else _cause(job)
        if cause == MERGED:
            return
        causes.update([cause] if cause else [])
    if causes:
        said = " and ".join(sorted(f"`{cause}`" for cause in causes))
        text = f"nothing is merged: with {said} every tensor comes from one model; change the values"
        yield Remark("unmerged", f"{text} (--allow-unmerged obeys them)", "refusal")


def _cause(job: TensorJob) -> str:
    """Return the value by which a tensor is that of one model, or that it is merged."""
    given = job.result.parameters
    if not job.result.declared.has_anchor(given):
        return MERGED
    zero = (f"{name}: 0" for name, values in job.result.declared.given("amount", given) if not any(values))
    return next(zero, MERGED)


def _reads_several(job: TensorJob) -> bool:
    return len({operand.checkpoint for operand in job.reading.operands}) > 1
