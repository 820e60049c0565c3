"""Noise of codes: the numbers that its facts are made of."""

import numpy as np
import pytest

from stockflow.engine.noise import _median


@pytest.mark.parametrize("count", [1, 2, 3, 4, 263, 264, 4096])
def test_a_median_is_that_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    values[count // 3 :: 3] = 0.0

    assert _median(values) == np.median(values)
