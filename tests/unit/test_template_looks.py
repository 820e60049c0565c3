"""Chat templates that go out: whose they are, whether the vocabulary that is written has their words, what is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.token_files import LETTERS, added
from tests.unit.test_tokenizer_looks import FAST, Models, fast

TURNS = fast(LETTERS, more=added("<|im_start|>", "<|im_end|>", start=10))
END = fast(LETTERS, more=added("<|im_end|>", start=10))
OWN = {"chat_template.jinja": "{{ messages }}"}
MARKED = {"chat_template.jinja": "<|im_start|>{{ messages }}<|im_end|>"}
FURTHER = {"additional_chat_templates/rag.jinja": "{{ documents }}"}


def said(models: Models, code: str, **top_level: Any) -> list[str]:
    return [each.text for each in models.plan(**top_level).remarks if each.code == code]


def published(models: Models, **top_level: Any) -> dict[str, str]:
    """The files that go out, and of which model, or that they are written."""
    plan = models.plan(**top_level)
    copied = {each.key: Path(plan.checkpoints[each.checkpoint].url).name for each in plan.side_files}
    return copied | {each.key: "written" for each in plan.written_files}


def test_a_template_is_held_against_the_vocabulary_that_is_written(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, END)

    for source in (None, "base"):
        asked = {"tokenizer_source": source} if source else {}
        (text,) = said(models, "template-unread", chat_template="chatml", **asked)
        assert f"'<|im_start|>', '<|im_end|>', which are no tokens of {models.folders[0]}, " in text
    (text,) = said(models, "template-unread", chat_template="chatml", tokenizer_source="union")
    assert "'<|im_start|>', which is no token of the vocabulary that is written" in text


@pytest.mark.parametrize("source", ["union", "one"])
def test_a_template_whose_words_are_written_as_tokens_is_quiet(tmp_path: Path, source: str) -> None:
    models = Models(tmp_path, FAST, TURNS)
    source = str(models.folders[1]) if source == "one" else source

    assert said(models, "template-unread", chat_template="chatml", tokenizer_source=source) == []


def test_a_tokenizer_of_no_merged_model_is_held_against_a_template_too(tmp_path: Path) -> None:
    models = Models(tmp_path / "merged", FAST, FAST)
    given = {name: Models(tmp_path / name, files, FAST).folders[0] for name, files in (("x", END), ("y", TURNS))}

    (text,) = said(models, "template-unread", chat_template="chatml", tokenizer_source=str(given["x"]))
    assert f"'<|im_start|>', which is no token of {given['x']}, " in text
    assert said(models, "template-unread", chat_template="chatml", tokenizer_source=str(given["y"])) == []


def test_tokens_that_the_recipe_adds_are_tokens_of_a_template(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, FAST)
    row = {"source": {"kind": "model_token", "model": str(models.folders[0]), "token": "a"}}
    tokenizer = {"source": "base", "tokens": {"<|im_start|>": row, "<|im_end|>": row}}

    assert said(models, "template-unread", chat_template="chatml", tokenizer=tokenizer) == []


def test_a_union_with_more_tokens_keeps_the_templates_of_its_base(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST | OWN | FURTHER, TURNS | OWN | FURTHER)

    files = published(models, tokenizer_source="union")

    assert files == {"tokenizer.json": "written", **dict.fromkeys((*OWN, *FURTHER), "base")}
    assert models.said(tokenizer_source="union") == {}


CHOSEN: dict[str, dict[str, Any]] = {
    "by `auto`": {"chat_template": "auto"},
    "by `auto`, of a union": {"chat_template": "auto", "tokenizer_source": "union"},
    "as the model's": {"chat_template": "one"},
    "with its tokenizer": {"tokenizer_source": "one"},
    "with its other files": {"stockflow": {"side_files_from": "one"}},
}


@pytest.mark.parametrize("case", CHOSEN)
def test_a_template_that_is_published_is_not_said_to_stay(tmp_path: Path, case: str) -> None:
    models = Models(tmp_path, FAST, TURNS | MARKED)
    asked: dict[str, Any] = json.loads(json.dumps(CHOSEN[case]).replace('"one"', json.dumps(str(models.folders[1]))))

    assert "chat_template.jinja" in published(models, **asked)
    assert said(models, "not-taken", **asked) == []


@pytest.mark.parametrize("asked", [{}, {"tokenizer_source": "base"}, {"tokenizer_source": "union"}])
def test_a_template_that_stays_is_said_once_with_the_word_that_takes_it(tmp_path: Path, asked: dict[str, str]) -> None:
    models = Models(tmp_path, FAST, TURNS | MARKED)

    assert "chat_template.jinja" not in published(models, **asked)
    assert said(models, "not-taken", **asked) == []
    (text,) = said(models, "side-files-differ", **asked)
    assert text.endswith("`chat_template: auto` or MODEL takes theirs")


def test_a_template_asked_for_by_name_that_stays_is_said(tmp_path: Path) -> None:
    models = Models(tmp_path, FAST, TURNS, TURNS | FURTHER)

    (text,) = said(models, "not-taken")
    assert "`stockflow: {side_files_from: ...}`" in text
    (text,) = said(models, "not-taken", tokenizer_source="union")
    assert "side_files_from" not in text
    assert text.endswith(
        f"templates come with the tokenizer, from {models.folders[0]}; put them into the output by hand"
    )


@pytest.mark.parametrize("source", [None, "base", "union", "one"])
@pytest.mark.parametrize(
    ("ends", "is_said"), [(["<|im_end|>"], False), (["</s>", "<|im_end|>"], False), (["</s>"], True)]
)
def test_turns_that_do_not_end_are_said_whoever_gives_the_tokenizer(
    tmp_path: Path, source: str | None, ends: list[str], is_said: bool
) -> None:
    orders = ["</s>", "b", "<|im_start|>", "<|im_end|>"], ["</s>", "<|im_end|>", "b", "<|im_start|>"]
    base, tune = (
        fast(order) | {"generation_config.json": json.dumps({"eos_token_id": [order.index(each) for each in ends]})}
        for order in orders
    )
    models = Models(tmp_path, base, tune)
    asked = {"tokenizer_source": str(models.folders[1]) if source == "one" else source} if source else {}

    texts = said(models, "tokens-disagree", chat_template="chatml", accept=("vocabularies-differ",), **asked)

    number = 1 if source == "one" else 3
    assert len([text for text in texts if f"ends turns with '<|im_end|>' ({number})" in text]) == is_said
