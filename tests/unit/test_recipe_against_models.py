"""What a plan says of a recipe once it sees the models: filters that match nothing, buffers of some models, seeds."""

from pathlib import Path

import pytest
import torch

from stockflow.methods import METHODS
from stockflow.planning.plan import MergePlan
from stockflow.text.remarks import Remark
from tests.plans import Merge, jobs_of

DRAWING = [name for name, method in METHODS.items() if any(each.name == "seed" for each in method.parameters)]


def remarks(plan: MergePlan, code: str) -> list[Remark]:
    return [remark for remark in plan.remarks if remark.code == code]


def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_name_and_its_place(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    rules = {"rules": [{"filter": "norm", "action": "copy"}, {"filter": "embedd", "action": "copy"}]}

    assert (
        "recipe.yaml:11:5: no tensor's name contains 'embedd', the filter of a rule; did you mean 'embed'?; "
        "or accept it: `stockflow: {accept: [matches-nothing]}`"
    ) in merge.refusal(stockflow=rules)
    accepted = merge.plan(stockflow=rules | {"accept": ["matches-nothing"]})
    assert [remark.values["filter"] for remark in remarks(accepted, "matches-nothing")] == ["embedd"]


def test_a_rule_for_tensors_that_only_a_tuned_model_has_matches(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[1]["mtp_head.weight"] = torch.ones(3, dtype=torch.bfloat16)
    merge.write()

    plan = merge.plan(stockflow={"rules": [{"filter": "mtp_head", "action": "skip"}]})

    assert remarks(plan, "matches-nothing") == []


@pytest.mark.parametrize("text", ["*", "", "norm", "s.0.n", "weight"])
def test_filters_that_match_are_not_told_of(tmp_path: Path, text: str) -> None:
    plan = Merge(tmp_path).write().plan(parameters={"filter_wise": [{"filter": text, "value": True}, {"value": False}]})

    assert remarks(plan, "matches-nothing") == []


def test_a_filter_of_a_parameter_that_matches_nothing_is_warned_of(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    filtered = [{"filter": "layersnorm", "value": True}, {"filter": "zzz", "value": True}, {"value": False}]

    plan = merge.plan(parameters={"filter_wise": filtered})

    assert [(remark.severity, remark.text) for remark in remarks(plan, "matches-nothing")] == [
        ("warning", "no tensor's name contains 'layersnorm', the filter of a value; did you mean 'layers.norm'?"),
        ("warning", "no tensor's name contains 'zzz', the filter of a value; remove it"),
    ]
    assert [remark.place for remark in remarks(plan, "matches-nothing")] == ["recipe.yaml:8:5", "recipe.yaml:10:5"]


def test_filters_in_slices_are_told_of_too(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    sources = [
        {
            "model": str(folder),
            "layer_range": [0, 2],
            "parameters": {"weight": [{"filter": text, "value": 1}, {"value": 2}]},
        }
        for folder, text in zip(merge.folders, ("norm", "norn", "layers.1"), strict=True)
    ]
    merge.recipe = {"merge_method": "linear", "slices": [{"sources": sources}]}

    (told,) = remarks(merge.plan(), "matches-nothing")

    assert told.text == "no tensor's name contains 'norn', the filter of a value; did you mean 'norm'?"


ROTARY = "layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("holders", [(0,), (1,), (0, 2), (1, 2)])
def test_rotary_frequencies_of_some_models_are_left_out_and_said(tmp_path: Path, holders: tuple[int, ...]) -> None:
    merge = Merge(tmp_path)
    for number in holders:
        merge.models[number][ROTARY] = torch.arange(4, dtype=torch.float32)

    plan = merge.write().plan()

    assert ROTARY not in jobs_of(plan)
    told = remarks(plan, "recomputed")
    assert [remark.models for remark in told] == [(str(merge.folders[number]),) for number in holders]
    assert told[0].tensors == (ROTARY,)
    assert told[0].severity == "note"


def test_rotary_frequencies_of_all_models_stay(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors[ROTARY] = torch.arange(4, dtype=torch.float32)

    plan = merge.write().plan()

    assert ROTARY in jobs_of(plan)
    assert remarks(plan, "recomputed") == []


def test_a_rule_decides_about_rotary_frequencies(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[0][ROTARY] = torch.arange(4, dtype=torch.float32)

    plan = merge.write().plan(stockflow={"rules": [{"filter": "inv_freq", "action": "copy"}]})

    assert ROTARY in jobs_of(plan)


def test_another_buffer_that_some_models_hold_is_no_exception(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[0]["layers.0.self_attn.freq"] = torch.arange(4, dtype=torch.float32)

    assert "layers.0.self_attn.freq" in merge.write().refusal()


@pytest.mark.parametrize("name", DRAWING)
def test_the_seed_of_a_method_that_draws_is_told(tmp_path: Path, name: str) -> None:
    merge = Merge(tmp_path).write()

    plan = merge.plan(merge_method=name, stockflow={"seed": 7}, parameters={"weight": 1, "density": 0.5})

    assert [remark.values for remark in remarks(plan, "seed")] == [{"seed": "7"}]


def test_the_seed_is_not_told_of_where_nothing_is_drawn(tmp_path: Path) -> None:
    assert remarks(Merge(tmp_path).write().plan(stockflow={"seed": 7}), "seed") == []


def test_a_tokenizer_that_is_not_wanted_stays_behind_and_is_told_of(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    assert "tokenizer.json" in {side.key for side in merge.plan().side_files}

    plan = merge.plan(stockflow={"copy_tokenizer": False})

    assert {side.key for side in plan.side_files} == {"generation_config.json"}
    assert [remark.text for remark in remarks(plan, "not-copied")] == [
        "the tokenizer is not copied, as the recipe says: tokenizer.json, tokenizer_config.json"
    ]
