"""Decodes as plans record them: plain JSON, and back, held against what a decode may be."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from stockflow.checkpoints.decodes.joined import Joined
from stockflow.checkpoints.decodes.low_rank import Added, Anchored, Lengths, LowRank, ReplacedRows
from stockflow.checkpoints.decodes.stored import BlockScaled, Decode, GroupScaled, Plain, plain
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed
from stockflow.checkpoints.files.header import DTYPES

_KINDS: dict[str, Any] = {
    "blocks": BlockScaled, "groups": GroupScaled, "joined": Joined, "transposed": Transposed, "by_rows": ByRows,
    "anchor": Anchored, "low_rank": LowRank, "lengths": Lengths, "added": Added, "rows": ReplacedRows,
}  # fmt: skip
MAX_DEPTH = 8
"""Decodes within each other."""


def described(decode: Decode) -> object:
    """Return a decode as plain JSON: the word for its kind and its fields; of plain numbers, their dtype."""
    if isinstance(decode, Plain):
        return decode.dtype
    decode = replace(decode, is_verbatim=False) if isinstance(decode, Joined) else decode  # a copy says that itself
    word = next(word for word, kind in _KINDS.items() if isinstance(decode, kind))
    values = [getattr(decode, each.name) for each in fields(_KINDS[word])]
    return [word, *(described(value) if each.name == "inner" else value for each, value in _named(word, values))]


def _named(word: str, values: list[Any]) -> Iterator[tuple[Any, Any]]:
    yield from zip(fields(_KINDS[word]), values, strict=True)


def recorded(record: object, depth: int = 0) -> Decode:
    """Return the decode that ``described`` describes.

    Raises:
        ValueError: there is none such.
    """
    if isinstance(record, str) and depth:
        if DTYPES[record].kind != "float":
            raise ValueError(f"no adapted tensor is stored as {record}")
        return plain(record)
    if not isinstance(record, list) or depth > MAX_DEPTH:
        raise ValueError(f"no tensor is stored as {record!r}")
    word, *values = record
    given = {
        each.name: recorded(value, depth + 1)
        if each.name == "inner"
        else tuple(value)
        if isinstance(value, list)
        else value
        for each, value in _named(word, values)
    }
    known: Decode = _KINDS[word](**given)
    if isinstance(known, BlockScaled | GroupScaled):
        _check_codes(known, record)
    return known


def _check_codes(known: BlockScaled | GroupScaled, record: object) -> None:
    is_known = {known.dtype, known.scale_dtype} <= DTYPES.keys() and all(type(size) is int for size in known.sizes)
    if not is_known or min(known.sizes) < 1:
        raise ValueError(f"no tensor is stored as {record!r}")
