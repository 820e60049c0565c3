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
    "model_stock": Golden("model_stock", "9a821b06403ee7d993e4cf7f042df0b3a3d9d19fdd79dc503439fdd1505b04fd"),
    "model_stock, two": Golden("model_stock", "38533add52bc7a03b6b3927d9e23999cd822bf40ccc8cbef83f6fd600b1c7b67", 2),
    "model_stock, six": Golden("model_stock", "084707a179a7850131129b0cc5a8373413b16173e4b043ae15c4e275483542e8", 6),
    "model_stock by tensor": Golden(
        "model_stock",
        "2f0431213dae951395e4a2c762a36136e1ec2fd7193137c8e5652504889d5d04",
        asked={"stockflow": {"scope": "tensor"}},
    ),
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
        "model_stock", "6dee03d268bff489c5666e4016bb517a19bfcd3ebd81a874613d78e6241602a5", dtype=torch.float16
    ),
    "model_stock, F32 base, BF16 out": Golden(
        "model_stock",
        "b6675c046ce0289e31cc572784d9d6d523c87c7f45f67f618c9331a968c52548",
        drawn={"base_dtype": F32},
        asked={"out_dtype": "bfloat16"},
    ),
    "model_stock, F64 to BF16": Golden(
        "model_stock",
        "75c47b63f881a643bb0cdc2540b650f297e186af3d8ae4975c65f4dcd36496b6",
        dtype=torch.float64,
        asked={"dtype": "bfloat16"},
    ),
    "model_stock, 1e-13": Golden(
        "model_stock",
        "9665d5f1a34e4816841934b5986e3624fef1f40f0de3175c4eee4295f212d248",
        drawn={"base_scale": 0.0, "delta_scale": 1e-13},
    ),
    "model_stock, extrapolated": Golden(
        "model_stock",
        "07a45daadc7419f8fbd2cc0492334bfc4714d85bdc2dec2aaa456e385f2646e6",
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
        "fa41397643601fa34c7b41aa833bd8d3cc70bcfd5a0a089430a4a61cebb0c422",
        dtype=F32,
    ),
    "model_stock in F64": Golden(
        "model_stock",
        "278df0892cfc7fd5b029298bccea5d2bcffded29872a78a62446f59a3356b3e4",
        dtype=torch.float64,
    ),
    "model_stock, F32 to F16": Golden(
        "model_stock",
        "37c28ed0627a0fc01fa63e72b089734b824269280b52b66a1009a78461759195",
        dtype=F32,
        asked={"dtype": "float16"},
    ),
    "ties": Golden(
        "ties",
        "c32aea4b0d66a2bde227c30caf378bf36154e728e7abf90abe8317c8d3e1599d",
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
    "ties in F32": Golden(
        "ties",
        "a1d87c93cddb0b3c825f1afaa424863d20714c6e9c986974478a711bbcbc82b3",
        dtype=F32,
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
    "ties by tensor": Golden(
        "ties",
        "3c9794cee46bb5b3c84702303317b987b406a40f4c1f5aac3efdef26c54c7aa9",
        asked={
            "per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]},
            "stockflow": {"scope": "tensor"},
        },
    ),
    "ties in F64": Golden(
        "ties",
        "518d98170537265cf663f599085c5646d3e6967539137fcb971ac642428a0282",
        dtype=torch.float64,
        asked={"per_model": {"weight": [0.31, 0.72, 0.44], "density": [0.3, 1.0, 0.7]}},
    ),
    "breadcrumbs": Golden(
        "breadcrumbs",
        "b2655425efd9a8f5e95ac35e3d8ed5b895b2f48961effc83351c168b4a92954e",
        asked={
            "per_model": {"weight": [0.31, 0.72, 0.44]},
            "parameters": {"density": 0.4, "gamma": 0.05, "rescale": True},
        },
    ),
    "dare_ties": Golden(
        "dare_ties",
        "f0430aa4976c5b5e5c626a18965bd13e643f1a301a3fceb091f060e7a24dacfc",
        asked={"per_model": {"weight": [0.31, 0.72, 0.44]}, "parameters": {"density": 0.4}},
    ),
    "della": Golden(
        "della",
        "a6ae9360c44df636981a2ae81bd76ff3fe091b463b96f3750894aaab3c96db37",
        asked={"per_model": {"weight": [0.31, 0.72, 0.44]}, "parameters": {"density": 0.4}},
    ),
    "sce": Golden(
        "sce",
        "a9557dfe116a374d5b952b3cb3180f200bc1bf5b93fb9c9e560caa3c0935ad49",
        asked={"parameters": {"select_topk": 0.4}},
    ),
    "ramplus_tl": Golden(
        "ramplus_tl",
        "e448a98e59ac8d9511b106f49c8a102227453b3201c1da594a6c17ec03167e9e",
        asked={"parameters": {"epsilon": 0.001}},
    ),
    "nearswap": Golden(
        "nearswap",
        "e56fd80a477d3ea78fd0d2055827d930630be34f2c57ac8bc7f4a7c7419c1937",
        1,
        asked={"parameters": {"t": 0.0007}},
    ),
    "arcee_fusion": Golden("arcee_fusion", "eae1fc5fd919e17d6fab410d9abf0fed97dbe47bb47131c8b0759269d4694d72", 1),
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

    assert (numerics_class, NUMERICS, digest) == ("cpu", 6, GOLDEN[name].sha256)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of this architecture")
def test_a_processor_without_wide_vectors_and_fused_products_gives_the_same_bytes(tmp_path: Path) -> None:
    """SSE2 alone is the least that an x86-64 processor has; an ARM one shares no instruction with either."""
    names = ["model_stock by row", "model_stock in F32", "slerp", "task_arithmetic in F64", "ties", "ties in F64"]
    names += ["breadcrumbs", "dare_ties", "della", "sce", "ramplus_tl", "nearswap", "arcee_fusion"]
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
