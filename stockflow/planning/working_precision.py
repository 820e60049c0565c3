"""Working precisions: finer than what is written, and wide enough for what is read."""

from collections.abc import Collection, Iterable
from typing import Literal

FloatBits = Literal[32, 64]


def float_bits_of(dtypes: Iterable[str]) -> FloatBits:
    """Return the width that holds all of these dtypes."""
    return 64 if "F64" in dtypes else 32


def working_bits_of(output: str, operands: Collection[str]) -> FloatBits:
    """Return the width of a working precision that is finer than the output.

    Float32 is not finer enough for F16 of F32 operands: of 100,000 results 18 were wrong where models are as far
    apart as from 0. Those of BF16 were 3.
    """
    if output == "F32" or (output == "F16" and "F32" in operands):
        return 64
    return float_bits_of((output, *operands))
