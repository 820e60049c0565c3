"""Precision: what stays finer than asked, what is carried over instead of averaged, what an average makes worthless."""

from collections.abc import Iterator

import numpy as np

from stockflow.checkpoints.files.header import DTYPES
from stockflow.checkpoints.samples import RUNNING_STATISTICS
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.precision import has_smaller_range, kept_above
from stockflow.storage import redact
from stockflow.text.examples import such
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import are

_ENDS = {
    "F16": ("65,504", "6.1e-5", "3e-8"),
    "BF16": ("3.39e38", "1.2e-38", "4.6e-41"),
    "F32": ("3.40e38", "1.2e-38", "7e-46"),
}
"""Largest number, smallest normal one, and half of the smallest subnormal one."""


def kept_precision(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors keep their dtype though the recipe asks for another."""
    asked = proposal.recipe.output_dtype
    if asked is None or not proposal.recipe.stockflow.keep_precision:
        return
    merged = (job for job in proposal.jobs if not job.is_copy and not job.result.rule)
    kept = {job.output.name: job.output.dtype for job in merged if job.output.dtype != asked}
    if kept:
        text = (
            f"{such(list(kept))} {are(len(kept))} written as {' and '.join(sorted(set(kept.values())))} instead of "
            f"{asked}: every model stores them finer than the rest of its weights; "
            "`stockflow: {keep_precision: false}` casts them"
        )
        yield Remark("precision-kept", text, "note", tensors=tuple(kept), values={"output": asked})


def cast_unlike(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors are cast as asked though some of their models, not all, store them finer than the rest."""
    asked = proposal.recipe.output_dtype
    read = (job for job in proposal.jobs if job.output.dtype == asked and job.reading.is_plain)
    mixed = [job for job in read if len(set(job.reading.dtypes)) > 1]
    above = kept_above(proposal.recipe, proposal.checkpoints) if mixed else ()
    finer, holders = dict[str, str](), set[int]()
    for job in mixed if above else ():
        for operand, dtype in zip(job.reading.operands, job.reading.dtypes, strict=True):
            if DTYPES[dtype].bits > above[operand.checkpoint]:
                finer[job.output.name] = dtype
                holders.add(operand.checkpoint)
    if finer:
        text = (
            f"{such(list(finer))} {are(len(finer))} written as {asked}: some models store them finer than the rest of "
            "their weights, and not all; save all alike to keep that"
        )
        values = {"sources": " and ".join(sorted(set(finer.values()))), "output": str(asked)}
        severity: Severity = "warning" if proposal.recipe.donor in holders else "note"
        yield Remark("dtypes-differ", text, severity, tensors=tuple(finer), values=values)


def carried_indices(proposal: Proposal) -> Iterator[Remark]:
    """Yield which tensors of floats hold no weights."""
    known = [each.values.fixed for each in proposal.checkpoints]
    if any(known):
        names = [
            job.output.name
            for job in proposal.jobs
            if job.is_copy and any(each.extents[0] in known[each.checkpoint] for each in job.reading.operands)
        ]
        if names:
            text = (
                f"{such(names)} {are(len(names))} no weights but indices, masks or frequencies, stored as floats: "
                "carried over as stored, not averaged"
            )
            yield Remark("index-data", text, "note", tensors=tuple(names))


def running_statistics(proposal: Proposal) -> Iterator[Remark]:
    """Yield that running statistics are averaged, which are not those of the merged model."""
    found = {name for name in proposal.donor.specs if name.endswith(RUNNING_STATISTICS)}
    names = [job.output.name for job in proposal.jobs if job.output.name in found and not job.is_copy] if found else []
    sampled = [[each.payload for each in own if each.kind == "statistics"] for own in proposal.samples]
    are_frozen = any(sampled) and all(each == sampled[0] for each in sampled)
    if names and not are_frozen:
        text = (
            f"{such(names)} {are(len(names))} running statistics: their averages are not those of the merged model; "
            "run it over training data in training mode before it is used"
        )
        yield Remark("running-statistics", text, "warning", tensors=tuple(names))


def narrower_range(proposal: Proposal) -> Iterator[Remark]:
    """Yield that numbers of a wider range are written in a narrower one: what that loses is counted while merging."""
    asked = proposal.recipe.output_dtype
    if asked not in _ENDS:  # where none is asked for, one is chosen that holds all
        return
    names = [
        job.output.name
        for job in proposal.jobs
        if job.output.dtype == asked and not job.is_copy and has_smaller_range(asked, job.reading.dtypes)
    ]
    if names:
        beyond, digits, everything = _ENDS[asked]
        text = (
            f"{such(names)} {are(len(names))} written as {asked}, whose range is smaller than that of their sources: "
            f"beyond {beyond} the merge stops, below {digits} digits are lost, below {everything} everything. Both are "
            "counted: `subnormal` and `zeroed` in the facts of tensors.parquet, and in the manifest's summary"
        )
        yield Remark("narrower-range", text, "note", tensors=tuple(names))


def not_finite(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models have NaN or infinity in what is merged, where they were looked at: the merge stops there."""
    if proposal.recipe.stockflow.on_nonfinite == "propagate":
        return
    merged = {job.output.name for job in proposal.jobs if not job.is_copy}
    for checkpoint, own in zip(proposal.checkpoints, proposal.samples, strict=False):
        names = [each.name for each in own if each.name in merged and not np.isfinite(each.values).all()]
        if names:
            url = redact(checkpoint.url)
            text = (
                f"{url} has NaN or infinity in {such(names)}, where it was looked at, and the merge will stop there: "
                "mend the checkpoint, or name what is no weight in a rule with `action: copy`"
            )
            yield Remark("not-finite", text, models=(url,), tensors=tuple(names))
