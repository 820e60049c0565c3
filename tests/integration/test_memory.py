"""The promise of --memory, held by a process of its own against tensors that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.planning.budget import LEAST_MEMORY_BYTES
from tests import adapters, oracle, runs
from tests.adapters import write_adapter
from tests.checkpoints import Family, write_checkpoint, write_recipe
from tests.runs import MIB
from tests.selection import mostly_slow

MEMORY_BYTES = LEAST_MEMORY_BYTES
PERIOD_ROWS, NUM_PERIODS, NUM_COLUMNS = 512, 112, 1000
NUM_ROWS = PERIOD_ROWS * NUM_PERIODS
"""The checkpoints repeat their first 512 rows, so that the oracle needs to see only these."""


@pytest.fixture(scope="module")
def large_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Base and two models with one tensor: its sources take 344 MB, more than all of --memory."""
    folder = tmp_path_factory.mktemp("large")
    random = torch.Generator().manual_seed(1)

    def drawn(scale: float) -> torch.Tensor:
        return torch.randn(PERIOD_ROWS, NUM_COLUMNS, generator=random) * scale

    base, common = drawn(0.02), drawn(1e-3)
    models = [base, base + common + drawn(1e-3), base + common + drawn(1e-3)]
    folders = [
        write_checkpoint(folder / str(number), {"w": model.bfloat16().repeat(NUM_PERIODS, 1)})
        for number, model in enumerate(models)
    ]
    assert MEMORY_BYTES < 3 * 2 * NUM_ROWS * NUM_COLUMNS
    return Family(folders[0], tuple(folders[1:]))


@pytest.mark.parametrize("scope", mostly_slow(["tensor", "row"], ["tensor"]))
def test_a_tensor_larger_than_the_budget_is_merged_within_it(scope: str, large_family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", large_family, stockflow={"scope": scope})
    options = ("--memory", f"{MEMORY_BYTES // MIB}MiB", "--workers", 2, "--json")
    planned = json.loads(runs.run("plan", recipe, tmp_path / "out", *options).stdout)

    result, seen_peak = runs.merge_and_watch("merge", recipe, tmp_path / "out", "--quiet", *options)

    reported_peak = result["summary"]["peak_memory_bytes"]
    print(f"FIGURES {scope}: seen {seen_peak / MIB:.0f}, reported {reported_peak / MIB:.0f} MiB")
    assert planned["passes"] == {"2": 1}
    assert reported_peak <= planned["projected_memory_bytes"] <= MEMORY_BYTES
    assert seen_peak <= MEMORY_BYTES
    row = runs.tensor_facts(tmp_path / "out")["w"]
    assert 0.4 < row["mean_cosine"] < 0.6
    assert result["summary"]["bytes_read"] == 3 * 2 * NUM_ROWS * NUM_COLUMNS * 2
    assert_first_rows_are_right(scope, large_family, tmp_path / "out")


PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "rescale": True},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.3},
    "ramplus_tl": {},
    "arcee_fusion": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PARAMETERS)
def test_methods_that_look_at_elements_take_what_is_projected(
    method: str, large_family: Family, tmp_path: Path
) -> None:
    family = Family(large_family.base, large_family.tuned[:1]) if method == "arcee_fusion" else large_family
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, parameters=PARAMETERS[method])
    options = ("--memory", f"{MEMORY_BYTES // MIB}MiB", "--workers", 2, "--json")
    planned = json.loads(runs.run("plan", recipe, tmp_path / "out", *options).stdout)

    result, seen_peak = runs.merge_and_watch("merge", recipe, tmp_path / "out", "--quiet", *options)

    reported_peak = result["summary"]["peak_memory_bytes"]
    print(f"FIGURES {method}: projected {planned['projected_memory_bytes'] / MIB:.0f}, seen {seen_peak / MIB:.0f} MiB")
    assert reported_peak <= planned["projected_memory_bytes"] <= MEMORY_BYTES
    assert seen_peak <= MEMORY_BYTES


@pytest.mark.slow
def test_adapters_of_a_large_layer_take_what_is_projected(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (50_000, 8_192)
    random = torch.Generator().manual_seed(2)
    repeated = (0.02 * torch.randn(500, shape[1], generator=random)).bfloat16().repeat(100, 1)
    write_checkpoint(tmp_path / "base", {name: repeated})
    for number in range(3):
        write_adapter(tmp_path / f"lora{number}", adapters.linear({name: shape}, r=64, seed=number))
    models = [{"model": f"{tmp_path}/base+{tmp_path}/lora{number}"} for number in range(3)]
    recipe = {"merge_method": "model_stock", "base_model": f"{tmp_path}/base", "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    planned = json.loads(runs.run("plan", tmp_path / "recipe.yaml", tmp_path / "out", "--workers", 2, "--json").stdout)

    result, _ = runs.merge_and_watch(
        "merge", tmp_path / "recipe.yaml", tmp_path / "out", "--quiet", "--workers", 2, "--json"
    )

    reported, projected = result["summary"]["peak_memory_bytes"], planned["projected_memory_bytes"]
    print(f"FIGURES adapters: projected {projected / MIB:.0f}, reported {reported / MIB:.0f} MiB")
    assert reported <= projected <= 1.15 * reported


def test_a_budget_that_is_too_small_is_refused_while_planning(large_family: Family, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", large_family)

    refused = runs.run("plan", recipe, tmp_path / "out", "--memory", "200MiB", "--workers", 2)
    also_refused = runs.run("merge", recipe, tmp_path / "out", "--memory", "200MiB", "--workers", 2, "--quiet")

    assert (refused.returncode, also_refused.returncode) == (2, 2)
    assert refused.stderr == also_refused.stderr
    for part in ("at least 304 MiB", "compiling the kernels takes once", "the limit is 200 MiB", "Raise --memory"):
        assert part in refused.stderr
    assert not (tmp_path / "out").exists()


def assert_first_rows_are_right(scope: str, family: Family, output: Path) -> None:
    base, *tuned = (_first_rows(folder) for folder in (family.base, *family.tuned))
    expected = oracle.model_stock(base, tuned, scope="row" if scope == "row" else "tensor")
    found = oracle.round_to("BF16", _first_rows(output))

    distance = oracle.ulp_distance("BF16", found, oracle.round_to("BF16", expected.out))
    assert distance.max() <= 1
    assert (distance == 0).mean() >= 0.9999


def _first_rows(folder: Path) -> oracle.Floats:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        first: oracle.Floats = file.get_slice("w")[:PERIOD_ROWS].double().numpy()
        return first
