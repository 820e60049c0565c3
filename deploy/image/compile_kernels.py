"""Compile every kernel once, by merging tiny checkpoints with every method in every precision.

Run while an image is built, or once on a machine before work begins: machine code goes to ``NUMBA_CACHE_DIR`` and no
worker compiles for itself.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file

from stockflow.cli import app

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
METHODS: dict[str, dict[str, object]] = {
    "model_stock": {},
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.5},
    "arcee_fusion": {},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "geometric_median": {},
    "passthrough": {"scale": 0.5},
}
OF_ONE = ("slerp", "nearswap", "arcee_fusion", "passthrough")
WITHOUT_BASE = ("linear", "karcher", "passthrough")


def main() -> None:
    """Merge everything with everything and say how often."""
    with tempfile.TemporaryDirectory() as folder:
        recipes = list(write_recipes(Path(folder)))
        for recipe in recipes:
            app(
                ["merge", str(recipe), str(recipe.with_suffix("")), "--device", "cpu", "--quiet"], standalone_mode=False
            )
    print(f"kernels compiled: {len(recipes)} merges")


def write_recipes(folder: Path) -> Iterator[Path]:
    """Write checkpoints of two tensors and yield a recipe per method and precision."""
    random = np.random.default_rng(0)
    for name, dtype in DTYPES.items():
        for model in ("base", "tuned-1", "tuned-2"):
            tensors = {
                "model.norm.weight": random.standard_normal(7).astype(dtype),
                "model.up_proj.weight": random.standard_normal((33, 65)).astype(dtype),
            }
            path = folder / f"{model}-{name}" / "model.safetensors"
            path.parent.mkdir()
            save_file(tensors, path, metadata={"format": "pt"})
            (path.parent / "config.json").write_text("{}")
    for (method, parameters), source, target in itertools.product(METHODS.items(), DTYPES, DTYPES):
        numbers = (1,) if method in OF_ONE else (1, 2)
        recipe: dict[str, object] = {
            "merge_method": method,
            "models": [{"model": str(folder / f"tuned-{number}-{source}")} for number in numbers],
            "parameters": parameters,
            "dtype": target,
        }
        if method not in WITHOUT_BASE:
            recipe["base_model"] = str(folder / f"base-{source}")
        path = folder / f"{method}-{source}-{target}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        yield path


if __name__ == "__main__":
    main()
