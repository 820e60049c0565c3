"""What the recipe asks for, perhaps unaware: left out tensors, an unlisted base, promoted dtypes."""

import math
from collections.abc import Iterator, Sequence

from stockflow.checkpoints.beside.side_files import CONFIGS_OF_LIBRARIES, is_tokenizer_or_template
from stockflow.checkpoints.modules import MODULES_FILE
from stockflow.checkpoints.pipelines import PIPELINE_FILE
from stockflow.methods.parameters import Parameters
from stockflow.methods.protocol import Method
from stockflow.planning.job import TensorJob
from stockflow.planning.looks.proposal import Proposal
from stockflow.recipe.slices import slices_of
from stockflow.storage import halves_of, redact, scheme_of
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted

MERGED = "merged"
SMALL_SUM = 0.01
"""Of the weights' sizes."""


def skipped_tensors(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors rules leave out, and which of them models have beside the donor's."""
    names, donor = proposal.skipped, proposal.donor.specs
    if names:
        holders = {name: [redact(each.url) for each in proposal.checkpoints if name in each.specs] for name in names}
        beside = [name for name in names if holders[name] and name not in donor]
        models = tuple(dict.fromkeys(url for name in beside for url in holders[name]))
        text = f"{counted(len(names), 'tensor')} {are(len(names))} left out by rules: {_first_of(names)}"
        if beside:
            text += f"; only {', '.join(models)} {'has' if len(models) == 1 else 'have'} {_first_of(beside)}"
        yield Remark("skipped", text, "note", models, tuple(names))


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(map(in_a_line, names[:3])) + " ..." * (len(names) > 3)


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


def snapshots(proposal: Proposal) -> Iterator[Remark]:
    """Yield which snapshots are read of folders of the hub's cache."""
    for location, checkpoint in zip(proposal.recipe.checkpoints, proposal.checkpoints, strict=True):
        given, found = halves_of(location), halves_of(checkpoint.url)
        for one, read in zip(given, found, strict=True) if len(given) == len(found) else ():
            if scheme_of(one) == "file" and read != one:
                text = f"{one} is a folder of the hub's cache; read is its snapshot {read.rpartition('/')[2]}"
                yield Remark("snapshot", text, "note", (checkpoint.url,))


def over_http(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are read where a bit may flip on the way, and none the wiser."""
    urls = tuple(dict.fromkeys(redact(each.url) for each in proposal.checkpoints if each.over_http))
    if urls:
        text = (
            f"{counted(len(urls), 'model')} {are(len(urls))} read over http://, where nothing notices a bit that flips "
            f"in a range of a file: {', '.join(urls[:3])}{' ...' if len(urls) > 3 else ''}; "
            "--verify-inputs reads each twice and compares, https:// guards them"
        )
        yield Remark("over-http", text, "note", urls)


def missing_tokenizer(proposal: Proposal) -> Iterator[Remark]:
    """Yield which files of a tokenizer the recipe leaves out."""
    if not proposal.recipe.stockflow.copy_tokenizer and proposal.recipe.vocabulary is None:
        left = [key for key in proposal.side_files_donor.side_files if is_tokenizer_or_template(key)]
        yield Remark(
            "not-copied", f"the tokenizer is not copied, as the recipe says: {', '.join(left) or 'none'}", "note"
        )


def missing_config(proposal: Proposal) -> Iterator[Remark]:
    """Yield that there is no config to publish."""
    of_others = (PIPELINE_FILE, MODULES_FILE, *CONFIGS_OF_LIBRARIES)
    if proposal.donor.config is None and not any(key in proposal.donor.side_files for key in of_others):
        url = redact(proposal.donor.url)
        yield Remark("no-config", f"{url} has no config.json, so the output will have none", models=(url,))


def unlisted_base(proposal: Proposal) -> Iterator[Remark]:
    """Yield what becomes of a base that is not among the models of a method which needs none."""
    recipe = proposal.recipe
    method = recipe.method_for(None)
    if method.base != "ignored" or not recipe.base_model:
        return
    base, counts = redact(recipe.base_model), any(each.recipe.base_counts(method) for each in slices_of(recipe))
    if recipe.lists_base and not counts:
        return
    if counts:
        names = " and ".join(f"`{name}`" for name in method.required_per_model)
        given = f", with the recipe's own {names}" if names else ""
        own = f" or give each model its own {names}" if names else ""
        text = (
            f"the base {base} is not among the models, and `{method.name}` merges it in like them{given}, as mergekit "
            f"does; to leave it out, remove base_model{own}"
        )
    else:
        text = (
            f"the base {base} is not among the models, so `{method.name}` does not merge it in; it gives names, "
            "config and tokenizer"
        )
    yield Remark("base-not-listed", text, models=(base,))


def promoted_dtypes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors are written in another dtype than some of their sources, because these differ."""
    if proposal.recipe.output_dtype:
        return
    names: dict[tuple[str, str], list[str]] = {}
    for job in proposal.jobs:
        dtypes = job.reading.dtypes
        if dtypes.count(dtypes[0]) < len(dtypes) and not job.is_copy and not job.result.rule:
            key = " and ".join(sorted(set(dtypes))), job.output.dtype
            names.setdefault(key, []).append(job.output.name)
    for (found, written), tensors in names.items():
        which = f"{counted(len(tensors), 'tensor')} {are(len(tensors))}"
        text = f"{which} of {found} and written as {written}, which holds them all; `dtype` names another"
        yield Remark(
            "dtypes-differ", text, "note", tensors=tuple(tensors), values={"sources": found, "output": written}
        )


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
