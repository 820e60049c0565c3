"""The sparse family: keep some of each task vector, rescale what is kept, agree on signs, add what is left to the base.

    out = w_0 + lambda * sum_i m_i a_i f_i S_i(d_i) / Z

``S_i`` is the keep step of a method. ``f_i`` is 1, or what ``rescale`` asks for: ``l1`` (which ``true`` means) gives
what is kept the L1 norm of what was there, over the whole unit; 1 where either norm is below 1e-7, as in mergekit.
``m_i`` is 1, or with an election whether ``a_i f_i S_i(d_i)`` has the elected sign, that of the sum over the models: a
sum of zero elects positive, zeros never agree. ``Z`` is 1, or with ``normalize`` the sum of the ``m_i a_i``: element
by element with an election, and 1 where that is 0; without one the sum of all weights, and 1 where that is below 1e-8
in size.

Kernels are imported when they are called, so that planning needs no compiler.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from stockflow.kernels.arrays import Bytes, Counts, Floats
from stockflow.methods import selection
from stockflow.methods.parameters import FACTORS, Parameter, Parameters
from stockflow.methods.protocol import Block, Rounds, Statistic, UnitContext, Update

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

SMALLEST_NORM = 1e-7
SMALLEST_TOTAL = 1e-8
REMEMBERED_BYTES = 2**25
"""Of what is kept of elements, a bit each, between the sweep that adds up norms and the last."""


class Kept(Protocol):
    """A keep step that knows what it keeps."""

    @property
    def shares(self) -> Sequence[float]:
        """Kept elements of each model as a share of all; none where only the draws tell."""

    @property
    def factors(self) -> Sequence[float]:
        """What the kept elements of each model are to be multiplied by, beside ``rescale: l1``."""

    @property
    def is_whole(self) -> Sequence[bool]:
        """Of which models nothing is dropped; they are not rescaled either."""

    def drop(self, block: Block) -> Counts | None:
        """Multiply by zero what is not kept, so that NaN stays NaN; return how many are kept where draws decide."""


Keep = Callable[[UnitContext, Parameters], Generator[Statistic, Any, Kept]]
"""Asks for what it needs to know."""


def parameters(
    *more: Parameter, elect: bool, normalize: bool, rescale: bool, rescales: tuple[str, ...] = ("l1",)
) -> tuple[Parameter, ...]:
    """Return the parameters of the family, with the defaults of one method, and its own."""
    return (
        Parameter("weight", "number", per_model=True, usual=FACTORS, role="amount"),
        Parameter("density", "number", per_model=True, default=1.0, minimum=0.0, maximum=1.0, role="amount"),
        *more,
        Parameter("lambda", "number", default=1.0, usual=FACTORS, role="amount"),
        Parameter("normalize", "flag", default=normalize, role="agreeing sum" if elect else "sum"),
        Parameter("rescale", "flag", default=rescale, choices=rescales),
    )


def num_rounds(keeping: Callable[[int], int] = lambda float_bits: 0) -> Callable[[int, Parameters], int]:
    """Return how many rounds a method takes whose keep step takes so many: one more for the L1 norms."""

    def rounds(float_bits: int, given: Parameters) -> int:
        return keeping(float_bits) + (rescaling(given) == "l1")

    return rounds


def kept_bytes(num_picks: int = 0) -> Callable[[Parameters, int, int], int]:
    """Return what is kept by a method that selects by so many thresholds of each task vector."""

    def kept(given: Parameters, num_numbers: int, num_rows: int) -> int:
        del num_rows
        remembered = min(REMEMBERED_BYTES, num_numbers // 8) if rescaling(given) == "l1" else 0
        return selection.kept_bytes(num_picks * num_numbers) + remembered

    return kept


def rescaling(given: Parameters) -> str | None:
    """Return which rescaling is asked for."""
    asked = given.shared["rescale"]
    return asked if isinstance(asked, str) else "l1" if asked else None


def merged(context: UnitContext, given: Parameters, keep: Keep, *, elect: bool) -> Rounds:
    """Return what a method of the family adds to the base, after the rounds that it takes."""
    kept = yield from keep(context, given)
    factors, shares = list(kept.factors), kept.shares
    if rescaling(given) == "l1" and not all(kept.is_whole):
        kept = Remembered(kept)
        before_N, after_N, kept_N = yield NormSums(kept, context.num_tuned, context.working_bits)
        factors = _restoring(before_N, after_N, kept.is_whole)
        shares = shares or (kept_N / context.num_elems).tolist()
    counted, scale = given.each("weight"), given.number("lambda")
    weights = [weight * factor for weight, factor in zip(counted, factors, strict=True)]
    divisor = _divisor(counted, elect=elect) if given.flag("normalize") else 1.0
    election = Election(weights, weights, counted, elect, divisor, 0.0, scale)

    def change(block: Block) -> "Values":
        kept.drop(block)
        return election.change(block)

    return Update(change, facts=_facts(shares, factors))


def _restoring(before_N: Floats, after_N: Floats, is_whole: Sequence[bool]) -> list[float]:
    return [
        1.0 if whole or before < SMALLEST_NORM or after < SMALLEST_NORM else float(before / after)
        for before, after, whole in zip(before_N, after_N, is_whole, strict=True)
    ]


def _divisor(weights: Sequence[float], *, elect: bool) -> float:
    """Z of all elements, 0 where every element has its own."""
    total = math.fsum(weights)
    return 0.0 if elect else total if abs(total) >= SMALLEST_TOTAL else 1.0


def _facts(shares: Sequence[float], factors: Sequence[float]) -> Mapping[str, float]:
    facts = {f"kept_share_{number}": float(share) for number, share in enumerate(shares, 1)}
    is_rescaled = any(factor != 1.0 for factor in factors)
    return facts | ({f"rescale_{number}": each for number, each in enumerate(factors, 1)} if is_rescaled else {})


@dataclass(frozen=True, slots=True)
class Election:
    """How task vectors are added up: who votes with what, what counts, and what the sum is divided by."""

    ballots: Sequence[float]
    """``v_i``: the elected sign is that of ``sum_i v_i d_i``"""
    weights: Sequence[float]
    """``b_i``: the sum is ``sum_i m_i b_i d_i``"""
    counted: Sequence[float]
    """``a_i``: Z is ``sum_i m_i a_i`` where each element has its own"""
    elect: bool
    """whether only what has the elected sign counts; else all does"""
    divisor: float
    """Z of all elements, 0 where each has its own"""
    least: float
    """of each element's own Z; 0: 1 where that is 0"""
    factor: float
    """of the result"""

    def change(self, block: Block) -> "Values":
        """Return what is to be added to the base."""
        from stockflow.kernels import doubled, elementwise

        deltas_NE = block.deltas_NE
        ballots_N, weights_N, counted_N = (
            np.array(numbers, deltas_NE.dtype) for numbers in (self.ballots, self.weights, self.counted)
        )
        shares = (ballots_N, weights_N, counted_N, self.elect)
        divisor = np.array([self.divisor, self.least], deltas_NE.dtype)
        factor = np.array([self.factor], deltas_NE.dtype)
        if block.lows_NE is None:
            change_E = np.empty_like(block.base_E)
            elementwise.consensus(deltas_NE, *shares, divisor, factor, change_E)
            return change_E
        change_2E = np.empty((2, len(block.base_E)))
        doubled.consensus_exactly(deltas_NE, block.lows_NE, *shares, divisor, factor, change_2E)
        return change_2E


class Remembered:
    """A keep step that finds what it keeps of a block once, as far as that can be remembered."""

    def __init__(self, kept: Kept) -> None:
        """Begin with nothing."""
        self._kept = kept
        self._bits: dict[int, Bytes] = {}
        self._left = REMEMBERED_BYTES

    @property
    def shares(self) -> Sequence[float]:
        """Those of the step."""
        return self._kept.shares

    @property
    def factors(self) -> Sequence[float]:
        """Those of the step."""
        return self._kept.factors

    @property
    def is_whole(self) -> Sequence[bool]:
        """Of the same models."""
        return self._kept.is_whole

    def drop(self, block: Block) -> Counts | None:
        """Drop what the step drops, and remember what is left."""
        from stockflow.kernels.draws import multiply_bits

        known = self._bits.pop(block.start, None)
        if known is not None:
            multiply_bits(block.deltas_NE, known)
            return None
        kept_N = self._kept.drop(block)
        if self._left > 0:
            self._bits[block.start] = np.packbits(block.deltas_NE != 0, axis=1, bitorder="little")
            self._left -= self._bits[block.start].nbytes
        return kept_N


@dataclass(frozen=True)
class NormSums:
    """The L1 norms of the task vectors, those of what is kept of them, and how much draws keep. Shape (3, N)."""

    kept: Kept
    num_tuned: int
    float_bits: Literal[32, 64]

    def zero(self) -> Floats:
        """Return nothing."""
        return np.zeros((3, self.num_tuned))

    def update(self, state: Floats, block: Block) -> Floats:
        """Add up a block."""
        from stockflow.kernels.sums import add_magnitudes

        add_magnitudes(block.deltas_NE, state[0])
        kept_N = self.kept.drop(block)
        add_magnitudes(block.deltas_NE, state[1])
        state[2] += 0 if kept_N is None else kept_N
        return state

    def combine(self, left: Floats, right: Floats) -> Floats:
        """Add sums."""
        return left + right

    def finish(self, state: Floats) -> Floats:
        """Return the sums."""
        return state
