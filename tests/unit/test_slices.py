"""Slices and modules: what they lead to in a plan, and what stands against them, with line and value."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.checkpoints.opening import open_checkpoints
from stockflow.errors import PlanError, RecipeError
from stockflow.planning import file
from stockflow.planning.make import make_plan
from stockflow.planning.plan import MergePlan
from stockflow.recipe import parse_recipe
from stockflow.storage import open_store
from tests.checkpoints import write_checkpoint

PARTS = ("attn.weight", "norm.weight")


def write_model(folder: Path, num_layers: int, *, layers: str = "model.layers.", **config: Any) -> Path:
    names = ["model.embed.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"{layers}{layer}.{part}" for layer in range(num_layers) for part in PARTS]
    config = {"num_hidden_layers": num_layers} | config
    return write_checkpoint(folder, {name: torch.randn(3, 2) for name in names}, config=config, side_files={})


class Models:
    """Three models of four, four and six layers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, num_layers in (("a", 4), ("b", 4), ("c", 6)):
            write_model(root / name, num_layers)

    def plan(self, text: str, **asked: Any) -> MergePlan:
        recipe = parse_recipe(text.replace("$", f"{self.root}/"), "r.yaml")
        stores = [open_store(location, recipe.storage) for location in recipe.checkpoints]
        return make_plan(recipe, open_checkpoints(stores), **asked)

    def refusal(self, text: str) -> str:
        with pytest.raises((PlanError, RecipeError)) as caught:
            self.plan(text)
        return str(caught.value).replace(f"{self.root}/", "$")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def sources(plan: MergePlan) -> dict[str, list[tuple[int, str]]]:
    return {job.output.name: [(each.checkpoint, each.name) for each in job.reading.operands] for job in plan.jobs}


def linear(*slices: str, more: str = "parameters: {weight: 1}") -> str:
    return "merge_method: linear\nslices:\n" + "".join(f"- sources: [{each}]\n" for each in slices) + more + "\n"


def source(model: str, start: int, stop: int) -> str:
    return f"{{model: ${model}, layer_range: [{start}, {stop}]}}"


STACK = linear(source("a", 0, 3), f"{source('c', 4, 6)}, {source('b', 1, 3)}", source("a", 2, 4))


def test_layers_are_numbered_through_and_the_rest_comes_from_the_first_and_the_last_slice(models: Models) -> None:
    plan = models.plan(STACK)

    found = sources(plan)
    attn = "model.layers.{}.attn.weight"
    assert {name: froms for name, froms in found.items() if "norm" not in name} == {
        "model.embed.weight": [(0, "model.embed.weight")],
        attn.format(0): [(0, attn.format(0))],
        attn.format(1): [(0, attn.format(1))],
        attn.format(2): [(0, attn.format(2))],
        attn.format(3): [(1, attn.format(4)), (2, attn.format(1))],
        attn.format(4): [(1, attn.format(5)), (2, attn.format(2))],
        attn.format(5): [(0, attn.format(2))],
        attn.format(6): [(0, attn.format(3))],
        "lm_head.weight": [(0, "lm_head.weight")],
    }
    assert next(iter(found)) == "model.embed.weight"
    assert list(found)[-2:] == ["lm_head.weight", "model.norm.weight"]
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 7
    assert plan.notes == ()


def test_a_plan_of_stacked_layers_reads_back_as_it_was(models: Models) -> None:
    plan = models.plan(STACK)

    recorded = file.parse(file.encode(plan), "plan.json")

    assert sources(recorded.plan) == sources(plan)
    assert recorded.plan.is_stacked
    assert (recorded.digest, recorded.copies_digest) == (plan.plan_id, plan.merge_id)


def test_another_stack_of_equal_shapes_is_another_merge(models: Models) -> None:
    texts = [
        STACK,
        STACK.replace("[2, 4]", "[0, 2]"),
        STACK.replace("model: $b", "model: $a"),
        STACK.replace("[0, 3]", "[1, 4]"),
    ]
    plans = [models.plan(text) for text in texts]

    assert len({plan.plan_id for plan in plans}) == len({plan.merge_id for plan in plans}) == len(texts)


@pytest.mark.parametrize(
    "text",
    [
        linear(f"{source('a', 0, 4)}, {source('b', 0, 4)}", more="parameters: {weight: [1, 2, 5]}"),
        "merge_method: linear\nmodules:\n  default:\n    models: [{model: $a}, {model: $b}]\n"
        "    parameters: {weight: [1, 2, 5]}\nparameters: {weight: 7}\n",
        "merge_method: linear\nmodules:\n  default:\n    slices:\n    - sources:\n"
        f"      - {source('a', 0, 4)}\n      - {source('b', 0, 4)}\n      parameters: {{weight: [1, 2, 5]}}\n"
        "    parameters: {weight: 8}\nparameters: {weight: 7}\n",
    ],
)
def test_all_layers_in_one_slice_or_module_are_whole_models(text: str, models: Models) -> None:
    whole = models.plan("merge_method: linear\nmodels: [$a, $b]\nparameters: {weight: [1, 2, 5]}\n")
    plan = models.plan(text)

    assert plan.plan_id == whole.plan_id
    assert not plan.is_stacked
    assert file.encode(plan) == file.encode(whole)


def test_rules_see_the_names_of_the_output(models: Models) -> None:
    rules = "stockflow: {rules: [{filter: layers.4., action: copy}, {filter: layers.6, action: skip}]}"
    plan = models.plan(STACK + rules)

    found = sources(plan)
    assert found["model.layers.4.attn.weight"] == [(1, "model.layers.5.attn.weight")]
    assert plan.skipped == ("model.layers.6.attn.weight", "model.layers.6.norm.weight")


def test_values_over_the_layers_of_a_slice_and_from_slice_module_and_recipe(models: Models) -> None:
    text = yaml.safe_dump({
        "merge_method": "linear",
        "modules": {
            "default": {
                "slices": [
                    {
                        "sources": [{"model": "$a", "layer_range": [0, 3]}],
                        "parameters": {"weight": {"filter": "attn", "value": [1, 3]}},
                    },
                    {"sources": [{"model": "$b", "layer_range": [3, 4], "parameters": {"weight": [5, 6]}}]},
                ],
                "parameters": {"weight": [{"filter": "layers.2.norm", "value": 8}]},
            }
        },
        "parameters": {"weight": [10, 30]},
    })  # fmt: skip
    plan = models.plan(text)

    found = {job.output.name: job.result.parameters.each("weight") for job in plan.jobs}
    assert found == {
        "model.embed.weight": (10.0,),
        "model.layers.0.attn.weight": (1.0,), "model.layers.0.norm.weight": (10.0,),
        "model.layers.1.attn.weight": (2.0,), "model.layers.1.norm.weight": (20.0,),
        "model.layers.2.attn.weight": (3.0,), "model.layers.2.norm.weight": (8.0,),
        "model.layers.3.attn.weight": (6.0,), "model.layers.3.norm.weight": (6.0,),
        "lm_head.weight": (5.0,), "model.norm.weight": (5.0,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            linear(source("a", 0, 5)),
            "line 3: layer_range [0, 5] goes beyond the 4 layers of $a, the last of which",
        ),
        (
            linear(source("a", 0, 4), source("c", 5, 9)),
            "line 4: layer_range [5, 9] goes beyond the 6 layers of $c, the last of which is 5",
        ),
        (
            linear(f"{source('a', 0, 4)}, {source('c', 0, 3)}"),
            "slices[0].sources[1].layer_range: 3 layers, and 4 of sources[0]; a slice takes as many of each model",
        ),
        (
            linear(source("a", 2, 2)),
            "second number above the first, as it is behind the last layer, found [2, 2]",
        ),
        (linear(source("a", -1, 2)), "expected [first, behind the last], two numbers of layers, found [-1, 2]"),
        (linear("{model: $a, layer_range: [0, b]}"), "two numbers of layers, found [0, 'b']"),
        (linear("{model: $a, layer_range: 4}"), "two numbers of layers, found 4"),
        (linear("{model: $a}"), "slices[0].sources[0]: the required key `layer_range` is missing"),
        (linear(""), "slices[0].sources: expected at least one model, found none"),
        (
            linear(f"{source('a', 0, 2)}, {source('a', 2, 4)}"),
            "slices[0].sources[1].model: the same model as sources[0]: $a; list it once",
        ),
        (linear(source("a", 0, 2), more=""), "slices[0].sources[0]: `linear` needs the parameter `weight`; add it"),
        (linear(source("a", 0, 2), more="models: [$a]"), "found `models` and `slices`; keep one"),
        (linear(source("a", 0, 2), more="parameters: {weight: [1, x]}"), "parameters.weight[1]: expected a number"),
        (
            linear(source("a", 0, 2), more="  parameters: {weight: x}"),
            "slices[0].parameters.weight: expected a number, found 'x'",
        ),
        ("merge_method: linear\nslices: []\n", "expected at least one model"),
        (
            "merge_method: linear\nmodules: {default: {}}\n",
            "expected either `models` or `slices`, found neither",
        ),
        (
            "merge_method: linear\nmodules: {vison: {models: [$a]}}\nparameters: {weight: 1}\n",
            "no tensor belongs to the module 'vison'",
        ),
        (
            linear(f"{source('b', 0, 2)}, {source('c', 0, 2)}", more="base_model: $a\nparameters: {t: 0.5}").replace(
                "linear", "slerp"
            ),
            "slices[0]: `slerp` needs the base $a among the sources; add its layers, or let a source be the base",
        ),
        (
            linear(f"{source('a', 0, 2)}, {source('c', 0, 2)}, {source('b', 0, 2)}", more="base_model: $a").replace(
                "linear", "slerp"
            ),
            "slices[0]: `slerp` needs 1 model besides the base, found 2; change `sources` or the method",
        ),
    ],
)
def test_what_is_wrong_with_slices_is_said_with_its_place(text: str, expected: str, models: Models) -> None:
    assert expected in models.refusal(text)


def test_keys_without_effect_are_warned_of_in_slices_too(models: Models) -> None:
    text = linear("{model: $a, layer_range: [0, 2], revision: v0, parameters: {density: 1}}", source("a", 1, 3))
    plan = models.plan(text + "stockflow: {}\n")

    assert [(remark.code, remark.place) for remark in plan.remarks] == [
        ("unknown-key", "r.yaml:3:" + str(len(f"- sources: [{{model: {models.root}/a, layer_range: [0, 2], ") + 1)),
        ("no-effect", "r.yaml:3:" + str(text.replace("$", f"{models.root}/").split("\n")[2].index("density") + 1)),
    ]


def test_a_source_that_lacks_a_tensor_is_told_by_the_names_of_the_output(models: Models, tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.attn.weight": torch.randn(3, 2) for layer in range(4)}
    extra = {"model.layers.3.extra.weight": torch.randn(2), "model.embed.weight": torch.randn(3, 2)}
    write_checkpoint(tmp_path / "d", tensors | extra, config={"num_hidden_layers": 4})

    found = models.refusal(linear(f"{source('a', 0, 1)}, {source('d', 3, 4)}"))

    assert "'model.layers.0.norm.weight' is missing in $d" in found
    assert "'model.layers.0.extra.weight' is in $d but not in $a" in found


@pytest.mark.parametrize("layers", [None, "backbone.stage_{layer}."])
def test_a_pattern_tells_layers_whose_names_are_uncommon(layers: str | None, models: Models, tmp_path: Path) -> None:
    write_model(tmp_path / "d", 4, layers="backbone.stage_")
    text = linear(source("d", 0, 2), source("d", 1, 4))
    if layers is None:
        assert "the recipe speaks of layers, and no name in $d tells one" in models.refusal(text)
        return

    found = sources(models.plan(text + f"stockflow: {{layers: '{layers}'}}\n"))

    assert found["backbone.stage_4.attn.weight"] == [(0, "backbone.stage_3.attn.weight")]
    assert len(found) == 3 + 5 * len(PARTS)


def test_layers_that_predict_further_tokens_stay_behind_the_last(models: Models, tmp_path: Path) -> None:
    write_model(tmp_path / "d", 5, num_hidden_layers=4, num_nextn_predict_layers=1)

    plan = models.plan(linear(source("d", 0, 3), source("d", 2, 4)))

    assert sources(plan)["model.layers.5.attn.weight"] == [(0, "model.layers.4.attn.weight")]
    assert plan.config is not None
    assert plan.config["num_hidden_layers"] == 5
    assert models.refusal(linear(source("d", 0, 5))).count("goes beyond the 4 layers") == 1


def test_what_the_config_lists_per_layer_follows_the_layers(models: Models, tmp_path: Path) -> None:
    kinds = {"d": ["full", "full", "sliding"], "e": ["sliding", "full", "linear", "full", "other"]}
    for name, types in kinds.items():
        write_model(tmp_path / name, len(types), layer_types=types, eos_token_id=[1] * len(types), max_window_layers=7)

    plan = models.plan(linear(source("d", 0, 3), source("e", 2, 5), source("d", 1, 2)))

    assert {remark.code for remark in plan.remarks} == {"config-layers"}, plan.notes

    assert plan.config == {
        "num_hidden_layers": 7,
        "layer_types": ["full", "full", "sliding", "linear", "full", "other", "full"],
        "eos_token_id": [1] * 3,
        "max_window_layers": 7,
    }
    assert [remark.text for remark in plan.remarks if remark.code == "config-layers"] == [
        "config.json speaks of layers in 'max_window_layers', too, which stay as they are: see whether they suit "
        "the output"
    ]


GEMMA2 = {"model_type": "gemma2", "sliding_window": 8}


@pytest.mark.parametrize(
    ("config", "slices", "moved"),
    [
        (
            GEMMA2,
            [(0, 3), (2, 4)],
            "of 'gemma2' tell it by its number, alike every 2: layer 2 becomes layer 3;",
        ),
        (GEMMA2, [(0, 4), (2, 4)], ""),
        (GEMMA2, [(0, 2), (3, 4)], "layer 3 becomes layer 2;"),
        (GEMMA2 | {"layer_types": ["sliding", "full"] * 3}, [(0, 3), (2, 4)], ""),
        ({"model_type": "gemma3_text"}, [(0, 6), (3, 6)], "'gemma3' tell it by its number, alike every 6"),
        ({"model_type": "gemma3_text"}, [(0, 6), (0, 6)], ""),
        ({"model_type": "smollm3"}, [(0, 4), (2, 6)], "`no_rope_layers`, follows them"),
        ({"model_type": "llama4_text", "no_rope_layers": []}, [(0, 4), (2, 6)], "'llama4' tell it by its number"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1, 1]}, [(0, 4), (2, 6)], ""),
        ({"model_type": "llama"}, [(0, 4), (2, 6)], ""),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*ME"}, [(0, 4), (2, 6)], ""),
        (
            {"sliding_window_pattern": "LLLG"},
            [(0, 4), (2, 6)],
            "'sliding_window_pattern', too",
        ),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, [(0, 4), (2, 6)], "'block_types', too"),
        ({"scale_depth": 1.4}, [(0, 4), (2, 6)], "'scale_depth', too"),
        ({"scale_attn_by_inverse_layer_idx": True}, [(0, 4), (2, 6)], "'scale_attn_by_inverse_layer_idx', too"),
        ({"scale_attn_by_inverse_layer_idx": False}, [(0, 4), (2, 6)], ""),
        ({"full_attn_idxs": [2, 5]}, [(0, 4), (2, 6)], "'full_attn_idxs', too"),
        ({"attention_types": [[["global", "local"], 3]]}, [(0, 4), (2, 6)], "'attention_types', too"),
        (
            {"global_attn_idx": [0, 5], "kv_reuse_group": [[1, 2]]},
            [(0, 4), (2, 6)],
            "'global_attn_idx', 'kv_reuse_group', too",
        ),
        ({"slstm_at": [1]}, [(0, 2), (1, 6)], "'slstm_at', too"),
        ({"moe_layers_enum": "1,2,3"}, [(0, 2), (1, 6)], "'moe_layers_enum', too"),
        ({"global_attn_idx": [0, 3]}, [(0, 3)], "'global_attn_idx', too"),
        ({"global_attn_idx": [0, 3]}, [(0, 4)], ""),
        ({"global_attn_idx": [0, 6], "kv_reuse_group": [[1, 1]]}, [(0, 4), (2, 6)], ""),
        ({"bad_token_ids": [1, 2], "conv_kernel": [4, 3], "mrope_section": [1, 2], "version": "1,2"}, [(1, 6)], ""),
        ({"vision_config": {"deepstack_at": [1, 2]}, "eps": [0.5], "flags": [True, False]}, [(1, 6)], ""),
    ],
)
def test_layers_whose_kind_is_their_number_are_said_where_they_move(
    models: Models, tmp_path: Path, config: dict[str, Any], slices: list[tuple[int, int]], moved: str
) -> None:
    write_model(tmp_path / "d", 6, **config)

    plan = models.plan(linear(*(source("d", *each) for each in slices)))

    said = [remark.text for remark in plan.remarks if remark.code == "config-layers"]
    assert len(said) == bool(moved)
    assert moved in "".join(said)


WHISPER = {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3}
T5 = {"num_layers": 3, "num_decoder_layers": 3}
CLIP = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}


@pytest.mark.parametrize(
    ("towers", "config", "raised"),
    [
        ("model.decoder.layers. model.encoder.layers.", WHISPER, WHISPER | {"decoder_layers": 4}),
        (
            "model.encoder.layers. model.decoder.layers.",
            WHISPER,
            {**WHISPER, "encoder_layers": 4, "num_hidden_layers": 4},
        ),
        ("decoder.block. encoder.block.", T5, T5 | {"num_decoder_layers": 4}),
        ("encoder.block. decoder.block.", T5, T5 | {"num_layers": 4}),
        ("model.decoder.layers.", {"num_hidden_layers": 3}, {"num_hidden_layers": 4}),
        ("vision_model.encoder.layers.", {"num_hidden_layers": 3}, {"num_hidden_layers": 4}),
        (
            "vision_model.encoder.layers. text_model.encoder.layers.",
            CLIP,
            {**CLIP, "vision_config": {"num_hidden_layers": 4}},
        ),
        (
            "text_model.encoder.layers. vision_model.encoder.layers.",
            CLIP,
            {**CLIP, "text_config": {"num_hidden_layers": 4}},
        ),
        (
            "model.decoder.layers. model.encoder.layers.",
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 3}},
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 4}},
        ),
        (
            "decoder.block. encoder.block.",
            T5 | {"decoder_kinds": [1, 2, 2], "encoder_kinds": [5, 6, 7]},
            {"num_layers": 3, "num_decoder_layers": 4, "decoder_kinds": [1, 2, 2, 2], "encoder_kinds": [5, 6, 7]},
        ),
    ],
)
def test_of_towers_of_one_depth_only_that_is_counted_anew_which_is_sliced(
    models: Models, tmp_path: Path, towers: str, config: dict[str, Any], raised: dict[str, Any]
) -> None:
    names = [f"{tower}{layer}.{part}" for tower in towers.split() for layer in range(3) for part in PARTS]
    write_checkpoint(tmp_path / "d", {name: torch.randn(3, 2) for name in names}, config=config, side_files={})
    chosen = f"stockflow: {{layers: '{towers.split()[0]}{{layer}}.'}}\n"

    plan = models.plan(linear(source("d", 0, 2), source("d", 1, 3)) + chosen)

    assert plan.config == raised
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        ([(0, 2), (0, 3)], "and the output in layer 0, layer 2: loaders leave out the later"),
        ([(1, 3), (0, 2)], "in layer 2: loaders make up that of layer 0; let the first slice begin"),
        ([(1, 3)], "in none: loaders make up"),
        ([(0, 2), (1, 3)], ""),
    ],
)
def test_a_bias_that_the_first_layer_has_for_all_is_said_where_it_goes_elsewhere(
    models: Models, tmp_path: Path, slices: list[tuple[int, int]], said: str
) -> None:
    names = [f"{side}.block.{layer}.{part}" for side in ("encoder", "decoder") for layer in range(3) for part in PARTS]
    names += [f"{side}.block.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")]
    write_checkpoint(tmp_path / "d", {name: torch.randn(3, 2) for name in names}, config=T5, side_files={})
    sliced = linear(*(source("d", *each) for each in slices)) + "stockflow: {layers: 'decoder.block.{layer}.'}\n"

    plan = models.plan(sliced)

    assert [remark.code for remark in plan.remarks] == ["promise-unkept"] * bool(said)
    assert said in "".join(remark.text for remark in plan.remarks)


def test_a_pattern_with_a_letter_per_layer_follows_the_layers(models: Models, tmp_path: Path) -> None:
    write_model(tmp_path / "d", 6, hybrid_override_pattern="M-M*ME", hidden_act="silu24")

    plan = models.plan(linear(source("d", 0, 4), source("d", 2, 6)))

    assert plan.config == {"num_hidden_layers": 8, "hybrid_override_pattern": "M-M*M*ME", "hidden_act": "silu24"}


def test_a_config_that_says_nothing_of_a_layer_is_refused(models: Models, tmp_path: Path) -> None:
    write_model(tmp_path / "d", 3, layer_types=["full"] * 3)

    found = models.refusal(linear(source("d", 0, 3), source("a", 2, 3)))

    assert "config.json of $a says nothing in 'layer_types' of layer 2, which a slice takes" in found


def write_llava(folder: Path, num_layers: int, *others: str) -> Path:
    names = [
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.a.weight",
        *others,
    ]
    names += [f"language_model.model.layers.{layer}.{part}" for layer in range(num_layers) for part in PARTS]
    names += [f"vision_tower.encoder.layers.{layer}.{part}" for layer in range(3) for part in PARTS]
    config = {"text_config": {"num_hidden_layers": num_layers}, "vision_config": {"num_hidden_layers": 3}}
    return write_checkpoint(folder, {name: torch.randn(3, 2) for name in names}, config=config, side_files={})


MODULES = """\
merge_method: linear
modules:
  text_decoder:
    slices:
    - sources: [{model: $d, layer_range: [0, 4]}]
    - sources: [{model: $e, layer_range: [1, 4]}]
  vision_tower:
    models: [$d, $e]
  multi_modal_projector: {models: [$e]}
parameters: {weight: 1}
"""


def test_modules_are_parts_of_names_and_the_rest_is_the_text_decoder(models: Models, tmp_path: Path) -> None:
    for name in ("d", "e"):
        write_llava(tmp_path / name, 4)

    plan = models.plan(MODULES)

    found = sources(plan)
    assert found["language_model.model.layers.6.attn.weight"] == [(1, "language_model.model.layers.3.attn.weight")]
    assert found["language_model.model.embed_tokens.weight"] == [(0, "language_model.model.embed_tokens.weight")]
    assert found["language_model.lm_head.weight"] == [(1, "language_model.lm_head.weight")]
    assert found["vision_tower.encoder.layers.2.norm.weight"] == [
        (0, "vision_tower.encoder.layers.2.norm.weight"),
        (1, "vision_tower.encoder.layers.2.norm.weight"),
    ]
    assert found["multi_modal_projector.a.weight"] == [(1, "multi_modal_projector.a.weight")]
    assert plan.config == {"text_config": {"num_hidden_layers": 7}, "vision_config": {"num_hidden_layers": 3}}


def test_a_module_that_the_recipe_does_not_name_is_left_out_and_said(models: Models, tmp_path: Path) -> None:
    write_llava(tmp_path / "d", 4)
    write_llava(tmp_path / "e", 4, "audio_tower.weight")
    text = MODULES.replace("  multi_modal_projector: {models: [$e]}\n", "")

    plan = models.plan(text)

    assert "multi_modal_projector.a.weight" not in sources(plan)
    assert [(each.code, each.severity, each.tensors) for each in plan.remarks if each.code == "module-left-out"] == [
        ("module-left-out", "warning", ("multi_modal_projector.a.weight", "audio_tower.weight"))
    ]


def test_slices_of_a_model_of_several_towers_are_of_the_one_the_config_counts(models: Models, tmp_path: Path) -> None:
    write_llava(tmp_path / "d", 4)
    write_llava(tmp_path / "e", 3)

    found = sources(models.plan(linear(source("d", 0, 3), source("d", 2, 4))))

    assert found["language_model.model.layers.4.attn.weight"] == [(0, "language_model.model.layers.3.attn.weight")]
    assert found["vision_tower.encoder.layers.2.attn.weight"] == [(0, "vision_tower.encoder.layers.2.attn.weight")]
    assert "has several kinds: 3 of 'language_model.model.layers.*', 3 of" in models.refusal(linear(source("e", 0, 2)))


def test_many_slices_and_rules_take_little_time(models: Models) -> None:
    """A recipe is read in full before it is refused; its text is parsed once for all that is said of it."""
    slices = [source("a", layer, layer + 9) for layer in range(700)]
    rules = ", ".join(f"{{filter: x{number}, action: copy}}" for number in range(700))

    found = models.refusal(linear(*slices) + f"stockflow: {{rules: [{rules}]}}\n")

    assert found.count("goes beyond the 4 layers of $a") == 20
    assert "... and 680 more" in found
