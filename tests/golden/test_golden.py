"""Digests of small merges that never change by accident.

A change here changes models people have: bump ``stockflow.planning.plan.NUMERICS`` in the same commit and say why.
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from stockflow.planning.plan import NUMERICS
from tests import runs
from tests.checkpoints import Shape, make_family, write_recipe

SHAPES: dict[str, Shape] = {
    "model.embed_tokens.weight": (130, 257),
    "model.layers.0.experts": (3, 5, 260),
    "model.layers.0.norm.weight": (1023,),
    "model.layers.0.proj.weight": (17, 64),
    "odd.empty": (0, 7),
    "odd.scalar": (),
}


@dataclass(frozen=True)
class Golden:
    """A merge and the sha256 of its one shard."""

    method: str
    sha256: str
    num_tuned: int = 3
    dtype: torch.dtype = torch.bfloat16
    drawn: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of ``make_family``"""
    asked: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of ``write_recipe``"""


F32 = torch.float32
GOLDEN = {
    "model_stock": Golden("model_stock", "2f0431213dae951395e4a2c762a36136e1ec2fd7193137c8e5652504889d5d04"),
    "model_stock, two": Golden("model_stock", "1e5fd1df042bd6b3b35ac030d00e156695d073296ad01adda68f756cfcab6191", 2),
    "model_stock, six": Golden("model_stock", "03d29454918e924450619d4f9115d88e57330089c1e6821e57550496388859b1", 6),
    "model_stock by row": Golden(
        "model_stock",
        "c33fcc554ed31ccf5e62349fc8d31bc4e46e1860ad5b3f81559bed87b46ccc2a",
        asked={"stockflow": {"scope": "row"}},
    ),
    "model_stock by leading index": Golden(
        "model_stock",
        "9a821b06403ee7d993e4cf7f042df0b3a3d9d19fdd79dc503439fdd1505b04fd",
        asked={"stockflow": {"scope": "leading"}},
    ),
    "model_stock in F16": Golden(
        "model_stock", "a5f75866dd526af3da1c997e76d15c07f7d62a7ff5ce736404b53e750b1ebb0e", dtype=torch.float16
    ),
    "model_stock, F32 base, BF16 out": Golden(
        "model_stock",
        "3f66ce59aa7f756965046803c0dac19f92a9d4fd142e3022613c852de98cc782",
        drawn={"base_dtype": F32},
        asked={"out_dtype": "bfloat16"},
    ),
    "model_stock, F64 to BF16": Golden(
        "model_stock",
        "8895d63db44a7226f1283c6b5b1629560384a3fb3247c2c6713d004883bcf4fe",
        dtype=torch.float64,
        asked={"dtype": "bfloat16"},
    ),
    "model_stock, 1e-13": Golden(
        "model_stock",
        "4fe84acaf24c38f9f880b8a95a043a01148c2d60a4c2dcddf3ce467338f8bcb6",
        drawn={"base_scale": 0.0, "delta_scale": 1e-13},
    ),
    "model_stock, extrapolated": Golden(
        "model_stock",
        "2accca4a2400117af9827e913daa474d49b39276936898a8105ddf8e8ab8d74d",
        5,
        drawn={"cosine": -0.15},
        asked={"stockflow": {"on_negative": "extrapolate"}},
    ),
    "linear": Golden(
        "linear",
        "f22638d6d4d0299375c1a93eab85af9d33708e801468751c53e7eb3313917689",
        asked={"per_model": {"weight": [0.31, 0.72, -0.44]}, "with_base": False},
    ),
    "linear in F32, not normalized": Golden(
        "linear",
        "0df78cdc359f22556317bda4beef56aa87d3d9f7310ec7ee4db00ff0728c5fcf",
        dtype=F32,
        asked={"per_model": {"weight": [0.31, 0.72, -0.44]}, "parameters": {"normalize": False}},
    ),
    "task_arithmetic in F32": Golden(
        "task_arithmetic",
        "eaaf2f9f21fd4f37c92ae0e6929cd44ba04e1d97f92d5412b2dc3c2a19e0ae31",
        dtype=F32,
        asked={"per_model": {"weight": [0.31, 0.72, -0.44]}, "parameters": {"lambda": 0.7}},
    ),
    "task_arithmetic in F64": Golden(
        "task_arithmetic",
        "82e5fdd106a98ac385b4e3197fffb23e7618e53ccd9b208d6413a833fd6790a1",
        dtype=torch.float64,
        asked={"per_model": {"weight": [0.31, 0.72, -0.44]}},
    ),
    "slerp": Golden(
        "slerp",
        "4870c2e6ea2fa25310069035894c288c643ab98dafd0289ee086054363fdaac4",
        1,
        drawn={"delta_scale": 0.03},
        asked={"parameters": {"t": 0.37}},
    ),
    "model_stock in F32": Golden(
        "model_stock",
        "46f414ddbda8070de386dedcdf2832f2c3a873e26de2e46f55c0358a520a1274",
        dtype=F32,
    ),
    "model_stock in F64": Golden(
        "model_stock",
        "9eeac12c940e65ce87809d0a51f1e061d27b80fd5013607651f1e6b0e6181fdf",
        dtype=torch.float64,
    ),
    "model_stock, F32 to F16": Golden(
        "model_stock",
        "4764d53765c41977b99b11893c37c53b8b2bde6faeded12ee61519ded5136247",
        dtype=F32,
        asked={"dtype": "float16"},
    ),
    "ties": Golden(
        "ties",
        "69bac2d9ecf5ce8d893d42f97f4e44eea4d85fd1c6cb34dc5b3ae764e350ae4f",
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
    "ties in F32": Golden(
        "ties",
        "f5896dc99d31c223deb7e70b450b144a0d1c3bef729ef85f5b7a155084c000d0",
        dtype=F32,
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
    "ties in F64": Golden(
        "ties",
        "bf84b94e7834f236bbc3b20dfbc036f1c73f67c8b122e6b70bc2db2212e1eeca",
        dtype=torch.float64,
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
}


def merge_one(name: str, folder: Path) -> tuple[str, str]:
    """Merge and return numerics class and digest."""
    golden = GOLDEN[name]
    family = make_family(folder, golden.num_tuned, SHAPES, golden.dtype, **golden.drawn)
    recipe = write_recipe(folder / "recipe.yaml", golden.method, family, **golden.asked)
    runs.merge_here(recipe, folder / "out")
    (receipt,) = runs.receipts(folder / "out")
    return receipt["numerics_class"], receipt["sha256"]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_a_merge_do_not_change(name: str, tmp_path: Path) -> None:
    numerics_class, digest = merge_one(name, tmp_path)

    assert (numerics_class, NUMERICS, digest) == ("cpu", 3, GOLDEN[name].sha256)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of this architecture")
def test_a_processor_without_wide_vectors_and_fused_products_gives_the_same_bytes(tmp_path: Path) -> None:
    """SSE2 alone is the least that an x86-64 processor has; an ARM one shares no instruction with either."""
    names = ["model_stock by row", "model_stock in F32", "slerp", "task_arithmetic in F64", "ties", "ties in F64"]
    script = (
        "import sys; from pathlib import Path; from tests.golden.test_golden import merge_one\n"
        "for name in sys.argv[2:]: print(merge_one(name, Path(sys.argv[1], name))[1])"
    )
    least = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    other = subprocess.run(
        [sys.executable, "-c", script, tmp_path, *names],
        cwd=runs.REPOSITORY, capture_output=True, text=True, env=os.environ | least,
    )  # fmt: skip

    assert other.stderr == ""
    assert other.stdout.split() == [GOLDEN[name].sha256 for name in names]
