"""Vocabularies: each form of file gives the ids that loaders give, and what is none is refused in a line."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stockflow.checkpoints.tokens import vocabularies
from tests.token_files import added, ids_of, sentencepiece_model, tekken_json, tiktoken_lines

CORPUS = ["the stock of two models is merged", "eine Brücke über den Fluß", "naïve café — 日本語 🙂 <|x|>"]


def trained(kind: str) -> Tokenizer:
    """A real tokenizer of the tokenizers library, with tokens added to it."""
    model, trainer = {
        "BPE": (models.BPE(), trainers.BpeTrainer(vocab_size=300)),
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"])),
        "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]"])),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"])),
    }[kind]
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel() if kind == "BPE" else pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens(["Brücke"])
    return made


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_a_tokenizer_json_gives_the_ids_that_its_library_gives(kind: str) -> None:
    made = trained(kind)

    found = vocabularies.tokenizer_json(made.to_str().encode())

    assert found == made.get_vocab(with_added_tokens=True)


def test_bytes_are_written_as_byte_level_bpe_writes_them() -> None:
    letters = [vocabularies.as_letters(bytes([byte])) for byte in range(256)]

    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert vocabularies.as_letters(" é\n".encode()) == "ĠÃ©Ċ"


def test_tiktoken_and_byte_level_bpe_of_the_same_tokens_are_the_same() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b" stock", "日".encode()]
    lines = tiktoken_lines(tokens)

    found = vocabularies.tokenizer_model(lines)

    assert found == ids_of([vocabularies.as_letters(token) for token in tokens])
    assert found["Ġstock"] == 256


def test_of_tekken_the_special_tokens_come_first_and_the_rest_as_far_as_there_is_room() -> None:
    found = vocabularies.tekken(tekken_json([b"a", b" b", b"c"], ["<unk>", "<s>"], room=4).encode())

    assert found == {"<unk>": 0, "<s>": 1, "a": 2, "Ġb": 3}


def test_a_sentencepiece_model_gives_its_pieces_in_order() -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁stock", "x" * 300]

    assert vocabularies.tokenizer_model(sentencepiece_model(pieces)) == ids_of(pieces)


def test_of_a_vocab_txt_the_last_of_equal_lines_counts() -> None:
    assert vocabularies.token_lines(b"[PAD]\r\n[UNK]\r\nthe\r\n\r\nthe\r\n") == {
        "[PAD]": 0,
        "[UNK]": 1,
        "the": 4,
        "": 3,
    }


@pytest.mark.parametrize(
    ("read", "payload", "problem"),
    [
        (vocabularies.tokenizer_json, b"version https://git-lfs", "Expecting value"),
        (vocabularies.tokenizer_json, b"[]", "not a JSON object"),
        (vocabularies.tokenizer_json, b'{"model": {"type": "BPE"}}', "expected a mapping or a list `model.vocab`"),
        (vocabularies.tokenizer_json, b'{"model": {"vocab": {"a": -1}}}', "found 'a': -1"),
        (vocabularies.tokenizer_json, b'{"model": {"vocab": {"a": true}}}', "found 'a': True"),
        (vocabularies.tokenizer_json, b'{"model": {"vocab": {"a": 0, "a": 1}}}', "key 'a' occurs twice"),
        (vocabularies.tokenizer_json, b'{"model": {"vocab": [["a", 0.0], "b"]}}', "expected pieces with their scores"),
        (vocabularies.tokenizer_json, b'{"model": {"vocab": {}}, "added_tokens": {"a": 1}}', "a list of mappings"),
        (vocabularies.token_map, b'{"eng": {"a": 0}}', "expected tokens with their ids, found 'eng'"),
        (vocabularies.token_lines, b"caf\xe9\n", "can't decode byte 0xe9"),
        (vocabularies.tiktoken, b"YQ== 0\nYQ 1\n", "expected base64 in line 2"),
        (vocabularies.tiktoken, b"YQ== 0\nYQ== one\n", "expected a token in base64 and its rank in line 2"),
        (vocabularies.tekken, b'{"config": {}, "vocab": []}', "default_num_special_tokens"),
        (vocabularies.tokenizer_model, sentencepiece_model(["<unk>", "a"])[:-3], "cut off"),
        (vocabularies.tokenizer_model, b"<!DOCTYPE html>", "it is no SentencePiece model"),
        (vocabularies.tokenizer_model, b"", "it is no SentencePiece model"),
    ],
)  # fmt: skip
def test_what_is_no_vocabulary_is_refused_in_a_line(
    read: Callable[[bytes], object], payload: bytes, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        read(payload)

    assert "\n" not in str(caught.value)


def test_how_many_values_a_file_may_hold_is_bounded_before_any_exists() -> None:
    with pytest.raises(ValueError, match="at most 20,000,000 are read"):
        vocabularies.tokenizer_json(b"[" + b"0," * vocabularies.MAX_VALUES + b"0]")


def test_added_tokens_and_those_of_a_decoder_are_read_alike() -> None:
    entries = added("<|a|>", "<|b|>", start=7)
    decoder = {str(entry["id"]): {"content": entry["content"], "special": True} for entry in entries}

    assert (
        vocabularies.added_of({"added_tokens": entries})
        == vocabularies.decoder_tokens(decoder)
        == {"<|a|>": 7, "<|b|>": 8}
    )
    with pytest.raises(ValueError, match="found '<x>': 'seven'"):
        vocabularies.decoder_tokens({"seven": {"content": "<x>"}})
