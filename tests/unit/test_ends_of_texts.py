"""Ends of texts: the token, and the ids in config.json and generation_config.json, of the model that is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from stockflow.planning.plan import MergePlan
from tests.token_files import LETTERS, added
from tests.unit.test_tokenizer_looks import FAST, Files, Models, fast

TOKEN = fast(LETTERS, more=added("<|im_end|>", start=10))


def ending(files: Files, token: str, number: int, generation: int | list[int] | None = None) -> Files:
    """A model whose files name an end."""
    return {
        **files,
        "config.json": json.dumps({"model_type": "llama", "vocab_size": 12, "eos_token_id": number}),
        "tokenizer_config.json": json.dumps({"eos_token": token, "unk_token": "b"}),
        "special_tokens_map.json": json.dumps({"eos_token": token}),
        **({} if generation is None else {"generation_config.json": json.dumps({"eos_token_id": generation})}),
    }


BASE, TUNE = ending(FAST, "a", 0, 0), ending(TOKEN, "<|im_end|>", 10, 10)


def named(plan: MergePlan, folder: Path) -> tuple[object, ...]:
    """What goes out as the end: of config.json, of tokenizer_config.json and special_tokens_map.json."""
    written = {each.key: json.loads(each.payload) for each in plan.written_files}
    stored = [written.get(key) or json.loads((folder / key).read_text()) for key in FILES]
    return (plan.config or {})["eos_token_id"], *(each["eos_token"] for each in stored)


FILES = ("tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("source", [None, "union", "one"])
def test_the_end_of_texts_is_taken_of_the_model_that_is_asked_for_it(tmp_path: Path, source: str | None) -> None:
    models = Models(tmp_path, BASE, TUNE)
    asked: dict[str, Any] = {"stockflow": {"side_files_from": str(models.folders[1])}}
    asked |= {} if source is None else {"tokenizer_source": str(models.folders[1]) if source == "one" else source}

    plan = models.plan(**asked)

    giver = models.folders[0 if source == "union" else 1]
    assert named(plan, giver) == (10, "<|im_end|>", "<|im_end|>")
    assert "side-files-differ" not in models.said(**asked)
    assert "tokens-disagree" not in models.said(**asked)


def test_a_union_keeps_what_is_said_by_the_base_alone(tmp_path: Path) -> None:
    models = Models(tmp_path, BASE, TUNE)

    plan = models.plan(tokenizer_source="union")

    assert named(plan, models.folders[0]) == (0, "a", "a")
    assert models.said(tokenizer_source="union") == {"side-files-differ": "warning"}


def test_the_advice_names_the_word_that_takes_another_end(tmp_path: Path) -> None:
    models = Models(tmp_path, BASE, TUNE)
    words = {"base": "`tokenizer_source: MODEL` takes", "union": "`stockflow: {side_files_from: MODEL}` takes"}

    for source, advice in words.items():
        texts = [each.text for each in models.plan(tokenizer_source=source).remarks if "end token of" in each.text]
        assert len(texts) == 1
        assert advice in texts[0]


def test_ends_that_a_merge_puts_together_are_said(tmp_path: Path) -> None:
    models = Models(tmp_path, BASE, TUNE)

    (said,) = [
        each for each in models.plan(tokenizer_source=str(models.folders[1])).remarks if each.code == "tokens-disagree"
    ]

    assert said.severity == "warning"
    assert "0 by generation_config.json" in said.text
    assert "10 by the tokenizer of" in said.text
    assert "`stockflow: {side_files_from: MODEL}`" in said.text


@pytest.mark.parametrize(
    ("files", "severity"),
    [
        (ending(TOKEN, "<|im_end|>", 0, 10), "note"),  # config.json is another's
        (ending(TOKEN, "<|im_end|>", 0, [0, 10]), None),
        (ending(TOKEN, "<|im_end|>", 0), "note"),
        (ending(TOKEN, "<|im_end|>", 10), None),
    ],
)
def test_ends_that_the_files_of_one_model_name_are_held_against_each_other(
    tmp_path: Path, files: Files, severity: str | None
) -> None:
    assert Models(tmp_path, files, files).said().get("tokens-disagree") == severity


def test_ids_that_end_texts_have_no_order(tmp_path: Path) -> None:
    one, two = ending(FAST, "a", 0, [0, 1]), ending(FAST, "a", 0, [1, 0])
    single = ending(FAST, "a", 0, [0])

    assert Models(tmp_path / "several", one, two).said() == {}
    assert Models(tmp_path / "one", single, ending(FAST, "a", 0, 0)).said() == {}
    assert Models(tmp_path / "another", one, single).said() != {}
