"""The language of recipes as people write it: what is taken, what is said to have no effect, what is refused."""

from pathlib import Path

import pytest

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.recipe import Recipe, parse_recipe
from stockflow.storage import halves_of
from stockflow.text.remarks import objections

STOCK = """\
merge_method: model_stock
base_model: org/base
models:
  - model: org/a
  - model: org/b
"""
LINEAR = """\
merge_method: linear
models:
  - {model: org/a, parameters: {weight: 1}}
  - {model: org/b, parameters: {weight: 2}}
"""
TASK = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - {model: org/base}
  - {model: org/a, parameters: {weight: 1}}
parameters: {lambda: 0.5}
"""


def parse(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml")


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return str(caught.value)


def said(text: str) -> list[str]:
    """Return what is remarked on a recipe, each a warning that --strict refuses."""
    remarks = parse(text).remarks
    assert [remark.severity for remark in remarks] == ["warning"] * len(remarks)
    assert len(objections(remarks, (), strict=True)) == len(remarks)
    return [str(remark) for remark in remarks]


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        *((key, "did you mean `base_model`?") for key in ("base", "basemodel", "base-model", "baseModel", "base_path")),
        *((key, "did you mean `dtype`?") for key in ("precision", "torch_dtype", "data_type", "type")),
        ("outdtype", "did you mean `out_dtype`?"),
        ("weights", "did you mean `parameters.weight`?"),
        ("tokenizer_path", "did you mean `tokenizer`?"),
        ("checkpoints", "`models` is there as well; remove it"),
        ("memory", "did you mean the command's option --memory? remove it here"),
        *((key, "remove it") for key in ("license", "author", "description", "output_path")),
    ],
)
def test_a_key_is_taken_for_the_nearest_known_one(key: str, advice: str) -> None:
    assert said(f"{LINEAR}{key}: x")[0] == f"r.yaml:5:1: `{key}` has no effect here; {advice}"


@pytest.mark.parametrize("key", ["method", "merge-method", "mergeMethod", "merge", "type", "strategy", "algorithm"])
def test_a_method_under_another_key_is_found(key: str) -> None:
    assert "the required key `merge_method` is missing, is this it? rename it" in refusal(
        LINEAR.replace("merge_method", key)
    )


@pytest.mark.parametrize("key", ["path", "name", "checkpoint", "model_path", "url"])
def test_a_model_under_another_key_is_found(key: str) -> None:
    found = refusal(LINEAR.replace("{model: org/a", f"{{{key}: org/a"))

    assert f"models[0].{key}: the required key `model` is missing, is this it? rename it" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            LINEAR + "normalize: false",
            "r.yaml:5:1: `normalize` has no effect here, and true is used; did you mean `parameters.normalize`?",
        ),
        (
            STOCK + "normalize: true",
            "r.yaml:6:1: `normalize` has no effect here; `model_stock` has no parameter of this name; remove it",
        ),
        (
            LINEAR + "parameters: {normalize: true}\nnormalize: false",
            "r.yaml:6:1: `normalize` has no effect here; did you mean `parameters.normalize`?",
        ),
        (STOCK + "dype: float32", "r.yaml:6:1: `dype` has no effect here; did you mean `dtype`?"),
        (LINEAR + "normalise: true", "r.yaml:5:1: `normalise` has no effect here; did you mean `parameters.norm"),
        (
            STOCK + "name: it",
            "r.yaml:6:1: `name` has no effect here; it names a stage for mergekit-multi, and nothing here reads it; "
            "remove it",
        ),
        (STOCK + "seed: 3", "r.yaml:6:1: `seed` has no effect here; did you mean `stockflow.seed`?"),
        (STOCK + "random_seed: 3", "r.yaml:6:1: `random_seed` has no effect here; did you mean `stockflow.seed`?"),
        (
            STOCK + "allow_crimes: true",
            "r.yaml:6:1: `allow_crimes` has no effect here; it is an option of mergekit's commands; remove it",
        ),
        (
            STOCK + "pad_to_multiple_of: 8",
            "r.yaml:6:1: `pad_to_multiple_of` has no effect here; did you mean `tokenizer.pad_to_multiple_of`?",
        ),
        (STOCK + "zzz:", "r.yaml:6:1: `zzz` has no effect here; remove it"),
        (STOCK + "int8_mask: true", "r.yaml:6:1: `int8_mask` has no effect here; `model_stock` has no parameter"),
        (
            LINEAR.replace("{model: org/a,", "{model: org/a, density: 1,"),
            "r.yaml:3:20: `density` has no effect here; `linear` has no parameter of this name; remove it",
        ),
        (
            LINEAR.replace("{model: org/a,", "{model: org/a, weight: 1,"),
            "r.yaml:3:20: `weight` has no effect here; did you mean `parameters.weight`?",
        ),
        (
            STOCK.replace("- model: org/a", "- {model: org/a, revision: v1}"),
            "r.yaml:4:20: `revision` has no effect here; write it behind the model: `org/name@revision`",
        ),
        (
            STOCK.replace("- model: org/a", "- {model: org/a, layer_range: [0, 4]}"),
            "r.yaml:4:20: `layer_range` has no effect here; it belongs to the `sources` of `slices`; remove it",
        ),
        (
            LINEAR.replace("weight: 1", "weight: {filtr: a, value: 1}"),
            "r.yaml:3:42: `filtr` has no effect here; did you mean `filter`?",
        ),
        (
            LINEAR + "parameters: {normalise: true}",
            "r.yaml:5:14: `linear` has no parameter `normalise`, so it has no effect, and true is used; did you mean "
            "`normalize`?",
        ),
        (
            LINEAR + "parameters: {int8_mask: true}",
            "r.yaml:5:14: `linear` has no parameter `int8_mask`, so it has no effect; remove it",
        ),
        (
            LINEAR + "parameters: {dtype: float32}",
            "r.yaml:5:14: `linear` has no parameter `dtype`, so it has no effect; did you mean `dtype` at the top of "
            "the recipe?",
        ),
        (
            LINEAR + "parameters: {seed: 3}",
            "r.yaml:5:14: `linear` has no parameter `seed`, so it has no effect; did you mean `stockflow.seed`?",
        ),
        (
            LINEAR.replace("weight: 1", "weight: 1, normalize: false"),
            "r.yaml:3:44: `normalize` is one for the merge, so it has no effect of one model; did you mean the "
            "recipe's own `parameters.normalize`?",
        ),
        (
            TASK.replace("weight: 1", "weight: 1, lambda: 0.9"),
            "r.yaml:5:44: `lambda` is one for the merge, so it has no effect of one model; remove it",
        ),
        (
            TASK.replace("{model: org/base}", "{model: org/base, parameters: {weight: 0.3}}"),
            "r.yaml:4:36: `weight` has no effect, as this model is the base; remove it",
        ),
        (
            LINEAR + "parameters: {normalize: []}",
            "r.yaml:5:14: `normalize` is an empty list, which gives no value; remove it",
        ),
        (
            STOCK + "base_model: org/base",
            "r.yaml:6:1: `base_model` is here again, with the value it has on line 2; keep one",
        ),
        (
            STOCK + "  - model: hf://org/a/",
            "r.yaml:6:5: the same model as models[0] on line 4: hf://org/a, here as hf://org/a/; it counts once",
        ),
    ],
)  # fmt: skip
def test_what_the_usual_tool_passes_over_is_said_with_place_and_what_was_meant(text: str, expected: str) -> None:
    (remark,) = said(text)

    assert remark.startswith(expected)


@pytest.mark.parametrize(
    "text", [STOCK, LINEAR, TASK, TASK.replace("lambda", "int8_mask"), TASK + "tokenizer_source: base"]
)
def test_nothing_is_said_of_what_has_its_effect(text: str) -> None:
    assert said(text) == []


def test_dead_parameters_reach_no_method() -> None:
    recipe = parse(TASK.replace("weight: 1", "weight: 1, lambda: 0.9, t: 3") + "normalize: true")
    parameters = recipe.parameters_for(METHODS["task_arithmetic"], "x", None)

    assert parameters.number("lambda") == 0.5
    assert parameters.flag("normalize") is False
    assert len(recipe.remarks) == 3


def test_a_key_with_two_values_is_refused_with_both_lines() -> None:
    message = refusal(STOCK + "dtype: float32\nmerge_method: linear\ndtype: float16")

    assert message.split("\n") == [
        "r.yaml: 2 problems in this recipe",
        "  r.yaml:7:1: the key `merge_method` is here again, with another value than on line 1; keep one",
        "  r.yaml:8:1: the key `dtype` is here again, with another value than on line 6; keep one",
    ]


def test_a_model_that_is_listed_twice_counts_once_where_models_have_no_parameters() -> None:
    recipe = parse(STOCK + "  - model: org/a\n  - model: org/base\n")

    assert recipe.checkpoints == ("hf://org/base", "hf://org/a", "hf://org/b")
    assert recipe.sources(METHODS["model_stock"]) == (0, 1, 2)


def test_a_model_that_is_listed_twice_is_refused_with_both_lines_where_models_have_weights() -> None:
    message = refusal(LINEAR + "  - {model: org/a, parameters: {weight: 3}}")

    assert message == (
        "r.yaml:5:6: models[2].model: the same model as models[0] on line 3: hf://org/a; list it once "
        "(add up the two weights)"
    )


@pytest.mark.parametrize("value", ["1", "1.0", "'1'", "true", "'true'", "yes", "'Yes'", "on", "'on'", "'T'"])
def test_flags_are_given_in_many_ways(value: str) -> None:
    negated = {"1": "0", "1.0": "0.0", "'1'": "'0'", "true": "false", "'true'": "'False'", "yes": "no", "'Yes'": "'NO'",
               "on": "off", "'on'": "'off'", "'T'": "'f'"}[value]  # fmt: skip
    for given, expected in ((value, True), (negated, False)):
        recipe = parse(LINEAR + f"parameters: {{normalize: {given}}}")
        assert recipe.parameters_for(METHODS["linear"], "x", None).flag("normalize") is expected


@pytest.mark.parametrize("value", ["1e-1", "'0.1'", "1e-01", "' .1 '", "+0.1", "0.10"])
def test_numbers_are_given_in_many_ways(value: str) -> None:
    recipe = parse(LINEAR.replace("weight: 1", f"weight: {value}"))

    assert recipe.parameters_for(METHODS["linear"], "x", None).each("weight") == (0.1, 2.0)


@pytest.mark.parametrize(
    "model",
    [
        "{path: org/a, revision: v1}",
        "{model: {path: org/a, revision: v1}}",
        "{model: org/a@v1}",
        "{path: org/a@v1}",
        "'org/a@v1'",
        "{model: {path: org/a, revision: v1}, lora: null, override_architecture: null}",
    ],
)
def test_a_model_is_a_text_or_a_mapping_with_its_revision(model: str) -> None:
    recipe = parse(
        STOCK.replace("- model: org/a", f"- model: {model}").replace("org/base", model.replace("/a", "/base"))
    )

    assert recipe.checkpoints == ("hf://org/base@v1", "hf://org/a@v1", "hf://org/b")
    assert recipe.remarks == ()


def test_a_model_in_the_list_may_be_its_name_alone() -> None:
    assert parse(STOCK.replace("- model: org/a", "- org/a")).canonical() == parse(STOCK).canonical()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{path: org/a, revison: v1}", "expected a model as {path, revision}, found the key 'revison'"),
        ("{revision: v1}", "found no path"),
        ("{model: org/a, override_architecture: Llama}", "`override_architecture` is not needed"),
    ],
)
def test_other_mappings_of_a_model_are_refused(model: str, expected: str) -> None:
    assert expected in refusal(STOCK.replace("org/a", model))


def test_the_revision_of_a_folder_is_passed_over_and_said(tmp_path: Path) -> None:
    (tmp_path / "m0").mkdir()
    (tmp_path / "m1@v2").mkdir()
    text = STOCK.replace("org/base", f"{tmp_path}/m0@v1").replace("org/a", f"{tmp_path}/m1@v2")
    text += f"  - model: {{path: {tmp_path}/m0, revision: main}}\n"

    assert parse(text).checkpoints == (str(tmp_path / "m0"), str(tmp_path / "m1@v2"), "hf://org/b")
    assert said(text)[0].startswith(f"r.yaml:2:1: the folder '{tmp_path}/m0' is taken as it is")
    assert [remark.code for remark in parse(text).remarks] == ["local-revision", "local-revision", "same-model"]


@pytest.mark.parametrize(
    "name",
    ["org/a+org/lora", "/x/m0+/x/lora0", "./m0+./lora", "s3://b/m+s3://b/l", "org/a@v1+org/lora@v2", "/c++/m+/c++/l"],
)
def test_a_plus_stands_between_a_model_and_its_adapter(name: str) -> None:
    found = parse(STOCK.replace("org/a", f"'{name}'"))

    assert len(halves_of(found.checkpoints[1])) == 2
    assert parse(STOCK.replace("org/a", f"'{found.checkpoints[1]}'")).checkpoints == found.checkpoints


def test_an_adapter_may_stand_under_a_key_of_its_own() -> None:
    model = "{model: {path: org/a, revision: v1}, lora: {path: org/l, revision: v2}}"

    assert parse(STOCK.replace("- model: org/a", f"- model: {model}")).checkpoints[1] == "hf://org/a@v1 + hf://org/l@v2"


@pytest.mark.parametrize("name", ["/c++/m", "../x+y", "./a+b", "s3://b/a+b/c"])
def test_a_plus_in_a_name_is_no_adapter(name: str) -> None:
    assert len(parse(STOCK.replace("org/a", name)).checkpoints) == 3


@pytest.mark.parametrize("name", ["./model.ckpt", "s3://b/m.pt", "x/consolidated.00.pth"])
def test_a_file_of_pickled_weights_is_refused_by_name(name: str) -> None:
    assert "is a file of pickled weights" in refusal(STOCK.replace("org/a", name))


# --- files


def test_several_documents_are_refused_with_the_names_of_the_stages() -> None:
    stages = f"name: one\n{LINEAR}---\nname: two\n{STOCK}---\n{STOCK}"

    assert refusal(stages).startswith(
        "r.yaml:6:1: a second document starts here, of 3: `one`, `two` and 1 without a name; merges in stages"
    )


@pytest.mark.parametrize("text", [f"---\n{STOCK}", f"{STOCK}---\n", f"{STOCK}...\n", f"---\n---\n{STOCK}"])
def test_empty_documents_are_none(text: str) -> None:
    assert parse(text).canonical() == parse(STOCK).canonical()


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("base_model: org/a\ngate_mode: hidden\nexperts: [{source_model: org/a}]", "mergekit-moe"),
        ("genome: {models: [org/a]}\ntasks: [{name: x}]", "mergekit-evolve"),
        ("layer_slices: [{model: org/a, start: 0, end: 4}]", "bakllama"),
    ],
)
def test_files_of_other_tools_are_named_as_such(text: str, tool: str) -> None:
    assert refusal(text).startswith(f"r.yaml:1:1: a file of {tool}, which ")


@pytest.mark.parametrize(
    "text",
    [
        STOCK.replace("\n", "\r\n"),
        STOCK.replace("  - model: org/a", "\t\n  - model:\torg/a\t"),
        STOCK.replace("org/base", '"org/base"\t# the base').replace("merge", "\t# first\nmerge", 1),
        STOCK.replace("  - ", "   - "),
        STOCK.replace("  - ", "- "),
        STOCK.replace("\n", " # words\n"),
        STOCK.replace("org/base", "'org/base'"),
        STOCK.removesuffix("\n"),
    ],
)
def test_the_same_recipe_is_written_in_many_ways(text: str) -> None:
    recipe = parse(text)

    assert recipe.canonical() == parse(STOCK).canonical()
    assert recipe.remarks == ()


def test_a_tab_in_quotes_stays_and_one_that_indents_is_refused() -> None:
    assert parse(STOCK + 'base_model: "org/base"\t# again\n').remarks[0].code == "repeated-key"
    assert "org/a\\tb" in refusal(STOCK.replace("org/a", '"org/a\tb"\t').replace("org/base", "[1]"))
    assert refusal(STOCK.replace("  - model: org/a", "\t- model: org/a")).startswith("r.yaml:4:1: not valid YAML")


def test_a_merge_key_brings_in_what_is_not_said_otherwise() -> None:
    text = (
        "merge_method: linear\nmodels:\n"
        "  - {model: org/a, parameters: &p {weight: 1, normalize: false}}\n"
        "  - {model: org/b, parameters: {<<: *p, weight: 2}}\n"
        "  - {model: org/c, parameters: {<<: [*p, {weight: 9}]}}\n"
    )

    assert parse(text).parameters_for(METHODS["linear"], "x", None).each("weight") == (1.0, 2.0, 1.0)
    assert [remark.place for remark in parse(text).remarks] == ["r.yaml:3:47"] * 3
    assert "expected a mapping after `<<`, found 3" in refusal(STOCK + "<<: 3")


# --- refusals that do not hide each other


def test_a_value_that_cannot_be_read_does_not_hide_what_else_is_wrong() -> None:
    message = refusal(
        "merge_method: slerp\nbase_model: 7\ndtype: bf16\nmodels:\n- {model: 8}\n- {model: 9}\n- {model: org/a}\n"
        "stockflow: {seed: x, rules: [{filter: 1}]}\n"
    )

    assert message.split("\n") == [
        "r.yaml: 8 problems in this recipe",
        "  r.yaml:1:1: merge_method: `slerp` needs 1 model besides the base, found 3; change `models` or the method",
        "  r.yaml:1:1: merge_method: `slerp` needs the parameter `t`; add it",
        "  r.yaml:2:1: base_model: expected a folder, a URL or org/name, found 7; put it in quotes",
        "  r.yaml:3:1: dtype: expected one of bfloat16, float16, float32, float64, found 'bf16'; "
        "did you mean `bfloat16`?",
        "  r.yaml:5:4: models[0].model: expected a folder, a URL or org/name, found 8; put it in quotes",
        "  r.yaml:6:4: models[1].model: expected a folder, a URL or org/name, found 9; put it in quotes",
        "  r.yaml:8:13: stockflow.seed: expected an integer from 0 to 2^63 - 1, found 'x'; correct it",
        "  r.yaml:8:31: stockflow.rules[0].filter: expected a text, found 1; put it in quotes if it is meant",
    ]


def test_a_parameter_that_cannot_be_read_is_not_called_missing() -> None:
    assert refusal(LINEAR.replace("weight: 1", "weight: {value: {a: 1}}")).startswith(
        "r.yaml:3:42: models[0].parameters."
    )


def test_models_that_are_all_wrong_are_not_called_none() -> None:
    assert "expected at least one model" not in refusal("merge_method: linear\nmodels: [{model: 7}]")
    assert "expected at least one model" in refusal("merge_method: linear\nmodels: []")
