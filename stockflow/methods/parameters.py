"""Parameters of merge methods: what a method declares of each, and what a recipe gives them for one output tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scalar = bool | float | str
Kind = Literal["number", "integer", "flag", "word"]
Role = Literal["amount", "place", "step", "least change", "scale", "share", "sum", "agreeing sum"]
"""What a parameter is to its method. ``amount``: how much of the changes counts, 0 leaves the base as it is; ``place``:
from 0, the base, to 1, the other model; ``step``: how far elements may go from the base; ``least change``: smaller ones
do not count; ``scale``: multiplies a model; ``share``: is divided by the sum of all models'; ``sum``: a flag by which
all is divided by the sum of the weights; ``agreeing sum``: a flag by which each number is divided by the sum of those
weights that agree on its sign."""
FACTORS = (-10.0, 10.0)
"""What is usual of numbers that changes or models are multiplied by."""
FROM_BASE = "from_base"
"""A flag that every method with an optional base has, and that says whether the recipe names one."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, in mergekit's words."""

    name: str
    kind: Kind
    per_model: bool = False
    """whether each model has its own value"""
    default: Scalar | None = None
    """None: the recipe must give a value"""
    choices: tuple[str, ...] = ()
    """allowed values of a ``word``; of a ``flag`` beside true and false"""
    minimum: float | None = None
    maximum: float | None = None
    usual: tuple[float, float] | None = None
    """what merges mean; a value outside is warned of, and obeyed"""
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Resolved parameters of one output tensor."""

    shared: Mapping[str, Scalar] = field(default_factory=dict)
    per_model: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """one value per non-anchor source, or per source where the method has no base"""

    def number(self, name: str) -> float:
        """Return a shared number."""
        return float(self.shared[name])

    def integer(self, name: str) -> int:
        """Return a shared integer."""
        return int(self.shared[name])

    def flag(self, name: str) -> bool:
        """Return a shared flag."""
        return bool(self.shared[name])

    def word(self, name: str) -> str:
        """Return a shared word."""
        return str(self.shared[name])

    def each(self, name: str) -> tuple[float, ...]:
        """Return a per-model parameter, in recipe order."""
        return self.per_model[name]

    def values(self, parameter: Parameter) -> tuple[Scalar, ...]:
        """Return what one has, one value or one per model."""
        return self.per_model[parameter.name] if parameter.per_model else (self.shared[parameter.name],)

    @property
    def from_base(self) -> bool:
        """Whether a method that can do without a base was given one."""
        return bool(self.shared.get(FROM_BASE))
