"""What a merge method is: a declaration, and a rule that maps statistics to a decision.

A *linear* method never sees a tensor: it maps a small Gram matrix per group to coefficients.
An *elementwise* method asks for rounds of statistics over blocks and ends with a function of blocks.
A *copy* carries bytes over. Each kind of rule says what memory it takes and how often it looks at the elements, so that
the recipe, the plan, the budget and the engine read one declaration, and none of them asks for the kind.

Shape suffixes: G groups (rows, leading indices, or 1), M sources (the anchor and the others),
N the sources that are not the anchor, E elements of a block.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from stockflow.kernels.arrays import Floats
from stockflow.methods.gram import Gram, Products
from stockflow.methods.parameters import FROM_BASE, Parameter, Parameters, Role, Scalar

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

Scope = Literal["tensor", "row", "leading", "layer"]
"""What gets its own decision: a tensor, a row, an index of the first of three, a layer's experts."""

Fact = Floats
"""One number per group."""


@dataclass(frozen=True)
class Coefficients:
    """The decision of a linear method: ``out = w_0 + sum_i c_i (w_i - w_0)``, or ``sum_i c_i w_i``."""

    weights_GM: Floats
    """float64; one column per non-anchor source if ``anchored``, else one per source"""
    anchored: bool
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """per group, by a name the method declares; recorded as the mean over the groups"""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """boolean per group, by flag name (``clamped``, ``zero_delta``)"""


@dataclass(frozen=True, slots=True)
class Block:
    """A short run of elements of one tensor, widened: as a statistic wants it, to working precision in the update."""

    name: str
    start: int
    """flat index of the first element in the tensor, or in what this is decided with"""
    shape: tuple[int, ...]
    """of the whole tensor"""
    base_E: "Values"
    deltas_NE: "Values"
    """task vectors ``w_i - w_0``; owned by the callee, which may overwrite them"""
    lows_NE: "Values | None" = None
    """what rounding took from them; only for the update of F64 results"""
    row_elems: int = 1
    """elements of a row, for methods that want whole rows; the last may be shorter"""


class Statistic(Protocol):
    """A monoid over blocks: combining the updates of any split gives the same result.

    The engine updates a fresh zero with the blocks of a span, on any thread, and combines spans in their order; both
    states are then the statistic's own to change. Spans and blocks of a unit begin at the same elements every time.
    """

    @property
    def float_bits(self) -> Literal[32, 64]:
        """Width of the blocks it wants: that magnitudes are ranked in, or that of the working precision."""

    def zero(self) -> Any:
        """Return the empty state."""

    def update(self, state: Any, block: Block) -> Any:
        """Return ``state`` with ``block`` counted in."""

    def combine(self, left: Any, right: Any) -> Any:
        """Return the state of two neighbouring runs of blocks, ``left`` first."""

    def finish(self, state: Any) -> Any:
        """Return what the method receives."""


@dataclass(frozen=True, slots=True)
class Update:
    """The decision of an elementwise method: ``out = w_0 + change(block)``.

    The change has the shape (E,), or (2, E), high parts and low parts of float64, where the block has ``lows_NE``.
    """

    change: Callable[[Block], "Values"]
    facts: Mapping[str, float] = field(default_factory=dict)
    float_bits: Literal[32, 64] | None = None
    """width of the blocks it wants, if not that of the working precision"""


Rounds = Generator[Statistic, Any, Update]
"""Yields the statistics it needs, one per pass over the sources, and returns its decision."""


@dataclass(frozen=True, slots=True)
class UnitContext:
    """What an elementwise method knows of what it decides on, a tensor or a group of one, before the first round."""

    name: str
    """of the output tensor"""
    num_tuned: int
    num_elems: int
    float_bits: Literal[32, 64]
    """width that magnitudes are ranked in"""
    working_bits: Literal[32, 64]
    """width that results are computed in"""


BaseUse = Literal["required", "optional", "ignored"]
"""mergekit's words. ``required``: the anchor is the base model. ``optional``: it is, where the recipe names one.
``ignored``: all models are equal, and a base is one of them (``Recipe.base_counts``)."""


class MethodRule(Protocol):
    """How a method gets from elements to a result, as far as reading them and memory go. All sizes in bytes."""

    def num_statistic_passes(self, float_bits: int, given: Parameters) -> int:
        """Return how often the sources go by before they are combined, magnitudes being ranked in so many bits."""

    def scratch_bytes(self, num_sources: int, num_elems: int, float_bits: int) -> int:
        """Return what one thread needs, beside the sources, for a span of so many elements."""

    def span_state_bytes(self, num_sources: int, num_groups: int) -> int:
        """Return what one statistics pass over a span of so many groups leaves behind."""


FLOAT_BYTES = 8
"""Of the products and sums that lead to a decision."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A weighted sum of the sources, by coefficients that follow from their Gram matrix or from parameters alone."""

    coefficients: Callable[[Gram, Parameters], Coefficients]
    products: Products | Literal["vectors"] | None = "changes"
    """what its Gram holds; ``vectors``: changes if there is a base, else sources; None: it takes no Gram, and the
    coefficients follow from the parameters alone"""

    @property
    def needs_gram(self) -> bool:
        """Whether it looks at the elements before they are added up."""
        return self.products is not None

    def products_for(self, parameters: Parameters) -> Products:
        """Return what the Gram of a tensor holds."""
        assert self.products is not None
        if self.products == "vectors":
            return "changes" if parameters.from_base else "sources"
        return self.products

    def num_statistic_passes(self, float_bits: int, given: Parameters) -> int:
        """Return one for the Gram, if it takes one."""
        del float_bits, given
        return int(self.needs_gram)

    def scratch_bytes(self, num_sources: int, num_elems: int, float_bits: int) -> int:
        """Return 0: sums are taken in the caches."""
        del num_sources, num_elems, float_bits
        return 0

    def span_state_bytes(self, num_sources: int, num_groups: int) -> int:
        """Return the size of the products."""
        return int(self.needs_gram) * num_groups * num_sources**2 * FLOAT_BYTES


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of task vectors, element by element, after rounds of statistics."""

    decide: Callable[[UnitContext, Parameters], Rounds | Update]
    """a generator of statistics, or an ordinary function where none is needed"""
    num_rounds: Callable[[int, Parameters], int] = field(default=lambda float_bits, given: 0)
    """at most, by the width that magnitudes are ranked in, and the parameters"""
    state_bytes: int = 0
    """of the state of one statistic, per source"""
    temporaries: int = 2
    """rows of working precision it needs beside those of the sources, per source"""
    kept_bytes: Callable[[Parameters, int, int], int] = field(default=lambda given, num_numbers, num_rows: 0)
    """of what is kept of a unit between sweeps, by the numbers in all its task vectors and its rows, at most"""
    whole_rows: bool = False
    """whether blocks are of whole rows of the last dimension, or of a whole span where these are longer"""

    def num_statistic_passes(self, float_bits: int, given: Parameters) -> int:
        """Return its number of rounds."""
        return self.num_rounds(float_bits, given)

    def scratch_bytes(self, num_sources: int, num_elems: int, float_bits: int) -> int:
        """Return the size of the task vectors and of its temporaries."""
        return num_sources * (1 + self.temporaries) * num_elems * float_bits // 8

    def span_state_bytes(self, num_sources: int, num_groups: int) -> int:
        """Return the size of a statistic's state per group."""
        return num_groups * num_sources * self.state_bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """The first source's bytes, unchanged."""

    must_agree: bool = False
    """whether all sources must hold the same bytes"""

    def num_statistic_passes(self, float_bits: int, given: Parameters) -> int:
        """Return 0."""
        del float_bits, given
        return 0

    def scratch_bytes(self, num_sources: int, num_elems: int, float_bits: int) -> int:
        """Return 0."""
        del num_sources, num_elems, float_bits
        return 0

    def span_state_bytes(self, num_sources: int, num_groups: int) -> int:
        """Return 0."""
        del num_sources, num_groups
        return 0


COSINE_TOLERANCE = 1e-7
"""The error of a cosine that any machine's sums stay below."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart statistics and decisions of the same inputs may be on machines that add in another order."""

    fact: Callable[[str, float | None, int], float] = lambda name, mean_cosine, num_tuned: COSINE_TOLERANCE
    """of a fact, given its name, the mean cosine that was found and the number of task vectors"""
    coefficient: Callable[[float, int], float] = lambda coefficient, num_tuned: 10.0 * COSINE_TOLERANCE
    """of a coefficient, given its value and how many there are"""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as the recipe, the plan and the engine see it."""

    name: str
    rule: MethodRule
    source: str
    """where the formula comes from"""
    base: BaseUse = "required"
    min_tuned: int = 1
    """least number of models besides the base (of all models where the base is optional)"""
    max_tuned: int | None = None
    parameters: tuple[Parameter, ...] = ()
    scopes: tuple[Scope, ...] = ("tensor",)
    facts: tuple[str, ...] = ()
    """what it records of each tensor; a number per model by its name and the model's, as ``kept_share_1``"""
    tolerance: Tolerance = Tolerance()
    """how far apart machines may be that add in another order"""
    rows_if: tuple[str, bool] | None = None
    """a flag, and the value of it that asks for the scope ``row``"""
    columns_if: str | None = None
    """a flag that makes rows of what lies along the first dimension, where rows are asked for"""
    refuses: Callable[[Parameters], str | None] = lambda _: None
    """what stands against values that are right one by one"""
    copies: Callable[[Parameters], bool] | None = None
    """whether the result is the only source, bit for bit, if it has the same dtype"""
    outweighs: Callable[[Parameters], bool] = lambda _: False
    """whether the weights alone make one of the models the result"""

    @property
    def required_per_model(self) -> tuple[str, ...]:
        """Names of the parameters that every model must have a value of."""
        return tuple(each.name for each in self.parameters if each.per_model and each.default is None)

    def given(self, role: Role, parameters: Parameters) -> Iterator[tuple[str, tuple[Scalar, ...]]]:
        """Yield the parameters of a role with their values, one or one per model."""
        for each in self.parameters:
            if each.role == role:
                yield each.name, parameters.values(each)

    def weights_divided_by(self, parameters: Parameters) -> Literal["sum", "agreeing sum"] | None:
        """Return by what the weights of all models are divided, if by anything."""
        if any(each.role == "share" for each in self.parameters):
            return "sum"
        asked = (each.role for each in self.parameters if each.kind == "flag" and parameters.flag(each.name))
        return next((role for role in asked if role == "sum" or role == "agreeing sum"), None)

    def has_anchor(self, parameters: Parameters) -> bool:
        """Return whether the first source is a base, beside the models that count."""
        return self.base == "required" or parameters.from_base

    def asks_for_rows(self, parameters: Parameters) -> bool:
        """Return whether parameters say that rows get their own decisions."""
        return self.rows_if is not None and parameters.flag(self.rows_if[0]) is self.rows_if[1]


REGISTRY: dict[str, Method] = {}

Coefficient = Callable[[Gram, Parameters], Coefficients]
Decide = TypeVar("Decide", bound=Callable[[UnitContext, Parameters], Rounds | Update])


def linear_method(
    name: str,
    *,
    source: str,
    base: BaseUse,
    min_tuned: int,
    max_tuned: int | None = None,
    parameters: tuple[Parameter, ...] = (),
    scopes: tuple[Scope, ...] = ("tensor",),
    products: Products | Literal["vectors"] | None = "changes",
    facts: tuple[str, ...] = (),
    tolerance: Tolerance = Tolerance(),
    rows_if: tuple[str, bool] | None = None,
    columns_if: str | None = None,
    refuses: Callable[[Parameters], str | None] = lambda _: None,
    copies: Callable[[Parameters], bool] | None = None,
    outweighs: Callable[[Parameters], bool] = lambda _: False,
) -> Callable[[Coefficient], Coefficient]:
    """Register a function from a Gram matrix to coefficients as a merge method."""
    if base == "optional":
        parameters = (*parameters, Parameter(FROM_BASE, "flag"))

    def register(function: Coefficient) -> Coefficient:
        REGISTRY[name] = Method(
            name, Linear(function, products), source, base, min_tuned, max_tuned, parameters, scopes, facts, tolerance,
            rows_if, columns_if, refuses, copies, outweighs,
        )  # fmt: skip
        return function

    return register


def elementwise_method(
    name: str,
    *,
    source: str,
    min_tuned: int,
    num_rounds: Callable[[int, Parameters], int] = lambda float_bits, given: 0,
    state_bytes: int = 0,
    temporaries: int = 2,
    kept_bytes: Callable[[Parameters, int, int], int] = lambda given, num_numbers, num_rows: 0,
    whole_rows: bool = False,
    max_tuned: int | None = None,
    parameters: tuple[Parameter, ...] = (),
    scopes: tuple[Scope, ...] = ("tensor",),
    facts: tuple[str, ...] = (),
    refuses: Callable[[Parameters], str | None] = lambda _: None,
) -> Callable[[Decide], Decide]:
    """Register what ends in a function of blocks, after rounds of statistics if it yields some, as a merge method."""

    def register(function: Decide) -> Decide:
        rule = Elementwise(function, num_rounds, state_bytes, temporaries, kept_bytes, whole_rows)
        REGISTRY[name] = Method(
            name, rule, source, "required", min_tuned, max_tuned, parameters, scopes, facts, refuses=refuses
        )
        return function

    return register
