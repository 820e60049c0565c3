"""The recipe: what it accepts, what it resolves to, and that it refuses everything else with a place."""

import dataclasses
import io
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockflow.errors import NotFoundError, RecipeError
from stockflow.methods import METHODS, Method
from stockflow.methods.parameters import Parameter
from stockflow.recipe import (
    Options,
    Recipe,
    StorageEntry,
    load_recipe,
    parse_recipe,
    parse_size,
    recipe_schema,
    resolve_location,
)
from stockflow.recipe.resolve import OUTSIDE, Resolver, Stand
from stockflow.recipe.values import MERGEKIT_METHODS
from stockflow.storage import StoreOptions

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


def parse(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml")


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return str(caught.value)


def weights(recipe: Recipe, tensor_name: str) -> tuple[float, ...]:
    rule = recipe.rule_for(tensor_name)
    return recipe.parameters_for(recipe.method_for(rule), tensor_name, rule).each("weight")


def test_the_smallest_recipe_has_defaults() -> None:
    recipe = parse(STOCK)

    assert recipe.checkpoints == ("hf://org/base", "hf://org/a", "hf://org/b")
    assert recipe.output_dtype is None
    assert recipe.stockflow.on_negative == "clamp"
    assert recipe.stockflow.on_nonfinite == "error"
    assert recipe.stockflow.shard_size is None
    assert recipe.vocabulary is None
    assert recipe.text == STOCK
    assert recipe.storage.by_prefix == {}


def test_the_canonical_form_is_json_and_reads_back_to_itself() -> None:
    text = STOCK + (
        "dtype: float32\nparameters: {filter_wise: [{filter: mlp, value: true}, {value: false}]}\n"
        "stockflow:\n  shard_size: 5GB\n  storage: {'s3://b/': {region: x}}\n"
        "  rules: [{filter: norm, action: copy}]\n"
    )
    canonical = parse(text).canonical()

    assert canonical == parse(json.dumps(canonical)).canonical()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("dtype: bfloat16", "BF16"),
        ("dtype: float32\nout_dtype: torch.float16", "F16"),
        ("out_dtype: float64", "F64"),
        ("dtype: torch.float32", "F32"),
    ],
)
def test_the_output_dtype_is_out_dtype_else_dtype(lines: str, expected: str) -> None:
    assert parse(STOCK + lines).output_dtype == expected


def test_other_dtypes_are_refused() -> None:
    assert "r.yaml:6:1: dtype: expected one of bfloat16, " in refusal(STOCK + "dtype: int64")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5_000_000_000),
        ("256MiB", 256 << 20),
        ("1.5 kib", 1536),
        ("1000", 1000),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("3kB", 3000),
    ],
)
def test_sizes_are_decimal_or_binary(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "5G", "GB", "1e9", "nan", "1.5", "5 5GB", "0.0001kB", "9" * 99])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected a size such as 5GB"):
        parse_size(text)


def test_the_shard_size_is_bytes_or_a_size() -> None:
    assert parse(STOCK + "stockflow: {shard_size: 123}").stockflow.shard_size == 123
    assert parse(STOCK + "stockflow: {shard_size: 1GiB}").stockflow.shard_size == 1 << 30
    assert "shard_size: expected a size" in refusal(STOCK + "stockflow: {shard_size: true}")


def test_empty_sections_are_absent() -> None:
    recipe = parse(STOCK + "parameters:\ndtype:\nstockflow:\n")

    assert recipe.canonical() == parse(STOCK).canonical()


# --- YAML


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: 1\n---\nb: 2", "2:1", "a second document starts here, of 2: 2 without a name"),
        ("a: !!python/object:os.system x", "1:4", "the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: !!str x", "1:4", "the tag"),
        ("- a", "1:1", "expected a mapping with `merge_method` and `models`, found a list"),
        ("", "1:1", "found nothing"),
        ("a: [1", "1:4", "not valid YAML: the `[` here is not closed"),
        ("a: [1]x", "1:7", "not valid YAML: text goes on behind a closing quote or bracket; put the whole value in"),
        ("a:\n\t- b", "2:1", "not valid YAML: a tab indents this line; write spaces"),
        ("a:\n  - b\n - c", "3:2", "not valid YAML: this line begins in a column of its own"),
        ("a: b\n c: d", "2:3", "not valid YAML: this line is indented as if it went on the one above"),
        ("a: b: c", "1:5", "not valid YAML: a second `: ` in one line; put the whole value in quotes"),
        ("a: b\nc:d\n", "2:1", "not valid YAML: this key has no `: ` behind it"),
        ("a: @b", "1:4", "not valid YAML: a value cannot begin with `@`"),
        ('a: "C:\\Users"', "1:9", "not valid YAML: a backslash in double quotes begins an escape"),
        ("a:\n\u00a0 - b", "2:1", "a space that is none to YAML"),
        ("a: 1\nb: \x07", "2:4", "'\\x07' is not allowed in YAML"),
        ("1: a", "1:1", "expected a text as key, found 1"),
        ("[a]: b", "1:1", "expected a text as key, found a list"),
        ("a: &x [*x]", "1:8", "the alias *x has no anchor"),
        ("a: 0x_", "1:7", "not valid YAML"),
        ("a: " + "1" * 5000, "1:4", "a text of 5,000 characters; at most 4,096 are accepted"),
        ("a: " + "1" * 401, "1:4", "a number of 401 characters"),
        ("a: 0x" + "f" * 4000, "1:4", "a number of 4,002 characters"),
        ("a: 1" + ":1" * 2000, "1:4", "a number of 4,001 characters"),
        ("0x" + "f" * 4000, "1:1", "a number of 4,002 characters"),
        ("a: *" + "b" * 3000, "1:4", "the alias *bbbb"),
        ("a: !" + "b" * 3000 + " 1", "1:4", "the tag '!bbb"),
        ("%TAG !" + "b" * 3000 + "! x", "1:3010", "not valid YAML"),
        ('a: "\\ud800"', "1:4", "not valid Unicode"),
        ('a: "\\UFFFFFFFF"', "1:7", "not valid YAML"),
        ("[" * 1000, "1:65", "nested deeper than 64 levels"),
        ("- 1\n" * 20_001, "20001:3", "more than 20,000 values"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text: str, place: str, reason: str) -> None:
    message = refusal(text)

    assert message.startswith(f"r.yaml:{place}: ")
    assert reason in message


@pytest.mark.timeout(120)
def test_an_alias_bomb_is_refused_before_it_expands() -> None:
    levels = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 30)]

    assert "more than 20,000 values, aliases expanded" in refusal("\n".join(levels))


def test_nesting_through_aliases_is_bounded() -> None:
    levels = ["l0: &l0 [1]", *(f"l{n}: &l{n} [*l{n - 1}]" for n in range(1, 100))]

    assert "nested deeper than 64 levels" in refusal("\n".join(levels))


def test_an_alias_stands_for_its_anchor() -> None:
    text = LINEAR.replace("{weight: 1}", "&w {weight: 3}").replace("{weight: 2}", "*w")

    assert weights(parse(text), "x") == (3.0, 3.0)


@given(st.text())
def test_arbitrary_text_raises_nothing_but_recipe_errors(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)


_words = st.sampled_from([
    "merge_method", "base_model", "models", "model", "parameters", "weight", "filter", "value", "stockflow",
    "rules", "storage", "scope", "t", "linear", "slerp", "model_stock", "org/a", "org/b", "s3://b/x", "copy",
    "action", "dtype", "int8_mask", "filter_wise", "on_negative", "row", "*", "~x", "./y",
])  # fmt: skip
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | _words | st.text(max_size=5)
_keys = _words | st.text(max_size=5)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(_words, _trees, max_size=5),
    st.sampled_from(["linear", "slerp", "model_stock", "task_arithmetic"]),
    st.booleans(),
)
def test_arbitrary_yaml_raises_nothing_but_recipe_errors(tree: dict[str, object], method: str, whole: bool) -> None:
    if whole:
        models = [
            {"model": "org/a", "parameters": {"weight": 1}},
            {"model": "org/b", "parameters": {"weight": 2}},
        ]
        tree = {"merge_method": method, "models": models, **tree}
    try:
        recipe = parse(json.dumps(tree).replace("NaN", ".nan").replace("Infinity", ".inf"))
    except RecipeError:
        return
    assert isinstance(recipe.canonical(), dict)


# --- structure


def test_all_problems_are_reported_together_in_file_order_and_warnings_after_them() -> None:
    message = refusal(
        "merge_method: linear\nmodls: 1\nmodels:\n  - model: org/a\n    parameters: {wieght: 1}\n"
        "stockflow:\n  scop: row\n"
    )

    expected = [
        "r.yaml: 2 problems and 2 warnings in this recipe",
        "  r.yaml:4:5: models[0]: `linear` needs the parameter `weight`; add it",
        (
            "  r.yaml:7:3: stockflow.scop: unknown key; did you mean `scope`? Known here: "
            f"{', '.join(Options.model_fields)}"
        ),
        "  r.yaml:2:1: warning: `modls` has no effect here; `models` is there as well; remove it",
        "  r.yaml:5:18: warning: `linear` has no parameter `wieght`, so it has no effect; did you mean `weight`?",
    ]
    assert message.split("\n") == expected


def test_after_twenty_problems_only_the_count_is_reported() -> None:
    options = ", ".join(f"unknown_{n}: 1" for n in range(25))
    lines = refusal(STOCK + f"stockflow: {{{options}}}").split("\n")

    assert lines[0] == "r.yaml: 25 problems in this recipe"
    assert len(lines) == 1 + 20 + 1
    assert ["Known here" in line for line in lines[1:-1]] == [True] + [False] * 19
    assert lines[-1] == "  ... and 5 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STOCK + "stockflow: {rules: [{filter: a, acton: copy}]}", "did you mean `action`?"),
        (STOCK + "stockflow: {storage: {'s3://b': {regoin: x}}}", "did you mean `region`?"),
        (STOCK + "stokflow: {scope: row}", "r.yaml:6:1: stokflow: unknown key; did you mean `stockflow`?"),
    ],
)
def test_unknown_keys_of_ours_are_refused_with_the_nearest_known_name(text: str, expected: str) -> None:
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            STOCK.replace("merge_method", "merge_metod"),
            "r.yaml:1:1: merge_metod: the required key `merge_method` is missing, is this it? rename it",
        ),
        (
            STOCK.replace("- model: org/a", "- modle: org/a"),
            "r.yaml:4:5: models[0].modle: the required key `model` is missing, is this it? rename it",
        ),
    ],
)
def test_a_required_key_that_is_misspelt_is_one_problem(text: str, expected: str) -> None:
    assert refusal(text) == expected


@pytest.mark.parametrize("name", sorted(MERGEKIT_METHODS - METHODS.keys()))
def test_methods_that_only_mergekit_has_are_refused_by_name(name: str) -> None:
    message = refusal(STOCK.replace("model_stock", name))

    assert f"r.yaml:1:1: merge_method: mergekit's method `{name}` is not supported by stockflow yet" in message


def test_unknown_methods_get_the_nearest_name_and_the_list() -> None:
    message = refusal(STOCK.replace("model_stock", "model_stok"))

    assert f"did you mean `model_stock`? Known here: {', '.join(METHODS)}" in message
    assert "`linear`?" in refusal(STOCK + "stockflow: {rules: [{filter: a, merge_method: liner}]}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[0, x, 1]", "r.yaml:5:26: parameters.weight[1]: expected a number, found 'x'"),
        ("{filter: a, value: [0, .nan]}", "r.yaml:5:45: parameters.weight.value[1]: expected a finite number"),
        (
            "[{filter: a, value: [0, true]}]",
            "r.yaml:5:46: parameters.weight[0].value[1]: expected a number, found true",
        ),
        ("[1, {value: 2}]", "parameters.weight: expected either values or mappings, found both in one list"),
        ("[[1]]", "parameters.weight[0]: expected a number, true/false or a word, found a list"),
        ("[1, null]", "r.yaml:5:26: parameters.weight[1]: expected a number, true/false or a word, found nothing"),
        ("{value: []}", "parameters.weight.value: expected at least one value over the layers, found none"),
    ],
)
def test_every_value_over_the_layers_is_checked_in_its_place(value: str, expected: str) -> None:
    assert expected in refusal(LINEAR + f"parameters: {{weight: {value}}}")


def test_an_empty_list_gives_no_value() -> None:
    assert weights(parse(LINEAR.replace("weight: 1", "weight: []") + "parameters: {weight: 7}"), "x") == (7.0, 2.0)


def test_values_over_the_layers_fall_through_like_others() -> None:
    own = "weight: [{filter: mlp, value: [1, 2]}, {filter: attn, value: 4}]"
    recipe = parse(LINEAR.replace("weight: 1", own) + "parameters: {weight: [10, 20], normalize: [true, false]}")
    method = METHODS["linear"]

    found = {
        (name, depth): recipe.parameters_for(method, name, None, Stand(depth))
        for name in ("mlp", "attn", "norm")
        for depth in (0.0, 0.5, 1.0)
    }

    assert {place: each.each("weight")[0] for place, each in found.items()} == {
        ("mlp", 0.0): 1.0, ("mlp", 0.5): 1.5, ("mlp", 1.0): 2.0,
        ("attn", 0.0): 4.0, ("attn", 0.5): 4.0, ("attn", 1.0): 4.0,
        ("norm", 0.0): 10.0, ("norm", 0.5): 15.0, ("norm", 1.0): 20.0,
    }  # fmt: skip
    assert [found["mlp", depth].flag("normalize") for depth in (0.0, 0.5, 1.0)] == [True, True, False]


def test_a_vocabulary_is_said_by_one_key_or_by_a_mapping() -> None:
    for word, donor in (("base", 0), ("union", 0), ("org/b", 2)):
        recipe = parse(STOCK + f"tokenizer_source: {word}")
        assert recipe.vocabulary == parse(STOCK + f"tokenizer: {{source: {word}}}").vocabulary
        assert recipe.vocabulary_donor == donor
    assert parse(STOCK + "tokenizer: {}").vocabulary == parse(STOCK + "tokenizer_source: union").vocabulary
    tokens = parse(STOCK + "tokenizer: {tokens: {<x>: {source: org/a, force: true}, <y>: {source: {kind: zero}}}}")
    assert tokens.vocabulary is not None
    assert [(entry.source.kind, entry.force) for entry in tokens.vocabulary.tokens.values()] == [
        ("model", True),
        ("zero", False),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer_source: union\ntokenizer: {source: base}", "is said by `tokenizer`, too; keep one of them"),
        ("tokenizer: {tokens: {<x>: {source: org/c}}}", "expected one of the models, found hf://org/c"),
        ("tokenizer: {tokens: {<x>: {source: {kind: model}}}}", "expected one of the models, found none"),
        ("tokenizer: {tokens: {<x>: {force: true}}}", "the required key `source` is missing"),
        ("tokenizer: {tokens: {<x>: {source: {kind: mean}}}}", "expected 'zero', 'model' or 'model_token'"),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: org/a}}}}",
            "expected either `token` or `token_id`, found neither",
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: org/a, token: a, token_id: 3}}}}",
            "expected either `token` or `token_id`, found both",
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: org/a, token_id: -1}}}}",
            "expected the id of a token, found -1",
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: org/c, token_id: 1}}}}",
            "expected one of the models, found hf://org/c",
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model, model: org/a, token: y}}}}",
            "`token` and `token_id` go with `kind: model_token`, found `kind: model`",
        ),
        ("tokenizer: {pad_to_multiple_of: 0}", "expected an integer from 1 to 1,048,576, found 0"),
        ("tokenizer: {pad_to_multiple_of: eight}", "expected an integer from 1 to 1,048,576, found 'eight'"),
        ("chat_template: nonsense", "no template, no model, and none of the known ones"),
        ("chat_template: chatmk", "did you mean `chatml`"),
        ("chat_template: '{% for m in messages %}'", "no template that can be read: line 1: Unexpected end"),
        ("chat_template: ''", "expected `auto`, a name or a template"),
    ],
)
def test_what_is_no_vocabulary_or_template_is_refused(text: str, expected: str) -> None:
    assert expected in refusal(STOCK + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge_method: linear", "expected at least one model under `models`, `slices` or `modules`, found none"),
        ("merge_method: linear\nmodels: []", "expected at least one model"),
        ("merge_method: linear\nmodels: org/a", "expected a list, found 'org/a'"),
        ("merge_method: linear\nmodels: [[org/a]]", "models[0]: expected a mapping, found a list"),
        ("merge_method: linear\nmodels: [{model: 7}]", "found 7"),
        (
            STOCK + "stockflow: {on_negative: clmp}",
            "expected 'clamp', 'extrapolate' or 'error', found 'clmp'",
        ),
        (STOCK + "stockflow: {on_nonfinite: ignore}", "expected 'error' or 'propagate'"),
        (STOCK + "stockflow: {storage: {'s3://b': {anonymous: 1}}}", "expected true or false, found 1"),
        (STOCK + "stockflow: {rules: [{filter: a}]}", "either `action` or `merge_method`, found neither"),
        (STOCK + "stockflow: {rules: [{filter: a, action: copy, merge_method: linear}]}", "found both"),
        (
            STOCK + "stockflow: {rules: [{filter: a, action: skip, parameters: {t: 1}}]}",
            "no effect with `action: skip`",
        ),
        (STOCK + "stockflow: {rules: [{action: skip}]}", "the required key `filter` is missing"),
        (LINEAR + "parameters: {normalize: }", "expected a value, found nothing"),
    ],
)
def test_wrong_structure_says_expected_against_found(text: str, expected: str) -> None:
    assert expected in refusal(text)


# --- locations


def test_an_existing_folder_is_a_path_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "a+b", "x@y", "org/n+l@r"):
        (tmp_path / name).mkdir(parents=True)

        assert resolve_location(name) == str(tmp_path / name)
        assert resolve_location(str(tmp_path / name)) == str(tmp_path / name)
    for name in ("~", "~/x", "~nobody"):
        assert resolve_location(f"./{name}") == str(tmp_path / name)


def test_a_bare_name_that_is_no_folder_is_on_the_hub() -> None:
    assert resolve_location("org/name") == "hf://org/name"
    for place, meant in (
        ("s3:/bucket/x", "s3://bucket/x"), ("S3:bucket/x", "s3://bucket/x"), ("s3//bucket/x", "s3://bucket/x"),
        ("https:/host/x", "https://host/x"), ("file:/tmp/x", "file:///tmp/x"), ("ftp:/host/x", "ftp://host/x"),
        ("arn:aws:s3:::bucket/x", "s3://bucket/x"), ("s3://arn:aws-cn:s3:::bucket/x", "s3://bucket/x"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=re.escape(f"'{place}' is no URL; did you mean '{meant}'?")):
            resolve_location(place)
    assert resolve_location("org/name@refs/pr/1") == "hf://org/name@refs/pr/1"
    assert resolve_location("hf://org/name@main") == "hf://org/name@main"


def test_explicit_paths_that_do_not_exist_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert resolve_location("./x") == str(tmp_path / "x")
    assert resolve_location("../x+y") == str(tmp_path.parent / "x+y")
    assert resolve_location("~/x") == str(tmp_path / "x")
    assert resolve_location("/no/such@folder") == "/no/such@folder"
    assert resolve_location("plain") == str(tmp_path / "plain")


def test_locations_are_normalized(tmp_path: Path) -> None:
    assert resolve_location(f"file://{tmp_path}/a%20b/") == str(tmp_path / "a b")
    assert resolve_location("s3://bucket/prefix/") == "s3://bucket/prefix"


def test_a_model_and_an_adapter_are_one_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)

    assert resolve_location("org/name+org/lora") == "hf://org/name + hf://org/lora"
    assert resolve_location("org/name@r+org/lora@s") == "hf://org/name@r + hf://org/lora@s"
    assert resolve_location(f"{tmp_path}/base@r+lora") == f"{tmp_path}/base + {tmp_path}/lora"
    assert resolve_location("s3://b/m + s3://b/l") == resolve_location("s3://b/m+s3://b/l") == "s3://b/m + s3://b/l"


@pytest.mark.parametrize("text", ["/x/m+/x/a+/x/b", "s3://b/m+s3://b/a+s3://b/b"])
def test_several_adapters_of_one_model_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="more than a model and one adapter"):
        resolve_location(text)


@pytest.mark.parametrize("url", ["s3://AKIA:hunter2@b/x", "s3://AKIA:hun/ter2@b/x", "https://u:12345@h/x"])
def test_urls_with_a_password_are_refused_and_never_shown(url: str) -> None:
    for text in (
        STOCK.replace("org/base", url),
        STOCK.replace("org/a", url),
        STOCK + f"stockflow: {{storage: {{'{url}': {{}}}}}}",
        STOCK + f"stockflow: {{storage: {{'s3://b': {{endpoint: '{url}'}}}}}}",
    ):
        message = refusal(text)

        assert "carries a user and a password" in message
        assert not any(secret in message for secret in ("AKIA", "hun", "ter2", "12345"))


def test_ports_and_azure_containers_are_no_passwords() -> None:
    for url in ("https://host:8443/a/b@c", "abfs://container@account.dfs.core.windows.net/x"):
        assert resolve_location(url) == url


@pytest.mark.parametrize("text", ["", "s3://", "s3:///", "https://h/x?token=hunter2", "a\0b", "~nobody-here/x", "://x"])
def test_unusable_locations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_location(text)
    assert "hunter2" not in str(caught.value)


# --- storage


def test_storage_options_reach_the_store() -> None:
    recipe = parse(STOCK + "stockflow: {storage: {'s3://b/': {region: eu, anonymous: true, client: fsspec}}}")

    assert StoreOptions(region="eu", anonymous=True, client="fsspec") == recipe.storage.for_url("s3://b/x")
    assert StoreOptions() == recipe.storage.for_url("s3://c/x")


def test_the_recipe_knows_every_store_option() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(StoreOptions)}

    assert fields == {name: field.default for name, field in StorageEntry.model_fields.items()}


@pytest.mark.parametrize(
    "name",
    ["key", "secret", "token", "password", "access_key_id", "secret_access_key", "sas_token", "username"],
)
def test_secrets_are_refused_and_never_shown(name: str) -> None:
    message = refusal(STOCK + f"stockflow: {{storage: {{'s3://b': {{{name}: hunter2}}}}}}")

    assert "a recipe never holds secrets" in message
    assert "the environment" in message
    assert "hunter2" not in message


def test_a_storage_prefix_must_be_a_url() -> None:
    assert "expected a URL such as s3://bucket/folder" in refusal(STOCK + "stockflow: {storage: {bucket: {}}}")


# --- models and counts


def test_the_base_may_be_listed_and_is_not_counted() -> None:
    recipe = parse(STOCK + "  - model: hf://org/base/\n")

    assert recipe.checkpoints == ("hf://org/base", "hf://org/a", "hf://org/b")
    assert recipe.sources(METHODS["model_stock"]) == (0, 1, 2)


def test_a_listed_base_is_an_ordinary_input_of_linear() -> None:
    recipe = parse(LINEAR + "base_model: org/b\n")

    assert recipe.checkpoints == ("hf://org/b", "hf://org/a")
    assert recipe.sources(METHODS["linear"]) == (1, 0)
    assert weights(recipe, "x") == (1.0, 2.0)
    assert "needs the parameter `weight`" in refusal(LINEAR.replace("weight: 2", "") + "base_model: org/b")


def test_an_unlisted_base_only_donates_names_to_linear() -> None:
    recipe = parse(LINEAR + "base_model: org/base\n")

    assert recipe.checkpoints == ("hf://org/base", "hf://org/a", "hf://org/b")
    assert recipe.sources(METHODS["linear"]) == (1, 2)
    assert recipe.donor == 0


def test_without_a_base_the_first_model_is_the_donor() -> None:
    recipe = parse(LINEAR)

    assert recipe.checkpoints[recipe.donor] == "hf://org/a"
    assert recipe.side_files_donor == recipe.donor


def test_side_files_may_come_from_any_model_of_the_recipe() -> None:
    assert parse(STOCK + "stockflow: {side_files_from: org/b}").side_files_donor == 2
    assert "expected the base or one of the models, found hf://org/c" in refusal(
        STOCK + "stockflow: {side_files_from: org/c}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            STOCK.replace("  - model: org/b\n", ""),
            "`model_stock` needs at least 2 models besides the base, found 1",
        ),
        (
            STOCK.replace("  - model: org/b\n", "  - model: org/base\n"),
            "found 1, as one of those listed is the base, hf://org/base, by this name or through a link; change",
        ),
        (
            STOCK.replace("model_stock", "slerp") + "parameters: {t: 0.5}",
            "`slerp` needs 1 model besides the base, found 2",
        ),
        (STOCK.replace("base_model: org/base\n", ""), "`model_stock` needs a base, found no `base_model`"),
        (
            LINEAR + "stockflow: {rules: [{filter: x, merge_method: model_stock}]}",
            "stockflow.rules[0].merge_method: `model_stock` needs a base",
        ),
    ],
)
def test_models_must_suit_every_method_in_use(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_the_base_is_the_second_input_of_slerp() -> None:
    recipe = parse(
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]\nparameters: {t: 0.5}\n"
    )

    assert recipe.sources(METHODS["slerp"]) == (0, 1)


# --- parameters


def test_the_first_matching_filter_wins_and_a_star_matches_all() -> None:
    recipe = parse(
        LINEAR.replace(
            "weight: 1",
            "weight: [{filter: mlp, value: 5}, {filter: mlp.up, value: 6}, {filter: '*', value: 7}, {value: 8}]",
        )
    )

    assert weights(recipe, "layers.0.mlp.up") == (5.0, 2.0)
    assert weights(recipe, "layers.0.attn") == (7.0, 2.0)


def test_a_lone_conditional_is_a_list_of_one() -> None:
    recipe = parse(LINEAR.replace("weight: 1", "weight: {filter: mlp, value: 5}") + "parameters: {weight: 9}")

    assert weights(recipe, "mlp") == (5.0, 2.0)
    assert weights(recipe, "attn") == (9.0, 2.0)


def test_precedence_is_rule_then_model_then_recipe_then_default() -> None:
    recipe = parse(
        "merge_method: task_arithmetic\nbase_model: org/x\n"
        "models:\n- {model: org/a, parameters: {weight: {filter: mlp, value: 2}}}\n- {model: org/b}\n"
        "parameters: {weight: 3, lambda: {filter: attn, value: 4}}\n"
        "stockflow: {rules: [{filter: norm, merge_method: task_arithmetic, "
        "parameters: {weight: {filter: norm1, value: 5}}}]}\n"
    )
    method = METHODS["task_arithmetic"]

    assert weights(recipe, "mlp") == (2.0, 3.0)
    assert weights(recipe, "attn") == (3.0, 3.0)
    assert weights(recipe, "mlp.norm1") == (5.0, 5.0)
    assert weights(recipe, "mlp.norm2") == (2.0, 3.0)
    assert recipe.parameters_for(method, "attn", None).number("lambda") == 4.0
    assert recipe.parameters_for(method, "mlp", None).number("lambda") == 1.0
    assert recipe.parameters_for(method, "mlp", None).flag("normalize") is False


def test_texts_that_are_numbers_become_numbers() -> None:
    assert weights(parse(LINEAR.replace("weight: 1", "weight: 1e-5")), "x") == (1e-5, 2.0)
    assert weights(parse(LINEAR.replace("weight: 1", "weight: '-.5'")), "x") == (-0.5, 2.0)


def test_zero_has_no_sign() -> None:
    """Equal values are one object, so -0.0 and 0.0 must not depend on which tensor came first."""
    (weight, _) = weights(parse(LINEAR.replace("weight: 1", "weight: -0.0")), "x")

    assert math.copysign(1.0, weight) == 1.0


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1.0e+999", "1e999", "1" * 400])
def test_numbers_must_be_finite(value: str) -> None:
    assert "expected a finite number" in refusal(LINEAR.replace("weight: 1", f"weight: {value}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINEAR.replace("weight: 1", "weight: true"), "weight: expected a number, found true"),
        (LINEAR.replace("weight: 1", "weight: heavy"), "expected a number, found 'heavy'"),
        (LINEAR.replace("weight: 1", "weight: nan"), "expected a number, found 'nan'"),
        (LINEAR + "parameters: {normalize: 0.5}", "normalize: expected true or false, found 0.5"),
        (LINEAR + "parameters: {normalize: 'maybe'}", "expected true or false, found 'maybe'"),
        (LINEAR.replace("weight: 1", "weight: {value: {a: 1}}"), "found a mapping"),
    ],
)
def test_values_must_be_of_the_declared_kind(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_a_parameter_that_the_method_of_a_rule_lacks_is_refused() -> None:
    assert "stockflow.rules[0].parameters.t: `linear` has no such parameter" in refusal(
        LINEAR + "stockflow: {rules: [{filter: a, merge_method: linear, parameters: {t: 1}}]}"
    )


def test_a_parameter_that_only_a_rule_uses_may_be_global() -> None:
    recipe = parse(STOCK + "parameters: {weight: 2}\nstockflow: {rules: [{filter: a, merge_method: linear}]}")

    assert weights(recipe, "a") == (2.0, 2.0)
    assert recipe.method_for(recipe.rule_for("a")).name == "linear"
    assert recipe.method_for(recipe.rule_for("b")).name == "model_stock"


DRAWN = Method(
    "drawn", METHODS["ties"].rule, "a test", parameters=(Parameter("seed", "integer"), Parameter("rounds", "integer"))
)


def test_a_seed_reaches_methods_that_draw_and_no_others() -> None:
    recipe = parse(STOCK + "stockflow: {seed: 7}\nparameters: {filter_wise: false}")
    slots = recipe.slots(DRAWN, None)

    assert slots[0].candidates == ((None, (7,)),)
    assert Resolver("task_arithmetic", slots[:1]).resolve("x", OUTSIDE).integer("seed") == 7
    assert "seed" not in recipe.parameters_for(METHODS["model_stock"], "x", None).shared


@pytest.mark.parametrize("seed", ["-1", "0.5", "true", "'3'", str(2**63)])
def test_a_seed_is_an_integer_of_63_bits(seed: str) -> None:
    assert "r.yaml:6:13: stockflow.seed: " in refusal(STOCK + f"stockflow: {{seed: {seed}}}")


def test_on_negative_is_written_under_stockflow_and_reaches_the_method() -> None:
    recipe = parse(STOCK + "stockflow: {on_negative: extrapolate}")

    assert recipe.parameters_for(METHODS["model_stock"], "x", None).word("on_negative") == "extrapolate"
    rule = "rules: [{filter: a, merge_method: model_stock, parameters: {on_negative: error}}]"
    assert "write it under `stockflow:`" in refusal(STOCK + f"stockflow: {{{rule}}}")


def test_a_required_value_nobody_gives_is_refused_at_once() -> None:
    text = STOCK.replace("model_stock", "slerp").replace("  - model: org/b\n", "")

    assert "r.yaml:1:1: merge_method: `slerp` needs the parameter `t`" in refusal(text)


def test_a_required_value_no_filter_gives_is_refused_by_parameter_model_and_tensor() -> None:
    recipe = parse(LINEAR.replace("weight: 1", "weight: {filter: mlp, value: 1}"))

    with pytest.raises(RecipeError, match=r"`weight` of the model hf://org/a for the tensor 'attn'"):
        weights(recipe, "attn")


def test_equal_parameters_are_one_object() -> None:
    recipe = parse(
        LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: 1}, {filter: attn, value: 1}, {value: 3}]")
    )
    method = METHODS["linear"]

    assert recipe.parameters_for(method, "mlp", None) is recipe.parameters_for(method, "attn", None)
    assert recipe.parameters_for(method, "mlp", None) is not recipe.parameters_for(method, "norm", None)


def test_per_model_parameters_are_plain_floats_in_recipe_order() -> None:
    found = weights(parse(LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: 5}, {value: 3}]")), "x.mlp")

    assert found == (5.0, 2.0)
    assert type(found) is tuple
    assert {type(weight) for weight in found} == {float}


def test_rules_with_equal_methods_keep_their_own_parameters() -> None:
    recipe = parse(
        STOCK + "stockflow: {rules: [{filter: a, merge_method: linear, parameters: {weight: 1}}, "
        "{filter: b, merge_method: linear, parameters: {weight: 2}}]}"
    )

    assert [weights(recipe, name) for name in ("a", "b", "a")] == [(1.0, 1.0), (2.0, 2.0), (1.0, 1.0)]


def test_a_recipe_with_answers_survives_pickling() -> None:
    """Answers are filed under a rule's position: an id would mean another rule in another process."""
    recipe = parse(STOCK + "stockflow: {rules: [{filter: a, merge_method: linear, parameters: {weight: 1}}]}")
    weights(recipe, "a")
    copy = pickle.loads(pickle.dumps(recipe))

    assert weights(copy, "a") == (1.0, 1.0)
    assert set(copy.resolvers) == {("linear", 0)}
    assert copy.text == recipe.text


def test_a_rule_of_another_recipe_is_a_programming_error() -> None:
    text = STOCK + "stockflow: {rules: [{filter: a, merge_method: linear, parameters: {weight: 1}}]}"
    rule = parse(text).rule_for("a")

    with pytest.raises(ValueError, match="not one of this recipe's"):
        parse(text).parameters_for(METHODS["linear"], "a", rule)


def test_ninety_thousand_tensors_take_little_work_each() -> None:
    """Calls are counted, of Python's functions and of C's: they took eight microseconds."""
    recipe = parse(
        STOCK + "parameters: {filter_wise: [{filter: mlp, value: true}, {filter: attn, value: false}]}\n"
        "stockflow: {rules: [{filter: norm, action: copy}, {filter: lm_head, action: copy}]}\n"
    )
    names = [f"model.layers.{n // 9}.mlp.experts.{n % 256}.up_proj.weight" for n in range(2_000)]
    method = METHODS["model_stock"]
    calls = itertools.count()
    sys.setprofile(lambda _, event, __: next(calls) if event in ("call", "c_call") else None)
    try:
        for name in names:
            recipe.parameters_for(method, name, recipe.rule_for(name))
    finally:
        sys.setprofile(None)

    assert next(calls) / len(names) < 20


# --- rules and scopes


def test_the_first_matching_rule_wins() -> None:
    recipe = parse(STOCK + "stockflow: {rules: [{filter: norm, action: copy}, {filter: '*', action: skip}]}")

    assert [rule.action for name in ("a.norm", "b") if (rule := recipe.rule_for(name))] == ["copy", "skip"]
    assert parse(STOCK).rule_for("a.norm") is None


def test_filter_wise_means_scope_row_where_its_filter_matches() -> None:
    recipe = parse(STOCK + "parameters: {filter_wise: [{filter: mlp, value: true}, {value: false}]}")
    method = METHODS["model_stock"]

    assert recipe.scope_for(method, "mlp", None) == "row"
    assert recipe.scope_for(method, "attn", None) == "tensor"
    assert parse(STOCK + "stockflow: {scope: leading}").scope_for(method, "x", None) == "leading"
    assert parse(STOCK + "stockflow: {scope: null}").scope_for(method, "x", None) == "tensor"


def test_filter_wise_and_another_scope_contradict_each_other() -> None:
    text = STOCK + "parameters: {filter_wise: true}\nstockflow: {scope: %s}"

    assert parse(text % "row").scope_for(METHODS["model_stock"], "x", None) == "row"
    for scope in ("tensor", "leading"):
        assert "r.yaml:7:13: stockflow.scope: `filter_wise: true` means" in refusal(text % scope)


@pytest.mark.parametrize("scope", ["row", "leading"])
def test_a_scope_that_the_recipes_own_method_lacks_is_refused(scope: str) -> None:
    rule = f"stockflow: {{scope: {scope}, rules: [{{filter: a, merge_method: model_stock}}]}}"

    for text in (f"stockflow: {{scope: {scope}}}", "base_model: org/base\n" + rule):
        assert f"stockflow.scope: `linear` knows the scope tensor, found {scope}" in refusal(LINEAR + text)


@pytest.mark.parametrize("scope", ["row", "leading"])
def test_a_rule_whose_method_lacks_the_scope_decides_per_tensor(scope: str) -> None:
    """Otherwise one `linear` rule for the norms would forbid Model Stock by row everywhere else."""
    rules = "rules: [{filter: norm, merge_method: linear, parameters: {weight: 1}}]"
    recipe = parse(STOCK + f"stockflow: {{scope: {scope}, {rules}}}")
    rule = recipe.rule_for("a.norm")

    assert recipe.scope_for(recipe.method_for(rule), "a.norm", rule) == "tensor"
    assert recipe.scope_for(recipe.method_for(None), "mlp", None) == scope


def test_a_rule_may_not_contradict_the_scope_by_filter_wise() -> None:
    rule = "rules: [{filter: a, merge_method: model_stock, parameters: {filter_wise: true}}]"

    assert "`filter_wise: true` means the scope row" in refusal(STOCK + f"stockflow: {{scope: leading, {rule}}}")


# --- loading


def test_a_recipe_is_read_from_a_file_or_a_url(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + STOCK.encode())

    assert load_recipe(str(path)).canonical() == parse(STOCK).canonical()
    assert load_recipe(f"file://{path}").text == STOCK


def test_a_recipe_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STOCK.encode())))

    assert load_recipe("-").text == STOCK


def test_what_is_no_recipe_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 20) + 1))

    with pytest.raises(NotFoundError):
        load_recipe(str(tmp_path / "absent.yaml"))
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match=r"latin\.yaml:2:4: expected UTF-8"):
        load_recipe(str(tmp_path / "latin.yaml"))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(str(tmp_path / "large.yaml"))
    with pytest.raises(RecipeError, match="no usable location"):
        load_recipe("~nobody-here/x.yaml")


def test_reading_a_recipe_needs_no_heavy_library() -> None:
    code = "import sys, stockflow.recipe; print({'torch', 'ray', 'pyarrow', 'fsspec'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"


# --- schema


def test_the_schema_describes_every_key_and_accepts_every_form() -> None:
    schema = recipe_schema()
    text = json.dumps(schema)

    assert set(Recipe.model_fields) == set(schema["properties"])  # type: ignore[call-overload]
    assert json.dumps(list(METHODS)) in text
    for part in ("_text", "_resolvers"):
        assert part not in text
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    accepted = {
        "merge_method": "linear",
        "models": [{"model": "a/b", "parameters": {"weight": [{"filter": "x", "value": 1}, {"value": "1e-5"}]}}],
        "parameters": {"normalize": {"value": [True, False]}, "weight": [0, "1e-1", 1]},
        "dtype": "torch.float32",
        "stockflow": {"shard_size": "5GB", "scope": None},
    }
    jsonschema.validate(accepted, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**accepted, "unknown": 1}, schema)


@pytest.mark.parametrize(
    ("density", "place"),
    [("0.1", "r.yaml:4:14: parameters.density"), ("[0.5, 0.9]", "r.yaml:4:14: parameters.density")],
    ids=["a number", "over the layers"],
)
def test_values_that_do_not_go_together_are_refused_where_they_stand(density: str, place: str) -> None:
    text = "merge_method: della\nbase_model: /m/a\nmodels: [{model: /m/b, parameters: {weight: 1}}]\n"

    with pytest.raises(RecipeError, match=re.escape(f"{place}: the `density` ")):
        parse_recipe(f"{text}parameters: {{density: {density}, epsilon: 0.15}}\n", "r.yaml")


def test_texts_may_hold_any_space() -> None:
    text = f"{LINEAR}chat_template: |\n  {{{{ messages }}}} and some more\n  \u00a0 - a line\n"

    assert parse(text).chat_template is not None
