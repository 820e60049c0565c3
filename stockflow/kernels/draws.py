"""Random words from a counter: Philox 4x32 with ten rounds, so that any element is drawn for by itself.

The words of a key are a sequence in which element k has word k: word ``k % 4`` of the counter ``k // 4``. Nothing else
enters, so draws depend neither on how elements are cut into blocks nor on what was drawn before.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

Shape suffixes: N task vectors, E elements of a block of elements, T words of a tile.
"""

import numpy as np

from stockflow.kernels.arrays import Bits, Bytes, Counts, Unsigned, Values
from stockflow.kernels.floats import TILE, Index
from stockflow.kernels.jit import jit

_LOW = np.uint64(0xFFFF_FFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57)
_STEPS = np.uint64(0x9E37_79B9), np.uint64(0xBB67_AE85)
_ROUNDS = 10
_WIDTH = np.uint64(4)

Words = tuple[Index, Index, Index, Index]


@jit
def philox(c0: Index, c1: Index, c2: Index, c3: Index, k0: Index, k1: Index) -> Words:
    """Return the four words of a counter of four words under a key of two, all in 64 bits of which 32 are used."""
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return c0, c1, c2, c3


@jit
def fill_words(words_T: Bits, counter: Index, key: Unsigned) -> None:
    """Fill memory for a multiple of four words with those from a counter on."""
    nothing, k0, k1 = np.uint64(0), key[0], key[1]
    for b in range(np.uint64(len(words_T) // 4)):
        number, first = counter + b, b * _WIDTH
        w0, w1, w2, w3 = philox(number & _LOW, number >> _HALF, nothing, nothing, k0, k1)
        words_T[first] = w0
        words_T[first + np.uint64(1)] = w1
        words_T[first + np.uint64(2)] = w2
        words_T[first + np.uint64(3)] = w3


@jit
def keep_drawn(deltas_NE: Values, start: Index, keys_N2: Unsigned, limits_N: Counts, kept_N: Counts) -> None:
    """Multiply by zero what is not drawn, so that NaN stays NaN.

    Args:
        deltas_NE: the task vectors; changed.
        start: number of the first element, by which it is drawn for.
        keys_N2: key of each model.
        limits_N: greatest word for which an element is kept; negative for none, 2**32 or more for all without drawing.
        kept_N: counts of kept elements so far; grows.
    """
    zero, one = deltas_NE.dtype.type(0.0), deltas_NE.dtype.type(1.0)
    num_elems, skipped = np.uint64(deltas_NE.shape[1]), start % _WIDTH
    words_T = np.empty(TILE, np.uint32)
    for n in range(len(deltas_NE)):
        delta, limit = deltas_NE[n], np.uint32(limits_N[n])
        if limits_N[n] >= 2**32:
            kept_N[n] += num_elems
            continue
        if limits_N[n] < 0:
            for k in range(num_elems):
                delta[k] *= zero
            continue
        done = np.uint64(0)
        while done < num_elems:
            fill_words(words_T, (start + done) // _WIDTH, keys_N2[n])
            shift = skipped if done == 0 else np.uint64(0)
            count = min(np.uint64(TILE) - shift, num_elems - done)
            num_kept = np.uint32(0)
            for k in range(count):
                is_kept = words_T[k + shift] <= limit
                num_kept += np.uint32(is_kept)
                delta[done + k] *= one if is_kept else zero
            kept_N[n] += num_kept
            done += count


@jit
def multiply_bits(rows_RE: Values, bits_RB: Bytes) -> None:
    """Multiply by zero where a bit is not set, so that NaN stays NaN: bit ``k % 8`` of byte ``k // 8`` of a row."""
    zero, one = rows_RE.dtype.type(0.0), rows_RE.dtype.type(1.0)
    masks = np.uint8(1) << np.arange(8).astype(np.uint8)
    num_whole = np.uint64(rows_RE.shape[1] // 8)
    for r in range(len(rows_RE)):
        row, bits = rows_RE[r], bits_RB[r]
        for b in range(num_whole):
            eight, first = bits[b], np.uint64(8) * b
            for n in range(np.uint64(8)):
                row[first + n] *= one if eight & masks[n] else zero
        for k in range(np.uint64(8) * num_whole, np.uint64(len(row))):
            row[k] *= one if bits[num_whole] & masks[k % np.uint64(8)] else zero
