"""Properties that are computed once: ``functools.cached_property`` without the lock that Python 3.11 takes for it."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class once(Generic[Value]):
    """A property whose value stays in its instance: planning 92,000 tensors asks for 1.4 million of them."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        """Take what computes it; two threads at once may both do so."""
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: object, owner: type) -> Value:
        """Compute it; Python finds the value itself from then on."""
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
