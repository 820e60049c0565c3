"""Quantisation: what configs and folders say of it where the weights are plain numbers."""

from collections.abc import Iterator

from stockflow.checkpoints.configs import quantization_keys
from stockflow.checkpoints.packed import packed_weights, scales_of_plain_weights
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def removed_quantization(proposal: Proposal) -> Iterator[Remark]:
    """Yield what of the published config, and beside it, speaks of packed weights that are not there."""
    donor = proposal.donor
    keys = list(quantization_keys(donor.config or {}))
    files = [file for file in QUANTIZATION_FILES if file in donor.other_files]
    if (keys or files) and not packed_weights({job.output.name: job.output for job in proposal.jobs}):
        url = redact(donor.url)
        removed = [*(f"`{in_a_line(key)}` of its config" for key in keys), *files]
        text = (
            f"{url} says that its weights are quantised, but they are plain numbers: "
            f"{' and '.join(removed)} {are(len(removed))} not published"
        )
        yield Remark("quantization-removed", text, "note", (url,), values={"removed": ", ".join([*keys, *files])})


def leftover_scales(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models have scales beside weights of plain numbers: one of the two is not what its name says."""
    by_layout = {id(each.specs): each.specs for each in proposal.checkpoints}
    scales = {layout: scales_of_plain_weights(specs) for layout, specs in by_layout.items()}
    for checkpoint in proposal.checkpoints:
        names = [name for name in scales[id(checkpoint.specs)] if not proposal.is_skipped(name)]
        if names:
            url = redact(checkpoint.url)
            text = (
                f"{url} has {counted(len(names), 'scale')} such as {in_a_line(names[0])} beside weights of plain "
                "numbers: if these are codes that were cast without their scales, this is no model; give the 16-bit "
                "original. If the scales were applied and left behind, a rule with `action: skip` leaves them out"
            )
            yield Remark("leftover-scales", text, "refusal", (url,), tuple(names))
