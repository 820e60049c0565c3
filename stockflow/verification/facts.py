"""Recorded statistics against those found again: within 1e-7, the error that any machine's sums stay below."""

from collections.abc import Iterator
from typing import NamedTuple

from stockflow.output.receipts import TensorFacts
from stockflow.verification.sample import Groups
from stockflow.verification.table import Row

TOLERANCE = 1e-7
COEFFICIENT_TOLERANCE = 1e-6
"""What the arc of slerp makes of an error of 1e-7, at its narrowest; more than a ratio does."""
EXACT_IN_CLASS = ("clamped_groups",)
"""Counts of what is decided at zero, which the last bit of a cosine can tip."""


class Fact(NamedTuple):
    """A statistic that is not what it should be."""

    column: str
    stated: object
    found: object


def differing_facts(row: Row, found: TensorFacts, *, same_class: bool) -> Iterator[Fact]:
    """Yield the columns in which a row of the table is not what the inputs give.

    Args:
        row: of tensors.parquet.
        found: the facts found again.
        same_class: whether both were computed on one class of machine.
    """
    cosine, num_tuned = found.mean_cosine, len(found.delta_norms)
    tolerances = {
        "mean_cosine": TOLERANCE,
        "min_cosine": TOLERANCE,
        "max_cosine": TOLERANCE,
        "ratio": TOLERANCE * _slope(cosine, num_tuned),
        "legacy_ratio": TOLERANCE * _slope(cosine, 2),
    }
    for column, tolerance in tolerances.items():
        stated, again = row[column], getattr(found, column)
        at_the_edge = not same_class and cosine is not None and abs(cosine) <= TOLERANCE
        if not _agree(stated, again, tolerance) and not (at_the_edge and None in (stated, again)):
            yield Fact(column, stated, again)
    norms = (
        ("base_norm", (row["base_norm"],), (found.base_norm,)),
        ("delta_norms", row["delta_norms"], found.delta_norms),
    )
    for column, stated_norms, norms_again in norms:
        if not _agree_all(list(stated_norms), list(norms_again)):  # type: ignore[call-overload]
            yield Fact(column, row[column], getattr(found, column))
    yield from _differing_counts(row, found, same_class=same_class)


def coefficients_agree(stated: Groups, found: Groups) -> bool:
    """Return whether coefficients are those of cosines that agree; a straight line agrees with the arc it replaces."""
    if list(map(len, stated)) != list(map(len, found)):
        return len(stated) == len(found) == 1 and {len(stated[0]), len(found[0])} == {1, 2}
    return all(
        abs(left - right) <= COEFFICIENT_TOLERANCE * _slope_of(right, len(group)) or (left != left and right != right)
        for group, again in zip(stated, found, strict=True)
        for left, right in zip(group, again, strict=True)
    )


def _slope_of(coefficient: float, num_tuned: int) -> float:
    """The slope of ``_slope`` at the cosine that gives the ratio ``N * coefficient``; at least 1."""
    return max((num_tuned - (num_tuned - 1) * num_tuned * coefficient) ** 2 / num_tuned, 1.0)


def _differing_counts(row: Row, found: TensorFacts, *, same_class: bool) -> Iterator[Fact]:
    stated_flags, flags = set(_listed(row["flags"])), set(found.flags)
    if not same_class:
        stated_flags, flags = stated_flags - {"clamped"}, flags - {"clamped"}
    if stated_flags != flags:
        yield Fact("flags", row["flags"], list(found.flags))
    stated_facts = row["facts"] if isinstance(row["facts"], dict) else {}
    for name in sorted(stated_facts.keys() | found.facts.keys()):
        stated, again = stated_facts.get(name), found.facts.get(name)
        if not _agree(stated, again, TOLERANCE) and (same_class or name not in EXACT_IN_CLASS):
            yield Fact(f"facts.{name}", stated, again)


def _slope(cosine: float | None, num_tuned: int) -> float:
    """How much a ratio ``N c / (1 + (N - 1) c)`` moves with its cosine; at least 1."""
    denominator = 1.0 + (num_tuned - 1) * (cosine or 0.0)
    return max(num_tuned / max(denominator, 1e-6) ** 2, 1.0)


def _agree(stated: object, found: float | None, tolerance: float) -> bool:
    if not isinstance(stated, float) or found is None:
        return stated is found
    return abs(stated - found) <= tolerance


def _agree_all(stated: list[object], found: list[float | None]) -> bool:
    """Whether norms agree, relative to their size."""
    return len(stated) == len(found) and all(
        _agree(left, right, TOLERANCE * abs(right or 0.0)) for left, right in zip(stated, found, strict=True)
    )


def _listed(value: object) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else []
