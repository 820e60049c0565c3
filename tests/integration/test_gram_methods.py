"""Methods that see products of vectors alone, at their edges: zeros, copies, opposites, far scales, refusals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stockflow import verify
from stockflow.errors import NumericsError, RecipeError
from stockflow.recipe import parse_recipe
from tests import oracle, runs
from tests.checkpoints import Family, Shape, make_family, write_checkpoint, write_recipe
from tests.selection import by_name, diagonal

RANDOM = torch.Generator().manual_seed(7)
X, Y, Z = (torch.randn(1000, generator=RANDOM) for _ in range(3))
NOTHING = torch.zeros(1000)
WEIGHTS = {"nuslerp": [0.4, 0.7], "multislerp": [0.4, 0.7, 0.3], "geometric_median": [0.4, 0.7, 0.6], "karcher": None}
METHODS = pytest.mark.parametrize("method", WEIGHTS)
SHAPES: dict[str, Shape] = {"model.layers.0.experts": (3, 8, 40), "model.layers.0.mlp.weight": (17, 23), "norm": (33,)}


def merged(
    folder: Path, method: str, models: Sequence[torch.Tensor], base: torch.Tensor | None = None, **asked: Any
) -> tuple[oracle.Floats, dict[str, Any]]:
    """Merge one tensor of each model; return the result and its row of facts."""
    tensors = [*([] if base is None else [base]), *models]
    folders = [write_checkpoint(folder / f"model-{i}", {"tensor": tensor}) for i, tensor in enumerate(tensors)]
    tuned = tuple(folders[len(folders) - len(models) :])
    weights = WEIGHTS.get(method)
    asked = {"per_model": {"weight": weights[: len(models)]} if weights else {}} | asked
    recipe = write_recipe(
        folder / "recipe.yaml", method, Family(folders[0], tuned), with_base=base is not None, **asked
    )
    runs.merge_here(recipe, folder / "out")
    return oracle.load_checkpoint(folder / "out")["tensor"].array, runs.tensor_facts(folder / "out")["tensor"]


def expected(method: str, models: Sequence[torch.Tensor], base: torch.Tensor | None = None) -> oracle.OracleResult:
    arrays = [tensor.double().numpy() for tensor in models]
    weights = WEIGHTS[method]
    given: dict[str, Any] = {"weights": weights[: len(models)]} if weights else {}
    if base is not None and method in ("nuslerp", "multislerp"):
        given["base"] = base.double().numpy()
    result: oracle.OracleResult = getattr(oracle, method)(arrays, **given)
    return result


EDGES: Mapping[str, tuple[torch.Tensor, ...]] = {
    "zeros": (NOTHING, NOTHING),
    "one zero": (X, NOTHING),
    "opposed": (X, -X),
    "parallel": (X, 3.0 * X),
    "of 1e-12": (1e-12 * X, 1e-12 * Y),
    "of 1e12": (1e12 * X, 1e12 * Y),
    "one of 1e-6": (X, 1e-6 * Y),
    "one of 1e-6, first": (1e-6 * Y, X),
    "two numbers": (X[0], -X[1]),
    "scalars alike in sign": (X[0].abs(), X[1].abs()),
}


@METHODS
@pytest.mark.parametrize(("edge", "with_base"), diagonal(EDGES, {"": False, "from a base": True}))
def test_edges_are_what_the_oracle_says(
    edge: tuple[torch.Tensor, ...], with_base: bool, method: str, tmp_path: Path
) -> None:
    """A base of zeros leaves task vectors exact. No norm is too small to have a direction."""
    models = [tensor.bfloat16() for tensor in edge]
    base = torch.zeros_like(models[0]) if with_base else None
    counted = [*models, torch.zeros_like(models[0])] if with_base and method == "karcher" else models

    found, _ = merged(tmp_path, method, models, base)

    want = expected(method, counted, base)
    distance = oracle.ulp_distance("BF16", oracle.round_to("BF16", found), oracle.round_to("BF16", want.out))
    assert np.count_nonzero(distance) <= 1e-3 * distance.size
    assert distance.max(initial=0) <= 1


@METHODS
@pytest.mark.parametrize(
    ("dtype", "scope"),
    diagonal(by_name(torch.bfloat16, torch.float16, torch.float32, torch.float64), by_name("tensor", "row")),
)
def test_copies_come_back_bit_for_bit(scope: str, dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, 3.0, -1.0])
    copy = torch.cat([X, special]).reshape(5, 201).to(dtype)

    found, _ = merged(tmp_path, method, [copy] * 2, stockflow={"scope": scope})

    assert found.tobytes() == copy.double().numpy().tobytes()


@pytest.mark.parametrize("method", ["multislerp", "karcher", "geometric_median"])
def test_one_model_comes_back(method: str, tmp_path: Path) -> None:
    found, _ = merged(tmp_path, method, [X])

    assert np.array_equal(found, X.double().numpy())


@METHODS
def test_nan_passes_where_it_is_asked_to_and_is_named_where_not(method: str, tmp_path: Path) -> None:
    models = [X, torch.full_like(X, torch.nan)]

    found, _ = merged(tmp_path / "asked", method, models, stockflow={"on_nonfinite": "propagate"})

    assert np.isnan(found).all()
    with pytest.raises(NumericsError, match="model-1 has NaN or infinity at flat index 0"):
        merged(tmp_path / "not", method, models)


def test_directions_that_cancel_have_no_mean(tmp_path: Path) -> None:
    corners = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.75**0.5]), torch.tensor([-0.5, -(0.75**0.5)])]
    models = [corner.double() for corner in corners]

    with pytest.raises(NumericsError, match="tensor 'tensor': the directions of 3 models cancel"):
        merged(tmp_path, "multislerp", models, per_model={"weight": [1.0, 1.0, 1.0]})


def test_tensors_that_no_model_changed_stay(tmp_path: Path) -> None:
    """mergekit stops there: the direction of nothing has no length."""
    found, row = merged(tmp_path, "multislerp", [X, X, X], X)

    assert np.array_equal(found, X.double().numpy())
    assert row["flags"] == ["zero_delta"]


@pytest.mark.parametrize(
    ("shape", "with_base"),
    diagonal(by_name((17, 23), (3, 5, 4), (33,), (1, 7), (700, 400)), {"": False, "from a base": True}),
)
def test_columns_are_rows_of_the_transpose(shape: tuple[int, ...], with_base: bool, tmp_path: Path) -> None:
    models = [torch.randn(shape, generator=RANDOM).bfloat16() for _ in range(2)]
    base = torch.randn(shape, generator=RANDOM).bfloat16() if with_base else None
    asked = {"nuslerp_flatten": False, "nuslerp_row_wise": True}

    found, row = merged(tmp_path, "nuslerp", models, base, parameters=asked)

    rows = [tensor.double().numpy().reshape(shape[0], -1) for tensor in (*models, *([] if base is None else [base]))]
    turned = rows if len(shape) == 1 else [each.T for each in rows]
    turned = [each.ravel() if len(shape) == 1 else each for each in turned]
    want = oracle.nuslerp(turned[:2], WEIGHTS["nuslerp"], base=turned[2] if with_base else None, scope="row").out
    expected = (want if len(shape) == 1 else want.T).reshape(shape)
    distance = oracle.ulp_distance("BF16", oracle.round_to("BF16", found), oracle.round_to("BF16", expected))
    assert np.count_nonzero(distance) <= 1e-3 * distance.size
    assert verify(tmp_path / "out", inputs=True, sample="100%").is_sound
    assert row["scope"] == "row"


# --- the geometric median


def test_one_bad_model_of_five_hardly_moves_the_median(tmp_path: Path) -> None:
    good = [X + 0.01 * torch.randn(1000, generator=RANDOM) for _ in range(4)]
    alike = {"per_model": {"weight": [1.0] * 5}}

    found, row = merged(tmp_path, "geometric_median", [*good, 1e6 * Z], **alike)

    middle = torch.stack(good).mean(0).double().numpy()
    assert np.linalg.norm(found - middle) < 0.01 * np.linalg.norm(middle)
    assert row["facts"]["share_5"] < 1e-6
    assert sum(row["facts"][f"share_{number}"] for number in range(1, 6)) == pytest.approx(1.0)


def test_a_base_moves_no_median(tmp_path: Path) -> None:
    models = [X, X + 0.1 * Y, X + 0.2 * Z]

    without, _ = merged(tmp_path / "without", "geometric_median", models)
    beside, _ = merged(tmp_path / "beside", "geometric_median", models, X - 0.1 * Z)

    assert without == pytest.approx(beside, abs=1e-6)


def test_a_median_that_is_not_reached_is_flagged(tmp_path: Path) -> None:
    _, row = merged(tmp_path, "geometric_median", [X, Y, Z], parameters={"max_iter": 2})

    assert row["flags"] == ["unconverged"]
    assert row["facts"]["iterations"] == 2.0


# --- what is on record


def test_angles_are_on_record(tmp_path: Path) -> None:
    right = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])]

    facts = {}
    for method in ("nuslerp", "multislerp", "karcher"):
        _, row = merged(tmp_path / method, method, right, **({} if method == "karcher" else EVEN))
        facts[method] = row["facts"]

    assert all(found["angle"] == pytest.approx(90.0) for found in facts.values())
    assert facts["multislerp"]["direction_length"] == pytest.approx(0.5**0.5)
    assert facts["karcher"]["spread"] == pytest.approx(45.0)


EVEN: dict[str, Any] = {"per_model": {"weight": [1.0, 1.0]}}


@pytest.mark.parametrize(
    ("method", "with_base", "scope"),
    diagonal(by_name(*WEIGHTS), {"with a base": True, "without": False}, by_name("tensor", "row")),
)
def test_an_output_is_verified_and_reported(method: str, with_base: bool, scope: str, tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 2, SHAPES, num_shards=2)
    weights = WEIGHTS[method]
    per_model = {"weight": weights[:2]} if weights else {}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        method,
        family,
        per_model=per_model,
        with_base=with_base,
        stockflow={"scope": scope},
    )
    runs.merge_here(recipe, tmp_path / "out")

    verified = runs.invoke("verify", tmp_path / "out", "--inputs", "--sample", "100%")
    reported = runs.invoke("report", tmp_path / "out", "--json", "--html", tmp_path / "report.html")

    assert verified.exit_code == 0, verified.stdout + verified.stderr
    assert "3 combined from the coefficients on record" in verified.stdout + verified.stderr
    assert reported.exit_code == 0, reported.stderr
    report = json.loads(reported.stdout)
    recorded = {name for row in runs.tensor_facts(tmp_path / "out").values() for name in row["facts"]} - {"groups"}
    assert {fact["name"] for fact in report["geometry"]["method_facts"]} == recorded
    has_base = with_base and method != "karcher"
    assert [model["role"] for model in report["models"]] == (["base"] if has_base else ["model"]) + ["model"] * (
        len(report["models"]) - 1
    )


def test_a_changed_coefficient_on_record_is_found(tmp_path: Path) -> None:
    """Verification combines again by what is on record, in the form in which it was combined."""
    family = make_family(tmp_path / "family", 2, SHAPES)
    recipe = write_recipe(tmp_path / "recipe.yaml", "nuslerp", family, with_base=False, **EVEN)
    runs.merge_here(recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["norm"] += 0.25
    save_file(tensors, file)

    verified = runs.invoke("verify", tmp_path / "out", "--sample", "100%")

    assert verified.exit_code == 4
    assert "model.safetensors" in verified.stdout + verified.stderr


# --- what is refused, and where


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return str(caught.value)


TWO = "models:\n  - model: /m/a\n  - model: /m/b\n"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (
            "merge_method: multislerp\n" + TWO + "parameters: {weight: 0.0}",
            "r.yaml:1:1: merge_method: the weights 0, 0 sum to zero, so they cannot be normalized; change them",
        ),
        (
            "merge_method: linear\nmodels:\n  - {model: /m/a, parameters: {weight: 1}}\n"
            "  - {model: /m/b, parameters: {weight: -1}}",
            "the weights 1, -1 sum to zero, so they cannot be normalized; change them",
        ),
        (
            "merge_method: multislerp\nbase_model: /m/c\nmodels:\n  - {model: /m/a, parameters: {weight: 1}}\n"
            "  - {model: /m/b, parameters: {weight: -1}}",
            "so they cannot be normalized; change them or set `normalize_weights: false`",
        ),
        (
            "merge_method: linear\nmodels:\n  - {model: /m/a, parameters: {weight: 0.1}}\n"
            "  - {model: /m/b, parameters: {weight: 0.2}}\n  - {model: /m/c, parameters: {weight: -0.3}}",
            "the weights 0.1, 0.2, -0.3 sum to zero, so they cannot be normalized",
        ),
        (
            "merge_method: geometric_median\n" + TWO + "parameters: {weight: 0}",
            "every `weight` of `geometric_median` is 0",
        ),
        (
            "merge_method: nuslerp\n" + TWO + "parameters: {weight: 1, nuslerp_flatten: false}\n"
            "stockflow: {scope: leading}",
            "`nuslerp_flatten: false` means the scope row, found `scope: leading`",
        ),
        (
            "merge_method: nuslerp\nbase_model: /m/a\n" + TWO + "parameters: {weight: 1}",
            "`nuslerp` needs 2 models besides the base, found 1",
        ),
        (
            "merge_method: nuslerp\n" + TWO + "  - model: /m/c\nparameters: {weight: 1}",
            "`nuslerp` needs 2 models, found 3",
        ),
        (
            "merge_method: passthrough\nbase_model: /m/c\nmodels: [{model: /m/a}]",
            "`passthrough` needs 1 model, found 2, as a base that is not listed counts like them",
        ),
        ("merge_method: karcher\n" + TWO + "parameters: {max_iter: 2.5}", "expected an integer, found 2.5"),
        ("merge_method: multislerp\n" + TWO + "parameters: {weight: 1, eps: -1}", "expected at least 0, found -1"),
    ],
    ids=range(11),
)
def test_what_makes_no_sense_is_refused_by_the_recipe(head: str, said: str) -> None:
    assert said in refusal(head)
    assert "normalize: false" not in refusal(head)


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        (
            "multislerp",
            (-0.5, 0.5),
            "; change them or set `normalize_weights: false`; so it is for the tensor 'model.layers.0.experts'",
        ),
        ("linear", (-0.5, 0.5), "; change them; so it is for the tensor 'model.layers.0.experts'"),
        ("linear", (0.0, 0.0), "; change them; so it is for the tensor 'model.layers.0.experts', by the filter 'exp'"),
    ],
)
def test_weights_that_cancel_for_some_tensors_are_refused_before_anything_is_read(
    tmp_path: Path, method: str, values: tuple[float, float], said: str
) -> None:
    family = make_family(tmp_path / "family", 2, SHAPES)
    weight = [
        [{"value": 1.0, "filter": "mlp"}, {"value": value, **({} if any(values) else {"filter": "exp"})}, {"value": 1}]
        for value in values
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", method, family, per_model={"weight": weight})

    with pytest.raises(RecipeError) as caught:
        runs.merge_here(recipe, tmp_path / "out")

    assert str(caught.value).endswith(f"sum to zero, so they cannot be normalized{said}")
    assert not list((tmp_path / "out").glob("*"))


# --- slerp


def test_slerp_begins_at_the_base_wherever_it_is_listed(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 1, SHAPES, delta_scale=0.03)
    digests = []
    base, tuned = family.base, family.tuned[0]
    for number, models in enumerate(([tuned], [tuned, base], [base, tuned])):
        recipe = write_recipe(
            tmp_path / f"{number}.yaml", "slerp", Family(family.base, tuple(models)), parameters={"t": 0.3}
        )
        runs.merge_here(recipe, tmp_path / f"out-{number}")
        digests.append(runs.shard_digests(tmp_path / f"out-{number}"))

    assert digests[0] == digests[1] == digests[2]


# --- passthrough


@pytest.mark.parametrize("scale", [None, 1.0], ids=["no scale", "a scale of 1"])
def test_bytes_of_any_dtype_are_carried_over(scale: float | None, tmp_path: Path) -> None:
    """NaN with a payload, signalling, and formats that are not merged, too."""
    stored = {
        "bf16": torch.tensor([0x7FA1, 0x0001, -32768], dtype=torch.int32).to(torch.int16).view(torch.bfloat16),
        "f8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "f32": torch.randn(3, 5),
        "ids": torch.arange(7),
    }
    model = write_checkpoint(tmp_path / "model", stored, num_shards=2)
    per_model = {} if scale is None else {"scale": [scale]}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", "passthrough", Family(model, (model,)), with_base=False, per_model=per_model
    )

    runs.merge_here(recipe, tmp_path / "out")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.view(torch.uint8).tolist() for name, tensor in found.items()} == {
        name: tensor.view(torch.uint8).tolist() for name, tensor in stored.items()
    }
    assert {row["method"] for row in runs.tensor_facts(tmp_path / "out").values()} == {"copy"}


@pytest.mark.parametrize("scale", [0.0, -0.37, 2.5])
def test_a_scale_is_applied_in_working_precision(scale: float, tmp_path: Path) -> None:
    model = X.bfloat16()

    found, _ = merged(tmp_path, "passthrough", [model], per_model={"scale": [scale]})

    assert np.array_equal(oracle.round_to("BF16", found), oracle.round_to("BF16", scale * model.double().numpy()))


def test_another_dtype_is_rounded_to(tmp_path: Path) -> None:
    found, row = merged(tmp_path, "passthrough", [X], out_dtype="bfloat16")

    assert row["dtype"] == "BF16"
    assert np.array_equal(found, X.bfloat16().double().numpy())
