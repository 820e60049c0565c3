"""What the CUDA path computes, held against the kernels bit for bit; its copies and streams need a device."""

import numpy as np
import pytest
import torch

from stockflow.engine import cuda
from stockflow.kernels import doubled, linear
from stockflow.kernels.floats import FORMATS, results_in, slab_of

NUM_ELEMS, NUM_SOURCES, NUM_GROUPS = 3000, 4, 3


@pytest.mark.parametrize("shared", [True, False], ids=["one weight", "a weight each"])
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "plain"])
@pytest.mark.parametrize("out", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_coefficients_give_the_bytes_of_the_kernels(
    dtype: torch.dtype, out: str, anchored: bool, shared: bool
) -> None:
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(NUM_SOURCES, NUM_ELEMS, dtype=dtype, generator=random)
    rows[1:, :7] = rows[0, :7] = torch.tensor([0.0, -0.0, 1e-40, -1e-30, 65519.0, 3e4, -2e-8])
    rows = rows if out not in ("F32", "F64") else rows.double()  # the working precision of these
    dtype = rows.dtype
    weights = np.random.default_rng(6).standard_normal((NUM_GROUPS, NUM_SOURCES - anchored))
    if shared:
        weights[:] = weights[:, :1]
    slab = slab_of(rows.flatten().numpy().view(np.uint8))
    expected = np.empty(NUM_ELEMS * cuda.DTYPES[out].itemsize, np.uint8)
    sources = (
        slab,
        np.arange(NUM_SOURCES, dtype=np.uint64) * np.uint64(NUM_ELEMS),
        np.full(NUM_SOURCES, FORMATS["F32" if dtype == torch.float32 else "F64"], np.uint64),
        np.uint64(NUM_ELEMS // NUM_GROUPS),
        weights.astype(rows.numpy().dtype),
    )
    results = results_in(expected, out)
    if out == "F64":
        doubled.combine(*sources, anchored, results)
        total = cuda.doubled_sum(rows.clone(), weights, anchored=anchored)
    else:
        (linear.combine_anchored if anchored else linear.combine_plain)(*sources, results, FORMATS[out])
        total = (cuda.anchored_sum if anchored else cuda.weighted_sum)(rows.clone(), weights)

    found = cuda.rounded(total, cuda.DTYPES[out]).view(torch.uint8).numpy()
    assert (expected == found).all()
