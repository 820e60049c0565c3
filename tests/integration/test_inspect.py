"""``stockflow inspect`` on real files: every number against sums in extended precision, by code of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stockflow.errors import PlanError, RecipeError
from stockflow.insight.inspection import Inspection
from stockflow.insight.surveys import SurveyOptions, inspect
from stockflow.recipe import load_recipe
from stockflow.run.inputs import Inputs
from stockflow.run.places import survey_in_this_process
from tests import oracle, runs
from tests.checkpoints import Family, make_family, write_checkpoint, write_recipe
from tests.quantised import fp8

LAYERS = {
    "model.embed_tokens.weight": (300, 40),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.mlp.up_proj.weight": (900, 700),
    "model.layers.1.self_attn.q_proj.weight": (40, 40),
    "model.layers.1.mlp.experts.0.up_proj.weight": (50, 40),
    "model.norm.weight": (40,),
}
"""One of several spans among small ones."""


def inspected(recipe: Path, memory_bytes: int = 512 * runs.MIB) -> Inspection:
    inputs = Inputs.open(load_recipe(str(recipe)))
    options = SurveyOptions(memory_bytes + runs.grown_bytes(), 2, "cpu")
    return inspect(inputs, options, survey_in_this_process, lambda _: None)


def expected_row(tensors: list[np.ndarray]) -> dict[str, Any]:
    """Norms, cosines and angles in extended precision."""
    base = tensors[0].astype(np.longdouble).ravel()
    deltas = [tensor.astype(np.longdouble).ravel() - base for tensor in tensors[1:]]
    norms = [np.sqrt(np.sum(delta * delta)) for delta in deltas]
    cosines = [
        float(np.sum(deltas[i] * deltas[j]) / norms[i] / norms[j])
        for i in range(len(deltas))
        for j in range(i + 1, len(deltas))
    ]
    cosine = sum(cosines) / len(cosines)
    return {
        "base_norm": float(np.sqrt(np.sum(base * base))),
        "delta_norms": [float(norm) for norm in norms],
        "cosines": cosines,
        "angles": [math.degrees(math.acos(value)) for value in cosines],
        "mean_cosine": cosine,
        "ratio_exact": len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine),
        "ratio_two_model": 2 * cosine / (1 + cosine),
    }


def loaded(family: Family, name: str) -> list[np.ndarray]:
    return [oracle.load_checkpoint(folder)[name].array for folder in (family.base, *family.tuned)]


@pytest.mark.parametrize(
    ("num_tuned", "dtype"), [(2, torch.bfloat16), (4, torch.bfloat16), (3, torch.float32), (2, torch.float64)]
)
def test_every_number_is_that_of_extended_precision(num_tuned: int, dtype: torch.dtype, tmp_path: Path) -> None:
    family = make_family(tmp_path, num_tuned, LAYERS, dtype, num_shards=2)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    rows = {row["name"]: row for row in inspected(recipe).rows()}

    for name in LAYERS:
        expected = expected_row(loaded(family, name))
        assert {key: rows[name][key] for key in expected} == {
            key: pytest.approx(value, rel=1e-6) for key, value in expected.items()
        }, name
        assert rows[name]["flags"] == []


def test_ratios_and_cosines_are_bit_for_bit_those_of_a_merge(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, LAYERS)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    runs.merge_here(recipe, tmp_path / "out")

    rows = list(inspected(recipe).rows())

    merged = runs.tensor_facts(tmp_path / "out")
    assert [(row["ratio_exact"], row["mean_cosine"], row["delta_norms"]) for row in rows if row["cosines"]] == [
        (facts["ratio"], facts["mean_cosine"], facts["delta_norms"])
        for facts in (merged[row["name"]] for row in rows if row["cosines"])
    ]


def test_the_inputs_are_read_once_within_little_memory(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, LAYERS | {"huge": (1200, 2000)}, torch.float32)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    found = inspected(recipe, 320 * runs.MIB)

    num_elems = sum(math.prod(shape) for shape in (*LAYERS.values(), (1200, 2000)))
    assert found.num_bytes_read == 3 * 4 * num_elems


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "linear"])
def test_any_recipe_with_a_base_is_inspected(method: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, LAYERS)
    weights = {"weight": [0.5, 0.5]} | ({"density": [0.5, 0.5]} if method == "ties" else {})
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, per_model=weights)

    rows = {row["name"]: row for row in inspected(recipe).rows()}

    name = "model.layers.0.mlp.up_proj.weight"
    assert rows[name]["method"] == method
    assert rows[name]["cosines"] == pytest.approx(expected_row(loaded(family, name))["cosines"], rel=1e-6)
    assert rows["odd.steps"]["flags"] == ["copied"]


def test_one_model_besides_the_base_has_norms_and_no_pairs(tmp_path: Path) -> None:
    family = make_family(tmp_path, 1, LAYERS)
    recipe = write_recipe(tmp_path / "recipe.yaml", "task_arithmetic", family, per_model={"weight": [1.0]})

    rows = list(inspected(recipe).rows())

    assert [len(row["delta_norms"]) for row in rows if row["kind"] == "mlp"] == [1]
    assert {row["ratio_exact"] for row in rows} == {None}


def test_tensors_worth_a_look_are_flagged_and_nan_stops_nothing(tmp_path: Path) -> None:
    base = {"same": torch.ones(50), "one": torch.ones(50), "against": torch.ones(50), "nan": torch.ones(50)}
    first = base | {"one": torch.full((50,), 2.0), "against": torch.full((50,), 2.0), "nan": torch.full((50,), 2.0)}
    second = base | {"against": torch.zeros(50), "nan": torch.tensor([float("nan")] * 50)}
    folders = [
        write_checkpoint(tmp_path / name, tensors, seed=0)
        for name, tensors in (("base", base), ("1", first), ("2", second))
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(folders[0], tuple(folders[1:])))

    flags = {row["name"]: row["flags"] for row in inspected(recipe).rows()}

    assert flags == {
        "same": ["unchanged", "zero_delta"],
        "one": ["zero_delta"],
        "against": ["degenerate", "would_clamp"],
        "nan": ["nonfinite"],
    }


def test_a_recipe_without_a_base_and_one_with_a_base_only_are_refused(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, LAYERS)
    without = write_recipe(tmp_path / "without.yaml", "linear", family, per_model={"weight": [1, 1]}, with_base=False)
    other = make_family(tmp_path / "other", 1, LAYERS | {"model.norm.weight": (41,)})
    mixed = Family(family.base, (family.tuned[0], other.tuned[0]))

    with pytest.raises(RecipeError, match="names none; add `base_model"):
        inspected(without)
    with pytest.raises(PlanError, match=r"model.norm.weight.* is \[41\] in .*other/tuned-1, expected \[40\]"):
        inspected(write_recipe(tmp_path / "mixed.yaml", "model_stock", mixed))


@pytest.mark.parametrize(("change", "is_noise", "is_floor"), [(0.1, 0, 1), (0.03, 1, 1), (0.001, 1, 0)])
def test_cosines_of_codes_stand_beside_what_rounding_alone_makes_of_zero(
    change: float, is_noise: int, is_floor: int, tmp_path: Path
) -> None:
    """The true cosine is 0: what is read of it is the floor, and less where a change is too small for the codes."""
    drawn = [torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) * 0.02 for seed in range(3)]
    models = [drawn[0], *(drawn[0] + change * each for each in drawn[1:])]
    folders = [
        write_checkpoint(
            tmp_path / str(number),
            {f"a.up_proj.{own}": tensor for own, tensor in fp8(each, (128, 128)).tensors.items()},
            config={},
        )
        for number, each in enumerate(models)
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(folders[0], tuple(folders[1:])))

    found = inspected(recipe)

    (row,) = found.rows()
    assert row["mean_cosine"] < row["cosine_floor"] + 0.02
    assert not is_floor or row["mean_cosine"] == pytest.approx(row["cosine_floor"], rel=0.5)
    assert ("rounding_noise" in row["flags"]) == bool(is_noise)
    assert "  floor  " in str(found)
    assert row["cosine_floor"] == pytest.approx(found.facts()["all"]["cosine_floor"])


def test_the_command_prints_a_summary_and_leaves_both_files(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, LAYERS)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    finished = runs.invoke("inspect", recipe, "--out", tmp_path / "found", "--device", "cpu", "--progress", "none")

    assert (finished.exit_code, finished.stderr) == (0, "")
    assert "inspected 6 of 9 tensors" in finished.stdout
    assert all(f"\n  {kind} " in finished.stdout for kind in ("embedding", "attention", "mlp", "experts", "norm"))
    document = json.loads((tmp_path / "found" / "inspect.json").read_text())
    table = pq.read_table(tmp_path / "found" / "inspect.parquet").to_pylist()
    assert document["tensors"] == table
    assert document["kinds"]["attention"]["tensors"] == 2
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, None]
    row = next(row for row in table if row["kind"] == "mlp")
    assert len(row["cosines"]) == len(document["pairs"]) == 3


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{file}", "a file is where a folder should be"),
        ("web://x", "web://"),
        ("/proc/nowhere", "cannot write /proc/nowhere"),  # not even root can
    ],
)
def test_a_place_that_cannot_take_rows_is_refused_before_anything_is_read(
    place: str, said: str, tmp_path: Path
) -> None:
    family = make_family(tmp_path, 2, LAYERS)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    finished = runs.invoke("inspect", recipe, "--out", place.format(file=recipe), "--progress", "json")

    assert finished.exit_code == 2
    assert said in finished.stderr
    assert '"read_bytes": ' not in finished.stderr or '"read_bytes": 0' in finished.stderr
    assert finished.stdout == ""


def test_a_place_is_tried_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (8, 4)}))

    assert runs.invoke("inspect", recipe, "--out", tmp_path / "found", "--device", "cpu").exit_code == 0

    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["inspect.json", "inspect.parquet"]


def test_a_signal_while_rows_are_written_ends_it_as_at_any_other_time(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", make_family(tmp_path, 2, {"w": (8, 4)}))
    code = (
        "import os, signal, sys; from stockflow.cli import app, looking; "
        "looking.publish = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), signal.pause()); "
        "app(sys.argv[1:])"
    )
    arguments = ["inspect", str(recipe), "--out", str(tmp_path / "found"), "--device", "cpu"]

    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=runs.REPOSITORY, capture_output=True, text=True, check=False
    )

    assert finished.returncode == 143
    assert finished.stderr.splitlines()[-1].startswith("stockflow: stopped by SIGTERM")
