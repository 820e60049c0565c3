"""Classes of tokenizers: what they take where files say nothing, and the tokens that they add behind their pieces."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.token_files import added, ids_of, sentencepiece_model, tokenizer_json
from tests.unit.test_tokenizer_looks import Files, Models

GPT2 = ["a", "b", "<|endoftext|>"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "a", "<mask>"]


def config(model_type: str, rows: int = 12, **said: Any) -> Files:
    return {"config.json": json.dumps({"model_type": model_type, "vocab_size": rows, **said})}


def fast(tokens: list[str], settings: dict[str, Any]) -> Files:
    return {"tokenizer.json": tokenizer_json(tokens), "tokenizer_config.json": json.dumps(settings)}


def slow(name: str, pieces: list[str], **settings: Any) -> Files:
    return {name: sentencepiece_model(pieces), "tokenizer_config.json": json.dumps(settings)}


OF_GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
OF_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
QUIET: dict[str, tuple[Files, Files]] = {
    "GPT-2 as on the hub": (
        config("gpt2") | fast(GPT2, {"model_max_length": 1024}),
        config("gpt2") | fast(GPT2, OF_GPT2 | {"tokenizer_class": "GPT2Tokenizer"}),
    ),
    "RoBERTa as on the hub": (
        config("roberta") | fast(ROBERTA, {}),
        config("roberta") | fast(ROBERTA, OF_ROBERTA | {"tokenizer_class": "RobertaTokenizer"}),
    ),
    "the end that the ids of a config name": (
        config("new", eos_token_id=1) | fast(GPT2, {}),
        config("new", eos_token_id=1) | fast(GPT2, {"eos_token": "b"}),
    ),
    "texts that are filled with their end": (
        config("new") | fast(GPT2, {"eos_token": "a"}),
        config("new") | fast(GPT2, {"eos_token": "a", "pad_token": "a"}),
    ),
}
SAID: dict[str, tuple[Files, Files]] = {
    "another end than the class takes": (
        config("gpt2") | fast(GPT2, {}),
        config("gpt2") | fast(GPT2, {"eos_token": "b"}),
    ),
    "an end where files alone count": (
        config("gpt2") | fast(GPT2, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        config("gpt2") | fast(GPT2, {"eos_token": "b"}),
    ),
}


@pytest.mark.parametrize("case", QUIET)
def test_what_a_class_takes_is_no_difference(case: str, tmp_path: Path) -> None:
    assert Models(tmp_path, *QUIET[case]).said() == {}


@pytest.mark.parametrize("case", SAID)
def test_another_token_than_the_class_takes_is_said(case: str, tmp_path: Path) -> None:
    said = Models(tmp_path, *SAID[case]).plan().remarks

    assert [(each.code, each.severity) for each in said] == [("side-files-differ", "warning")]
    assert ("'<|endoftext|>'" if "class" in case else "(none)") in said[0].text


def test_of_a_model_without_a_tokenizer_no_word_is_missed(tmp_path: Path) -> None:
    assert Models(tmp_path, config("gpt2"), config("gpt2") | fast(GPT2, OF_GPT2)).said() == {"no-tokenizer": "warning"}


DEBERTA = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b"]
T5 = ["<pad>", "</s>", "<unk>", "a", "b"]
GAPS = ["<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
ADDED: dict[str, tuple[Files, list[str]]] = {
    "DeBERTa's mask": (config("deberta-v2") | slow("spm.model", DEBERTA, vocab_type="spm"), [*DEBERTA, "[MASK]"]),
    "T5's gaps, the last one first": (
        config("t5") | slow("spiece.model", T5, tokenizer_class="T5Tokenizer", extra_ids=3),
        [*T5, *GAPS],
    ),
    "T5's gaps where they are named, too": (
        config("t5")
        | slow("spiece.model", T5, tokenizer_class="T5Tokenizer", extra_ids=3, additional_special_tokens=GAPS[::-1]),
        [*T5, *GAPS],
    ),
    "mT5, which has them among its pieces": (
        config("mt5") | slow("spiece.model", [*T5, "▁<extra_id_0>"], tokenizer_class="T5Tokenizer"),
        [*T5, "▁<extra_id_0>"],
    ),
    "Llama's filling, which its config names": (
        config("llama")
        | slow("tokenizer.model", ["<unk>", "<s>", "</s>", "a"], tokenizer_class="LlamaTokenizer", pad_token="[PAD]"),
        ["<unk>", "<s>", "</s>", "a", "[PAD]"],
    ),
}


@pytest.mark.parametrize("case", ADDED)
def test_tokens_that_a_class_adds_behind_its_pieces_are_known(case: str, tmp_path: Path) -> None:
    files, tokens = ADDED[case]
    tune = {"config.json": files["config.json"], "tokenizer.json": tokenizer_json(tokens)}

    assert Models(tmp_path, files, tune).said() == {}
    assert Models(tmp_path / "other", files, tune | fast([*tokens[:-2], *tokens[:-3:-1]], {})).said() == {
        "vocabularies-differ": "refusal"
    }


def test_whether_code_of_an_unknown_class_adds_tokens_cannot_be_told(tmp_path: Path) -> None:
    base = config("new") | slow("spiece.model", T5, tokenizer_class="NewTokenizer")
    tune = config("new") | {"tokenizer.json": tokenizer_json([*T5, "<gap>"])}

    (said,) = Models(tmp_path, base, tune).plan().remarks

    assert (said.code, said.severity) == ("tokens-missing", "note")
    assert "cannot be told" in said.text
    assert "union" not in said.text


def test_a_union_is_not_advised_without_the_file_that_it_needs(tmp_path: Path) -> None:
    base = config("gpt2") | {"vocab.json": json.dumps(ids_of(GPT2)), "merges.txt": ""}
    tune = config("gpt2") | {"tokenizer.json": tokenizer_json(GPT2, more=added("<tool>", start=3))}

    (said,) = Models(tmp_path, base, tune).plan().remarks

    assert said.code == "tokens-missing"
    assert "save_pretrained(...) writes a tokenizer.json" in said.text
