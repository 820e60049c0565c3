"""Selection: the k largest magnitudes of rows of any length, exactly k, in a few rounds of counting.

A magnitude is taken as the integer of its bits and found digit by digit: 2 rounds for a float32, 4 for a float64. Among
equal magnitudes the lower flat index comes first; where more equal the k-th than are wanted, one more round counts them
block by block, so that the update, which sees the same blocks, knows how many to take of each.

Kernels are imported when they are called, so that planning needs no compiler.

Shape suffixes: R rows, P picks, D digits, E elements of a block, B blocks.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from stockflow.kernels.arrays import Counts, Unsigned
from stockflow.methods.protocol import Block, Statistic, UnitContext

if TYPE_CHECKING:
    from stockflow.kernels.arrays import Values

DIGIT_BITS = 16
"""The first digit has one less, as magnitudes have no sign."""
STATE_BYTES = 8 << DIGIT_BITS
"""Of the counts of one pick, at most."""
MEMBERS_BYTES = 2**24
"""Magnitudes with a common prefix are collected once they take so little."""
EVERYTHING = 2**62


def num_rounds(float_bits: int) -> int:
    """Return how many rounds it takes: one for every digit, and one for the equals."""
    return float_bits // DIGIT_BITS + 1


def kept_bytes(num_numbers: int, float_bits: int = 32) -> int:
    """Return what the magnitudes take, at most, that are collected of so many, and a copy."""
    return 2 * min(MEMBERS_BYTES, num_numbers * _member_bytes(float_bits - DIGIT_BITS))


class Pick(NamedTuple):
    """How many of the largest of a row are wanted."""

    row: int
    rank: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is among the largest: every magnitude above ``least``, and the first of those that equal it."""

    least: float
    """NaN if nothing is"""
    num_wanted: int = EVERYTHING
    """of those that equal it"""
    starts_B: Counts | None = None
    """first element of every block; None where all that equal it are wanted"""
    before_B: Counts | None = None
    """how many equal it before that block, and before the end, shape (B + 1)"""

    def quota(self, start: int) -> int:
        """Return how many elements that equal it are wanted of the block from ``start`` on."""
        if self.starts_B is None or self.before_B is None:
            return self.num_wanted
        block = int(np.searchsorted(self.starts_B, start))
        before, behind = self.before_B[block : block + 2].tolist()
        return EVERYTHING if behind <= self.num_wanted else max(self.num_wanted - before, 0)


NOTHING, ALL = Threshold(math.nan), Threshold(0.0)

Rows = Callable[[Block], "Values"]
"""What is ranked of a block, shape (R, E)."""


def task_vectors(block: Block) -> "Values":
    """Return the task vectors of a block, a row each."""
    return block.deltas_NE


class OrderStatistics(NamedTuple):
    """The last of the largest of rows, per pick."""

    least_P: "Values"
    """its magnitude"""
    wanted: Sequence[int]
    """how many of those that equal it are among the largest"""
    equal: Sequence[int]
    """how many equal it"""
    equals: tuple[Counts, Counts] | None
    """where that was seen: first elements of blocks (B), and how many equal it in each (B, P)"""


def order_statistics(
    rows_P: Sequence[int],
    ranks: Sequence[int],
    bits: Literal[32, 64],
    float_bits: Literal[32, 64],
    rows: Rows,
    first_PD: Counts | None = None,
) -> Generator[Statistic, Any, OrderStatistics]:
    """Ask for what tells the ``rank``-th largest magnitude of rows.

    Args:
        rows_P: which row each pick is of.
        ranks: 1 is the largest.
        bits: width of the rows.
        float_bits: width of the blocks they are made of.
        rows: what is ranked.
        first_PD: the counts of the first digits, if they are known, for each distinct row.
    """
    prefixes, left = [0] * len(rows_P), list(ranks)
    equal: list[int] = []
    equals: tuple[Counts, Counts] | None = None
    distinct = tuple(dict.fromkeys(rows_P))
    for shift in reversed(range(0, bits, DIGIT_BITS)):
        is_first = shift + DIGIT_BITS == bits
        if not is_first and sum(equal) * _member_bytes(shift + DIGIT_BITS) <= MEMBERS_BYTES:
            found = yield Members(tuple(rows_P), tuple(prefixes), shift + DIGIT_BITS, float_bits, rows)
            chosen = [found.largest(pick, rank) for pick, rank in enumerate(left)]
            equals = found.starts_B, np.stack([each.equals_B for each in chosen], axis=1)
            left, equal = [each.wanted for each in chosen], [int(each.equals_B.sum()) for each in chosen]
            prefixes = [
                prefix << (shift + DIGIT_BITS) | each.member for prefix, each in zip(prefixes, chosen, strict=True)
            ]
            break
        asked = distinct if is_first else tuple(rows_P)
        known = first_PD if is_first else None
        counts_PD = (
            (yield DigitCounts(asked, tuple(prefixes), shift, bits, float_bits, rows)) if known is None else known
        )
        equal = []
        for number, row in enumerate(rows_P):
            digits = counts_PD[distinct.index(row) if is_first else number]
            at_least = np.cumsum(digits[::-1])[::-1]
            digit = int(np.nonzero(at_least >= left[number])[0][-1])
            equal.append(int(digits[digit]))
            left[number] -= int(at_least[digit]) - equal[-1]
            prefixes[number] = prefixes[number] << DIGIT_BITS | digit
    least_P = np.array(prefixes, np.uint32 if bits == 32 else np.uint64).view(f"f{bits // 8}")
    return OrderStatistics(least_P, left, equal, equals)


def largest(
    context: UnitContext, picks: Sequence[Pick], rows: Rows = task_vectors, first_PD: Counts | None = None
) -> Generator[Statistic, Any, list[Threshold]]:
    """Ask for what tells the ``rank`` largest elements of rows; return a threshold per pick.

    Args:
        context: the unit.
        picks: a rank of 0 or less is for nothing, one of all elements or more for all.
        rows: what is ranked, in the precision that magnitudes are.
        first_PD: the counts of the first digits, if they are known.
    """
    found = [NOTHING if pick.rank <= 0 else ALL for pick in picks]
    searched = [number for number, pick in enumerate(picks) if 0 < pick.rank < context.num_elems]
    if not searched:
        return found
    rows_P, bits = tuple(picks[number].row for number in searched), context.float_bits
    ranks = [picks[number].rank for number in searched]
    least_P, wanted, equal, equals = yield from order_statistics(rows_P, ranks, bits, bits, rows, first_PD)
    thresholds = [Threshold(float(least), rank) for least, rank in zip(least_P, wanted, strict=True)]
    if list(wanted) != list(equal):
        starts_B, equals_BP = equals or (yield EqualCounts(rows_P, least_P, bits, rows))
        before_BP = np.cumsum(np.insert(equals_BP, 0, 0, axis=0), axis=0)
        thresholds = [
            replace(threshold, starts_B=starts_B, before_B=before_BP[:, number])
            for number, threshold in enumerate(thresholds)
        ]
    for number, threshold in zip(searched, thresholds, strict=True):
        found[number] = threshold
    return found


def multiply_largest(rows_RE: "Values", thresholds: Sequence[Threshold], start: int, bits: int, *, by: int) -> None:
    """Multiply the largest of each row of a block by ``by``, 0 or 1, and the others by the other of these.

    Args:
        rows_RE: changed.
        thresholds: what is among the largest, per row.
        start: flat index of the block's first element.
        bits: width that magnitudes were ranked in.
        by: as it says.
    """
    from stockflow.kernels.selection import multiply_largest

    least_R = np.array([threshold.least for threshold in thresholds], f"f{bits // 8}")
    quotas_R = np.array([threshold.quota(start) for threshold in thresholds], np.int64)
    multiply_largest(rows_RE, least_R, quotas_R, np.uint64(by), np.uint64(1 - by))


@dataclass(frozen=True)
class DigitCounts:
    """How often each value of one digit occurs among the magnitudes that begin with a prefix. Shape (P, D)."""

    rows_P: tuple[int, ...]
    prefixes: tuple[int, ...]
    """per pick, the digits above this one"""
    shift: int
    """position of the digit, in bits"""
    bits: int
    """width of the rows"""
    float_bits: Literal[32, 64]
    rows: Rows

    @property
    def _is_first(self) -> bool:
        return self.shift + DIGIT_BITS == self.bits

    def zero(self) -> Any:
        """Return no counts: those of a span fit 32 bits."""
        return np.zeros((len(self.rows_P), 1 << (DIGIT_BITS - self._is_first)), np.uint32)

    def update(self, state: Any, block: Block) -> Any:
        """Count the digits of a block."""
        from stockflow.kernels.selection import count_digits, count_first_digits, patterns

        found, rows_P, shift = patterns(self.rows(block)), np.array(self.rows_P, np.uint64), np.uint64(self.shift)
        if self._is_first:
            count_first_digits(found, rows_P, shift, state)
        else:
            count_digits(found, rows_P, np.array(self.prefixes, np.uint64), shift, np.uint64(DIGIT_BITS), state)
        return state

    def combine(self, left: Any, right: Any) -> Counts:
        """Add counts, which may then need more than 32 bits."""
        total: Counts = left if left.dtype == np.int64 else left.astype(np.int64)
        total += right
        return total

    def finish(self, state: Counts) -> Counts:
        """Return the counts."""
        return state


def first_digits(bits: Literal[32, 64], rows: Rows = task_vectors) -> DigitCounts:
    """Return the statistic of the first digits of one row."""
    return DigitCounts((0,), (), bits - DIGIT_BITS, bits, bits, rows)


@dataclass(frozen=True)
class EqualCounts:
    """How many magnitudes equal the least that is wanted, block by block: starts (B) and counts (B, P)."""

    rows_P: tuple[int, ...]
    least_P: "Values"
    float_bits: Literal[32, 64]
    rows: Rows

    def zero(self) -> Any:
        """Return no blocks."""
        return []

    def update(self, state: Any, block: Block) -> Any:
        """Count a block."""
        from stockflow.kernels.selection import count_equals

        equals_P = np.empty(len(self.rows_P), np.int64)
        count_equals(self.rows(block), np.array(self.rows_P, np.uint64), self.least_P, equals_P)
        return [*state, (block.start, equals_P)]

    def combine(self, left: Any, right: Any) -> Any:
        """Put the blocks of two runs one after the other."""
        left.extend(right)
        return left

    def finish(self, state: Any) -> tuple[Counts, Counts]:
        """Return starts and counts as arrays."""
        starts, equals = zip(*state, strict=True)
        return np.array(starts, np.int64), np.stack(equals)


def _member_bytes(shift: int) -> int:
    return 2 if shift <= 16 else 8


class Chosen(NamedTuple):
    """One of the members of a pick."""

    member: int
    wanted: int
    """how many that equal it are as large as it was asked for"""
    equals_B: Counts
    """how many equal it, block by block"""


class CollectedMembers(NamedTuple):
    """The members of picks, block by block."""

    starts_B: Counts
    members: Sequence[Unsigned]
    """of each block, pick after pick"""
    ends_BP: Counts
    """where in these the members of each pick end"""

    def largest(self, pick: int, rank: int) -> Chosen:
        """Return the ``rank``-th largest member of a pick."""
        begins_B = self.ends_BP[:, pick - 1].tolist() if pick else [0] * len(self.members)
        own = [each[a:b] for each, a, b in zip(self.members, begins_B, self.ends_BP[:, pick].tolist(), strict=True)]
        together = np.concatenate(own)
        place = len(together) - rank
        together.partition(place)
        member, larger = together[place], together[place + 1 :]
        equals_B = np.array([np.count_nonzero(each == member) for each in own], np.int64)
        return Chosen(int(member), rank - int(np.count_nonzero(larger > member)), equals_B)


@dataclass(frozen=True)
class Members:
    """The magnitudes that begin with a prefix, by the bits behind it, block by block; per pick."""

    rows_P: tuple[int, ...]
    prefixes: tuple[int, ...]
    shift: int
    """position of the prefix, in bits"""
    float_bits: Literal[32, 64]
    rows: Rows

    def zero(self) -> Any:
        """Return no blocks."""
        return []

    def update(self, state: Any, block: Block) -> Any:
        """Collect those of a block."""
        from stockflow.kernels.selection import find_members, patterns

        rows_P, prefixes_P = np.array(self.rows_P, np.uint64), np.array(self.prefixes, np.uint64)
        found = np.empty(len(rows_P) * len(block.base_E), f"u{_member_bytes(self.shift)}")
        ends_P = np.empty(len(rows_P), np.int64)
        find_members(patterns(self.rows(block)), rows_P, prefixes_P, np.uint64(self.shift), found, ends_P)
        return [*state, (block.start, found[: ends_P[-1]].copy(), ends_P)]

    def combine(self, left: Any, right: Any) -> Any:
        """Put the blocks of two runs one after the other."""
        left.extend(right)
        return left

    def finish(self, state: Any) -> CollectedMembers:
        """Return all blocks."""
        starts, members, ends = zip(*state, strict=True)
        return CollectedMembers(np.array(starts, np.int64), members, np.stack(ends))


@dataclass(frozen=True, slots=True)
class KeptByRank:
    """What is kept of each task vector by the ranks of its magnitudes, as far as that is known beforehand."""

    shares: Sequence[float]
    bits: Literal[32, 64]

    @property
    def factors(self) -> Sequence[float]:
        """Nothing beside what is asked for."""
        return [1.0] * len(self.shares)

    @property
    def is_whole(self) -> Sequence[bool]:
        """Those of which everything is kept."""
        return [share == 1.0 for share in self.shares]
