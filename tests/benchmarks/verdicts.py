"""What ``stockflow audit`` says of merges whose maker is known; ``inspect`` and ``diff`` beside it: docs/insight.md.

``python -m tests.benchmarks.verdicts FOLDER`` makes a small Llama with three tuned models in FOLDER, in BF16 and in
float32, merges them by stockflow, by mergekit 0.1.5 and by the two-model formula (here, in float64), and prints the
table. The checkpoints stay, so that the commands can be tried on them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.benchmarks.peers import ENVIRONMENT, OFFLINE, installed
from tests.benchmarks.processes import run
from tests.checkpoints import LLAMA_CONFIG, Family, llama_shapes, make_family, write_checkpoint, write_recipe

CONFIG = LLAMA_CONFIG | {
    "hidden_size": 256, "intermediate_size": 640, "vocab_size": 1000, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STOCKFLOW = (sys.executable, "-m", "stockflow")


def two_model_merge(family: Family, folder: Path) -> Path:
    """Merge by ``2 cos / (1 + cos)`` in float64, rounded once."""
    base, *tuned = (load_file(path / "model.safetensors") for path in (family.base, *family.tuned))
    merged = {}
    for name, tensor in base.items():
        deltas = [each[name].double().flatten() - tensor.double().flatten() for each in tuned]
        units = [delta / delta.norm() for delta in deltas]
        pairs = [(i, j) for i in range(len(units)) for j in range(i)]
        cosine = sum(float(units[i] @ units[j]) for i, j in pairs) / len(pairs)
        update = 2.0 * cosine / (1.0 + cosine) * sum(deltas) / len(deltas)
        merged[name] = (tensor.double() + update.reshape(tensor.shape)).to(tensor.dtype)
    return write_checkpoint(folder, merged, config=CONFIG)


def by_mergekit(family: Family, folder: Path, dtype: str) -> Path:
    """Merge by mergekit, computing and writing in ``dtype``."""
    recipe = write_recipe(folder.with_suffix(".yaml"), "model_stock", family, dtype=dtype)
    finished = run([str(installed(ENVIRONMENT)), str(recipe), str(folder)], environment=OFFLINE)
    if not list(folder.glob("*.safetensors")):
        raise RuntimeError(finished.stderr)
    return folder


def by_stockflow(recipe: Path, folder: Path) -> Path:
    """Merge by the product."""
    subprocess.run([*STOCKFLOW, "merge", str(recipe), str(folder), "--quiet", "--device", "cpu"], check=True)
    return folder


def verdict_row(maker: str, dtype: str, recipe: Path, merged: Path) -> str:
    """Return a line of the table."""
    command = [*STOCKFLOW, "audit", str(recipe), str(merged), "--json", "--device", "cpu"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    labels = ", ".join(f"{label} {counts['tensors']}" for label, counts in found["labels"].items())
    num_elems = sum(row["num_elems"] for row in found["tensors"])
    share, apart = (
        sum(row[column] * row["num_elems"] for row in found["tensors"]) / num_elems
        for column in ("equal_share", "mean_roundings")
    )
    return (
        f"| {maker} | {dtype} | {labels} | {found['distance']:.2g} | {100 * share:.3f} % | {apart:.3g} | "
        f"{found['verdict']} |"
    )


def main() -> None:
    """Make, merge, audit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes; must not exist")
    root = parser.parse_args().folder
    print("| made by | dtype | labels | distance | elements equal | roundings, mean | merge again |")
    print("|---|---|---|---|---|---|---|")
    for dtype, stored in DTYPES.items():
        here = root / dtype
        family = make_family(here, 3, llama_shapes(CONFIG), stored, buffers=False, config=CONFIG, delta_scale=3e-3)
        recipe = write_recipe(here / "recipe.yaml", "model_stock", family)
        merges = {
            "stockflow": by_stockflow(recipe, here / "stockflow"),
            "mergekit 0.1.5": by_mergekit(family, here / "mergekit", dtype),
            "the old formula": two_model_merge(family, here / "two-model"),
        }
        for maker, merged in merges.items():
            print(verdict_row(maker, dtype, recipe, merged), flush=True)


if __name__ == "__main__":
    main()
