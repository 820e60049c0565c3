"""Two tensors compared by the kernel, against numpy in float64 and integers of any size."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockflow.kernels import comparison
from stockflow.kernels.floats import EXPONENTS, FORMATS, TILE, WIDTHS, slab_of

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
EVERY_NUMBER = 2**16


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    width = tensor.element_size()
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return tensor.contiguous().view(signed).numpy().view(f"u{width}")


def compared(a: torch.Tensor, b: torch.Tensor, dtype_a: str, dtype_b: str) -> tuple[list[float], list[int]]:
    """Return sums and counts of the kernel for two tensors side by side in a slab."""
    parts = [bits_of(each).tobytes() for each in (a, b)]
    first_b = -(-len(parts[0]) // 8) * 8
    slab = np.frombuffer(parts[0].ljust(first_b, b"\xff") + parts[1] + b"\xff" * 8, np.uint8).copy()
    common = dtype_a if dtype_a == dtype_b else "F64" if "F64" in (dtype_a, dtype_b) else "F32"
    width = 8 if common == "F64" else 4
    wide = np.full((2, TILE), np.nan, f"f{width}")
    sums, counts = np.full(comparison.NUM_SUMS, np.nan), np.zeros(comparison.NUM_COUNTS, np.uint64)
    comparison.compare(
        slab_of(slab),
        np.array([0, first_b // WIDTHS[dtype_b]], np.uint64),
        np.array([FORMATS[dtype_a], FORMATS[dtype_b]], np.uint64),
        np.uint64(a.numel()),
        WIDTHS[common] == 2,
        np.uint64(EXPONENTS[common]),
        wide,
        wide.view(f"u{width}"),
        sums,
        counts,
    )
    return sums.tolist(), counts.tolist()


def ordinals(tensor: torch.Tensor) -> list[int]:
    """Return where numbers stand among all numbers of their format: 0.0 and -0.0 at 0, the smallest one at 1."""
    half = 1 << (8 * tensor.element_size() - 1)
    return [int(bits) if bits < half else half - int(bits) for bits in bits_of(tensor)]


def expected(a: torch.Tensor, b: torch.Tensor) -> tuple[list[float], list[int]]:
    """The same, element by element, with exact sums."""
    size = a.numel()
    differs = (bits_of(a) != bits_of(b)).tolist()
    usable = (torch.isfinite(a) & torch.isfinite(b)).tolist()
    apart = [abs(x - y) for x, y in zip(ordinals(a), ordinals(b), strict=True)]
    pairs = list(zip(a.double().tolist(), b.double().tolist(), strict=True))
    changes = [abs(y - x) if ok else 0.0 for (x, y), ok in zip(pairs, usable, strict=True)]
    counted = [steps for steps, ok in zip(apart, usable, strict=True) if ok]
    sums = [
        math.fsum(x * x for (x, _), ok in zip(pairs, usable, strict=True) if ok),
        math.fsum(y * y for (_, y), ok in zip(pairs, usable, strict=True) if ok),
        math.fsum(change * change for change in changes),
        max(changes, default=0.0),
    ]
    counts = [
        sum(differs),
        differs.index(True) if any(differs) else size,
        changes.index(sums[3]) if sums[3] else size,
        max(counted, default=0),
        *(counted.count(steps) for steps in range(3)),
        sum(steps > 2 for steps in counted),
        size - len(counted),
    ]
    return sums, counts


def assert_compared(a: torch.Tensor, b: torch.Tensor, dtype_a: str, dtype_b: str) -> None:
    sums, counts = compared(a, b, dtype_a, dtype_b)
    common = TORCH[dtype_a if dtype_a == dtype_b else "F64" if "F64" in (dtype_a, dtype_b) else "F32"]
    expected_sums, expected_counts = expected(a.to(common), b.to(common))
    assert counts == expected_counts
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-13, atol=0)


@given(
    dtype=st.sampled_from(list(TORCH)),
    size=st.sampled_from([0, 1, 2, 127, 128, 511, 512, 513, 1025, 2000]),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    scale=st.sampled_from([1e-30, 1e-4, 1.0]),
)
@settings(max_examples=40)
def test_near_neighbours_are_compared_exactly(dtype: str, size: int, seed: int, share: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    base = scale * random.standard_normal(size)
    moved = np.where(random.random(size) < share, base * (1 + 0.004 * random.standard_normal(size)), base)
    a, b = (torch.from_numpy(values).to(TORCH[dtype]) for values in (base, moved))

    assert_compared(a, b, dtype, dtype)


@given(dtype=st.sampled_from(list(TORCH)), size=st.integers(1, 1200), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_any_bits_are_compared_exactly(dtype: str, size: int, seed: int) -> None:
    """NaN with any payload, infinities, subnormals, zeros of both signs."""
    random = np.random.default_rng(seed)
    width = WIDTHS[dtype]
    bits = random.integers(0, 256, 2 * size * width, np.uint8)
    a, b = torch.from_numpy(bits).view(TORCH[dtype]).reshape(2, size)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0], dtype=TORCH[dtype])
    for tensor in (a, b):
        places = random.integers(0, size, size // 3)
        tensor[places] = special[random.integers(0, len(special), size // 3)]
    if dtype == "F64":  # squares of numbers beyond 1e154 overflow, as they do in float64
        a, b = (torch.where(tensor.abs() > 1e150, tensor.new_tensor(2.0), tensor) for tensor in (a, b))

    assert_compared(a, b, dtype, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_against_every_tenth_later_one(dtype: str) -> None:
    every = torch.from_numpy(np.arange(EVERY_NUMBER, dtype=np.uint16).view(np.int16)).view(TORCH[dtype])

    assert_compared(every, every.roll(10), dtype, dtype)


@pytest.mark.parametrize("dtype_a", TORCH)
@pytest.mark.parametrize("dtype_b", TORCH)
def test_dtypes_that_differ_are_compared_in_the_one_that_holds_both(dtype_a: str, dtype_b: str) -> None:
    values = torch.from_numpy(np.random.default_rng(3).standard_normal(1300))
    a, b = values.to(TORCH[dtype_a]), values.to(TORCH[dtype_b])
    a[7], b[900] = math.inf, math.nan

    assert_compared(a, b, dtype_a, dtype_b)


def test_zeros_of_both_signs_differ_and_are_no_rounding_apart() -> None:
    a, b = torch.zeros(600, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.bfloat16)
    b[[5, 599]] = -0.0
    b[300] = 1.0

    sums, counts = compared(a, b, "BF16", "BF16")

    assert counts[comparison.DIFFERING] == 3
    assert counts[comparison.FIRST] == 5
    assert counts[comparison.SAME] == 599
    assert sums == [0.0, 1.0, 1.0, 1.0]
