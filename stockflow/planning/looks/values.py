"""Values of parameters that no merge is likely to mean: far off, cancelling, or such that nothing is merged."""

import math
from collections.abc import Iterable, Iterator, Sequence

from stockflow.checkpoints.files.header import DTYPES
from stockflow.checkpoints.naming import layer_of
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Method
from stockflow.methods.weights import cancel
from stockflow.planning.job import TensorJob
from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.slices import slices_of
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted, share

SMALL_SUM = 0.01
"""Of the weights' sizes."""
ZERO_IS_BASE = ("amount", "place", "step")
"""Roles of parameters of which 0 leaves the base as it is."""


def far_values(proposal: Proposal) -> Iterator[Remark]:
    """Yield weights and factors that no merge is likely to mean, such as percentages; of each kind the first."""
    said: dict[str, str] = {}
    for method, parameters in proposal.methods:
        for name, text in _far_off(method, parameters):
            said.setdefault(name, text)
    if _is_all_zeros(proposal):
        said["scale"] = "`scale: 0` of every tensor makes an output of zeros; give it a filter"
    for text in said.values():
        yield Remark("far-values", text)


def shared_gradients(proposal: Proposal) -> Iterator[Remark]:
    """Yield that weights which vary over tensors, the same for all models, change nothing where they are normalized."""
    weighing = [each for each in proposal.methods if "weight" in each[1].per_model]
    given = {values.each("weight") for _, values in weighing}
    are_shared = all(len(weights) > 1 and len(set(weights)) == 1 for weights in given)
    if len(given) > 1 and are_shared and all(method.weights_divided_by(values) for method, values in weighing):
        text = (
            "`weight` varies over the tensors (a list is a gradient over the layers) and is the same for every model, "
            "and weights are divided by their sum: it changes nothing; for a weight per model give each its own"
        )
        yield Remark("no-effect", text)


def _is_all_zeros(proposal: Proposal) -> bool:
    zero = {
        id(given) for method, given in proposal.methods for _, each in method.given("scale", given) if not any(each)
    }
    holding = (job for job in proposal.jobs if DTYPES[job.output.dtype].kind == "float" and job.output.num_bytes)
    return bool(zero) and all(id(job.result.parameters) in zero for job in holding)


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
    if method.outweighs(given):
        yield "outweighed", f"with `{_weights_in_words(given)}` one model outweighs the others: it is the result itself"
    weights = given.per_model.get("weight", ())
    total, sizes = sum(weights), sum(map(abs, weights))
    flag = next((each.name for each in method.parameters if each.role == "sum"), "")
    if divided_by == "sum" and sizes and cancel(weights):
        instead = "they count as they are" if method.base == "required" else "they count alike"
        yield "sum", f"the weights sum to zero, so nothing is divided by that: {instead}; change them"
    elif divided_by == "sum" and abs(total) < SMALL_SUM * sizes:
        most = max(map(abs, weights)) / abs(total)
        text = f"the weights sum to {total:g}, by which all are divided: single ones count up to {most:.3g} times"
        yield "sum", f"{text}; change them{f', or `{flag}: false`' if flag else ''}"
    if method.base == "ignored" and flag and not divided_by and not 0.8 <= total <= 1.25:
        text = f"the weights sum to {total:g} and are not normalized (`{flag}: false`): so much is the result"
        yield "sum", f"{text} of an average"


def unmerged(proposal: Proposal) -> Iterator[Remark]:
    """Yield that a merge of several models would take every tensor from one, by rules or for want of others.

    Or every tensor of every layer, by rules.
    """
    recipe = proposal.recipe
    method = recipe.method_for(None)
    num_sources = max(len(set(each.recipe.sources(method))) for each in slices_of(recipe))
    if num_sources < 2 or not proposal.jobs:
        return
    merged = [job for job in proposal.jobs if _reads_several(job)]
    if merged:
        yield from _unmerged_layers(proposal, merged)
        return
    text = f"nothing is merged: every tensor comes from one model, though `{method.name}` is to merge {num_sources}"
    yield Remark("unmerged", f"{text}; change the rules or the models (--allow-unmerged obeys them)", "refusal")


def _unmerged_layers(proposal: Proposal, merged: Sequence[TensorJob]) -> Iterator[Remark]:
    """Yield that rules copy what is in layers, and nothing of any layer is merged."""
    if any(layer_of(job.output.name) is not None for job in merged):
        return
    rules = [(job, proposal.recipe.rule_for(job.stored_name)) for job in proposal.jobs if job.is_copy]
    copied = [job for job, rule in rules if rule and rule.action == "copy" and layer_of(job.output.name) is not None]
    if copied:
        whole = sum(job.result.num_bytes for job in proposal.jobs)
        part = share(sum(job.result.num_bytes for job in merged) / whole)
        url, of = redact(proposal.donor.url), f"of {len(proposal.jobs):,} {are(len(merged))} merged"
        text = (
            f"{counted(len(merged), 'tensor')} {of}, {part} of the bytes, and none in a layer: rules copy "
            f"{counted(len(copied), 'tensor')} of layers, so the output is {url} but for {some([*_names(merged)], 3)}; "
            "take these rules out, and models that do not fit without them"
        )
        yield Remark("unmerged", text, models=(url,), tensors=tuple(_names(copied)))


def _names(jobs: Iterable[TensorJob]) -> Iterator[str]:
    return (job.output.name for job in jobs)


def without_effect(proposal: Proposal) -> Iterator[Remark]:
    """Yield that by the values of the recipe every tensor that is merged comes from one model, and tokens as well."""
    if proposal.recipe.vocabulary is not None:
        return
    causes: set[str] = set()
    models: set[int] = set()
    for job in proposal.jobs:
        if job.is_copy or not _reads_several(job):
            continue
        found = only_source(job.result.declared, job.result.parameters)
        if found is None:
            return
        place, cause = found
        causes.add(f"`{cause}`")
        models.add(job.reading.operands[place].checkpoint)
    if len(models) == 1:
        url = redact(proposal.checkpoints[models.pop()].url)
        text = f"nothing is merged: with {' and '.join(sorted(causes))} every tensor comes from one model, {url}"
        yield Remark("unmerged", f"{text}; change the values (--allow-unmerged obeys them)", "refusal", (url,))


def only_source(method: Method, given: Parameters) -> tuple[int, str] | None:
    """Return the place of the source that a result equals, whatever sources hold, and the value that makes it so."""
    is_anchored = method.has_anchor(given)
    if is_anchored:
        for each in method.parameters:
            if each.role in ZERO_IS_BASE and not any(given.values(each)):
                return 0, f"{each.name}: 0"
            if each.role == "place" and given.values(each) == (1.0,):
                return 1, f"{each.name}: 1"
    if not _is_alone(method, given):
        return None
    number = next(number for number, weight in enumerate(given.each("weight")) if weight)
    return number + is_anchored, _weights_in_words(given)


def _is_alone(method: Method, given: Parameters) -> bool:
    """Return whether the weights of all models but one of several are 0, and that one is the result as it is."""
    all_weights = given.per_model.get("weight", ())
    weights = [weight for weight in all_weights if weight]
    others = (each for each in method.parameters if each.per_model and each.name != "weight")
    if len(all_weights) < 2 or len(weights) != 1 or any(set(given.values(each)) != {1.0} for each in others):
        return False
    factor = 1.0 if method.weights_divided_by(given) else weights[0]
    return factor * float(given.shared.get("lambda", 1.0)) == 1.0


def _weights_in_words(given: Parameters) -> str:
    return f"weight: {', '.join(f'{weight:g}' for weight in given.each('weight'))}"


def _reads_several(job: TensorJob) -> bool:
    return len({operand.checkpoint for operand in job.reading.operands}) > 1
