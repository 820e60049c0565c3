"""Depths: where a layer stands among its like, told from names alone."""

from pathlib import Path

import pytest

from stockflow.checkpoints.naming import LayerNames, LayerPlace
from stockflow.errors import PlanError
from stockflow.methods.parameters import Kind, Scalar
from stockflow.planning.towers import depth_of, num_layers
from stockflow.recipe.resolve import value_at
from tests.plans import Merge


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    return Merge(tmp_path)


@pytest.mark.parametrize(
    ("depth", "values", "kind", "expected"),
    [
        (0.0, (0.3,), "number", 0.3),
        (1.0, (0.3,), "number", 0.3),
        (0.0, (1.0, 3.0), "number", 1.0),
        (0.25, (1.0, 3.0), "number", 1.5),
        (1.0, (1.0, 3.0), "number", 3.0),
        (0.5, (0.0, 4.0, 6.0), "number", 4.0),
        (0.75, (0.0, 4.0, 6.0), "number", 5.0),
        (0.1, (10.0, 20.0), "integer", 11.0),
        (0.49, (True, False), "flag", True),
        (0.99, (True, False), "flag", True),
        (1.0, (True, False), "flag", False),
        (0.5, ("a", "b", "c"), "word", "b"),
    ],
)
def test_numbers_are_interpolated_and_flags_are_not(
    depth: float, values: tuple[Scalar, ...], kind: Kind, expected: Scalar
) -> None:
    assert value_at(depth, values, kind) == expected


def test_the_depth_goes_from_the_first_layer_to_the_last() -> None:
    assert [depth_of(number, 5) for number in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert depth_of(0, 1) == 1.0
    assert depth_of(61, 61) == 1.0


def test_towers_count_their_own_layers() -> None:
    names = ["vision.blocks.0.a", "vision.blocks.1.a", "model.layers.0.a", "model.layers.4.b", "head"]
    places = [place for name in names if (place := LayerNames().place(name))]

    assert num_layers(places, None) == {"vision.blocks.": 2, "model.layers.": 5}


@pytest.mark.parametrize(("beyond", "expected"), [(1, 61), (None, 62), (2, 62)])
def test_layers_that_predict_further_tokens_lie_beyond_the_last(beyond: int | None, expected: int) -> None:
    places = [LayerPlace("model.layers.", number, ".w") for number in range(62)]

    config = {"num_hidden_layers": 61, "num_nextn_predict_layers": beyond}
    assert num_layers(places, config) == {"model.layers.": expected}


def test_a_pattern_says_how_names_in_layers_begin() -> None:
    names = LayerNames(("backbone.stage_", "."))

    assert names.place("backbone.stage_12.conv.w") == LayerPlace("backbone.stage_", 12, ".conv.w")
    assert names.place("backbone.stage_x.conv.w") is None
    assert names.place("other.backbone.stage_12.conv.w") is None
    assert names.place("model.layers.3.w") is None


def test_plans_hold_numbers_one_object_per_layer_and_filter(merge: Merge) -> None:
    merge.write()
    plan = merge.plan(merge_method="linear", base_model=None, parameters={"weight": [1, 3]})

    found = {job.output.name: job.result.parameters for job in plan.jobs if not job.is_copy}
    assert {name: each.each("weight") for name, each in found.items()} == {
        "embed.weight": (1.0, 1.0),
        "layers.0.norm.weight": (1.0, 1.0),
        "layers.1.norm.weight": (3.0, 3.0),
        "scalar": (1.0, 1.0),
    }
    assert found["embed.weight"] is found["layers.0.norm.weight"]


def test_a_plan_is_known_by_its_values_not_by_how_they_are_written(merge: Merge) -> None:
    merge.write()
    ids = {
        merge.plan(merge_method="linear", base_model=None, parameters={"weight": weight}).plan_id
        for weight in (1, [1], [1, 1], [{"value": [1, 1, 1]}], {"filter": "*", "value": ["1.0", 1]})
    }

    assert len(ids) == 1
    assert merge.plan(merge_method="linear", base_model=None, parameters={"weight": [1, 2]}).plan_id not in ids


def test_values_over_layers_that_no_name_tells_are_refused(merge: Merge) -> None:
    merge.models = [{name.replace("layers.", "part-"): each for name, each in model.items()} for model in merge.models]
    merge.write()
    words = merge.recipe | {"merge_method": "linear", "base_model": None, "parameters": {"weight": [1, 2]}}

    with pytest.raises(PlanError, match=r"no name in .* tells a layer; say how such names begin"):
        merge.plan(**words)
    found = merge.plan(**words, stockflow={"layers": "part-{layer}."})
    weights = {job.output.name: job.result.parameters.each("weight") for job in found.jobs if not job.is_copy}
    assert weights["part-1.norm.weight"] == (2.0, 2.0)
