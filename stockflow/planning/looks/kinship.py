"""Kinship: models that are copies of each other, or too far from the base to have been tuned from it, by samples."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from stockflow.checkpoints.samples import Sample
from stockflow.methods.parameters import Role
from stockflow.planning.looks.casts import cast_to
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import halves_of, redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

LIMITS: tuple[Role, Role] = ("least change", "step")
"""Roles of parameters below which changes leave the output the base, and the other model."""
LEAST_SHIFT = 0.1
"""Of what norms multiply by: a shift that is no tune's, and how far one may be from 1."""
STRANGER = 1.0
"""Of the weights' own size: a difference that large is no tune's. Of two unrelated models it is sqrt(2)."""


def copies(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are the same wherever they were looked at."""
    whole = [each for each in _read(proposal) if len(halves_of(each[0])) == 1]  # adapters leave most of a base alone
    for (left, ours), (right, theirs) in combinations([(url, _matrices(own)) for url, own in whole], 2):
        pairs = list(zip(ours, theirs, strict=True))
        if not pairs:
            continue
        said = f"{left} and {right} hold the same numbers in all {len(pairs)} places that were looked at"
        if all(_are_equal(one, other) for one, other in pairs):
            said += ": one may be a copy of the other"
        elif dtype := cast_to(pairs):
            said += f", once they are rounded to {dtype}: one may be the other in another precision"
        else:
            continue
        yield Remark("same-samples", said, "note", (left, right), tuple(each.name for each in ours))
    yield from _copied_adapters(proposal)


def _copied_adapters(proposal: Proposal) -> Iterator[Remark]:
    """Yield which adapters of one model are the same wherever they were looked at."""
    adapted = [each for each in proposal.checkpoints if any(map(any, each.factors.values()))]
    for one, other in combinations(adapted, 2):
        if one.factors == other.factors and halves_of(one.url)[0] == halves_of(other.url)[0]:
            left, right = redact(one.url), redact(other.url)
            text = (
                f"{left} and {right} have the same factors in all {len(one.factors)} places that were looked at: one "
                "may be a copy of the other"
            )
            yield Remark("same-samples", text, "note", (left, right), tuple(one.factors))


def strangers(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models are as far from the base, or the first one, as if they had nothing to do with it."""
    if not proposal.recipe.base_model and all(len(job.reading.operands) == 1 for job in proposal.jobs):
        return
    (base, own), *others = _sampled(proposal) or [("", ())]
    for url, samples in others:
        pairs = [(one, other) for one, other in zip(own, samples, strict=True) if other.values.any()]
        far = {one.name: distance for one, other in pairs if (distance := _relative_distance([one], [other]))}
        anew = {two.name for one, two in pairs if _is_made_anew(one, two)}
        names = tuple(two.name for _, two in pairs if far.get(two.name, 0.0) >= STRANGER or two.name in anew)
        of_layers = [(one, other) for one, other in pairs if one.kind != "norm"]  # those are large, and alike
        whole = _relative_distance(*zip(*of_layers, strict=True)) if of_layers else None
        if (whole or 0.0) >= STRANGER and 2 * len(names) > len(of_layers):
            said, names = f"by {whole:.2f} of the weights' own size, where it was looked at: another model, or", ()
        elif names:
            most = max(far.values(), default=math.inf)
            counted = " norms counted from another number, or" if anew else ""
            said = f"by up to {most:.2f} of the weights' own size in {_in_tensors(names)}: made anew, or{counted}"
        else:
            continue
        text = f"{url} differs from {base} {said} tensors stored another way round, though of equal shapes"
        yield Remark("stranger", text, models=(url,), tensors=names, values={url: f"{whole or 0.0:.3g}"})


def _is_made_anew(base: Sample, other: Sample) -> bool:
    """Return whether what a norm multiplies by is one number, or the base's and 1 more or less (GGUF's of Gemma)."""
    shift = other.values - base.values
    is_one_number = np.ptp(other.values) == 0.0 < np.ptp(base.values) and bool(np.abs(shift).max() >= LEAST_SHIFT)
    is_shifted = abs(abs(float(shift.mean())) - 1.0) + float(shift.std()) < LEAST_SHIFT
    return other.kind == "norm" and (is_one_number or is_shifted)


def small_changes(proposal: Proposal) -> Iterator[Remark]:
    """Yield that a method counts no change that was looked at, or takes every one over as it is."""
    limits = {role: list(_limits(proposal, role)) for role in LIMITS}
    (base, own), *others = (_sampled(proposal) if any(limits.values()) else []) or [("", ())]
    pairs = [pair for _, samples in others for pair in zip(own, samples, strict=True)]
    apart = max((float(np.abs(two.values - one.values).max(initial=0.0)) for one, two in pairs), default=math.inf)
    for role, output in zip(LIMITS, (base, others[-1][0] if others else base), strict=True):
        least, name = min(limits[role], default=(0.0, ""))
        if apart < least:
            text = f"`{name}: {least:g}` is more than any change that was looked at ({apart:.3g} at most)"
            yield Remark("far-values", f"{text}: where none is larger, the output is {output}")


def _limits(proposal: Proposal, role: Role) -> Iterator[tuple[float, str]]:
    for method, parameters in proposal.methods:
        for name, values in method.given(role, parameters):
            yield from ((float(value), name) for value in values)


def zeros(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models have zeros alone in a tensor of which another one has numbers."""
    sampled = _sampled(proposal)
    for url, samples in sampled:
        names = tuple(
            each.name
            for number, each in enumerate(samples)
            if not each.values.any() and any(others[number].values.any() for _, others in sampled)
        )
        if names:
            text = (
                f"{url} has nothing but zeros where it was looked at in {_in_tensors(names)}, and another model has "
                "numbers there: a download or copy that did not finish, or a tensor that was never trained; fetch it "
                "again or leave it out"
            )
            yield Remark("zeros", text, models=(url,), tensors=names)


def _matrices(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return samples but for those of scales and norms, which small changes of a model leave as they are."""
    return [each for each in samples if each.kind == "matrix"]


def _in_tensors(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more of the tensors that were looked at" if len(names) > 1 else ""
    return f"{shown(names[0])}{more}"


def _read(proposal: Proposal) -> list[tuple[str, Sequence[Sample]]]:
    pairs = zip(proposal.checkpoints, proposal.samples, strict=False)
    return [(redact(each.url), [one for one in own if one.kind != "statistics"]) for each, own in pairs]


def _sampled(proposal: Proposal) -> list[tuple[str, Sequence[Sample]]]:
    """Return what was read in places where all have numbers, by model."""
    read = _read(proposal)
    places = list(zip(*(own for _, own in read), strict=True))
    kept = [place for place in places if all(np.isfinite(each.values).all() for each in place)]
    return [(url, [place[number] for place in kept]) for number, (url, _) in enumerate(read)]


def _are_equal(one: Sample, other: Sample) -> bool:
    return one.payload == other.payload or np.array_equal(one.values, other.values, equal_nan=True)


def _relative_distance(base: Sequence[Sample], other: Sequence[Sample]) -> float | None:
    """Return |w - w0| / |w0| over all samples, None where that says nothing."""
    with np.errstate(invalid="ignore", over="ignore"):
        own = sum(float(np.vdot(each.values, each.values)) for each in base)
        apart = sum(float(np.sum((one.values - two.values) ** 2)) for one, two in zip(base, other, strict=True))
    return float(np.sqrt(apart / own)) if 0.0 < own < np.inf and apart < np.inf else None
