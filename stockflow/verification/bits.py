"""How two runs of elements differ, given as bytes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stockflow.checkpoints.files.header import DTYPES

_BITS: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_WIDE = {"F32": np.float32, "F64": np.float64}
CLOSE_TO_LARGEST = 1e-6
"""What coefficients that differ by 1e-7 can change in a sum of terms up to ten times its largest element."""


@dataclass
class Difference:
    """How the elements of one tensor differ from what they should be."""

    num_elems: int = 0
    """that differ"""
    first: int = -1
    """flat index of the first one"""
    is_close: bool = True
    """whether all of them are neighbouring numbers, or for F32 and F64 within 1e-6 of the largest beside them"""

    def add(self, dtype: str, start: int, expected: memoryview, found: memoryview) -> None:
        """Compare whole elements.

        Args:
            dtype: of the elements; those below a byte are compared as bytes.
            start: flat index of the first of them.
            expected: the bytes that should be.
            found: the bytes that are.
        """
        kind = _BITS[max(DTYPES[dtype].bits, 8)]
        left, right = np.frombuffer(expected, kind), np.frombuffer(found, kind)
        differs = left != right
        if not differs.any():
            return
        if self.first < 0:
            self.first = start + int(differs.argmax())
        self.num_elems += int(np.count_nonzero(differs))
        self.is_close = self.is_close and DTYPES[dtype].kind == "float" and _are_close(dtype, left, right)


Bits = npt.NDArray[np.unsignedinteger]


def _are_close(dtype: str, left: Bits, right: Bits) -> bool:
    """Whether all numbers are the same, neighbours, or (in wide dtypes) close beside the largest of them."""
    ordered = _ordered(left), _ordered(right)
    apart = np.maximum(*ordered) - np.minimum(*ordered)
    if apart.max() <= 1:
        return True
    if dtype not in _WIDE:
        return False
    values = [bits.view(_WIDE[dtype]).astype(np.float64) for bits in (left, right)]
    with np.errstate(all="ignore"):
        close = np.abs(values[0] - values[1]) <= CLOSE_TO_LARGEST * np.abs(values[0]).max()
    return bool(((apart <= 1) | close).all())


def _ordered(bits: Bits) -> Bits:
    """Return integers that are ordered as the floating-point numbers with these bits."""
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)
