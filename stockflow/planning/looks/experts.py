"""Parts of large models that merges are apt to break: what chooses among experts, and parts that tunes come without."""

from collections.abc import Iterator

from stockflow.checkpoints.naming import is_router, projection_of
from stockflow.methods.protocol import Linear
from stockflow.planning.job import TensorJob
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.optional import PREDICTION, OptionalParts
from stockflow.storage import redact
from stockflow.text.examples import such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown


def merged_routers(proposal: Proposal) -> Iterator[Remark]:
    """Yield that routers are added up, after which tokens go to other experts than in any of the models."""
    names = [name for name, job in proposal.written.items() if is_router(name) and _adds_up(job)]
    if names:
        choose = "chooses" if len(names) == 1 else "choose"
        text = (
            f"{such(names)} {are(len(names))} merged, which {choose} among "
            "experts: sums of routers are known to send tokens to the wrong ones; "
            "`stockflow: {routers: copy}` takes them from the base"
        )
        yield Remark("routers-merged", text, tensors=tuple(names))


def _adds_up(job: TensorJob) -> bool:
    is_linear = isinstance(job.result.declared.rule, Linear)
    return is_linear and len({operand.checkpoint for operand in job.reading.operands}) > 1


def single_units(proposal: Proposal) -> Iterator[Remark]:
    """Yield that experts are decided one by one where mergekit decides all of a layer together."""
    alone = (name for name, job in proposal.written.items() if ".experts." in name and _is_decided_alone(job))
    first = next(alone, None)
    if first and projection_of(first):
        text = (
            f"projections of experts such as {shown(first)} are decided each by itself; mergekit decides all of a "
            "layer together, as `stockflow: {scope: layer}` does"
        )
        yield Remark("expert-units", text, "note", tensors=(first,))


def _is_decided_alone(job: TensorJob) -> bool:
    decides = job.reading.scope == "tensor" and "layer" in job.result.declared.scopes
    return decides and (job.num_statistic_passes > 0 or "seed" in job.result.parameters.shared)


def kept_parts(proposal: Proposal) -> Iterator[Remark]:
    """Yield which parts of the donor's other models lack, so that the output has them as they are there."""
    own = proposal.donor.specs
    lacking = [each for each in proposal.checkpoints if each.specs is not own and own.keys() - each.specs.keys()]
    if not lacking:
        return
    optional, found = OptionalParts(proposal.donor), dict[tuple[str, tuple[str, ...]], list[str]]()
    for job in proposal.jobs:
        part = _part(proposal, job, optional)
        if part and (models := tuple(redact(each.url) for each in lacking if _own_name(job) not in each.specs)):
            found.setdefault((part, models), []).append(job.output.name)
    for (part, models), names in found.items():
        go, them = ("go", "them") if part == PREDICTION else ("goes", "it")
        text = (
            f"{part} of {redact(proposal.donor.url)} {go} out as stored, {counted(len(names), 'tensor')} such as "
            f"{shown(names[0])}: {', '.join(models)} {'lacks' if len(models) == 1 else 'lack'} {them}"
        )
        drafts = "; the merged model may accept their drafts less often" * (part == PREDICTION)
        yield Remark("part-kept", text + drafts, "note", models, tuple(names))


def _part(proposal: Proposal, job: TensorJob, optional: OptionalParts) -> str | None:
    """Which optional part is copied by a job that no rule asks for."""
    is_kept = job.is_copy and proposal.recipe.rule_for(job.stored_name) is None
    return optional.of(_own_name(job)) if is_kept else None


def _own_name(job: TensorJob) -> str:
    return job.reading.operands[0].name
