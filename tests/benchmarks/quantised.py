"""What merging and writing codes costs beside plain numbers: CPU seconds per element, interleaved in one process.

    python -m tests.benchmarks.quantised [--rounds 5] [--folder /tmp/quantised]

Base and two tunes of two matrices each, Model Stock, from the page cache to disk; ratios are to BF16 of equal shapes.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from tests import quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import Tensors

SHAPE, NUM_MATRICES, NUM_THREADS = (2048, 7168), 2, 2
KEEP, WIDEN = {}, {"dtype": "bfloat16"}
Make = Callable[[torch.Tensor], Tensors]


def fp8(values: torch.Tensor) -> Tensors:
    return quantised.fp8(values, (128, 128)).tensors


def int4(values: torch.Tensor) -> Tensors:
    return quantised.int4(values.double().numpy()).tensors


def mxfp4(values: torch.Tensor) -> Tensors:
    return quantised.mxfp4(values.double().numpy(), "packed").tensors


def bf16(values: torch.Tensor) -> Tensors:
    return {"weight": values.bfloat16()}


CASES: dict[str, tuple[Make, dict[str, str], float | None]] = {
    "BF16": (bf16, WIDEN, None),
    "FP8 to BF16": (fp8, WIDEN, 1.2),
    "FP8 kept": (fp8, KEEP, 1.6),
    "INT4 to BF16": (int4, WIDEN, None),
    "INT4 kept": (int4, KEEP, 2.0),
    "MXFP4 kept": (mxfp4, KEEP, None),
}
"""How the models are made, what the recipe says, and what it may cost at most."""


def recipe_of(folder: Path, name: str, make: Make, asked: dict[str, str]) -> Path:
    """Return a recipe of models that are written once for each way of making them."""
    root = folder / make.__name__
    models = [root / f"m{number}" for number in range(3)]
    if not root.exists():
        for number, model in enumerate(models):
            tensors: Tensors = {}
            for matrix in range(NUM_MATRICES):
                base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(matrix)) * 0.02
                drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(97 * matrix + number)) * 0.006
                made = make(base + number * drawn)
                tensors |= {f"layers.{matrix}.up_proj.{own}": tensor for own, tensor in made.items()}
            write_checkpoint(model, tensors, config={}, side_files={})
    recipe = {"merge_method": "model_stock", "base_model": str(models[0]), **asked}
    path = root / f"{name.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"models": [{"model": str(model)} for model in models[1:]]}))
    return path


def cpu_seconds(recipe: Path, output: Path) -> float:
    """Return the CPU time of one merge in this process."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.process_time()
    runs.merge_here(recipe, output, memory_bytes=2048 * runs.MIB, num_threads=NUM_THREADS)
    return time.process_time() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        recipes = {name: recipe_of(folder, name, make, asked) for name, (make, asked, _) in CASES.items()}
        taken: dict[str, list[float]] = {name: [] for name in CASES}
        for round_number in range(given.rounds + 1):
            for name, recipe in recipes.items():
                seconds = cpu_seconds(recipe, folder / "output")
                if round_number:  # the first loads kernels
                    taken[name].append(seconds)
    num_elems = SHAPE[0] * SHAPE[1] * NUM_MATRICES
    plain = statistics.median(taken["BF16"])
    for name, (_, _, most) in CASES.items():
        median = statistics.median(taken[name])
        aim = f" (at most {most})" if most else ""
        print(f"{name:14} {median / num_elems * 1e9:6.2f} ns per element {median / plain:5.2f} x BF16{aim}")


if __name__ == "__main__":
    main()
