"""Cosines and roundings of one tensor of 2**29 elements against float64, chunk by chunk: ``make test-scale``."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stockflow.output.tables import decode_tensors
from tests import oracle

NUM_ELEMS = 2**29
CHUNK = 2**24
NUM_TUNED = 2

pytestmark = pytest.mark.scale


def noise(stream: int, chunk: int, *, heavy_tailed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * stream + chunk)
    values = torch.randn(CHUNK, generator=generator)
    return values**3 if heavy_tailed else values


def write(folder: Path, index: int, *, scale: float, heavy_tailed: bool) -> None:
    folder.mkdir(parents=True)
    tensor = torch.empty(NUM_ELEMS, dtype=torch.bfloat16)
    for chunk in range(NUM_ELEMS // CHUNK):
        values = noise(0, chunk, heavy_tailed=False) * 0.02 if scale == 1e-3 else torch.zeros(CHUNK)
        if index:
            values += noise(1, chunk, heavy_tailed=heavy_tailed) * scale
            values += noise(1 + index, chunk, heavy_tailed=heavy_tailed) * scale
        tensor[chunk * CHUNK : (chunk + 1) * CHUNK] = values.bfloat16()
    save_file({"weight": tensor}, folder / "model.safetensors")


def chunk_of(folder: Path, chunk: int) -> np.ndarray:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_slice("weight")[chunk * CHUNK : (chunk + 1) * CHUNK].double().numpy()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("scale", "heavy_tailed", "most"),
    [(1e-3, False, 1e-7), (1e-3, True, 1e-6), (4e-15, False, 1e-7), (4e5, False, 1e-7)],
    ids=["normal", "heavy-tailed", "norm-1e-10", "norm-1e10"],
)
def test_a_tensor_of_half_a_billion_elements(tmp_path: Path, scale: float, heavy_tailed: bool, most: float) -> None:
    folders = [tmp_path / "base", *(tmp_path / f"tuned-{index}" for index in range(1, NUM_TUNED + 1))]
    for index, folder in enumerate(folders):
        write(folder, index, scale=scale, heavy_tailed=heavy_tailed)
    recipe = tmp_path / "recipe.yaml"
    models = "".join(f"- model: {folder}\n" for folder in folders[1:])
    recipe.write_text(f"merge_method: model_stock\nbase_model: {folders[0]}\nmodels:\n{models}")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "stockflow", "merge", str(recipe), str(output), "--memory", "1GiB"]
    report = json.loads(subprocess.check_output([*command, "--quiet", "--json"]))
    (row,) = decode_tensors(next(output.glob("_stockflow/*/tensors.parquet")).read_bytes())

    products = np.zeros((NUM_TUNED, NUM_TUNED))
    for chunk in range(NUM_ELEMS // CHUNK):
        base, *tuned = (chunk_of(folder, chunk) for folder in folders)
        deltas = np.stack([values - base for values in tuned])
        products += deltas @ deltas.T
    cosine = products[0, 1] / math.sqrt(products[0, 0]) / math.sqrt(products[1, 1])
    ratio = 2 * cosine / (1 + cosine)
    wrong = 0
    for chunk in range(NUM_ELEMS // CHUNK):
        base, *tuned = (chunk_of(folder, chunk) for folder in folders)
        expected = base + ratio / NUM_TUNED * sum(values - base for values in tuned)
        wrong += int((oracle.round_to("BF16", chunk_of(output, chunk)) != oracle.round_to("BF16", expected)).sum())

    error, share = abs(row["mean_cosine"] - cosine), 1 - wrong / NUM_ELEMS
    print(f"|cos error| {error:.2e}, correctly rounded {share:.6f}, peak {report['summary']['peak_memory_bytes']:,}")
    assert error <= most
    assert share >= 0.9999
    assert report["summary"]["peak_memory_bytes"] <= 2**30
