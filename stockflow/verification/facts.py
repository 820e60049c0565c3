"""Recorded statistics against those found again, within what their method says machines may differ."""

from collections.abc import Iterator
from typing import NamedTuple

from stockflow.engine.facts import COLUMNS
from stockflow.methods.protocol import COSINE_TOLERANCE, Tolerance
from stockflow.output.receipts import TensorFacts
from stockflow.verification.sample import Groups
from stockflow.verification.table import Row

EXACT_IN_CLASS = ("clamped_groups",)
"""Counts of what is decided at zero, which the last bit of a cosine can tip."""


class Fact(NamedTuple):
    """A statistic that is not what it should be."""

    column: str
    stated: object
    found: object


def differing_facts(row: Row, found: TensorFacts, tolerance: Tolerance, *, same_class: bool) -> Iterator[Fact]:
    """Yield the columns in which a row of the table is not what the inputs give.

    Args:
        row: of tensors.parquet.
        found: the facts found again.
        tolerance: of the method that found them.
        same_class: whether both were computed on one class of machine.
    """
    cosine, num_tuned = found.mean_cosine, len(found.delta_norms)
    for column in COLUMNS:
        stated, again = row[column], getattr(found, column)
        at_the_edge = not same_class and cosine is not None and abs(cosine) <= COSINE_TOLERANCE
        agrees = _agree(stated, again, tolerance.fact(column, cosine, num_tuned))
        if not agrees and not (at_the_edge and None in (stated, again)):
            yield Fact(column, stated, again)
    norms = (
        ("base_norm", (row["base_norm"],), (found.base_norm,)),
        ("delta_norms", row["delta_norms"], found.delta_norms),
    )
    for column, stated_norms, norms_again in norms:
        if not _agree_all(list(stated_norms), list(norms_again)):  # type: ignore[call-overload]
            yield Fact(column, row[column], getattr(found, column))
    yield from _differing_counts(row, found, tolerance, same_class=same_class)


def coefficients_agree(stated: Groups, found: Groups, tolerance: Tolerance) -> bool:
    """Return whether coefficients are those of cosines that agree; a straight line agrees with the arc it replaces."""
    if list(map(len, stated)) != list(map(len, found)):
        return len(stated) == len(found) == 1 and {len(stated[0]), len(found[0])} == {1, 2}
    return all(
        abs(left - right) <= tolerance.coefficient(right, len(group)) or (left != left and right != right)
        for group, again in zip(stated, found, strict=True)
        for left, right in zip(group, again, strict=True)
    )


def _differing_counts(row: Row, found: TensorFacts, tolerance: Tolerance, *, same_class: bool) -> Iterator[Fact]:
    stated_flags, flags = set(_listed(row["flags"])), set(found.flags)
    if not same_class:
        stated_flags, flags = stated_flags - {"clamped"}, flags - {"clamped"}
    if stated_flags != flags:
        yield Fact("flags", row["flags"], list(found.flags))
    stated_facts = row["facts"] if isinstance(row["facts"], dict) else {}
    for name in sorted(stated_facts.keys() | found.facts.keys()):
        stated, again = stated_facts.get(name), found.facts.get(name)
        allowed = tolerance.fact(name, found.mean_cosine, len(found.delta_norms))
        if not _agree(stated, again, allowed) and (same_class or name not in EXACT_IN_CLASS):
            yield Fact(f"facts.{name}", stated, again)


def _agree(stated: object, found: float | None, tolerance: float) -> bool:
    if not isinstance(stated, float) or found is None:
        return stated is found
    return abs(stated - found) <= tolerance


def _agree_all(stated: list[object], found: list[float | None]) -> bool:
    """Whether norms agree, relative to their size."""
    return len(stated) == len(found) and all(
        _agree(left, right, COSINE_TOLERANCE * abs(right or 0.0)) for left, right in zip(stated, found, strict=True)
    )


def _listed(value: object) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else []
