"""Vocabularies: which id stands for which token, as the files of a tokenizer say. Nothing of a model's code is run.

Every form becomes a mapping from token strings to ids. Strings are those of ``tokenizer.json``: where a form holds
bytes (tiktoken, Mistral's tekken), each byte is the letter that byte-level BPE writes for it, so that forms compare.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from stockflow.checkpoints.tokens.cutting import Cutting
from stockflow.text.strictjson import check_num_values, parse_json, shown

Ids = dict[str, int]
"""By token."""

MAX_VALUES = 20_000_000
"""of a JSON file; a tokenizer of 260,000 tokens and 500,000 merges has 2.5 million"""
MAX_ID = 2**31 - 1
FAST = "tokenizer.json"

_COUNTED = re.compile(r"(\S+) \d+")
_OF_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_RANK = re.compile(rb"(\S+) (\d{1,10})\r?")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""wire types of protobuf"""


def _byte_letters() -> dict[int, str]:
    """Return byte-level BPE's letter for each byte: itself where it is printable, else one from 256 on.

    Source: Radford et al. 2019, GPT-2, section 2.2; as `tokenizers` pre-tokenizes.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


def as_letters(token: bytes) -> str:
    """Return a token of bytes as byte-level BPE writes it."""
    return "".join(map(_BYTE_LETTERS.__getitem__, token))


def tokenizer_json(payload: bytes) -> Ids:
    """Return the vocabulary of a ``tokenizer.json``: BPE, WordPiece, WordLevel or Unigram, and the added tokens.

    Raises:
        ValueError: it is none; in one short line, as for all forms.
    """
    document = json_of(payload)
    return vocabulary_of(document) | added_of(document)


def vocabulary_of(document: Mapping[str, object]) -> Ids:
    """Return the vocabulary of the model of a ``tokenizer.json``, without added tokens."""
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        return _numbered(_piece(item) for item in vocab)
    if isinstance(vocab, dict):
        return checked(vocab)
    raise ValueError("expected a mapping or a list `model.vocab`")


def added_of(document: Mapping[str, object]) -> Ids:
    """Return what ``added_tokens`` of a ``tokenizer.json`` name."""
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("expected a list of mappings `added_tokens`")
    return checked({entry.get("content"): entry.get("id") for entry in entries})


def decoder_tokens(decoder: object) -> Ids:
    """Return what ``added_tokens_decoder`` of a ``tokenizer_config.json`` names: tokens by their ids."""
    if not isinstance(decoder, dict):
        raise ValueError("expected a mapping `added_tokens_decoder`")
    named = [(entry.get("content") if isinstance(entry, dict) else entry, key) for key, entry in decoder.items()]
    return checked({token: int(key) if key.isascii() and key.isdigit() else key for token, key in named})


def appended(tokens: Iterable[str], ids: Ids, added: Ids) -> Ids:
    """Return added tokens with those that have no id yet: loaders put them behind all others, one after the other."""
    lacking = dict.fromkeys(token for token in tokens if token not in ids and token not in added)
    begin = len(ids.keys() | added.keys()) if lacking else 0
    return added | {token: begin + place for place, token in enumerate(lacking)}


def token_map(payload: bytes) -> Ids:
    """Return a mapping from tokens to ids: ``vocab.json``, ``encoder.json``, ``added_tokens.json``."""
    return checked(json_of(payload))


def token_lines(payload: bytes) -> Ids:
    """Return the lines of a ``vocab.txt``; the number of a line is its id, of equal lines the last counts.

    Where each has a count behind it, as PhoBERT's from fairseq, four tokens come before them.
    """
    lines = payload.decode("utf-8-sig", errors="strict").split("\n")
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    counted = [_COUNTED.fullmatch(token) for token in tokens]
    return _numbered([*_OF_FAIRSEQ, *(each[1] for each in counted if each)] if all(counted) else tokens)


def tiktoken(payload: bytes) -> Ids:
    """Return tiktoken's ranks: a token in base64 and its id per line."""
    ids: Ids = {}
    for number, line in enumerate(payload.split(b"\n"), start=1):
        match = _RANK.fullmatch(line)
        if match:
            ids[as_letters(_bytes_of(match[1], f"line {number}"))] = int(match[2])
        elif line.strip():
            raise ValueError(f"expected a token in base64 and its rank in line {number}, found {shown(line[:80])}")
    return checked(ids)


def tekken(payload: bytes) -> Ids:
    """Return the vocabulary of Mistral's ``tekken.json``: special tokens, then as many as there is room for."""
    document = json_of(payload)
    settings, entries = document.get("config"), document.get("vocab")
    if not isinstance(settings, dict) or not isinstance(entries, list):
        raise ValueError("expected a mapping `config` and a list `vocab`")
    num_special, size = settings.get("default_num_special_tokens"), settings.get("default_vocab_size")
    if type(num_special) is not int or type(size) is not int:
        raise ValueError("expected integers `default_num_special_tokens` and `default_vocab_size`")
    ids = {
        as_letters(_bytes_of(str(entry.get("token_bytes")).encode(), "`vocab`")): num_special + place
        for place, entry in enumerate(entries[: max(size - num_special, 0)])
        if isinstance(entry, dict)
    }
    special = document.get("special_tokens")
    named = special if isinstance(special, list) else []
    return checked(ids) | checked({each.get("token_str"): each.get("rank") for each in named if isinstance(each, dict)})


def sentencepiece(payload: bytes) -> Ids:
    """Return the pieces of a SentencePiece model; the place of a piece is its id.

    Source: sentencepiece_model.proto: `repeated SentencePiece pieces = 1`, `optional string piece = 1` in each.
    """
    pieces = (field for number, field in _fields(memoryview(payload)) if number == 1)
    texts = [next((bytes(part) for number, part in _fields(piece) if number == 1), None) for piece in pieces]
    if not texts or None in texts:
        raise ValueError("it is no SentencePiece model: no piece is in it, or one has no text")
    return _numbered(text.decode() for text in texts if text is not None)


def scores_of(payload: bytes) -> Cutting:
    """Return how the pieces of a SentencePiece model cut texts: their scores, and of which kind they are."""
    pieces = [bytes(field) for number, field in _fields(memoryview(payload)) if number == 1]
    return {"scores of pieces": hashlib.sha256(b"\0".join(pieces)).hexdigest()}


def tokenizer_model(payload: bytes) -> Ids:
    """Return the vocabulary of a ``.model``: tiktoken's lines in some families, SentencePiece in the others."""
    return (tiktoken if _RANK.fullmatch(payload.partition(b"\n")[0]) else sentencepiece)(payload)


OF_PIECES = r"(tokenizer|tiktoken|(sentence)?piece(\.bpe)?|spiece|spm)\.model(\.v\d+)?"
"""Names of files of SentencePiece, in some families of tiktoken's lines."""
FORMS: tuple[tuple[re.Pattern[str], Callable[[bytes], Ids]], ...] = tuple(
    (re.compile(pattern), read)
    for pattern, read in (
        (r"tokenizer\.json", tokenizer_json),
        (r"vocab\.json|encoder\.json", token_map),
        (r"vocab\.txt", token_lines),
        (r"tekken\.json", tekken),
        (r".+\.tiktoken", tiktoken),
        (OF_PIECES, tokenizer_model),
    )
)  # fmt: skip
"""Names of files that hold a vocabulary, and how each is read; loaders take the first one that is there."""


def json_of(payload: bytes) -> dict[str, object]:
    """Return a JSON object that others wrote, within bounds."""
    parsed = _parsed(payload)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def items_of(payload: bytes) -> dict[str, object]:
    """Return a JSON object that others wrote, or a list with its places for keys."""
    parsed = _parsed(payload)
    return {f"[{place}]": item for place, item in enumerate(parsed)} if isinstance(parsed, list) else json_of(payload)


def _parsed(payload: bytes) -> object:
    check_num_values(payload, MAX_VALUES)
    return parse_json(payload, allows_constants=True)


def checked(ids: Mapping[Any, object]) -> Ids:
    """Return a mapping from tokens to ids that is one."""
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number <= MAX_ID:
            raise ValueError(f"expected tokens with their ids, found {shown(token)}: {shown(number)}")
    return cast(Ids, dict(ids))


def _numbered(tokens: Iterable[str]) -> Ids:
    return {token: number for number, token in enumerate(tokens)}


def _piece(item: object) -> str:
    if isinstance(item, list) and item and isinstance(item[0], str):
        return item[0]
    raise ValueError(f"expected pieces with their scores in `model.vocab`, found {shown(item)}")


def _bytes_of(text: bytes, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"expected base64 in {where}, found {shown(text[:80])}") from None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and bytes of a protobuf message's fields that have bytes; numbers are passed over."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        wire = tag & 7
        if wire == _VARINT:
            _, place = _varint(message, place)
        elif wire in (_FIXED32, _FIXED64):
            place += 4 if wire == _FIXED32 else 8
        elif wire == _BYTES:
            size, start = _varint(message, place)
            place = start + size
            if place > len(message):
                break
            yield tag >> 3, message[start:place]
        else:
            break
    if place != len(message):
        raise ValueError("it is no SentencePiece model: a field of it is cut off or of no known kind")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(message):
            break
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("it is no SentencePiece model: a number in it is cut off")
