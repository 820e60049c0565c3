"""`stockflow mergekit-yaml`: the options of mergekit's command, as they stand in scripts, and what each does here."""

import json
from pathlib import Path

import pytest
from typer.testing import Result

from stockflow.cli.mergekit import shard_bytes
from stockflow.errors import RecipeError
from stockflow.recipe import Recipe, amended, parse_recipe
from tests import runs
from tests.checkpoints import Family, make_family, write_recipe

SHAPES = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
STOCK = "merge_method: model_stock\nbase_model: org/base\nmodels: [{model: org/a}, {model: org/b}]\n"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path, 2, SHAPES, buffers=False)


def merge(family: Family, *words: object) -> tuple[Result, Path]:
    folder = family.base.parent
    recipe = write_recipe(folder / "recipe.yaml", "model_stock", family)
    output = folder / "out"
    return runs.invoke("mergekit-yaml", recipe, output, *words), output


def test_a_usual_line_of_a_script_merges(family: Family) -> None:
    result, output = merge(
        family, "--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle", "--low-cpu-memory",
        "--trust-remote-code", "--clone-tensors", "--lora-merge-cache", "/tmp/x", "-j", 1, "-v", "--no-cuda",
        "--write-threads", 4, "--read-to-gpu", "--random-seed", 3, "--device", "cpu",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert (output / "tokenizer.json").exists()
    for option in (
        "lazy-unpickle",
        "low-cpu-memory",
        "trust-remote-code",
        "clone-tensors",
        "lora-merge-cache",
        "verbose",
    ):
        assert f"--{option} has no use here" in result.stderr
    assert "--allow-crimes" not in result.stderr
    assert (output / "model.safetensors").read_bytes() == plainly_merged(family)


def plainly_merged(family: Family) -> bytes:
    recipe, output = family.base.parent / "recipe.yaml", family.base.parent / "plain"
    assert runs.invoke("merge", recipe, output).exit_code == 0
    return (output / "model.safetensors").read_bytes()


def test_needless_options_are_not_told_of_where_they_are_not_given(family: Family) -> None:
    result, _ = merge(family)

    assert result.exit_code == 0, result.output
    assert "has no use here" not in result.output


def test_a_tokenizer_may_stay_behind(family: Family) -> None:
    result, output = merge(family, "--no-copy-tokenizer")

    assert result.exit_code == 0, result.output
    assert not (output / "tokenizer.json").exists()
    assert "copy_tokenizer" in json.loads((output / "manifest.json").read_text())["recipe"]


def test_shards_are_as_large_as_is_said(family: Family) -> None:
    result, output = merge(family, "--out-shard-size", "1K")

    assert result.exit_code == 0, result.output
    assert len(list(output.glob("model-*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--no-safe-serialization", "only safetensors are written"),
        ("--unsafe-truncate-embeddings", "would cut vocabularies"),
        ("--out-shard-size=5X", "--out-shard-size: expected a size"),
    ],
)
def test_what_is_not_done_here_is_refused(family: Family, option: str, expected: str) -> None:
    result, output = merge(family, option)

    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert not output.exists()


def test_models_of_several_architectures_are_refused_unless_crimes_are_allowed(family: Family) -> None:
    config = json.loads((family.tuned[0] / "config.json").read_text())
    (family.tuned[0] / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))

    assert merge(family)[0].exit_code == 2
    assert merge(family, "--allow-crimes")[0].exit_code == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5B", 5 * 10**9), ("500M", 5 * 10**8), ("10k", 10**4), ("1.5b", 15 * 10**8), ("1000", 1000),
        ("5GB", 5 * 10**9), (None, None),
    ],
)  # fmt: skip
def test_sizes_are_mergekits_or_ours(text: str | None, expected: int | None) -> None:
    assert shard_bytes("--out-shard-size", text) == expected


# --- recipes with options of the command line


def amend(text: str, **options: object) -> Recipe:
    return amended(parse_recipe(text, "r.yaml"), **options)


@pytest.mark.parametrize(
    "text",
    [
        STOCK,
        STOCK + "stockflow: {scope: row, seed: 1}\n",
        STOCK + "...\n",
        json.dumps({"merge_method": "linear", "models": ["org/a"], "parameters": {"weight": 1}}),
        STOCK + "stockflow:\n",
        "# words\n" + STOCK.replace("\n", "\r\n"),
    ],
)
def test_an_option_is_in_the_recipe_and_in_its_text(text: str) -> None:
    given, recipe = parse_recipe(text, "r.yaml"), amend(text, seed=7)

    assert recipe.stockflow.seed == 7
    assert parse_recipe(recipe.text, "again").canonical() == recipe.canonical()
    assert recipe.canonical() | {"stockflow": None} == given.canonical() | {"stockflow": None}
    assert recipe.stockflow.scope == given.stockflow.scope


def test_comments_stay_where_nothing_else_is_said() -> None:
    assert amend("# words\n" + STOCK, seed=7).text == f'# words\n{STOCK}\nstockflow: {{"seed": 7}}\n'
    assert amend(STOCK).text == STOCK


def test_accepted_codes_are_added() -> None:
    recipe = amend(STOCK + "stockflow: {accept: [unmerged]}", accept=["no-config"])

    assert recipe.stockflow.accept == ("unmerged", "no-config")


def test_remarks_keep_their_places() -> None:
    assert [remark.place for remark in amend(STOCK + "name: x\n", seed=7).remarks] == ["r.yaml:4:1"]


def test_a_seed_that_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected an integer from 0"):
        amend(STOCK, seed=-1)
