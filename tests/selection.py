"""Selection of cases: what the default suite runs of them; the rest, which only repeats it, is ``make test-slow``."""

from collections.abc import Collection, Iterable, Mapping
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet

Axis = Mapping[str, Any]


def diagonal(*axes: Axis) -> list[ParameterSet]:
    """Every combination of the axes' values; by default as few as have each value of each axis."""
    shown = {tuple(step % len(axis) for axis in axes) for step in range(max(map(len, axes)))}
    return [
        _case(tuple(value for _, value in chosen), "-".join(name for name, _ in chosen), places in shown)
        for places, chosen in zip(
            product(*(range(len(axis)) for axis in axes)), product(*(axis.items() for axis in axes)), strict=True
        )
    ]


def mostly_slow(cases: Iterable[str], shown: Collection[str]) -> list[ParameterSet]:
    """Every case; by default those that are named."""
    return [_case((case,), case, case in shown) for case in cases]


def by_name(*values: object) -> Axis:
    """Return an axis of values that are called as they print."""
    return {str(value): value for value in values}


def _case(values: tuple[Any, ...], name: str, is_shown: bool) -> ParameterSet:
    return pytest.param(*values, id=name, marks=() if is_shown else pytest.mark.slow)
