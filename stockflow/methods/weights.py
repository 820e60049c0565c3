"""Weights of models, scaled to sum to 1."""

import math
from collections.abc import Callable, Sequence

from stockflow.methods.parameters import Parameters

ROUNDING = 1e-12
"""Of the sizes of weights, by which their sum misses zero where it is meant."""


def cancel(weights: Sequence[float]) -> bool:
    """Return whether weights sum to zero, but for the rounding of decimals."""
    return abs(math.fsum(weights)) <= ROUNDING * math.fsum(map(abs, weights))


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """Return weights divided by their sum."""
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def zero_sum(flag: str) -> Callable[[Parameters], str | None]:
    """Return what refuses weights that sum to zero where a flag asks for them to be normalized.

    Without it an average by such weights is no model: zeros, or what models differ in.
    """

    def refuses(parameters: Parameters) -> str | None:
        weights = parameters.each("weight")
        if not parameters.flag(flag) or not cancel(weights):
            return None
        said = ", ".join(f"{weight:g}" for weight in weights)
        otherwise = f" or set `{flag}: false`" if parameters.from_base and any(weights) else ""
        return f"the weights {said} sum to zero, so they cannot be normalized; change them{otherwise}"

    return refuses
