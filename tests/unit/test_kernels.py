"""Conversions against torch's, over every 16-bit pattern and every kind of float32; the Gram against math.fsum."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stockflow.kernels import linear
from stockflow.kernels.arrays import Singles
from stockflow.kernels.floats import FORMATS, TILE, first_nonfinite, narrow, slab_of, widen
from stockflow.kernels.turning import turn

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def scratch() -> tuple[npt.NDArray[np.uint32], Singles]:
    bits = np.empty(TILE, np.uint32)
    return bits, bits.view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_widened_exactly(dtype: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(HALVES[dtype]).float().numpy()
    found = np.empty(2**16, np.float32)

    for start in range(0, 2**16, TILE):
        part = found[start : start + TILE]
        widen(slab_of(patterns.view(np.uint8)), np.uint64(start), np.uint64(TILE), FORMATS[dtype], *scratch(), part)

    is_nan = np.isnan(expected)
    assert (np.isnan(found) == is_nan).all()
    assert (found.view(np.uint32) == expected.view(np.uint32))[~is_nan].all()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_kind_of_float32_is_rounded_to_nearest_even(dtype: str) -> None:
    random = np.random.default_rng(1)
    near_halfway = np.arange(2**16, dtype=np.uint32)[:, None] * 2**16 + np.array(
        [0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001]
    )
    patterns = np.concatenate([near_halfway.ravel().astype(np.uint32), random.integers(0, 2**32, 2**20, np.uint32)])
    values = np.resize(patterns, -(-len(patterns) // TILE) * TILE).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(HALVES[dtype])
    found = np.empty(len(values), np.uint16)
    finite = []

    for start in range(0, len(values), TILE):
        part = values[start : start + TILE]
        finite.append(narrow(part, np.uint64(TILE), FORMATS[dtype], *scratch(), found, np.uint64(start)))

    is_nan = np.isnan(values)
    assert (found == expected.view(torch.int16).numpy().view(np.uint16))[~is_nan].all()
    assert torch.from_numpy(found.view(np.int16)).view(HALVES[dtype]).isnan().numpy()[is_nan].all()
    assert finite == torch.isfinite(expected).view(-1, TILE).all(dim=1).tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_float64_is_rounded_once(dtype: str) -> None:
    """Through float32 a number just above halfway would become halfway, and then even."""
    halfway = 1.0 + 2.0 ** (-8 if dtype == "BF16" else -11)
    values = np.array([halfway, math.nextafter(halfway, 2), math.nextafter(halfway, 1), -math.nextafter(halfway, 2)])
    found = np.empty(4, np.uint16)

    narrow(values, np.uint64(4), FORMATS[dtype], *scratch(), found, np.uint64(0))

    step = 2.0 ** (-7 if dtype == "BF16" else -10)
    rounded = torch.from_numpy(found.view(np.int16)).view(HALVES[dtype]).double().tolist()
    assert rounded == [1.0, 1.0 + step, 1.0, -1.0 - step]


@pytest.mark.parametrize("is_rounded", [True, False], ids=["task vectors in float32", "in float64"])
@pytest.mark.parametrize("products", ["crossed", "changes", "sources"])
@pytest.mark.parametrize("group_elems", [1, 5, 255, 256, 257, TILE + 1, 5000])
def test_the_gram_is_that_of_exact_sums(group_elems: int, products: str, is_rounded: bool) -> None:
    num_groups, num_sources = 3, 4
    sources = np.random.default_rng(2).standard_normal((num_sources, num_groups * group_elems)).astype(np.float32)
    found = np.empty((num_groups, num_sources, num_sources))

    linear.gram(
        slab_of(sources.ravel().view(np.uint8)),
        np.arange(num_sources, dtype=np.uint64) * np.uint64(sources.shape[1]),
        np.full(num_sources, FORMATS["F32"], np.uint64),
        np.empty(TILE, np.float32),
        np.uint64(group_elems),
        products != "changes",
        is_rounded,
        products != "sources",
        found,
    )

    exact = sources if is_rounded else sources.astype(np.float64)
    rest = exact[1:] if products == "sources" else exact[1:] - exact[:1]
    rows = np.concatenate([exact[:1], rest]).astype(np.float64)
    for group, gram in enumerate(found):
        part = rows[:, group * group_elems : (group + 1) * group_elems]
        for i in range(num_sources):
            for j in range(num_sources):
                if products == "changes" and (i == 0) != (j == 0):
                    assert gram[i, j] == 0.0
                    continue
                scale = math.sqrt(math.fsum(part[i] ** 2) * math.fsum(part[j] ** 2))
                assert gram[i, j] == pytest.approx(math.fsum(part[i] * part[j]), abs=1e-15 * scale)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_first_nonfinite_element_is_found(dtype: str) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    values = torch.ones(9, dtype=kinds[dtype])
    assert first_nonfinite(values.view(torch.uint8).numpy(), dtype) is None

    values[5], values[7] = -math.inf, math.nan

    assert first_nonfinite(values.view(torch.uint8).numpy(), dtype) == 5


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 32), (33, 31)])
def test_matrices_are_turned_into_rows_and_back(shape: tuple[int, int], dtype: str) -> None:
    stored = np.random.default_rng(0).integers(0, 2**16, (shape[1], 3 * shape[0])).astype(dtype)
    rows, back = np.zeros(shape, dtype), stored.copy()

    turn(stored[:, 1::3], rows)
    back[:, 1::3] = 0
    turn(rows, back[:, 1::3])

    assert np.array_equal(rows, stored[:, 1::3].T)
    assert np.array_equal(back, stored)
