"""Files of one tokenizer that contradict each other, or themselves: each kind, and what only looks like one."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stockflow.checkpoints.tokens.doubts import doubts_of_slow
from stockflow.checkpoints.tokens.fast import fast_tokenizer
from stockflow.checkpoints.tokens.vocabularies import added_of, vocabulary_of
from tests.token_files import added, ids_of, sentencepiece_model, tokenizer_json
from tests.unit.test_tokenizer_looks import Files, Models, decoder

PIECES = ["<unk>", "<s>", "</s>", "▁a", "▁b", "c"]
SWAPPED = ["<unk>", "<s>", "</s>", "▁b", "▁a", "c"]
LLAMA = {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}
FAST = {"tokenizer.json": tokenizer_json(PIECES)}
SHIFTED = [*PIECES, "d"]
XLM = ["<s>", "<pad>", "</s>", "<unk>", *SHIFTED[3:], "<mask>"]
IM_END = {"tokenizer_config.json": json.dumps(decoder({"id": 5, "content": "<|im_end|>"}))}


def of_words(tokens: Sequence[str]) -> Files:
    return {"vocab.json": json.dumps(ids_of(tokens)), "merges.txt": ""}


BESIDE: dict[str, tuple[Files, str]] = {
    "pieces that changed places": (
        FAST | LLAMA | {"tokenizer.model": sentencepiece_model(SWAPPED)},
        "on 2 tokens: '▁b' is 3 in tokenizer.model and 4 in tokenizer.json; '▁a' is 4 in tokenizer.model and 3",
    ),
    "words that changed places": (FAST | of_words(SWAPPED), "'▁b' is 3 in vocab.json and 4 in tokenizer.json"),
    "lines that changed places": (
        FAST | {"vocab.txt": "\n".join(SWAPPED)},
        "'▁b' is 3 in vocab.txt and 4 in tokenizer.json",
    ),
    "a token that was renamed in one of them": (
        FAST | LLAMA | {"tokenizer.model": sentencepiece_model([*PIECES[:5], "d"])},
        "on 1 token: 'd' is 5 in tokenizer.model, where tokenizer.json has 'c'",
    ),
    "pieces that all moved, of a class that moves none": (
        FAST | LLAMA | {"tokenizer.model": sentencepiece_model(["<pad>", *PIECES])},
        "on 7 tokens",
    ),
}
AGREEING: dict[str, Files] = {
    "the same pieces": FAST | LLAMA | {"tokenizer.model": sentencepiece_model(PIECES)},
    "Llama's added tokens, in the fast form alone": {
        "tokenizer.json": tokenizer_json(PIECES, more=added("<pad>", start=6)),
        "tokenizer.model": sentencepiece_model(PIECES),
    }
    | LLAMA,
    "more in the older form": {"tokenizer.json": tokenizer_json(PIECES[:5])} | of_words(PIECES),
    "XLM-R's numbering": {
        "tokenizer.json": tokenizer_json(XLM, "Unigram", added("<s>", start=0)),
        "sentencepiece.bpe.model": sentencepiece_model(SHIFTED),
        "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizer"}',
    },
    "XLM-R's numbering where no class is named": {
        "tokenizer.json": tokenizer_json(XLM, "Unigram", added("<s>", start=0)),
        "sentencepiece.bpe.model": sentencepiece_model(SHIFTED),
    },
    "a token that added ones are put over": {
        "tokenizer.json": tokenizer_json([*PIECES[:5], "<|im_end|>"]),
        "tokenizer.model": sentencepiece_model([*PIECES[:5], "<|reserved|>"]),
    }
    | IM_END,
    "what cannot be read": FAST | {"vocab.json": '{"fra": {"a": 3}}'},
}


@pytest.mark.parametrize("case", BESIDE)
def test_an_older_form_that_gives_other_ids_is_said(case: str, tmp_path: Any) -> None:
    files, expected = BESIDE[case]

    said = [each for each in Models(tmp_path, files, files).plan().remarks if each.code == "tokens-disagree"]

    assert [each.severity for each in said] == ["warning", "note", "note"]
    assert expected in said[0].text


@pytest.mark.parametrize("case", AGREEING)
def test_an_older_form_that_agrees_is_quiet(case: str, tmp_path: Any) -> None:
    assert "tokens-disagree" not in Models(tmp_path, AGREEING[case], AGREEING[case]).said()


@pytest.mark.parametrize(
    ("fast", "slow"),
    [("\t", "<0x09>"), ("Ċ", "<0x0A>"), ("Ġa", "▁a"), ("Ã©", "é"), ("\u3000x", "x\u3000"), ("<|endoftext|>", "")],
)
def test_a_token_that_is_only_written_in_another_way_is_no_doubt(fast: str, slow: str) -> None:
    assert doubts_of_slow({"x": 0, fast: 1}, {"x": 0, slow: 1}, {}, "vocab.json", may_be_shifted=False) == {}


def around(token: str, *ids: int) -> dict[str, Any]:
    special = {token: {"id": token, "ids": list(ids), "tokens": [token] * len(ids)}}
    return {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": special}}


def unigram(unknown: int, *more: Mapping[str, Any]) -> dict[str, Any]:
    vocab = [[piece, -1.0] for piece in PIECES]
    return {"model": {"type": "Unigram", "unk_id": unknown, "vocab": vocab}, "added_tokens": list(more)}


ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
MOVED = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, ROBERTA | {"cls": ["<s>", 0]}]}
WITHIN: dict[str, tuple[Mapping[str, Any], dict[str, str]]] = {
    "puts in what it means": (around("<s>", 1), {}),
    "puts in another token": (
        around("<s>", 5),
        {"<s>": "is 5 in `post_processor` of tokenizer.json, and 1 in its vocabulary"},
    ),
    "puts in what is no token": (
        around("[CLS]", 1),
        {"[CLS]": "is 1 in `post_processor` of tokenizer.json, and it is no token"},
    ),
    "puts in RoBERTa's": ({"post_processor": ROBERTA}, {}),
    "puts in another than RoBERTa's, one step of several": (
        {"post_processor": MOVED},
        {"<s>": "is 0 in `post_processor` of tokenizer.json, and 1 in its vocabulary"},
    ),
    "fills with its own": ({"padding": {"pad_id": 2, "pad_token": "</s>"}}, {}),
    "fills with what the library takes by default": ({"padding": {"pad_id": 0, "pad_token": "[PAD]"}}, {}),
    "fills with another": (
        {"padding": {"pad_id": 4, "pad_token": "</s>"}},
        {"</s>": "is 4 in `padding` of tokenizer.json, and 2 in its vocabulary"},
    ),
    "an added token with another id": (
        {"added_tokens": added("<s>", start=7)},
        {"<s>": "is 7 in `added_tokens` of tokenizer.json and 1 in its vocabulary"},
    ),
    "an added token in the place of another": (
        {"added_tokens": added("<think>", start=5)},
        {"<think>": "is 5 in `added_tokens` of tokenizer.json, where its vocabulary has 'c'"},
    ),
    "added tokens": ({"added_tokens": added("</s>", start=2) + added("<think>", start=6)}, {}),
    "what is unknown": (unigram(0), {}),
    "what is unknown is an added token": (unigram(2, *added("</s>", start=2)), {}),
    "what is unknown is a word": (
        unigram(4),
        {"<unk>": "is 4 in `unk_id` of tokenizer.json, and 0 in its vocabulary"},
    ),
}


@pytest.mark.parametrize("case", WITHIN)
def test_ids_within_a_tokenizer_json_are_held_against_its_vocabulary(case: str) -> None:
    given, expected = WITHIN[case]
    document = json.loads(tokenizer_json(PIECES)) | given

    assert fast_tokenizer(json.dumps(document).encode()).doubts == expected
    assert vocabulary_of(document).keys() | added_of(document).keys() >= {*PIECES}


TEMPLATE = {"chat_template.jinja": "{{ messages }}"}
IN_BOTH: dict[str, tuple[Files, Mapping[str, str], list[str]]] = {
    "the same": (FAST | TEMPLATE | {"tokenizer_config.json": '{"chat_template": "{{ messages }}\\n"}'}, {}, []),
    "another": (FAST | TEMPLATE | {"tokenizer_config.json": '{"chat_template": "{{ a }}"}'}, {}, ["warning", *"nn"]),
    "another of a processor": (
        FAST | TEMPLATE | {"chat_template.json": '{"chat_template": "{{ a }}"}'},
        {},
        ["warning", *"nn"],
    ),
    "one that the recipe chooses": (
        FAST | TEMPLATE | {"tokenizer_config.json": '{"chat_template": "{{ a }}"}'},
        {"chat_template": "chatml"},
        [*"nn"],
    ),
}


@pytest.mark.parametrize("case", IN_BOTH)
def test_a_template_that_a_file_and_a_config_have_differently_is_said(case: str, tmp_path: Any) -> None:
    files, asked, severities = IN_BOTH[case]

    said = [each for each in Models(tmp_path, files, files).plan(**asked).remarks if each.code == "tokens-disagree"]

    assert [each.severity for each in said] == [{"n": "note"}.get(each, each) for each in severities]


def test_a_pointer_in_place_of_a_tokenizer_is_called_so(tmp_path: Any) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 17209961\n"
    models = Models(tmp_path, FAST, FAST, {"tokenizer.json": pointer})

    (said,) = models.plan(accept=("vocabularies-unread",)).remarks

    assert "tokenizer.json is a git-lfs pointer, not the file it stands for; run `git lfs pull`" in said.text
