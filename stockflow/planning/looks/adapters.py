"""Adapters: what is known of changes before a look at the elements, and what models have in common."""

from collections.abc import Iterator

from stockflow.checkpoints.adapters.factors import factors_said, factors_within
from stockflow.checkpoints.decodes.low_rank import reads_anchor
from stockflow.methods.protocol import Linear
from stockflow.planning.factors import factors_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted, gb


def factors_inside(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models hold factors of adapters that would be merged as if they were weights."""
    distinct = {id(each.specs): each.specs for each in proposal.checkpoints}  # fine-tuned models mostly share theirs
    within = {number: names for number, specs in distinct.items() if (names := factors_within(specs))}
    jobs = proposal.jobs if within else ()
    merged = {job.output.name for job in jobs if not job.is_copy and len(job.reading.operands) > 1}
    for each in proposal.checkpoints:
        names = [name for name in within.get(id(each.specs), ()) if name in merged]
        if names:
            text = f"{factors_said(redact(each.url), names)}. Accepted, each is merged as if it were a weight"
            yield Remark("factors-inside", text, "refusal", (redact(each.url),), tuple(names))


def known_changes(proposal: Proposal) -> Iterator[Remark]:
    """Yield how many tensors take no statistics pass, as adapters tell their geometry, and that a base is read once."""
    coded = [job.reading for job in proposal.jobs if not job.reading.is_plain]
    if not any(reads_anchor(operand.decode) for reading in coded for operand in reading.operands[1:]):
        return
    asking = [job for job in proposal.jobs if isinstance(rule := job.result.declared.rule, Linear) and rule.needs_gram]
    known = [job for job in asking if job.has_known_changes]
    num_bytes = sum(factor.reading.num_elems for factor in factors_of(known))
    passes = (
        f"{len(known):,} of {counted(len(asking), 'tensor')} take no statistics pass: their changes are products of "
        f"low rank, and {gb(num_bytes)} of factors tell their geometry. "
    )
    yield Remark("adapters", f"{passes if known else ''}What models have of one base is read once", "note")
