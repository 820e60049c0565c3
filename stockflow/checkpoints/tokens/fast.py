"""Fast tokenizers: what a ``tokenizer.json`` says, parsed once."""

from typing import NamedTuple

from stockflow.checkpoints.tokens.cutting import Cutting, cutting_of
from stockflow.checkpoints.tokens.doubts import Doubts, doubts_of_document
from stockflow.checkpoints.tokens.vocabularies import Ids, added_of, json_of, vocabulary_of


class FastTokenizer(NamedTuple):
    """What a ``tokenizer.json`` says."""

    ids: Ids
    cutting: Cutting
    doubts: Doubts
    """in what it contradicts itself"""


def fast_tokenizer(payload: bytes) -> FastTokenizer:
    """Return vocabulary and cutting of a ``tokenizer.json``.

    Raises:
        ValueError: as for ``tokenizer_json``.
    """
    document = json_of(payload)
    vocabulary, added = vocabulary_of(document), added_of(document)
    return FastTokenizer(vocabulary | added, cutting_of(document), doubts_of_document(document, vocabulary, added))
