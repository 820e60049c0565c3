"""Tied heads: a head of its own among tied ones, a pair that is treated in two ways, and one that nobody has."""

from collections.abc import Iterator

from stockflow.checkpoints.heads import (
    TIE_KEY,
    has_head,
    is_copy_in_a_layer,
    is_head,
    is_in_a_layer,
    tie_flag,
    tie_flags,
    tied_names,
    unties,
)
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.job import TensorJob
from stockflow.planning.looks.proposal import Proposal
from stockflow.planning.ties import WrittenHead
from stockflow.storage import redact
from stockflow.text.remarks import Remark, Severity
from stockflow.text.strictjson import shown


def own_heads(proposal: Proposal) -> Iterator[Remark]:
    """Yield that a model has a head of its own where others, or a config, tie it to the embedding."""
    for each in proposal.heads:
        if each.is_parted(proposal.donor):
            own, tied = (", ".join(redact(one.url) for one in these) for these in (each.own, each.tied))
            ones = dict.fromkeys(redact(one.url) for one in (proposal.donor, *each.own) if tie_flag(one.config))
            says = tied or ", ".join(f"the config of {url}" for url in ones)
            found = (
                f"{shown(each.head.output.name)} is a tensor of its own in {_as_found(each, proposal.donor)}, and "
                f"one with {shown(each.embedding.output.name)} in {says}: "
            )
            written = f"the head is written untied, from what each model has for one, and `{TIE_KEY}: false`"
            doubt = (
                f"a loader that ties them would take one of the two for both. {_way_out(each, proposal)}If accepted, "
            )
            models = tuple(redact(one.url) for one in each.own)
            values = {"own": own, "tied": tied}
            text = f"{found}{'' if each.is_adapted_apart else doubt}{written}"
            severity: Severity = "note" if each.is_adapted_apart else "refusal"
            yield Remark("head-untied", text, severity, models, (each.head.output.name,), values)


def _as_found(each: WrittenHead, donor: Checkpoint) -> str:
    """Return in which models a head is one of its own, and what it is there if that is known."""
    name, found = each.head.output.name, []
    for one in each.own:
        extent, known, kind = one.extents[name], one.values, ""
        if extent in known.partly:
            kind = f" (where it is the embedding but for some rows, the last of them {known.partly[extent]})"
        elif extent in known.untied_alike:
            kind = " (by its config alone: it is the embedding again)"
        elif extent in known.left_behind:
            kind = f" (where it is the embedding of {redact(donor.url)}, as if it had been left behind in training)"
        found.append(f"{redact(one.url)}{kind}")
    return ", ".join(found)


def _way_out(each: WrittenHead, proposal: Proposal) -> str:
    """Return how a head is left out that is of no use to a loader of its model, and that the output need not have."""
    name = each.head.output.name
    if unties(proposal.donor.config) or not all(one.extents[name] in one.values.left_behind for one in each.own):
        return ""
    return (
        f"`stockflow: {{rules: [{{filter: {name}, action: skip}}]}}` leaves it out, and the merged embedding is the "
        "head. "
    )


def parted_pairs(proposal: Proposal) -> Iterator[Remark]:
    """Yield which pairs that are stored twice would no longer be one tensor."""
    for each in proposal.heads:
        is_untied = is_head(each.head.output.name) and tie_flag(proposal.config) is False
        if not is_untied and not each.own and _treatment(each.head) != _treatment(each.embedding):
            head, embedding = each.head.output.name, each.embedding.output.name
            text = (
                f"{shown(head)} and {shown(embedding)} are one tensor in every model, but rules or filters treat them "
                "in two ways: a loader that ties them will take one of the two for both; let both match"
            )
            yield Remark("pair-parted", text, "warning", tensors=(head, embedding))


def contradicting_flags(proposal: Proposal) -> Iterator[Remark]:
    """Yield which configs say both, that head and embedding are one tensor and that they are two."""
    for each in proposal.checkpoints:
        flags = tie_flags(each.config)
        if flags and tie_flag(each.config) is None:
            url, values = redact(each.url), {f"{path}{TIE_KEY}": str(flag).lower() for path, flag in flags.items()}
            said = ", ".join(f"{key}: {flag}" for key, flag in values.items())
            text = f"the config of {url} says {said}, and loaders differ in which they follow: the tensors decide"
            if each is proposal.donor:
                text += f"; the published config says {str(tie_flag(proposal.config)).lower()} for all"
            yield Remark("tie-flags-disagree", text, "note", (url,), values=values)


def stale_copies(proposal: Proposal) -> Iterator[Remark]:
    """Yield copies of an embedding or a head that are the same tensor in some models and another one in others."""
    for each in proposal.heads:
        name, original = each.head.output.name, each.embedding.output.name
        if not is_head(name) and each.own and each.tied:
            is_draft = is_copy_in_a_layer(name)
            own, tied = (", ".join(redact(one.url) for one in these) for these in (each.own, each.tied))
            then = "drafts may be accepted less often" if is_draft else "loaders that tie the two take one for both"
            text = (
                f"{shown(name)} is {shown(original)} again in {tied}, and another tensor in {own}, as if it had been "
                f"left behind in training: both are merged as they are stored, and {then}"
            )
            models = tuple(redact(one.url) for one in each.own)
            yield Remark("tied-head", text, "note" if is_draft else "warning", models, (name,))


def missing_heads(proposal: Proposal) -> Iterator[Remark]:
    """Yield that the published config promises a head of its own, and none is written."""
    if not unties(proposal.config) or not _is_language_model(proposal):
        return
    written = proposal.written
    names = tied_names(written)
    embedded = {written[name].output.shape for name in names.embeddings}
    known = {*names.embeddings, *names.copies}
    others = (name for name in written if name not in known and not is_in_a_layer(name))
    if embedded and not any(_is_any_head(name) or written[name].output.shape in embedded for name in others):
        url = redact(proposal.donor.url)
        says = "says" if tie_flags(proposal.config) else "means by its model_type"
        text = (
            f"the published config {says} {TIE_KEY}: false, as that of {url} does, but no head is written: a loader "
            "would make one up; say true there if head and embedding are one, or keep the head"
        )
        yield Remark("promise-unkept", text, "warning", (url,), values={TIE_KEY: "False"})


def _treatment(job: TensorJob) -> object:
    operands = [operand.checkpoint for operand in job.reading.operands]
    return job.result.method, job.result.parameters, job.reading.scope, job.output.dtype, operands


def _is_language_model(proposal: Proposal) -> bool:
    return isinstance((proposal.config or {}).get("architectures"), list) and has_head(proposal.config)


def _is_any_head(name: str) -> bool:
    *_, module, _ = ("", *name.split("."))
    return is_head(name) or "lm_head" in name or "head" in module
