"""The tokenizer's files of the output: copied from one model, or written with the tokens that were added."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from stockflow.checkpoints.beside.side_files import is_of_tokenizer, is_tokenizer_or_template
from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.said import TEMPLATE_FILE, TEMPLATE_JSON, content_of
from stockflow.checkpoints.tokens.tokenizers import GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG, Tokenizer
from stockflow.checkpoints.tokens.vocabularies import FAST, Ids
from stockflow.errors import PlanError
from stockflow.planning.plan import SideFile, WrittenFile
from stockflow.planning.vocabulary.rows import OutputVocabulary
from stockflow.planning.vocabulary.templates import chosen_template
from stockflow.recipe import Recipe
from stockflow.storage import redact
from stockflow.text.sizes import counted

KEPT = (TOKENIZER_CONFIG, SPECIAL_TOKENS, "normalizer.json")
"""files of a tokenizer that hold no vocabulary"""

Document = dict[str, Any]
Published = tuple[tuple[SideFile, ...], tuple[WrittenFile, ...]]


def published_tokenizer(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    tokenizers: Sequence[Tokenizer],
    vocabulary: OutputVocabulary | None,
    generation: Config | None = None,
) -> Published:
    """Return the files that are copied beside the weights, and those that are written anew.

    Args:
        recipe: says whose they are.
        checkpoints: in the order of its locations.
        tokenizers: theirs.
        vocabulary: that is written, if rows move.
        generation: what generation_config.json is to say, if something else than the donor's.

    Raises:
        PlanError: tokens are added to a tokenizer that has no tokenizer.json, or to one that cannot hold them.
    """
    copied = _copied(recipe, checkpoints)
    written: dict[str, bytes] = {}
    source = recipe.vocabulary_donor
    if vocabulary is not None and vocabulary.added:
        written |= _with_tokens(redact(checkpoints[source].url), tokenizers, vocabulary)
        copied = {key: side for key, side in copied.items() if not is_of_tokenizer(key) or "/" in key or key in KEPT}
    vocabularies = [each.vocabulary for each in tokenizers[source : source + 1]]
    ids = vocabulary.ids if vocabulary else vocabularies[0].ids if vocabularies and vocabularies[0] else {}
    written |= _with_roles(recipe, tokenizers, ids, {**copied, **written})
    if generation is not None and GENERATION_CONFIG in copied:
        written[GENERATION_CONFIG] = _text(generation)
    template = chosen_template(recipe, tokenizers) if tokenizers else None
    if template is not None:
        settings = json.loads(written[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in written else tokenizers[source].settings
        written[TEMPLATE_FILE] = (template + "\n").encode()
        if "chat_template" in settings:
            written[TOKENIZER_CONFIG] = _text({key: each for key, each in settings.items() if key != "chat_template"})
        copied.pop(TEMPLATE_JSON, None)
    kept = tuple(side for key, side in copied.items() if key not in written)
    return kept, tuple(WrittenFile.of(key, payload) for key, payload in sorted(written.items()))


def is_taken(recipe: Recipe, index: int, key: str) -> bool:
    """Return whether a side file of one of the recipe's locations is to be copied.

    Tokenizer and templates are those of the model whose vocabulary it is, the rest is the donor's.
    """
    if is_tokenizer_or_template(key):
        return recipe.stockflow.copy_tokenizer and index == recipe.vocabulary_donor
    return index == recipe.side_files_donor


def _copied(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> dict[str, SideFile]:
    donors = dict.fromkeys((recipe.side_files_donor, recipe.vocabulary_donor))
    stamps = [(index, key, stamp) for index in donors for key, stamp in checkpoints[index].side_files.items()]
    return {key: SideFile(index, key, stamp) for index, key, stamp in stamps if is_taken(recipe, index, key)}


def _with_tokens(where: str, tokenizers: Sequence[Tokenizer], vocabulary: OutputVocabulary) -> dict[str, bytes]:
    """Return tokenizer.json and the config beside it, or the letters of a CTC tokenizer, with what is added."""
    own = tokenizers[vocabulary.source]
    if own.document is None and str(own.settings.get("tokenizer_class")).endswith("CTCTokenizer"):
        return {"vocab.json": _text(vocabulary.ids)}  # all there is of it, in which each letter is a token
    if own.document is None:
        raise PlanError(
            f"{where} has no tokenizer.json, and {counted(len(vocabulary.added), 'token')} would be added to it; "
            "write one: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    entries = _entries(tokenizers, vocabulary.added)
    files = {FAST: _text(_extended(where, own.document, vocabulary.added, entries))}
    decoder = own.settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        new = {str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in entries}
        files[TOKENIZER_CONFIG] = _text({**own.settings, "added_tokens_decoder": {**decoder, **new}})
    return files


def _with_roles(
    recipe: Recipe, tokenizers: Sequence[Tokenizer], ids: Ids, files: Mapping[str, bytes | SideFile]
) -> dict[str, bytes]:
    """Return the configs that say which tokens begin texts, end them and so on, where another model says that."""
    source, donor = recipe.vocabulary_donor, recipe.roles_donor
    if source == donor or donor >= len(tokenizers):
        return {}
    roles = {role: token for role, token in tokenizers[donor].roles.items() if token in ids}
    made: dict[str, bytes] = {}
    for key, own in ((TOKENIZER_CONFIG, tokenizers[source].settings), (SPECIAL_TOKENS, tokenizers[source].special)):
        found = files.get(key)
        document = json.loads(found) if isinstance(found, bytes) else own
        if found is not None and any(content_of(document.get(role)) != token for role, token in roles.items()):
            made[key] = _text({**document, **roles})
    return made


def _entries(tokenizers: Sequence[Tokenizer], added: Ids) -> list[Document]:
    """Return the entries of added tokens that are such in the models that have them, or in none."""
    known: dict[str, Document] = {}
    ordinary: set[str] = set()
    for each in tokenizers:
        for entry in cast(Document, each.document or {}).get("added_tokens") or []:
            known.setdefault(entry["content"], entry)
        if each.vocabulary is not None:
            ordinary |= each.vocabulary.ids.keys() & added.keys() - known.keys()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [
        {
            "id": row,
            "content": token,
            **plain,
            **{key: value for key, value in known.get(token, {}).items() if key in plain},
        }
        for token, row in sorted(added.items(), key=lambda item: item[1])
        if token in known or token not in ordinary
    ]


def _extended(where: str, document: Mapping[str, Any], added: Ids, entries: Sequence[Document]) -> Document:
    """Return a tokenizer.json with more tokens: all of them in the model's vocabulary, so that their ids are these.

    Loaders number added tokens that the vocabulary lacks anew, behind it. In BPE no merge leads to any of them.
    """
    model = cast(Document, document["model"])
    present = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    wanted = sorted((present | dict(added)).items(), key=lambda item: item[1])
    if isinstance(model["vocab"], dict):
        vocab: object = model["vocab"] | {token: row for token, row in wanted if token not in model["vocab"]}
    else:
        known = {piece for piece, _ in model["vocab"]}
        lowest = min((score for _, score in model["vocab"]), default=0.0)
        more = [(token, row) for token, row in wanted if token not in known]
        if [row for _, row in more] != list(range(len(known), len(known) + len(more))):
            raise PlanError(
                f"{where} leaves ids out between its pieces and its added tokens: no piece can be added to them"
            )
        vocab = [*model["vocab"], *([token, lowest - 10.0] for token, _ in more)]
    both = [*(document.get("added_tokens") or []), *entries]
    return {**document, "added_tokens": both, "model": {**model, "vocab": vocab}}


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
