"""Quantisation: what configs and folders say of it where the weights are plain numbers."""

from collections import Counter
from collections.abc import Iterator

from stockflow.checkpoints import packed
from stockflow.checkpoints.configs import quantization_keys
from stockflow.checkpoints.decodes.low_rank import codes_within
from stockflow.checkpoints.quantised import STATIC_SCALES
from stockflow.planning.formats import QUANTIZATION_FILE, has_codes, outputs_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted

_MEASURED = (
    *("_scale", "_quantizer._amax", "_fake_quant.scale"),
    *("activation_post_process.min_val", "activation_post_process.max_val"),
)
"""Ends of the names of what was measured to quantise by; the first of some scales, the others are those of ModelOpt
and torch.
"""
QUANTIZATION_FILES = (QUANTIZATION_FILE, "quantize_config.json", "quant_config.json")


def removed_quantization(proposal: Proposal) -> Iterator[Remark]:
    """Yield what of the published config, and beside it, speaks of packed weights that are not there."""
    donor = proposal.donor
    keys = list(quantization_keys(donor.config or {}))
    files = [file for file in QUANTIZATION_FILES if file in (*donor.other_files, *donor.side_files)]
    if (keys or files) and not has_codes(proposal.jobs):
        url = redact(donor.url)
        removed = [*(f"`{in_a_line(key)}` of its config" for key in keys), *files]
        which = "and they are written as plain numbers" if donor.stored else "but they are plain numbers"
        text = (
            f"{url} says that its weights are quantised, {which}: "
            f"{' and '.join(removed)} {are(len(removed))} not published"
        )
        yield Remark("quantization-removed", text, "note", (url,), values={"removed": ", ".join([*keys, *files])})


def read_codes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are quantised, and how they are read."""
    for checkpoint in proposal.checkpoints:
        found = (codes_within(held.decode) for held in checkpoint.stored.values())
        forms = Counter(codes.words for codes in found if codes)
        if forms:
            url = redact(checkpoint.url)
            said = " and ".join(f"{counted(count, 'tensor')} of {form}" for form, count in forms.items())
            text = f"{url} holds {said}, read as the numbers that codes and scales stand for"
            yield Remark("quantised", text, "note", (url,), values={form: str(count) for form, count in forms.items()})


def quantised_tunes(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are quantised where the base is not: the base of their codes is in every task vector."""
    names: dict[int, list[str]] = {}
    for job in proposal.jobs:
        if job.reading.is_plain or not job.result.declared.has_anchor(job.result.parameters):
            continue
        anchor, *tuned = job.reading.operands
        for operand in () if codes_within(anchor.decode) else tuned:
            if codes_within(operand.decode):
                names.setdefault(operand.checkpoint, []).append(job.output.name)
    for number, found in names.items():
        url, base = redact(proposal.checkpoints[number].url), redact(proposal.donor.url)
        text = (
            f"{url} has {such(found, quote=in_a_line)} as codes, {base} as plain "
            "numbers: the error of rounding to codes is then in every task vector, and looks like agreement (a "
            "cosine of 0 reads as 0.45 where changes are a hundredth of the weights, as 0.93 where they are a "
            "thousandth, in FP8). Give the 16-bit models that were quantised, or the base in the same codes"
        )
        yield Remark("quantised-tunes", text, "refusal", (url,), tuple(found))


def static_scales(proposal: Proposal) -> Iterator[Remark]:
    """Yield what becomes of fixed scales of activations: what they were measured on is another model's."""
    donor = proposal.donor
    names = list(donor.static_scales)
    if names:
        url, written = redact(donor.url), names[0] in outputs_of(proposal.jobs)
        becomes = "the base's, as no model was run" if written else "not published: they belong to its codes"
        text = (
            f"{counted(len(names), 'fixed scale')} of activations of {url}, such as {in_a_line(names[0])}, "
            f"{are(len(names))} {becomes}"
        )
        yield Remark("static-scales", text, "note", (url,), tuple(names))


def averaged_scales(proposal: Proposal) -> Iterator[Remark]:
    """Yield that fixed scales of activations, or of a cache of keys and values, are merged as if they were weights."""
    likely = (name for name, job in proposal.written.items() if name.endswith(_MEASURED) and not job.is_copy)
    names = [name for name in likely if name.rpartition(".")[2] in STATIC_SCALES or name.endswith(_MEASURED[1:])]
    if names:
        then = "they are measured anew" if any(name.endswith(_MEASURED[1:]) for name in names) else "loaders take 1"
        text = (
            f"{such(names, 'fixed scale', in_a_line)}, of activations or of the cache of "
            f"keys and values, {are(len(names))} merged like weights: measured on other models, what comes out may be "
            f"too small for this one; a rule with `action: skip` leaves such scales out, and {then}"
        )
        yield Remark("static-scales", text, "warning", tensors=tuple(names))


def leftover_scales(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models have scales that belong to no codes: part of such a model is missing, or not what it says."""
    by_layout = {id(each.specs): each.specs for each in proposal.checkpoints}
    scales = {layout: packed.leftover_scales(specs) for layout, specs in by_layout.items()}
    for checkpoint in proposal.checkpoints:
        url, found = redact(checkpoint.url), scales[id(checkpoint.specs)]
        beside, alone = ([name for name in names if not proposal.is_skipped(name)] for names in found)
        if beside:
            text = (
                f"{url} has {such(beside, 'scale', in_a_line)} beside weights of plain "
                "numbers: if these are codes that were cast without their scales, this is no model; give the 16-bit "
                "original. If the scales were applied and left behind, a rule with `action: skip` leaves them out"
            )
            yield Remark("leftover-scales", text, "refusal", (url,), tuple(beside))
        if alone:
            text = (
                f"{url} has {such(alone, 'scale', in_a_line)} and not the weights that they "
                "belong to: fetch or copy the model again. If it has none, a rule with `action: skip` leaves them out"
            )
            yield Remark("leftover-scales", text, "refusal", (url,), tuple(alone))
