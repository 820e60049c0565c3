"""Turning: matrices that are stored column by column into rows, and back, as patterns of bits."""

import numpy as np

from stockflow.kernels.arrays import Patterns
from stockflow.kernels.jit import jit

EDGE = 32
"""Of the square that is turned at a time: its rows are whole lines of a cache, and all of it is in the first one."""


@jit
def turn(stored_JI: Patterns, out_IJ: Patterns) -> None:
    """Fill ``out_IJ`` with the rows of what is stored column by column; either may be a part of something wider."""
    num_rows, num_columns = out_IJ.shape
    square = np.empty((EDGE, EDGE), out_IJ.dtype)
    for row in range(0, num_rows, EDGE):
        rows = min(EDGE, num_rows - row)
        for column in range(0, num_columns, EDGE):
            columns = min(EDGE, num_columns - column)
            for j in range(columns):
                for i in range(rows):
                    square[j, i] = stored_JI[column + j, row + i]
            for i in range(rows):
                for j in range(columns):
                    out_IJ[row + i, column + j] = square[j, i]
