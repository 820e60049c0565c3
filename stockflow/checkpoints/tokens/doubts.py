"""Doubts: in what the files of one tokenizer contradict each other, token by token."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stockflow.checkpoints.tokens.said import ROLES, content_of
from stockflow.checkpoints.tokens.vocabularies import FAST, Ids, as_letters
from stockflow.text.strictjson import shown

Doubts = dict[str, str]
"""By token: what is said of it, and where."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_POST = "post_processor"
_SPACE = "▁"
"""which SentencePiece writes for a space"""


def doubts_of_named(ids: Ids, fast: Ids, named: Ids, key: str, where: str = FAST) -> Doubts:
    """Return which tokens that a file names have another id, or another token's, in the tokenizer.json beside it.

    Args:
        ids: of all tokens as they are taken.
        fast: those of the tokenizer.json.
        named: those of the file.
        key: its name.
        where: what the tokenizer.json is called, or a part of it.
    """
    if named.items() <= fast.items():
        return {}
    moved = {token: number for token, number in named.items() if ids.get(token, number) != number}
    found = {token: f"is {number} in {key} and {ids[token]} in {where}" for token, number in moved.items()}
    lacking = {token: number for token, number in named.items() if token not in fast}
    holders = {number: token for token, number in fast.items()} if lacking else {}
    return found | {
        token: f"is {number} in {key}, where {where} has {shown(holders[number])}"
        for token, number in lacking.items()
        if number in holders and not _are_alike(token, holders[number])
    }


def doubts_of_slow(fast: Ids, slow: Ids, added: Ids, key: str, *, may_be_shifted: bool) -> Doubts:
    """Return which tokens an older form of a vocabulary gives other ids than the tokenizer.json beside it.

    Args:
        fast: what the tokenizer.json has.
        slow: what the older form has; what only one of both has, behind the other's tokens, is no doubt.
        added: tokens that loaders put over it.
        key: the name of its file.
        may_be_shifted: whether code of a class may number all its pieces anew, by one distance, as XLM-RoBERTa's does.
    """
    if slow.items() <= fast.items():
        return {}
    distances = Counter(fast[token] - number for token, number in slow.items() if token in fast)
    distance, often = max(distances.items(), key=lambda item: item[1], default=(0, 0))
    if may_be_shifted and distance and often * 2 > distances.total():
        return {}
    covered = {*added.values()}
    own = {token: number for token, number in slow.items() if token not in added and number not in covered}
    return doubts_of_named(fast, fast, own, key)


def _are_alike(piece: str, token: str) -> bool:
    """Return whether two forms write one token differently: bytes, letters for bytes, space around lines."""
    byte = _BYTE.fullmatch(piece)
    spelled = bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()
    return token in (spelled.decode(errors="replace"), as_letters(spelled)) or piece.strip() in ("", token.strip())


def doubts_of_roles(ids: Ids, documents: Mapping[str, Mapping[str, object]]) -> Doubts:
    """Return which tokens configs, by their names, give a part to play though there are none of that text."""
    found: Doubts = {}
    for key, said in documents.items():
        tokens = {role: content_of(token) for role, token in said.items() if role in ROLES}
        found |= {
            token: f"is the {role} of {key} and no token"
            for role, token in tokens.items()
            if token and token not in ids
        }
    return found


def doubts_of_document(document: Mapping[str, object], vocabulary: Ids, added: Ids) -> Doubts:
    """Return which tokens a tokenizer.json itself gives several ids, or the id of another one.

    Args:
        document: the tokenizer.json.
        vocabulary: of its model.
        added: its added tokens.
    """
    found = doubts_of_named(vocabulary, vocabulary, added, f"`added_tokens` of {FAST}", "its vocabulary")
    steps = [*_put_in(document.get("post_processor")), *_filling(document.get("padding"))]
    for place, token, number in (*steps, *_unknown(document.get("model"), vocabulary, added)):
        own = added.get(token, vocabulary.get(token))
        if own != number and (own is not None or place == _POST):
            vocabulary_has = "it is no token" if own is None else f"{own} in its vocabulary"
            found[token] = f"is {number} in `{place}` of {FAST}, and {vocabulary_has}"
    return found


def _put_in(step: object) -> Iterator[tuple[str, str, object]]:
    """Yield the tokens that a post-processor puts around texts, with the ids that it puts in for them."""
    if not isinstance(step, dict):
        return
    for each in _list(step.get("processors")):
        yield from _put_in(each)
    special = step.get("special_tokens")
    for each in special.values() if isinstance(special, dict) else ():
        if isinstance(each, dict):
            yield from ((_POST, str(token), number) for token, number in zip(*map(_list, _of(each)), strict=False))
    for role in ("sep", "cls"):
        if len(pair := _list(step.get(role))) == len(("token", "id")):
            yield _POST, str(pair[0]), pair[1]


def _of(special: Mapping[str, object]) -> tuple[object, object]:
    return special.get("tokens"), special.get("ids")


def _filling(padding: object) -> Iterator[tuple[str, str, object]]:
    if isinstance(padding, dict) and "pad_id" in padding:
        yield "padding", str(padding.get("pad_token")), padding["pad_id"]


def _unknown(model: object, vocabulary: Ids, added: Ids) -> Iterator[tuple[str, str, object]]:
    """Yield the token that stands for what is unknown, where the id that is said for it is a token's with a meaning."""
    said = model.get("unk_id") if isinstance(model, dict) else None
    if type(said) is not int or said in added.values():
        return
    named = [token for token in ("<unk>", "[UNK]") if token in vocabulary]
    yield from (("unk_id", token, said) for token in named[:1])


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
