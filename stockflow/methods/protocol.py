"""What a merge method is: a declaration, and a rule that maps statistics to a decision.

A *linear* method never sees a tensor: it maps a small Gram matrix per group to coefficients.
An *elementwise* method asks for rounds of statistics over blocks and ends with a function of blocks.
Both are described by a frozen declaration that the recipe, the plan and the engine read alike.

Shape suffixes: G groups (rows, leading indices, or 1), M sources (the anchor and the others),
N the sources that are not the anchor, E elements of a block.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

Scope = Literal["tensor", "row", "leading"]
"""What gets its own decision: a whole tensor, a row of the last dimension, an index of the first of three or more."""

Scalar = bool | float | str
Kind = Literal["number", "flag", "word"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, in mergekit's words."""

    name: str
    kind: Kind
    per_model: bool = False
    """True if each model has its own value (``models[].parameters``), False if one value is shared"""
    default: Scalar | None = None
    """None: the recipe must give a value"""
    choices: tuple[str, ...] = ()
    """allowed values of a ``word``"""
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Resolved parameters of one output tensor."""

    shared: Mapping[str, Scalar] = field(default_factory=dict)
    per_model: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """one value per non-anchor source, or per source where the method has no base"""

    def number(self, name: str) -> float:
        """Return a shared number."""
        return float(self.shared[name])

    def flag(self, name: str) -> bool:
        """Return a shared flag."""
        return bool(self.shared[name])

    def word(self, name: str) -> str:
        """Return a shared word."""
        return str(self.shared[name])

    def each(self, name: str) -> tuple[float, ...]:
        """Return a per-model parameter, in recipe order."""
        return self.per_model[name]


Fact = Floats
"""One number per group."""


@dataclass(frozen=True)
class Coefficients:
    """The decision of a linear method: ``out = w_0 + sum_i c_i (w_i - w_0)``, or ``sum_i c_i w_i``."""

    weights_GM: Floats
    """float64; one column per non-anchor source if ``anchored``, else one per source"""
    anchored: bool
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """what the tensor table records, by column name"""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """boolean per group, by flag name (``clamped``, ``zero_delta``)"""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of elements of one tensor, widened to the working precision (float32, or float64 for F64)."""

    name: str
    start: int
    """flat index of the first element in the tensor"""
    shape: tuple[int, ...]
    """of the whole tensor"""
    base_E: "Values"
    deltas_NE: "Values"
    """task vectors ``w_i - w_0``; owned by the callee, which may overwrite them"""


class Statistic(Protocol):
    """A monoid over blocks: combining the updates of any split gives the same result.

    The engine updates a fresh zero per block, on any thread, and combines the results in block order.
    """

    def zero(self) -> Any:
        """Return the empty state."""

    def update(self, state: Any, block: Block) -> Any:
        """Return ``state`` with ``block`` counted in."""

    def combine(self, left: Any, right: Any) -> Any:
        """Return the state of two neighbouring runs of blocks, ``left`` first."""

    def finish(self, state: Any) -> Any:
        """Return what the method receives."""


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The decision of an elementwise method: ``out = w_0 + update(block)``."""

    update: Callable[[Block], "Values"]
    facts: Mapping[str, float] = field(default_factory=dict)


Rounds = Generator[Statistic, Any, Elementwise]
"""Yields the statistics it needs, one per pass over the sources, and returns its decision."""


@dataclass(frozen=True, slots=True)
class TensorContext:
    """What an elementwise method knows of its tensor before the first round."""

    num_tuned: int
    num_elems: int
    float_bits: Literal[32, 64]
    """width of the working precision"""


BaseUse = Literal["required", "optional"]
"""``required``: the anchor is the base model. ``optional``: all listed models are equal; a base only donates names."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as the recipe, the plan and the engine see it."""

    name: str
    source: str
    """where the formula comes from"""
    base: BaseUse
    min_tuned: int
    """least number of models besides the base (of all models where the base is optional)"""
    max_tuned: int | None
    parameters: tuple[Parameter, ...]
    scopes: tuple[Scope, ...]
    needs_gram: bool
    """linear methods only: False if the coefficients follow from the parameters alone"""
    needs_anchor: bool = False
    """whether it uses the Gram's products of w_0 with the task vectors; |w_0|^2 is there in any case"""
    linear: Callable[[Gram, Parameters], Coefficients] | None = None
    rounds: Callable[[TensorContext, Parameters], Rounds] | None = None
    num_rounds: Callable[[int], int] = field(default=lambda float_bits: 1)
    """statistics passes of an elementwise method, by working precision in bits"""

    def num_statistic_passes(self, float_bits: int) -> int:
        """Return how often the sources are read before the combine."""
        if self.linear is not None:
            return 1 if self.needs_gram else 0
        return self.num_rounds(float_bits)


REGISTRY: dict[str, Method] = {}


def linear_method(
    name: str,
    *,
    source: str,
    base: BaseUse,
    min_tuned: int,
    max_tuned: int | None = None,
    parameters: tuple[Parameter, ...] = (),
    scopes: tuple[Scope, ...] = ("tensor",),
    needs_gram: bool = True,
    needs_anchor: bool = False,
) -> Callable[[Callable[[Gram, Parameters], Coefficients]], Callable[[Gram, Parameters], Coefficients]]:
    """Register a function from a Gram matrix to coefficients as a merge method."""

    def register(
        function: Callable[[Gram, Parameters], Coefficients],
    ) -> Callable[[Gram, Parameters], Coefficients]:
        REGISTRY[name] = Method(
            name, source, base, min_tuned, max_tuned, parameters, scopes, needs_gram, needs_anchor, linear=function
        )
        return function

    return register


def elementwise_method(
    name: str,
    *,
    source: str,
    min_tuned: int,
    num_rounds: Callable[[int], int],
    max_tuned: int | None = None,
    parameters: tuple[Parameter, ...] = (),
) -> Callable[[Callable[[TensorContext, Parameters], Rounds]], Callable[[TensorContext, Parameters], Rounds]]:
    """Register a generator of statistics that ends in a function of blocks as a merge method."""

    def register(
        function: Callable[[TensorContext, Parameters], Rounds],
    ) -> Callable[[TensorContext, Parameters], Rounds]:
        REGISTRY[name] = Method(
            name, source, "required", min_tuned, max_tuned, parameters, ("tensor",), False,
            rounds=function, num_rounds=num_rounds,
        )  # fmt: skip
        return function

    return register
