"""Cyclic redundancy checks of bytes of any number: the remainder of a reflected polynomial, by a table."""

from collections.abc import Sequence

import numpy as np

from stockflow.kernels.arrays import Bytes, Unsigned
from stockflow.kernels.jit import jit


def remainder(payload: memoryview, table: Sequence[int], value: int) -> int:
    """Return the register after all bytes; ``table`` tells what each byte does to it, ``value`` is where it begins."""
    return int(_remainder(np.frombuffer(payload, np.uint8), np.array(table, np.uint64), np.uint64(value)))


@jit
def _remainder(payload: Bytes, table: Unsigned, value: np.uint64) -> np.uint64:
    for byte in payload:
        value = (value >> np.uint64(8)) ^ table[(value ^ np.uint64(byte)) & np.uint64(0xFF)]
    return value
