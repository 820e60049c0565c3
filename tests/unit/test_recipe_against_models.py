"""What a plan says of a recipe once it sees the models: filters that match nothing, buffers of some models, seeds."""

import json
from pathlib import Path

import pytest
import torch

from stockflow.checkpoints.adapters.factors import factors_within
from stockflow.checkpoints.files.header import TensorSpec
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
        (
            "warning",
            "no tensor's name contains 'layersnorm', the filter of a value; names go along with it up to 'layers', as "
            "'layers.0.norm.weight' does: correct it, or remove it",
        ),
        ("warning", "no tensor's name contains 'zzz', the filter of a value; correct it, or remove it"),
    ]
    assert [remark.place for remark in remarks(plan, "matches-nothing")] == ["recipe.yaml:8:5", "recipe.yaml:10:5"]


def test_rules_and_values_that_are_never_reached_are_said(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    rules = [{"filter": "layers", "action": "copy"}, {"filter": "layers.1", "action": "skip"}]
    values = [{"filter": "layers", "value": 0.5}, {"value": 1.0}, {"filter": "embed", "value": 0.2}]

    refused = merge.refusal(stockflow={"rules": rules})
    plan = merge.plan(merge_method="task_arithmetic", parameters={"weight": values})

    assert "'layers.1', the filter of a rule, is never reached: 'layers' before it takes all its tensors" in refused
    assert [(remark.severity, remark.values["filter"]) for remark in remarks(plan, "matches-nothing")] == [
        ("warning", "embed")
    ]


def attention(
    names: tuple[str, ...] = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
) -> dict[str, torch.Tensor]:
    return {f"layers.0.{name}.weight": torch.full((3, 3), float(number)) for number, name in enumerate(names)}


DEAD = {
    "within another": (
        ["mlp", "up_proj"],
        "'up_proj', the filter of {}, is never reached: 'mlp' before it takes all its",
    ),
    "within a module": (["self_attn", "q_proj"], "'q_proj', the filter of {}, is never reached: 'self_attn' before"),
    "by a prefix": (["layers.", "mlp"], "'mlp', the filter of {}, is never reached: 'layers.' before it takes all"),
    "by several": (
        ["o_proj", "layers.0", "_proj"],
        "'_proj', the filter of {}, is never reached: 'o_proj', 'layers.0' before it take all its tensors",
    ),
    "of one text": (["mlp", "mlp."], "'mlp.', the filter of {}, is never reached: 'mlp' before it takes all"),
    "behind all": (["*", "mlp"], "'mlp', the filter of {}, is never reached: one without filter before it takes all"),
}
"""Filters in order, the last of which is left nothing, and what is said of it."""
LIVE = [["up_proj", "mlp"], ["q_proj", "self_attn"], ["norm", "self_attn", "mlp", "*"], ["mlp", "*"], ["position", "o"]]
"""Filters each of which is left something, or that say what is for the rest."""


def filtered(merge: Merge, texts: list[str], last: float = 0.0) -> tuple[dict[str, object], list[object]]:
    """Return rules and values by filters, of which only the last says something else, over a model with attention."""
    for tensors in merge.models:
        tensors |= attention()
    weights = [0.5] * (len(texts) - 1) + [last]
    rules: list[dict[str, object]] = [{"filter": text, "action": "copy"} for text in texts]
    if last != weights[0]:
        rules[-1] = {"filter": texts[-1], "merge_method": "linear", "parameters": {"weight": 1.0}}
    values: list[object] = [{"filter": text, "value": value} for text, value in zip(texts, weights, strict=True)]
    return {"rules": rules}, [*values, {"value": 1.0}]


@pytest.mark.parametrize("case", DEAD)
def test_filters_all_of_whose_tensors_go_to_ones_before_them_are_told_by_the_tensors(tmp_path: Path, case: str) -> None:
    merge = Merge(tmp_path)
    texts, told = DEAD[case]
    rules, values = filtered(merge, texts)
    merge.write()

    refused = merge.refusal(merge_method="task_arithmetic", parameters={"weight": 1.0}, stockflow=rules)
    plan = merge.plan(merge_method="task_arithmetic", parameters={"weight": values})

    assert told.format("a rule") in refused
    (warned,) = remarks(plan, "matches-nothing")
    assert warned.severity == "warning"
    assert told.format("a value") in warned.text


def test_a_filter_for_the_rest_of_which_nothing_is_left_is_noted(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    rules, values = filtered(merge, ["q_proj", "o_proj", "self_attn"])
    merge.write()

    plan = merge.plan(merge_method="task_arithmetic", parameters={"weight": values}, stockflow=rules)

    left = "is left no tensor, as 'q_proj', 'o_proj' before it take all its tensors; remove it, if these are meant"
    assert [(each.severity, each.text) for each in remarks(plan, "matches-nothing")] == [
        ("note", f"'self_attn', the filter of {what}, {left}") for what in ("a rule", "a value")
    ]


@pytest.mark.parametrize("texts", LIVE)
def test_filters_that_catch_what_is_left_are_no_mistake(tmp_path: Path, texts: list[str]) -> None:
    merge = Merge(tmp_path)
    rules, values = filtered(merge, texts)
    merge.write()

    plan = merge.plan(merge_method="task_arithmetic", parameters={"weight": values}, stockflow=rules)

    assert remarks(plan, "matches-nothing") == []


@pytest.mark.parametrize("case", DEAD)
def test_filters_that_are_left_nothing_may_say_what_those_before_them_say(tmp_path: Path, case: str) -> None:
    merge = Merge(tmp_path)
    rules, values = filtered(merge, DEAD[case][0], last=0.5)
    merge.write()

    plan = merge.plan(
        merge_method="task_arithmetic",
        parameters={"weight": values},
        stockflow=rules | {"accept": ["unmerged"]},
    )

    assert remarks(plan, "matches-nothing") == []


def test_a_rule_that_only_acts_on_what_a_tune_has_besides_is_reached(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[1]["layers.9.norm.weight"] = torch.ones(3)
    rules = [{"filter": f"layers.{number}", "action": "copy"} for number in range(2)]

    plan = merge.write().plan(stockflow={"rules": [*rules, {"filter": "norm", "action": "skip"}]})

    assert remarks(plan, "matches-nothing") == []


def test_values_of_models_and_of_slices_that_are_never_reached_are_said_once(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    weight = {"weight": [{"filter": "layers", "value": 1}, {"filter": "norm", "value": 0}, {"value": 0.5}]}
    sources = [{"model": str(folder), "layer_range": [0, 2], "parameters": weight} for folder in merge.folders]
    models = [{"model": str(folder), "parameters": weight} for folder in merge.folders[1:]]

    for recipe in ({"slices": [{"sources": sources}]}, {"models": models}):
        merge.recipe = {"merge_method": "linear"} | recipe
        assert [remark.values["filter"] for remark in remarks(merge.plan(), "matches-nothing")] == ["norm"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("layers.1", "is for 'layers.10', 'layers.11', too; 'layers.1.' is for that number alone"),
        ("1.norm", "is for '11.norm', too; '.1.norm' is for that number alone"),
        ("layers.1.", ""),
        (".1.norm", ""),
        ("layers.0", ""),
        ("layers.11", ""),
        ("layers", ""),
        ("*", ""),
    ],
)
def test_a_filter_that_is_for_longer_numbers_too_is_noted(tmp_path: Path, text: str, told: str) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors |= {f"layers.{number}.norm.weight": tensors["layers.1.norm.weight"].clone() for number in (10, 11)}
    merge.write()
    rules = {"rules": [{"filter": text, "action": "copy"}], "accept": ["unmerged"]}
    values = {"weight": [{"filter": text, "value": 0.5}, {"value": 1.0}]}

    plans = merge.plan(stockflow=rules), merge.plan(merge_method="task_arithmetic", parameters=values)

    found = [remark for plan in plans for remark in remarks(plan, "longer-numbers")]
    assert [(each.severity, each.text) for each in found] == [("note", f"the filter {text!r} {told}")] * 2 * bool(told)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (1.0, 1),
        ([{"filter": "layers", "value": 0.2}, {"value": 0.3}], 1),
        ([{"filter": "embed", "value": 0.2}], 0),
        ([{"filter": "norm", "value": 0.2}], 0),
        (None, 0),
    ],
)
def test_values_for_all_models_that_each_model_has_its_own_before_are_said(
    tmp_path: Path, own: object, told: int
) -> None:
    merge = Merge(tmp_path).write()
    given = {} if own is None else {"parameters": {"weight": own}}
    models = [{"model": str(folder)} | given for folder in merge.folders[1:]]
    values = {"weight": [{"filter": "norm", "value": 0.0}, {"value": 1.0}]}

    plan = merge.plan(merge_method="task_arithmetic", models=models, parameters=values)
    one = merge.plan(
        merge_method="task_arithmetic", models=[models[0], {"model": models[1]["model"]}], parameters=values
    )

    found = [remark.text for remark in remarks(plan, "matches-nothing")]
    assert ["each model has its own `weight` for these tensors" in text for text in found] == [True] * told
    assert remarks(one, "matches-nothing") == []


def test_rules_and_values_that_say_what_one_before_them_says_are_no_mistake(tmp_path: Path) -> None:
    rules = [{"filter": "layers", "action": "copy"}, {"filter": "layers.1", "action": "copy"}]
    values = [{"filter": "layers", "value": 0.5}, {"filter": "layers.1", "value": 0.5}, {"value": 1.0}]

    plan = (
        Merge(tmp_path)
        .write()
        .plan(merge_method="task_arithmetic", parameters={"weight": values}, stockflow={"rules": rules})
    )

    assert [remark for remark in remarks(plan, "matches-nothing") if "never reached" in remark.text] == []


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

    refused = merge.refusal()
    (told,) = remarks(merge.plan(stockflow={"accept": ["matches-nothing"]}), "matches-nothing")

    assert told.text in refused
    assert "`stockflow: {accept: [matches-nothing]}`" in refused
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


MASK = torch.ones(1, 1, 4, 4).tril()


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("h.0.attn.bias", MASK),
        ("h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("embeddings.position_ids", torch.arange(4)[None]),
        ("layer.0.attention.self.rotary_embeddings.inv_freq", torch.arange(4.0)),
        ("transformer.rotary_pos_emb.inv_freq", torch.arange(4.0)),
        ("rope.freqs", torch.arange(4.0)),
    ],
)
def test_masks_and_positions_of_some_models_are_left_out_and_said(
    tmp_path: Path, name: str, buffer: torch.Tensor
) -> None:
    merge = Merge(tmp_path)
    merge.models[1][name] = buffer

    plan = merge.write().plan()

    assert name not in jobs_of(plan)
    (told,) = remarks(plan, "recomputed")
    assert told.text.endswith(f"such as {name!r} is left out: not every model has it alike, and loaders compute it")


def test_masks_of_several_dtypes_are_left_out(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors, dtype in zip(merge.models, (torch.uint8, torch.bool, torch.float32), strict=True):
        tensors["h.0.attn.bias"] = MASK.to(dtype)

    plan = merge.write().plan()

    assert "h.0.attn.bias" not in jobs_of(plan)
    assert len(remarks(plan, "recomputed")) == 3


@pytest.mark.parametrize("lengths", [(6, 7, 8), (6, 6, 6)])
def test_what_transformer_engine_keeps_is_left_out_or_named(lengths: tuple[int, ...], tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, (tensors, length) in enumerate(zip(merge.models, lengths, strict=True)):
        tensors["q_proj._extra_state"] = torch.full((length,), number, dtype=torch.uint8)

    if len(set(lengths)) > 1:
        plan = merge.write().plan()
        assert "q_proj._extra_state" not in jobs_of(plan)
        assert len(remarks(plan, "recomputed")) == 3
    else:
        refused = merge.write().refusal()
        assert "TransformerEngine measures it anew: a rule with `action: skip` leaves it out" in refused


def test_rotary_tables_of_several_lengths_are_left_out(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for number, tensors in enumerate(merge.models):
        tensors["layers.0.rotary_emb.cos_cached"] = torch.ones(1, 1, 8 if number else 4, 2)

    plan = merge.write().plan()

    assert "layers.0.rotary_emb.cos_cached" not in jobs_of(plan)
    assert len(remarks(plan, "recomputed")) == 3


@pytest.mark.parametrize("name", ["q.input_quantizer._amax", "fc.activation_post_process.max_val"])
def test_what_was_measured_to_quantise_by_is_said(tmp_path: Path, name: str) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors[name] = torch.ones(())

    (told,) = remarks(merge.write().plan(), "static-scales")

    assert (told.severity, told.tensors) == ("warning", (name,))
    assert told.text.endswith("leaves such scales out, and they are measured anew")


def test_what_an_adapter_wrapped_in_all_tunes_is_not_looked_for_in_a_base(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models[1:]:
        tensors["head.modules_to_save.default.weight"] = torch.ones(2, 2)

    assert "PEFT wrapped the model: save it after `model.merge_and_unload()`" in merge.write().refusal()


def test_averages_that_a_base_keeps_beside_its_weights_are_not_advised_to_be_copied(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[0]["model_ema.layers"] = torch.ones(4)

    refused = merge.write().refusal()
    assert "that is what the trainer of one model keeps: a rule with `action: skip` leaves it out" in refused
    assert "action: copy" not in refused


def test_a_part_beside_the_model_that_it_is_of_is_told_by_its_folder(tmp_path: Path) -> None:
    merge = Merge(tmp_path).write()
    merge.folders[0].rename(tmp_path / "transformer")
    merge.folders[0].mkdir()
    (tmp_path / "transformer").rename(merge.folders[0] / "transformer")
    (merge.folders[0] / "transformer/model.safetensors").rename(
        merge.folders[0] / "transformer/diffusion_pytorch_model.safetensors"
    )
    parts = {"_class_name": "X", "transformer": ["diffusers", "T"]}
    (merge.folders[0] / "model_index.json").write_text(json.dumps(parts))

    found = merge.refusal()
    assert f"name {merge.folders[0]}/transformer in the place of the latter" in found


def test_a_head_that_peft_wrapped_is_not_missing(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[0]["score.weight"] = torch.ones(2, 2)
    for tensors in merge.models[1:]:
        tensors |= {f"base_model.model.score.{part}.weight": torch.ones(2, 2) for part in ("original_module", "x")}

    (line,) = (line for line in merge.write().refusal().splitlines() if "'score.weight' is missing" in line)
    assert line.endswith("; PEFT wrapped the model: save it after `model.merge_and_unload()`")


def test_a_bias_of_attention_is_no_mask(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    merge.models[1]["h.0.attn.bias"] = torch.ones(4)

    assert "'h.0.attn.bias' is in" in merge.write().refusal()


FACTORS = {f"layers.0.q_proj.lora_{part}.default.weight": torch.ones(2, 2) for part in "AB"}
KOHYA = {f"lora_unet_down_0_to_q.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
DIFFUSERS = {f"unet.attn.processor.to_q_lora.{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
INSIDE = (
    "holds 2 factors of adapters of PEFT such as 'layers.0.q_proj.lora_A.default.weight', and sums of factors are not"
)


def test_factors_in_a_whole_model_are_no_weights_whose_rules_could_skip_them(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    tensors = merge.models[1]
    merge.models[1] = {name: each for name, each in tensors.items() if name != "embed.weight"}
    merge.models[1] |= {"embed.base_layer.weight": tensors["embed.weight"]} | FACTORS

    said = merge.write().refusal()

    assert INSIDE in said
    assert "action" not in said


@pytest.mark.parametrize(
    "part",
    [
        "hada_w1_a.default", "lokr_w2", "oft_R.default", "boft_s.x", "vera_lambda_b.x", "ia3_l", "lora_a",
        "lora_b.weight", "adapter.linear_in.weight", "lora_kqv_adapter.linear_out.weight", "delora_A.default",
        "adapter.adapter_q.linear_in.weight", "processor.qkv_lora1.down.weight",
    ],
)  # fmt: skip
def test_factors_of_other_kinds_of_adapters_are_no_weights(tmp_path: Path, part: str) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors[f"layers.0.q_proj.{part}"] = torch.ones(2, 2)

    said = merge.write().refusal()

    assert "holds 1 factor of adapters" in said
    assert "BASE+ADAPTER" not in said


def bare(first: str, second: str, more: tuple[int, ...] = (), rank: int = 2) -> dict[str, torch.Tensor]:
    """Return factors of two matrices whose names are no library's."""
    return {
        name.format(number): torch.ones(shape)
        for number in range(2)
        for name, shape in ((first, (rank, 24, *more)), (second, (32, rank, *(1 for _ in more))))
    }


FORMS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "kohya": (KOHYA, "of kohya's sd-scripts such as 'lora_unet_down_0_to_q.lora_down.weight', and sums of factors are"),
    "diffusers": (DIFFUSERS, "put them into the weights with what made them (diffusers: `load_lora_weights(FILE)`"),
    "diffusers of PEFT": (
        {f"transformer.x.lora_{part}.weight": torch.ones(2, 2) for part in "AB"},
        "2 factors of adapters of diffusers such as",
    ),
    "LyCORIS": ({f"lora_unet_x.hada_w{part}": torch.ones(2, 2) for part in ("1_a", "1_b")}, "LyCORIS: `tools/merge.py"),
    "GLoRA": ({f"lora_unet_x.{part}.weight": torch.ones(2, 2) for part in ("a1", "b2")}, "LyCORIS: `tools/merge.py"),
    "ControlLoRA": (
        bare("input_blocks.{}.0.in_layers.2.down", "input_blocks.{}.0.in_layers.2.up", (3, 3))
        | {"zero_convs.0.0.weight": torch.ones(4, 4, 1, 1), "input_blocks.0.0.in_layers.2.bias": torch.ones(32)},
        "4 factors of adapters such as 'input_blocks.0.0.in_layers.2.down', and sums of factors are not factors",
    ),
    "single letters": (bare("l.{}.q.A", "l.{}.q.B"), "each second times its first is what is added to the weight"),
    "colons": (bare("unet:{}:down", "unet:{}:up"), "4 factors of adapters such as 'unet:0:down'"),
    "words": (bare("w_a_{}.weight", "w_b_{}.weight"), "4 factors of adapters such as 'w_a_0.weight'"),
}
"""Adapters in the place of models, and what is said of them."""


@pytest.mark.parametrize("form", FORMS)
def test_adapters_in_the_place_of_models_are_refused(tmp_path: Path, form: str) -> None:
    merge = Merge(tmp_path, (1, 1, 1))
    factors, told = FORMS[form]
    merge.models = [dict(factors)] * 3

    refused = merge.write().refusal()

    assert told in refused
    assert "accept: [factors-inside]" in refused


LAYERS = {
    "a feed-forward network": bare("l.{}.mlp.down_proj.weight", "l.{}.mlp.up_proj.weight", rank=8),
    "one beside others of its width": bare("l.{}.down.weight", "l.{}.up.weight") | {"embed.weight": torch.ones(64, 2)},
    "bottlenecks with biases": bare("l.{}.down.weight", "l.{}.up.weight")
    | {f"l.{number}.down.bias": torch.ones(2) for number in range(2)},
    "few among others": bare("q_a.{}.weight", "q_b.{}.weight") | {"experts.weight": torch.ones(30, 30)},
    "convolutions": bare("down_blocks.{}.weight", "up_blocks.{}.weight", (3, 3), rank=16),
}
"""Whole models with modules that go down and up."""


@pytest.mark.parametrize("kind", LAYERS)
def test_modules_that_go_down_and_up_are_no_factors(kind: str) -> None:
    specs = {name: TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in LAYERS[kind].items()}

    assert factors_within(specs) == []


def test_factors_of_all_models_are_refused_until_accepted(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors |= FACTORS

    assert INSIDE in merge.write().refusal()
    assert len(remarks(merge.plan(stockflow={"accept": ["factors-inside"]}), "factors-inside")) == 3
    copied = [{"filter": "lora_", "action": "copy"}]
    assert not remarks(merge.plan(stockflow={"rules": copied}), "factors-inside")


@pytest.mark.parametrize("holder", [0, 1])
def test_a_mark_of_what_a_model_predicts_is_not_copied_into_a_mix(tmp_path: Path, holder: int) -> None:
    merge = Merge(tmp_path)
    merge.models[holder]["v_pred"] = torch.empty(0)

    refused = merge.write().refusal()

    assert "by it loaders know that a model predicts otherwise" in refused
    assert "action:" not in refused


@pytest.mark.parametrize(
    ("action", "holders"),
    [("copy", (0,)), ("copy", (0, 1)), ("skip", (0,)), ("skip", (1,)), ("skip", (0, 1)), ("skip", (1, 2))],
)
def test_models_that_predict_otherwise_are_said_whatever_rule_settles_their_mark(
    tmp_path: Path, holders: tuple[int, ...], action: str
) -> None:
    merge = Merge(tmp_path)
    for holder in holders:
        merge.models[holder]["v_pred"] = torch.empty(0)
    rule = {"filter": "v_pred", "action": action}

    (told,) = remarks(merge.write().plan(stockflow={"rules": [rule]}), "predictions-differ")

    others = [str(folder) for number, folder in enumerate(merge.folders) if number not in holders]
    having = [str(merge.folders[holder]) for holder in holders]
    assert (told.severity, told.models) == ("warning", (*having, *others))
    assert f"by a rule it is {'' if action == 'copy' else 'not '}written" in told.text


def test_models_that_all_predict_alike_are_no_mix(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors["v_pred"] = torch.empty(0)

    assert not remarks(merge.write().plan(), "predictions-differ")


def test_a_model_of_fewer_layers_by_its_own_config_need_not_have_the_first_ones(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    del merge.models[1]["layers.1.norm.weight"]
    merge.write(config={"num_hidden_layers": 2})
    (merge.folders[1] / "config.json").write_text('{"num_hidden_layers": 1}')

    refused = merge.refusal()

    assert "its config says 1 layer, that of " in refused
    assert "action" not in refused


def test_a_tower_that_rules_leave_out_is_a_promise_of_the_config(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors["visual.patch.weight"] = torch.ones(3)
    merge.write(config={"vision_config": {"depth": 3}})

    (told,) = remarks(merge.plan(stockflow={"rules": [{"filter": "visual", "action": "skip"}]}), "promise-unkept")

    assert told.text.startswith("the published config says vision_config: a tower, ")
    assert not remarks(merge.plan(), "promise-unkept")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_that_no_loader_knows_are_said_where_the_base_has_them(tmp_path: Path, wrapper: str) -> None:
    merge = Merge(tmp_path)
    merge.models[0] = {f"{wrapper}{name}": each for name, each in merge.models[0].items()}

    (told,) = remarks(merge.write().plan(), "promise-unkept")

    assert told.text.startswith(f"6 tensors are written under names such as '{wrapper}position_ids', as ")
    assert not remarks(Merge(tmp_path / "other").write().plan(), "promise-unkept")


def test_a_module_may_be_called_like_what_adapters_wrap(tmp_path: Path) -> None:
    merge = Merge(tmp_path)
    for tensors in merge.models:
        tensors["timm_model.base_layer.0.weight"] = tensors["embed.weight"].clone()

    assert not remarks(merge.write().plan(), "not-weights")


KEPT_BESIDE = {
    "optimizer.state.embed.weight.exp_avg": "exp_avg",
    "ema_model.embed.weight": "ema_model.",
    "embed.modules_to_save.default.weight": "",
}


@pytest.mark.parametrize("name", KEPT_BESIDE)
def test_what_trainers_and_adapters_keep_is_not_merged_as_weights(tmp_path: Path, name: str) -> None:
    merge, marker = Merge(tmp_path), KEPT_BESIDE[name]
    for tensors in merge.models:
        tensors[name] = tensors["embed.weight"].clone()

    refused = merge.write().refusal()
    assert f"1 tensor such as {name!r} is " in refused
    assert "accept: [not-weights]" in refused
    assert ("merge_and_unload" in refused) == (not marker)
    if marker:
        rules = {"rules": [{"filter": marker, "action": "skip"}]}
        assert f"`stockflow: {{rules: [{{filter: {marker}, action: skip}}]}}`" in refused
        assert jobs_of(merge.plan(stockflow=rules)).keys() == merge.models[0].keys() - {name}


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
