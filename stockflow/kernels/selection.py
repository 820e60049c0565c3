"""Which elements of a row are its k largest by magnitude: digits counted, equals counted, the others dropped.

Magnitudes are ranked as the integers of their bits, which sort alike: NaN is above infinity.

Shape suffixes: R rows, E elements of a block, P picks (a row, and how many of it are wanted), D digits.
"""

import numpy as np

from stockflow.kernels.arrays import Bits, Counts, Patterns, Unsigned, Values
from stockflow.kernels.floats import TILE, Index
from stockflow.kernels.jit import jit

RUN = 64
"""Elements that are looked at together, of which mostly none begins with a prefix."""


def patterns(values: Values) -> Patterns:
    """Return the bits of floats as integers; without its sign bit a pattern sorts like the magnitude."""
    return values.view(np.uint32 if values.itemsize == 4 else np.uint64)


@jit
def count_first_digits(patterns_RE: Patterns, rows_P: Unsigned, shift: Index, counts_PD: Bits) -> None:
    """Count how often each digit occurs that magnitudes begin with.

    Args:
        patterns_RE: the bits of the rows.
        rows_P: which row each pick is of.
        shift: position of the digit, in bits.
        counts_PD: the counts so far; grows.
    """
    sign = np.uint64(8 * patterns_RE.itemsize - 1)
    magnitude = patterns_RE.dtype.type((np.uint64(1) << sign) - np.uint64(1))
    for p in range(len(rows_P)):
        row, counts = patterns_RE[rows_P[p]], counts_PD[p]
        for k in range(np.uint64(len(row))):
            counts[np.uint64(row[k] & magnitude) >> shift] += np.uint32(1)


@jit
def count_digits(
    patterns_RE: Patterns, rows_P: Unsigned, prefixes_P: Unsigned, shift: Index, digit_bits: Index, counts_PD: Bits
) -> None:
    """Count how often each digit occurs among the magnitudes that begin with a prefix.

    Args:
        patterns_RE: the bits of the rows.
        rows_P: which row each pick is of.
        prefixes_P: per pick, the digits above the one counted.
        shift: position of the digit, in bits.
        digit_bits: its width.
        counts_PD: the counts so far; grows.
    """
    sign = np.uint64(8 * patterns_RE.itemsize - 1)
    magnitude = patterns_RE.dtype.type((np.uint64(1) << sign) - np.uint64(1))
    digit_mask = (np.uint64(1) << digit_bits) - np.uint64(1)
    num_elems = np.uint64(patterns_RE.shape[1])
    for p in range(len(rows_P)):
        row, counts, prefix = patterns_RE[rows_P[p]], counts_PD[p], prefixes_P[p]
        least = patterns_RE.dtype.type(prefix << (shift + digit_bits))
        above = patterns_RE.dtype.type(digit_mask << shift | ((np.uint64(1) << shift) - np.uint64(1)))
        for start in range(np.uint64(0), num_elems, np.uint64(RUN)):
            stop = min(start + np.uint64(RUN), num_elems)
            num_found = np.uint32(0)
            for k in range(start, stop):
                num_found += np.uint32((row[k] & magnitude) - least <= above)
            if num_found:
                for k in range(start, stop):
                    digits = np.uint64(row[k] & magnitude) >> shift
                    if digits >> digit_bits == prefix:
                        counts[digits & digit_mask] += np.uint32(1)


@jit
def find_members(
    patterns_RE: Patterns, rows_P: Unsigned, prefixes_P: Unsigned, shift: Index, members: Unsigned, ends_P: Counts
) -> None:
    """Collect the magnitudes that begin with a prefix, in their order, by the bits behind it.

    Args:
        patterns_RE: the bits of the rows.
        rows_P: which row each pick is of.
        prefixes_P: per pick.
        shift: position of the prefix, in bits.
        members: receives them pick after pick, has room for all.
        ends_P: receives where those of each pick end.
    """
    sign = np.uint64(8 * patterns_RE.itemsize - 1)
    magnitude = patterns_RE.dtype.type((np.uint64(1) << sign) - np.uint64(1))
    above = patterns_RE.dtype.type((np.uint64(1) << shift) - np.uint64(1))
    num_elems, num_found = np.uint64(patterns_RE.shape[1]), np.uint64(0)
    marks = np.empty(TILE, np.uint8)
    eights = marks.view(np.uint64)
    for p in range(len(rows_P)):
        row, least = patterns_RE[rows_P[p]], patterns_RE.dtype.type(prefixes_P[p] << shift)
        for start in range(np.uint64(0), num_elems, np.uint64(TILE)):
            count = min(np.uint64(TILE), num_elems - start)
            marks[count:] = 0
            for k in range(count):
                marks[k] = np.uint8((row[start + k] & magnitude) - least <= above)
            for first in range(np.uint64(0), count, np.uint64(8)):
                if eights[first >> np.uint64(3)]:
                    for k in range(first, min(first + np.uint64(8), count)):
                        members[num_found] = (row[start + k] & magnitude) - least
                        num_found += np.uint64(marks[k])
        ends_P[p] = num_found


@jit
def count_equals(rows_RE: Values, rows_P: Unsigned, least_P: Values, equals_P: Counts) -> None:
    """Count the magnitudes that are ``least``, rounded to the precision of that."""
    for p in range(len(rows_P)):
        row, least = rows_RE[rows_P[p]], least_P[p]
        num_equal = np.uint32(0)
        for k in range(np.uint64(len(row))):
            num_equal += np.uint32(least_P.dtype.type(abs(row[k])) == least)
        equals_P[p] = num_equal


@jit
def multiply_largest(rows_RE: Values, least_R: Values, quotas_R: Counts, largest: Index, others: Index) -> None:
    """Multiply the largest of each row by one number and the others by another; times zero, NaN stays NaN.

    Args:
        rows_RE: the rows; changed.
        least_R: the least magnitude that is among the largest, NaN if none is; magnitudes are rounded to its precision.
        quotas_R: how many that equal it are among them, the first ones.
        largest: 0 or 1.
        others: 0 or 1.
    """
    inside, outside = rows_RE.dtype.type(largest), rows_RE.dtype.type(others)
    num_elems = np.uint64(rows_RE.shape[1])
    for r in range(len(rows_RE)):
        row, least, quota = rows_RE[r], least_R[r], quotas_R[r]
        if quota >= num_elems:
            if least != 0 or largest != 1:
                for k in range(num_elems):
                    row[k] *= inside if least_R.dtype.type(abs(row[k])) >= least else outside
        elif quota == 0:
            for k in range(num_elems):
                row[k] *= inside if least_R.dtype.type(abs(row[k])) > least else outside
        else:
            for k in range(num_elems):
                size = least_R.dtype.type(abs(row[k]))
                is_equal = size == least and quota > 0
                quota -= is_equal
                row[k] *= inside if size > least or is_equal else outside
