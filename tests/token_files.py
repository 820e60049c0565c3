"""Files of tokenizers as public families lay them out: made here, read by nobody's code but the product's."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import write_checkpoint

HIDDEN = 4
LETTERS = [*"abcdefgh", "Ġa", "Ġb"]
"""ten tokens"""


def ids_of(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def added(*tokens: str, start: int) -> list[dict[str, Any]]:
    """Entries of ``added_tokens`` as the tokenizers library writes them."""
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": number, "content": token, **settings} for number, token in enumerate(tokens, start=start)]


def tokenizer_json(
    tokens: Sequence[str] | Mapping[str, int], kind: str = "BPE", more: Sequence[dict[str, Any]] = ()
) -> str:
    """A ``tokenizer.json`` of one of the four kinds of models."""
    ids = tokens if isinstance(tokens, Mapping) else ids_of(tokens)
    model: dict[str, Any] = {"type": kind, "vocab": dict(ids)}
    if kind == "Unigram":
        model |= {"unk_id": 0, "vocab": [[token, -1.0 - number] for token, number in ids.items()]}
    elif kind == "BPE":
        model["merges"] = []
    else:
        model["unk_token"] = next(iter(ids))
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(more), "model": model}
    return json.dumps(document, ensure_ascii=False)


def sentencepiece_model(pieces: Sequence[str], score: float = -2.5) -> bytes:
    """A SentencePiece model in protobuf's wire format: pieces with scores and types, then a trainer's settings."""

    def field(number: int, payload: bytes) -> bytes:
        size, digits = len(payload), b""
        while size > 0x7F:
            digits, size = digits + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + digits + bytes([size]) + payload

    def piece(text: str) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18\x01")

    return b"".join(map(piece, pieces)) + field(2, b"\x18" + b"\x80\x7d")


def tiktoken_lines(tokens: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % number for number, token in enumerate(tokens))


def tekken_json(tokens: Sequence[bytes], special: Sequence[str], room: int) -> str:
    """Mistral's form: special tokens come first, and of the rest as many count as the vocabulary has room for."""
    vocab = [
        {"rank": number, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for number, token in enumerate(tokens)
    ]
    settings = {"default_vocab_size": room, "default_num_special_tokens": len(special), "version": "v7"}
    named = [{"rank": number, "token_str": token, "is_control": True} for number, token in enumerate(special)]
    return json.dumps({"config": settings, "vocab": vocab, "special_tokens": named})


def model_with(
    folder: Path, files: Mapping[str, str | bytes], *, rows: int = 12, seed: int = 0, embedding: str = ""
) -> Path:
    """A small language model with these files beside its weights."""
    random = torch.Generator().manual_seed(seed)
    name = embedding or "model.embed_tokens.weight"
    tensors = {
        name: torch.randn(rows, HIDDEN, generator=random).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(HIDDEN, HIDDEN, generator=random).bfloat16(),
        **({} if embedding else {"lm_head.weight": torch.randn(rows, HIDDEN, generator=random).bfloat16()}),
    }
    write_checkpoint(folder, tensors, side_files={}, config={"model_type": "llama", "vocab_size": rows})
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
