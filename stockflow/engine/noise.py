"""Noise of codes: how far task vectors stand above the error of rounding weights to the codes they are stored in.

A change that is smaller than that error is mostly lost, and what is left of it says little about how models agree. The
expected square of the error is the lesser of ``sum |d| step``, as a code flips with a probability of ``|d| / step``,
and ``sum step^2 / 6``, of two roundings that know nothing of each other; it is in ``|d|^2``, too, and taken from there.
The begin of each span is looked at.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stockflow.checkpoints.decodes.low_rank import reads_anchor
from stockflow.checkpoints.decodes.stored import BlockScaled, GroupScaled
from stockflow.checkpoints.decodes.transposed import within_rows
from stockflow.engine.pieces import LoadedPiece
from stockflow.engine.stage import geometry_of, scales_of
from stockflow.kernels import coding
from stockflow.planning.job import Reading, TensorJob
from stockflow.planning.operands import Operand

LOOKED_AT = 4096
"""Elements of a span."""
_FRACTION_BITS, _LEAST_EXPONENT = {"F8_E4M3": 3, "F8_E5M2": 2}, {"F8_E4M3": -6, "F8_E5M2": -14}


class Seen(NamedTuple):
    """What the begin of a span says of one change."""

    start: int
    model: int
    flips: float
    """sum of |d| step"""
    roundings: float
    """sum of step^2 / 6"""
    square: float
    """sum of d^2"""
    num_changed: int
    num_elems: int
    median_step: float
    """median of |d| over step"""


def is_looked_at(job: TensorJob) -> bool:
    """Return whether a job measures models from a base, any of them is in codes, and not all changes are known."""
    return has_codes(job.reading) and job.result.declared.has_anchor(job.result.parameters)


def has_codes(reading: Reading) -> bool:
    """Return whether any operand is in codes, row by row as it is read, and some change from the first is not known."""
    if all(reads_anchor(operand.decode) for operand in reading.operands[1:]):
        return False
    return any(map(_is_coded, reading.operands)) and not any(operand.rows for operand in reading.operands)


def _is_coded(operand: Operand) -> bool:
    return isinstance(within_rows(operand.decode), BlockScaled | GroupScaled)


def look(span: LoadedPiece) -> list[Seen]:
    """Return what the begin of a span says of the change of each model that has codes, or whose base has."""
    operands, num = span.reading.operands, min(LOOKED_AT, span.stop - span.start)
    base_E = span.numbers(0)[:num].astype(np.float64)
    found = []
    for number in range(1, len(operands)):
        coded = [each for each in (number, 0) if _is_coded(operands[each])]
        if not coded or reads_anchor(operands[number].decode):
            continue
        changes_E = np.abs(span.numbers(number)[:num] - base_E)
        steps_E = _steps(span, coded[0], num)
        shares_E = np.divide(changes_E, steps_E, out=np.zeros(num), where=steps_E > 0)
        found.append(
            Seen(
                span.start,
                number,
                float(changes_E @ steps_E),
                float(steps_E @ steps_E) / 6,
                float(changes_E @ changes_E),
                int(np.count_nonzero(shares_E >= 0.5)),
                num,
                _median(shares_E),
            )
        )
    return found


def _median(values_E: Any) -> float:
    """Return the median of a few numbers: numpy's own takes twenty times as long over them."""
    middle = len(values_E) // 2
    parted_E = np.partition(values_E, middle)
    upper = parted_E[middle]
    return float(upper if len(values_E) % 2 else 0.5 * (parted_E[:middle].max() + upper))


def facts_of(seen: Iterable[Seen]) -> dict[str, float]:
    """Return the least of the changes over its expected error, and of the medians, and the share of changed numbers."""
    by_model: dict[int, list[Seen]] = {}
    for each in sorted(seen):
        by_model.setdefault(each.model, []).append(each)
    if not by_model:
        return {}
    signals = [ratio for each in by_model.values() if (ratio := _signal(each)) is not None]
    changed = [sum(one.num_changed for one in each) / sum(one.num_elems for one in each) for each in by_model.values()]
    medians = [statistics.median(one.median_step for one in each) for each in by_model.values()]
    facts = {"changed_codes": float(np.mean(changed)), "median_step": min(medians)}
    return facts | ({"rounding_signal": min(signals)} if signals else {})


def cosine_floor(facts: Mapping[str, float], reading: Reading) -> float | None:
    """Return which cosine models that have nothing in common read as at most, by the error of their codes alone.

    Of the error in a change, half is the base's if that is in the same codes, and common to all models; that of models
    alone may be common, too, as they round the same numbers. None where no model but the base is in codes, or none is.
    """
    base, *models = map(_is_coded, reading.operands)
    signal = facts.get("rounding_signal")
    return (0.5 if base else 1.0) / (1.0 + signal**2) if any(models) and signal is not None else None


def _signal(seen: Sequence[Seen]) -> float | None:
    """Return the change over the expected error; None where nothing changed."""
    error = min(sum(each.flips for each in seen), sum(each.roundings for each in seen))
    return math.sqrt(max(sum(each.square for each in seen) - error, 0.0) / error) if error > 0 else None


def _steps(span: LoadedPiece, number: int, num: int) -> Any:
    """Return the distance between neighbouring codes at each of the first numbers of an operand."""
    decode, shape = within_rows(span.reading.operands[number].decode), span.reading.shape
    first, scales_S = scales_of(span, number)
    scales_E = np.empty(num)
    coding.spread(scales_S, np.uint64(first), np.uint64(span.start), geometry_of(decode, shape), scales_E)
    if isinstance(decode, GroupScaled) and decode.codes == "I4":
        return scales_E
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes_E = np.abs(span.numbers(number)[:num]) / scales_E
    if isinstance(decode, GroupScaled):
        return scales_E * np.where(sizes_E < 2, 0.5, np.where(sizes_E < 4, 1.0, 2.0))
    exponents_E = np.maximum(np.frexp(sizes_E)[1] - 1, _LEAST_EXPONENT[decode.dtype])
    return scales_E * np.ldexp(1.0, exponents_E - _FRACTION_BITS[decode.dtype])
