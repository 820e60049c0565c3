"""Codes become what their definition says, wherever a run begins and ends: in a row, a block, a byte, a tile."""

import numpy as np
import pytest

from stockflow.kernels import codecs

COLUMNS, ROWS = 1111, 9
"""rows of an odd length, longer than two tiles"""
RUNS = [(0, ROWS * COLUMNS), (1, 2), (511, 1025), (COLUMNS - 1, COLUMNS + 1), (3 * COLUMNS + 77, 7 * COLUMNS + 600)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def minifloat(code: int, fraction_bits: int, bias: int) -> float:
    exponent, fraction = (code & 127) >> fraction_bits, (code & (2**fraction_bits - 1)) / 2**fraction_bits
    size = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return -size if code & 128 else size


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("block", [(128, 128), (2, 100), (4, 2000)])
@pytest.mark.parametrize(("dtype", "fraction_bits", "bias"), [("F8_E4M3", 3, 7), ("F8_E5M2", 2, 15)])
def test_codes_of_a_byte_are_scaled_block_by_block(
    dtype: str, fraction_bits: int, bias: int, block: tuple[int, int], run: tuple[int, int]
) -> None:
    random, (start, stop) = np.random.default_rng(7), run
    codes = random.integers(0, 256, (ROWS, COLUMNS)).astype(np.uint8)
    codes[(codes & 127) >= 120] = 8  # what is no number is another test's
    scales = random.uniform(0.1, 3.0, (-(-ROWS // block[0]), -(-COLUMNS // block[1]))).astype(np.float32)
    numbers = np.array([minifloat(code, fraction_bits, bias) for code in range(256)])[codes]
    of_each = scales.repeat(block[0], 0)[:ROWS].repeat(block[1], 1)[:, :COLUMNS]
    expected = (numbers * of_each.astype(np.float64)).astype(np.float32).reshape(-1)[start:stop]

    found = np.empty(stop - start, np.float32)
    first, last = start // COLUMNS // block[0], (stop - 1) // COLUMNS // block[0] + 1
    sizes = [tuple(map(np.uint64, pair)) for pair in ((ROWS, COLUMNS), block)]
    table = codecs.numbers_of_codes(dtype, "f")
    codecs.scale_blocks(
        codes.reshape(-1), np.uint64(start), table, scales[first:last], np.uint64(start), sizes[0], sizes[1], found
    )

    assert np.array_equal(expected.view(np.uint32), found.view(np.uint32))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("group", [32, 7])
@pytest.mark.parametrize("codes_of", ["I4", "F4"])
def test_codes_of_half_a_byte_are_scaled_group_by_group(codes_of: str, group: int, run: tuple[int, int]) -> None:
    random, (start, stop) = np.random.default_rng(8), run
    packed = random.integers(0, 256, (ROWS, -(-COLUMNS // 2) + 2)).astype(np.uint8)
    scales = random.uniform(0.1, 3.0, (ROWS, -(-COLUMNS // group))).astype(np.float32)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(ROWS, -1)[:, :COLUMNS]
    table = np.arange(-8.0, 8.0) if codes_of == "I4" else np.array(E2M1 + [-each for each in E2M1])
    of_each = scales.repeat(group, 1)[:, :COLUMNS]
    expected = (table[halves] * of_each.astype(np.float64)).astype(np.float32).reshape(-1)[start:stop]

    found = np.empty(stop - start, np.float32)
    (row, column), per_row = divmod(start, COLUMNS), scales.shape[1]
    codecs.scale_groups(
        packed.reshape(-1), np.uint64(row * packed.shape[1] + column // 2), codecs.numbers_of_nibbles(codes_of, "f"),
        scales.reshape(-1)[row * per_row + column // group :], np.uint64(start), np.uint64(COLUMNS),
        np.uint64(packed.shape[1]), np.uint64(group), found,
    )  # fmt: skip

    assert np.array_equal(expected.view(np.uint32), found.view(np.uint32))
