"""Arrays by what their elements are: the words that kernels, methods and the engine share."""

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]
Bits = npt.NDArray[np.uint32]
Unsigned = npt.NDArray[np.uint64]
Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Values = npt.NDArray[Any]
"""float32 or float64: the working precision"""
Patterns = npt.NDArray[Any]
"""uint16, uint32 or uint64: the bits of numbers"""
