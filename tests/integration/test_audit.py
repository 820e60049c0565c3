"""``stockflow audit`` on merges whose maker is known: made here in numpy, by formulas written out, rounded once."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import stockflow
from stockflow.errors import InputChangedError, NotFoundError, PlanError, RecipeError
from stockflow.events import Done, Event, Moved, Stage
from stockflow.insight.audit import audit, open_output, open_recipe
from stockflow.insight.surveys import SurveyOptions
from stockflow.insight.verdict import Audit, audit_lines, judge
from stockflow.recipe import load_recipe
from stockflow.run.inputs import Inputs
from stockflow.run.places import survey_in_this_process
from stockflow.storage import StorageConfig
from tests import oracle, runs
from tests.checkpoints import Family, make_family, make_tensors, write_checkpoint, write_recipe
from tests.hub_server import COMMIT, hub_server
from tests.selection import by_name, diagonal

SHAPES = {
    "model.embed_tokens.weight": (600, 500),
    "model.layers.0.self_attn.q_proj.weight": (120, 120),
    "model.layers.0.input_layernorm.weight": (2000,),
}
"""The first is of two spans."""
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "BF16", F16: "F16", F32: "F32", F64: "F64"}


def audited(recipe: Path, merged: Path | None = None, memory_bytes: int = 512 * runs.MIB) -> Audit:
    merge = open_recipe(Inputs.open(load_recipe(str(recipe))), None if merged is None else str(merged))
    return audit(merge, options(memory_bytes), survey_in_this_process, lambda _: None)


def options(memory_bytes: int = 512 * runs.MIB) -> SurveyOptions:
    return SurveyOptions(memory_bytes + runs.grown_bytes(), 2, "cpu")


def labels(found: Audit) -> set[str]:
    return {row["match"] for row in found.rows}


def loaded(family: Family) -> dict[str, list[np.ndarray]]:
    """Base and models in float64, by tensor."""
    checkpoints = [oracle.load_checkpoint(folder) for folder in (family.base, *family.tuned)]
    return {name: [each[name].array for each in checkpoints] for name in SHAPES}


def mean_cosine(base: np.ndarray, tuned: list[np.ndarray]) -> float:
    deltas = [(each - base).astype(np.longdouble).ravel() for each in tuned]
    cosines = [
        float(np.sum(deltas[i] * deltas[j]) / np.sqrt(np.sum(deltas[i] ** 2) * np.sum(deltas[j] ** 2)))
        for i in range(len(deltas))
        for j in range(i + 1, len(deltas))
    ]
    return sum(cosines) / len(cosines)


def ratio_by(maker: str, base: np.ndarray, tuned: list[np.ndarray]) -> float:
    c, n = mean_cosine(base, tuned), len(tuned)
    return {
        "exact": max(n * c / (1 + (n - 1) * c), 0.0),
        "extrapolated": n * c / (1 + (n - 1) * c),
        "two_model": 2 * c / (1 + c),
        "average": 1.0,
        "base": 0.0,
    }[maker]


def merged_by(maker: str, family: Family, folder: Path, dtype: torch.dtype) -> Path:
    """Write a merge by a formula: in float64 from the definition, rounded once by the oracle."""
    made = {}
    for name, (base, *tuned) in loaded(family).items():
        t = ratio_by(maker, base, tuned)
        made[name] = stored(base + t * (np.mean(tuned, axis=0) - base), dtype)
    return write_checkpoint(folder, made)


def stored(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    bits = oracle.round_to(NAMES[dtype], values)
    return torch.from_numpy(bits.view({2: np.int16, 4: np.int32, 8: np.int64}[bits.itemsize])).view(dtype)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Family, Path]]:
    """Families and their recipes: three models that agree, three that oppose each other, two that agree."""
    found = {}
    for name, num_tuned, dtype, drawn in (
        ("bf16", 3, BF16, {}),
        ("f32", 3, F32, {}),
        ("f16", 3, F16, {}),
        ("f64", 3, F64, {}),
        ("opposing", 3, F32, {"cosine": -0.3}),
        ("opposing bf16", 3, BF16, {"cosine": -0.3}),
        ("two", 2, BF16, {}),
    ):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        family = make_family(folder, num_tuned, SHAPES, dtype, buffers=False, **drawn)
        found[name] = family, write_recipe(folder / "recipe.yaml", "model_stock", family)
    return found


@pytest.mark.parametrize(
    ("maker", "dtype"), diagonal(by_name("exact", "two_model", "average", "base"), by_name("bf16", "f32", "f16", "f64"))
)
def test_every_maker_is_recognised_in_every_dtype(
    maker: str, dtype: str, families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families[dtype]
    merged = merged_by(maker, family, tmp_path / "merged", {"bf16": BF16, "f32": F32, "f16": F16, "f64": F64}[dtype])

    found = audited(recipe, merged)

    assert labels(found) == {maker}
    assert judge(found).answer == ("no" if maker == "exact" else "yes")
    for row in found.rows:
        base, *tuned = loaded(family)[row["name"]]
        assert row["implied_ratio"] == pytest.approx(ratio_by(maker, base, tuned), abs=0.02)
        assert row["ratio_exact"] == pytest.approx(ratio_by("exact", base, tuned), rel=1e-6)


@pytest.mark.parametrize(("family_name", "dtype"), [("opposing", F32), ("opposing bf16", BF16)])
@pytest.mark.parametrize("maker", ["exact", "extrapolated", "two_model"])
def test_negative_cosines_clamped_and_extrapolated_are_told_apart(
    maker: str, family_name: str, dtype: torch.dtype, families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families[family_name]

    found = audited(recipe, merged_by(maker, family, tmp_path / "merged", dtype))

    assert labels(found) == {maker}
    assert judge(found).answer == ("no" if maker == "exact" else "yes")


def test_a_recipe_that_extrapolates_calls_that_correct(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, _ = families["opposing"]
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family, stockflow={"on_negative": "extrapolate"})

    found = audited(recipe, merged_by("extrapolated", family, tmp_path / "merged", F32))

    assert (labels(found), judge(found).answer) == ({"extrapolated"}, "no")
    for row in found.rows:
        base, *tuned = loaded(family)[row["name"]]
        t = ratio_by("extrapolated", base, tuned)
        assert t < 0
        assert row["ratio_correct"] == pytest.approx(t, rel=1e-6)
    alone = "\n".join(audit_lines(audited(recipe)))
    assert f" {found.rows[0]['ratio_correct']:.4f} " in alone
    assert "0.0000" not in alone


def test_where_all_cosines_are_negative_the_old_formula_moves_what_should_stay(
    families: dict[str, tuple[Family, Path]],
) -> None:
    family, recipe = families["opposing"]

    found = audited(recipe)

    squares = {"old": 0.0, "mean": 0.0}
    for row in found.rows:
        base, *tuned = loaded(family)[row["name"]]
        mean = np.linalg.norm(np.mean(tuned, axis=0) - base)
        old = abs(ratio_by("two_model", base, tuned)) * mean
        assert (row["update_norm"], row["ratio_correct"]) == (0.0, 0.0)
        assert (row["old_error"], row["mean_norm"]) == (pytest.approx(old, rel=1e-5), pytest.approx(mean, rel=1e-5))
        squares = {"old": squares["old"] + old**2, "mean": squares["mean"] + mean**2}
    assert judge(found).answer == "yes"
    assert judge(found).distance == pytest.approx(math.sqrt(squares["old"] / squares["mean"]), rel=1e-5)
    assert "of the size of the mean task vectors" in "\n".join(audit_lines(found))


def test_two_models_that_oppose_each_other_were_never_affected_by_the_formula(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"w": (200, 50)}, F32, buffers=False, cosine=-0.3)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    assert judge(audited(recipe)).answer == "same"


def test_one_small_tensor_that_should_have_stayed_is_hardly_worth_a_merge(tmp_path: Path) -> None:
    shapes = {"large": ((300, 200), 0.5, 3e-3), "small": ((40,), -0.3, 1e-5)}
    drawn = {
        name: [each.float() for each in make_tensors(name, shape, 3, cosine=cosine, delta_scale=scale)]
        for name, (shape, cosine, scale) in shapes.items()
    }
    folders = [
        write_checkpoint(tmp_path / str(number), {name: each[number] for name, each in drawn.items()})
        for number in range(4)
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", Family(folders[0], tuple(folders[1:])))
    made, errors, updates = {}, 0.0, 0.0
    for name, tensors in drawn.items():
        base, *tuned = (each.numpy().astype(np.float64) for each in tensors)
        mean = np.mean(tuned, axis=0) - base
        t, correct = ratio_by("extrapolated", base, tuned), ratio_by("exact", base, tuned)
        made[name] = stored(base + t * mean, F32)
        errors += float(np.sum((made[name].double().numpy() - base - correct * mean) ** 2)) * (name == "small")
        updates += float(np.sum((correct * mean) ** 2))

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert {row["name"]: row["match"] for row in found.rows} == {"large": "exact", "small": "extrapolated"}
    assert judge(found).answer == "hardly"
    assert 0 < judge(found).distance < 0.01
    assert judge(found).distance == pytest.approx(math.sqrt(errors / updates), rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_our_own_merge_is_the_exact_one(dtype: str, families: dict[str, tuple[Family, Path]], tmp_path: Path) -> None:
    _, recipe = families[dtype]
    runs.merge_here(recipe, tmp_path / "out")

    merge = open_output(str(tmp_path / "out"), StorageConfig())
    found = audit(merge, options(), survey_in_this_process, lambda _: None)

    assert labels(found) == {"exact"}
    assert all(row["equal_share"] >= 0.9999 and row["max_roundings"] <= 1.0 for row in found.rows)
    assert "A re-merge is not needed" in "\n".join(audit_lines(found))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_the_reference_is_finer_than_what_it_judges(
    dtype: torch.dtype, families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    """A merge computed in float32 is the exact one, and not to the last bit: judged in float32 it would be."""
    family, recipe = families["f32" if dtype == F32 else "f16"]
    made, num_wrong = {}, {}
    for name, (base, *tuned) in loaded(family).items():
        t = ratio_by("exact", base, tuned)
        single = [np.float32(values) for values in (base, *tuned)]
        total = sum(single[0] - values for values in single[1:]) * np.float32(t / len(tuned))
        made[name] = stored((single[0] - total).astype(np.float64), dtype)
        right = stored(base + t * (np.mean(tuned, axis=0) - base), dtype)
        num_wrong[name] = int((made[name] != right).sum())

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert sum(num_wrong.values()) > (1000 if dtype == F32 else 0)
    for row in found.rows:
        share_wrong = num_wrong[row["name"]] / row["num_elems"]
        assert 1.0 - row["equal_share"] == pytest.approx(share_wrong, abs=1e-5)


def test_a_merge_by_rows_is_held_against_ratios_by_row(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, by_tensor = families["f32"]
    recipe = write_recipe(tmp_path / "rows.yaml", "model_stock", family, parameters={"filter_wise": True})
    runs.merge_here(recipe, tmp_path / "rows")

    found = audited(recipe, tmp_path / "rows")

    assert labels(found) == {"exact"}
    assert {row["equal_share"] for row in found.rows} == {1.0}
    assert sorted(row["num_groups"] for row in found.rows) == [1, 120, 600]
    crossed = {row["name"]: row["match"] for row in audited(by_tensor, tmp_path / "rows").rows}
    assert crossed["model.embed_tokens.weight"] == "none"


def test_with_two_models_both_formulas_are_one(families: dict[str, tuple[Family, Path]], tmp_path: Path) -> None:
    family, recipe = families["two"]

    found = audited(recipe, merged_by("two_model", family, tmp_path / "merged", BF16))

    assert labels(found) == {"exact"}
    assert {row["candidates"][:2] == ["exact", "two_model"] for row in found.rows} == {True}
    assert judge(audited(recipe)).answer == "same"


def test_what_rounding_swallows_is_called_indistinguishable(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    """Updates of a hundredth of a BF16 step: all formulas give the base, bit for bit, nearly everywhere."""
    folder = tmp_path / "family"
    base, *tuned = (stored(each.numpy(), F32) for each in make_tensors("w", (500, 40), 3, delta_scale=1e-7))
    base = stored(stored(base.numpy(), BF16).double().numpy(), F32)
    tuned = [base + 1e-9 * each for each in tuned]
    family = Family(
        write_checkpoint(folder / "base", {"w": base}),
        tuple(write_checkpoint(folder / str(i), {"w": each}) for i, each in enumerate(tuned)),
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)

    (row,) = audited(recipe, write_checkpoint(tmp_path / "merged", {"w": base.to(BF16)})).rows

    assert row["match"] == "indistinguishable"
    assert {"exact", "two_model", "average", "base"} <= set(row["candidates"])


def test_updates_smaller_than_a_rounding_still_tell_formulas_apart_by_their_elements(tmp_path: Path) -> None:
    """A mean would mislead: such updates are rounded with a bias. The elements that round otherwise decide."""
    shapes = {"w": (600, 500)}
    family = make_family(tmp_path, 3, shapes, BF16, buffers=False, delta_scale=1e-4)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    base, *tuned = (oracle.load_checkpoint(folder)["w"].array for folder in (family.base, *family.tuned))

    for maker in ("exact", "two_model"):
        values = base + ratio_by(maker, base, tuned) * (np.mean(tuned, axis=0) - base)
        (row,) = audited(recipe, write_checkpoint(tmp_path / maker, {"w": stored(values, BF16)})).rows

        assert row["match"] == maker
        assert abs(row["implied_ratio"] - ratio_by(maker, base, tuned)) > 0.02


def test_other_weights_are_none_of_these_and_the_report_shows_them(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["f32"]
    made = {}
    for name, (base, first, second, _) in loaded(family).items():
        made[name] = stored(base + 0.4 * (first - base) + 0.3 * (second - base), F32)

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert labels(found) == {"none"}
    assert found.rows[0]["implied_weights"] == pytest.approx([0.4, 0.3, 0.0], abs=1e-4)
    assert judge(found).answer == "unrelated"
    assert "0.400, 0.300, " in "\n".join(audit_lines(found))


def test_distances_and_roundings_are_those_of_an_independent_count(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    """All of it again in float64 from the files: quadratic forms of the Gram agree with differences taken directly."""
    family, recipe = families["bf16"]
    merged = merged_by("two_model", family, tmp_path / "merged", BF16)
    made = oracle.load_checkpoint(merged)

    for row in audited(recipe, merged).rows:
        base, *tuned = loaded(family)[row["name"]]
        mean = np.mean(tuned, axis=0) - base
        t, old = ratio_by("exact", base, tuned), ratio_by("two_model", base, tuned)
        correct = base + t * mean
        found = made[row["name"]].array
        along = float(np.sum((found - base) * mean) / np.sum(mean**2))
        apart = oracle.ulp_distance("BF16", oracle.round_to("BF16", correct), oracle.round_to("BF16", found))
        steps = 2.0 ** (np.floor(np.log2(np.abs(found))) - 7)
        update = np.linalg.norm(t * mean)
        expected = {
            "update_norm": update,
            "distance": np.linalg.norm(found - correct) / update,
            "implied_ratio": along,
            "residual": np.linalg.norm(found - base - along * mean) / np.linalg.norm(found - base),
            "rounding_noise": math.sqrt(np.sum(steps**2) / 12) / update,
            "old_distance": abs(t - old) / t,
            "old_roundings": abs(t - old) * np.linalg.norm(mean) / math.sqrt(np.sum(steps**2)),
        }
        assert {key: row[key] for key in expected} == {
            key: pytest.approx(value, rel=1e-5) for key, value in expected.items()
        }
        # Elements near the middle between two numbers may round the other way in float32: a few in a million.
        assert row["equal_share"] == pytest.approx(np.mean(apart == 0), abs=1e-4)
        assert row["mean_roundings"] == pytest.approx(np.mean(apart), abs=1e-4)
        assert row["max_roundings"] == np.max(apart)


def test_a_large_tensor_that_is_read_twice_gives_the_same_row(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["f32"]
    merged = merged_by("two_model", family, tmp_path / "merged", F32)

    assert audited(recipe, merged, 310 * runs.MIB).rows == audited(recipe, merged, 700 * runs.MIB).rows


def test_nan_in_a_merge_is_said_of_its_tensor_and_stops_nothing(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["bf16"]
    merged = oracle.load_checkpoint(merged_by("exact", family, tmp_path / "good", BF16))
    made = {name: stored(tensor.array, BF16) for name, tensor in merged.items()}
    made["model.layers.0.input_layernorm.weight"][7] = float("nan")

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert {row["name"]: row["match"] for row in found.rows} == {
        name: "not_finite" if name == "model.layers.0.input_layernorm.weight" else "exact" for name in SHAPES
    }
    assert judge(found).answer == "yes"
    assert judge(found).share == pytest.approx(2000 / (600 * 500 + 120 * 120 + 2000))
    said = "\n".join(audit_lines(found))
    assert "1 of 3 tensors hold NaN or infinity, and no model does there" in said
    assert "NaN or infinity in the merge, and in no model: model.layers.0.input_layernorm.weight" in said


def test_a_merge_that_is_all_nan_is_to_be_made_again(families: dict[str, tuple[Family, Path]], tmp_path: Path) -> None:
    _, recipe = families["bf16"]
    made = {name: torch.full(shape, float("nan"), dtype=BF16) for name, shape in SHAPES.items()}

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert (judge(found).answer, judge(found).share) == ("yes", 1.0)
    assert "A re-merge is worth it" in "\n".join(audit_lines(found))


def test_nan_in_a_model_is_no_fault_of_the_merge(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, {"w": (200, 50), "v": (500,)}, F32, buffers=False)
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_stock", family)
    runs.merge_here(recipe, tmp_path / "good")
    tensors = {name: stored(tensor.array, F32) for name, tensor in oracle.load_checkpoint(family.tuned[1]).items()}
    tensors["v"][3] = float("inf")
    write_checkpoint(family.tuned[1], tensors)

    found = audited(recipe, tmp_path / "good")

    assert {row["name"]: row["flags"] for row in found.rows} == {"w": [], "v": ["nonfinite"]}
    assert judge(found).answer == "undecided"
    assert "NaN or infinity in a model: v" in "\n".join(audit_lines(found))
    assert judge(audited(recipe)).answer == "yes"


def test_a_recipe_alone_says_what_the_old_formula_would_have_done(
    families: dict[str, tuple[Family, Path]],
) -> None:
    family, recipe = families["bf16"]

    found = audited(recipe)

    for row in found.rows:
        base, *tuned = loaded(family)[row["name"]]
        t, old = ratio_by("exact", base, tuned), ratio_by("two_model", base, tuned)
        assert (row["ratio_two_model"], row["old_distance"]) == (
            pytest.approx(old, rel=1e-6),
            pytest.approx((t - old) / t, rel=1e-5),
        )
    assert judge(found).answer == "yes"
    assert "misses the correct one by 11 % of the size of the update" in "\n".join(audit_lines(found))


# --- what cannot be audited, and how it is said ---------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_refused_with_names(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    _, recipe = families["bf16"]
    foreign = write_checkpoint(tmp_path / "foreign", {"h.0.attn.c_attn.weight": torch.zeros(10, 10)})

    with pytest.raises(PlanError, match=r"no merge of this recipe's models: of 3 tensors none .*'h.0.attn.c_attn"):
        audited(recipe, foreign)


def test_another_vocabulary_leaves_out_what_does_not_fit(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["bf16"]
    merged = oracle.load_checkpoint(merged_by("exact", family, tmp_path / "good", BF16))
    made = {name: stored(tensor.array, BF16) for name, tensor in merged.items()}
    made["model.embed_tokens.weight"] = torch.zeros(608, 500, dtype=BF16)

    found = audited(recipe, write_checkpoint(tmp_path / "merged", made))

    assert found.left_out == {
        "model.embed_tokens.weight": "of shape [608, 500] in the merged checkpoint, expected [600, 500]"
    }
    assert labels(found) == {"exact"}
    assert "left out: 1 tensor, of shape [608, 500]" in "\n".join(audit_lines(found))
    assert "every tensor that was compared is the correct merge" in "\n".join(audit_lines(found))


def test_a_recipe_of_another_number_of_models_is_refused(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["bf16"]
    runs.merge_here(recipe, tmp_path / "out")
    fewer = write_recipe(tmp_path / "fewer.yaml", "model_stock", Family(family.base, family.tuned[:2]))

    with pytest.raises(PlanError, match="was merged from 4 checkpoints, as its manifest says, and the recipe names 3"):
        audited(fewer, tmp_path / "out")


def test_an_output_without_manifest_asks_for_the_recipe(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "merged", {"w": torch.zeros(3)})

    with pytest.raises(NotFoundError, match=r"no manifest.json, .*stockflow audit RECIPE .*mergekit_config.yml"):
        open_output(str(folder), StorageConfig())


def test_inputs_that_changed_since_are_named(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"w": (50, 50)}, buffers=False)
    runs.merge_here(write_recipe(tmp_path / "recipe.yaml", "model_stock", family), tmp_path / "out")
    write_checkpoint(family.tuned[1], {"w": torch.zeros(51, 50)})

    with pytest.raises(
        InputChangedError,
        match=r"not what .*out was merged from(.|\n)*tuned-2/model.safetensors: chang(.|\n)*audit RECIPE .*out",
    ):
        open_output(str(tmp_path / "out"), StorageConfig())


def test_a_merge_by_another_method_is_refused(families: dict[str, tuple[Family, Path]], tmp_path: Path) -> None:
    family, _ = families["bf16"]
    recipe = write_recipe(tmp_path / "r.yaml", "linear", family, per_model={"weight": [1, 1, 1]})

    with pytest.raises(PlanError, match="this merge is by linear; `stockflow inspect` shows"):
        audited(recipe)


def test_the_command_prints_a_verdict_and_leaves_both_files(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["bf16"]
    merged = merged_by("two_model", family, tmp_path / "merged", BF16)

    finished = runs.invoke("audit", recipe, merged, "--out", tmp_path / "found", "--progress", "none")

    assert (finished.exit_code, finished.stderr) == (0, "")
    assert "A re-merge is worth it: tensors with 100 % of the parameters" in finished.stdout
    assert "the old formula for two models (two_model)" in finished.stdout
    assert finished.stdout.splitlines()[-1] == f"next: stockflow merge {recipe} OUTPUT"
    document: dict[str, Any] = json.loads((tmp_path / "found" / "audit.json").read_text())
    assert document["tensors"] == pq.read_table(tmp_path / "found" / "audit.parquet").to_pylist()
    assert (document["verdict"], document["labels"]["two_model"]["tensors"]) == ("yes", 3)


def test_an_old_merge_on_the_hub_is_found_by_its_bare_name_and_pinned(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    """In a process of its own: the hub's client reads HF_ENDPOINT when it is imported."""
    family, recipe = families["bf16"]
    merged = merged_by("two_model", family, tmp_path / "merged", BF16)
    arguments = runs.command("audit", recipe, "org/old-merge", "--json", "--device", "cpu")

    with hub_server({"org/old-merge": merged}) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        finished = subprocess.run(
            arguments, env=environment, cwd=runs.REPOSITORY, capture_output=True, text=True, check=False
        )

    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert document["merged"] == f"hf://org/old-merge@{COMMIT}"
    assert (document["verdict"], document["labels"]["two_model"]["tensors"]) == ("yes", 3)


def test_an_output_that_needs_storage_options_gets_them_from_a_recipe(
    s3_bucket: str, s3_endpoint: str, families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    _, by_folder = families["bf16"]
    recipe, output = tmp_path / "recipe.yaml", f"s3://{s3_bucket}/out"
    stored_at = f"stockflow:\n  storage:\n    s3://{s3_bucket}: {{endpoint: {s3_endpoint}}}\n"
    recipe.write_text(f"{by_folder.read_text()}\n{stored_at}")
    runs.merge_elsewhere(recipe, output)  # type: ignore[arg-type]

    finished = runs.invoke("audit", output, "--recipe", recipe, "--json", "--device", "cpu")

    assert finished.exit_code == 0, finished.stderr
    assert json.loads(finished.stdout)["verdict"] == "no"
    assert stockflow.audit(output, recipe=recipe, device="cpu").verdict.answer == "no"
    with pytest.raises(RecipeError, match="here a recipe is audited, whose own apply"):
        stockflow.audit(recipe, recipe=recipe)


def test_a_memory_that_is_too_small_is_refused_by_the_figure_that_was_given(
    families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    family, recipe = families["bf16"]
    merged = merged_by("exact", family, tmp_path / "merged", BF16)

    finished = runs.invoke("audit", recipe, merged, "--memory", "200MiB", "--device", "cpu")

    assert (finished.exit_code, finished.stdout) == (2, "")
    assert "the limit is 200 MiB. Raise --memory" in finished.stderr


def test_progress_says_how_much_there_is_to_read(families: dict[str, tuple[Family, Path]], tmp_path: Path) -> None:
    """One tensor is of two spans: local files are read for each sweep over it."""
    family, recipe = families["f32"]
    merged = merged_by("exact", family, tmp_path / "merged", F32)
    for arguments, num_bytes in (
        ([recipe], 4 * (300_000 + 14_400 + 2_000) * 4),
        ([recipe, merged], 5 * (2 * 300_000 + 14_400 + 2_000) * 4),
    ):
        events: list[Event] = []

        stockflow.audit(*arguments, device="cpu", on_event=events.append)

        stages = [event for event in events if isinstance(event, Stage)]
        assert [stage.name for stage in stages] == ["opening checkpoints", "planning", "reading the inputs"]
        assert (stages[-1].total_bytes, stages[-1].num_items, stages[-1].unit) == (num_bytes, 3, "tensors")
        assert sum(event.num_read for event in events if isinstance(event, Moved)) == num_bytes
        read = events[events.index(stages[-1]) :]
        assert {event.item for event in read if isinstance(event, Done)} == set(SHAPES)


@pytest.mark.parametrize("arguments", [["nowhere.yaml"], ["{recipe}", "nowhere"], ["{folder}"]])
def test_what_is_not_there_is_one_line_and_exit_2(
    arguments: list[str], families: dict[str, tuple[Family, Path]], tmp_path: Path
) -> None:
    _, recipe = families["bf16"]

    finished = runs.invoke("audit", *(word.format(recipe=recipe, folder=tmp_path) for word in arguments))

    assert (finished.exit_code, finished.stdout) == (2, "")
    assert any(line.startswith("stockflow: ") for line in finished.stderr.splitlines())
    assert "Traceback" not in finished.stderr
