"""Tokenizers of models: what their ids stand for, the chat template, the end token and how text is generated.

Read only where a merge needs it, and bounded. Files that are equal, as their ETags or their bytes say, are parsed once,
and what is the same of several models is then one object.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from stockflow.checkpoints.beside.side_files import SOME_VOCABULARY, is_of_tokenizer, is_of_use
from stockflow.checkpoints.heads import said_of_language
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.classes import RENUMBERED, kin_of, roles_of_ids, roles_of_kin, tokens_for_gaps
from stockflow.checkpoints.tokens.cutting import Cutting, flags_of, merges_of
from stockflow.checkpoints.tokens.doubts import Doubts, doubts_of_named, doubts_of_roles, doubts_of_slow
from stockflow.checkpoints.tokens.fast import fast_tokenizer
from stockflow.checkpoints.tokens.reading import Reader, TokenFiles, Vocabulary, is_small
from stockflow.checkpoints.tokens.said import (
    DEFAULT,
    ROLES,
    TEMPLATE_JSON,
    is_template,
    named_tokens,
    roles_of,
    templates_of,
)
from stockflow.checkpoints.tokens.token_rows import vocabulary_rows
from stockflow.checkpoints.tokens.vocabularies import (
    FAST,
    FORMS,
    OF_PIECES,
    Ids,
    appended,
    decoder_tokens,
    items_of,
    scores_of,
    tekken,
    token_map,
)
from stockflow.storage import Store

TEKKEN = "tekken.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
MERGES = "merges.txt"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

_WRITTEN_BY = (
    "transformers_version",
    "_from_model_config",
    "_name_or_path",
    "__version__",
    "_diffusers_version",
    "processor_class",
)
"""keys of configs that say who wrote them"""
_OTHER_FORMS = re.compile(rf"{SOME_VOCABULARY}|.+\.(model|spm|vocab)|prophetnet\.tokenizer|bpe\.codes")
_OF_PLAIN_FORM = re.compile(r"vocab\.(json|txt)|encoder\.json")
"""to which no class adds tokens of its own, but those that configs name"""
_OF_FURTHER_IDS = re.compile(rf"(?!.*/)(?!.*\.bpe)({SOME_VOCABULARY})")
_BESIDE_ANY = re.compile(r"(entity|target)_vocab\.json")
"""a second vocabulary, of which the first one has nothing"""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What the files of a model say of its tokens, and of how it is talked to."""

    num_rows: int
    """of the input embedding, else of what is as long as a vocabulary; one per id"""
    vocabulary: Vocabulary | None = None
    """None if no file holds one"""
    templates: Mapping[str, str] = field(default_factory=dict)
    """chat templates by name, without space around them"""
    roles: Mapping[str, str] = field(default_factory=dict)
    """tokens by what they are for, as files say"""
    assumed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """and those that its class takes, or ids in config.json mean, where they say none"""
    generation: Mapping[str, object] | None = None
    """generation_config.json without what says who wrote it"""
    settings: Mapping[str, object] = field(default_factory=dict)
    """tokenizer_config.json"""
    special: Mapping[str, object] = field(default_factory=dict)
    """special_tokens_map.json"""
    document: Mapping[str, object] | None = None
    """tokenizer.json, where it was asked for and is there"""
    cutting: Cutting = field(default_factory=dict)
    """how texts are cut, as far as tokenizer.json and flags of the config say"""
    uses: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """what other files say of how the model is used, without what says who wrote them"""
    doubts: Mapping[str, str] = field(default_factory=dict)
    """by token: in what the files contradict each other"""
    below: Mapping[str, Ids] = field(default_factory=dict)
    """vocabularies of parts and modules that have folders of their own, by file"""
    contested: tuple[str, ...] = ()
    """names of templates that files of their own and configs have differently"""

    @property
    def template(self) -> str | None:
        """The chat template that is taken where none is asked for by name."""
        return self.templates.get(DEFAULT)

    @property
    def has_none(self) -> bool:
        """Whether no file is of a tokenizer."""
        return self.vocabulary is None and not self.settings

    @property
    def eos(self) -> str | None:
        """The token that ends a text."""
        return self.roles.get("eos_token")


def read_tokenizers(
    stores: Sequence[Store], checkpoints: Sequence[Checkpoint], *, with_documents: bool = False
) -> list[Tokenizer]:
    """Return the tokenizer of each checkpoint: of the first one first, of the others concurrently; none without rows.

    Args:
        stores: where the checkpoints lie.
        checkpoints: say which files there are.
        with_documents: whether all that tokenizer.json says is kept, and models without rows count.

    Raises:
        InputChangedError: a file is no longer the one that was listed.
        StorageError: reading failed after retries.
    """
    distinct = {id(each.specs): each.specs for each in checkpoints}  # fine-tuned models mostly share theirs
    rows = {number: vocabulary_rows(specs) for number, specs in distinct.items()}
    speaks = any(is_of_use(key) or is_of_tokenizer(key) for each in checkpoints for key in each.side_files)
    if not any(rows.values()) and not with_documents and not speaks:
        return []
    reader = Reader(with_documents)
    files = [
        TokenFiles(reader, store, each, rows[id(each.specs)]) for store, each in zip(stores, checkpoints, strict=True)
    ]
    first = [_tokenizer(each) for each in files[:1]]  # equal objects of the others are then not read at all
    with ThreadPoolExecutor(max(len(files), 1)) as pool:
        return first + list(pool.map(_tokenizer, files[1:]))


def _tokenizer(files: TokenFiles) -> Tokenizer:
    settings = files.json(TOKENIZER_CONFIG)
    vocabulary, (templates, contested) = _vocabulary(files, settings), _templates(files, settings)
    document = files.json(FAST) if files.reader.with_documents and FAST in files.stamps else None
    return Tokenizer(
        files.rows_of(vocabulary),
        vocabulary,
        templates,
        roles_of(settings, files.json(SPECIAL_TOKENS)),
        _assumed(files, settings, vocabulary),
        _generation(files),
        settings,
        files.json(SPECIAL_TOKENS),
        document,
        _cutting(files, settings),
        {key: _use(files, key) for key in files.stamps if is_of_use(key) and not is_template(key)},
        _doubts(files, settings, vocabulary) if vocabulary and FAST in files.stamps else {},
        dict(_below(files)),
        contested,
    )


def _below(files: TokenFiles) -> Iterator[tuple[str, Ids]]:
    """Yield the vocabularies in subfolders, of each folder the first file that loaders take; what is unread is not."""
    of_folders: dict[str, list[str]] = {}
    for key in files.stamps:
        if (folder := key.rpartition("/")[0]) and not folder.endswith("additional_chat_templates"):
            of_folders.setdefault(folder, []).append(key)
    for keys in of_folders.values():
        found = ((key, read) for form, read in FORMS for key in keys if form.fullmatch(key.rpartition("/")[2]))
        key, read = next(found, ("", None))
        with suppress(ValueError):
            if read is not None:
                yield key, files.parsed(key, read)


def _use(files: TokenFiles, key: str) -> dict[str, object]:
    """Return what a file says of how the model is used; of code and templates, which it is."""
    if key.endswith((".py", ".jinja")):
        return {"sha256": files.parsed(key, _digest)}
    try:
        return _without_writer(files.parsed(key, items_of))
    except ValueError:
        return {}


def _doubts(files: TokenFiles, settings: Mapping[str, object], vocabulary: Vocabulary) -> Doubts:
    """Return which tokens have another id in the files beside a tokenizer.json, or none there at all."""
    if vocabulary.problem:
        return {}
    fast = files.parsed(FAST, fast_tokenizer)
    decoded = decoder_tokens(settings.get("added_tokens_decoder") or {})
    added = files.parsed(ADDED_TOKENS, token_map) if ADDED_TOKENS in files.stamps else {}
    beside = {TOKENIZER_CONFIG: decoded, ADDED_TOKENS: added}
    with suppress(ValueError):
        beside |= {TEKKEN: files.parsed(TEKKEN, tekken)} if TEKKEN in files.stamps else {}
    found = dict(fast.doubts)
    for key, named in beside.items():
        found |= doubts_of_named(vocabulary.ids, fast.ids, named, key)
    older = next(((key, read) for form, read in FORMS[1:] for key in files.stamps if form.fullmatch(key)), None)
    if older and older[0] != TEKKEN and not _numbering(files, older[0], settings):
        with suppress(ValueError):
            slow, may_be_shifted = files.parsed(*older), _may_be_shifted(older[0], settings)
            found |= doubts_of_slow(fast.ids, slow, decoded | added, older[0], may_be_shifted=may_be_shifted)
    return found | doubts_of_roles(
        vocabulary.ids, {SPECIAL_TOKENS: files.json(SPECIAL_TOKENS), TOKENIZER_CONFIG: settings}
    )


def _may_be_shifted(key: str, settings: Mapping[str, object]) -> bool:
    """Return whether code of a class that is not known may number the pieces of a SentencePiece model anew."""
    return key.endswith(".bpe.model") or (key.endswith(".model") and "tokenizer_class" not in flags_of(settings))


def _cutting(files: TokenFiles, settings: Mapping[str, object]) -> Cutting:
    own: Cutting = {}
    with suppress(ValueError):  # said of its vocabulary
        if FAST in files.stamps:
            own = files.parsed(FAST, fast_tokenizer).cutting
        elif MERGES in files.stamps:
            own = files.parsed(MERGES, merges_of)
        elif model := next((key for key in files.stamps if re.fullmatch(OF_PIECES, key)), None):
            own = files.parsed(model, scores_of)
    unread = [] if FAST in files.stamps else filter(_is_of_no_form, files.stamps)
    beside = {key: files.parsed(key, _digest) for key in unread if is_small(files.stamps[key])}
    return {**own, **beside, **flags_of(settings)}


def _is_of_no_form(key: str) -> bool:
    """Return whether a file holds a vocabulary, or part of one, in a form that is not read."""
    return bool(_OTHER_FORMS.fullmatch(key)) and not any(form.fullmatch(key) for form, _ in FORMS)


def _vocabulary(files: TokenFiles, settings: Mapping[str, object]) -> Vocabulary | None:
    key, read = next(((key, read) for form, read in FORMS for key in files.stamps if form.fullmatch(key)), ("", None))
    if read is None:
        others = sorted(filter(_is_of_no_form, files.stamps))
        return _unread(files, others, f"{others[0]} is of no form that is read here") if others else None
    try:
        ids = files.parsed(FAST, fast_tokenizer).ids if key == FAST else files.parsed(key, read)
        added = files.parsed(ADDED_TOKENS, token_map) if ADDED_TOKENS in files.stamps else {}
        added = decoder_tokens(settings.get("added_tokens_decoder") or {}) | added
    except ValueError as error:
        said = str(error)
        return _unread(files, [key], f"{key}{'' if said.startswith('is ') else ':'} {said}")
    numbering = _numbering(files, key, settings)
    kin = kin_of(settings, files.model.config)
    is_of_pieces = bool(re.fullmatch(OF_PIECES, key)) and not numbering
    roles = roles_of_kin(kin) if is_of_pieces else {}
    is_known = roles.get("unk_token") in ids
    if is_known or (_OF_PLAIN_FORM.fullmatch(key) and not numbering):
        added = (tokens_for_gaps(kin, settings, ids) if is_of_pieces else {}) | added
        named = roles_of(settings, files.json(SPECIAL_TOKENS), roles)
        added = appended([*named.values(), *named_tokens(settings, files.json(SPECIAL_TOKENS))], ids, added)
    by_code = is_of_pieces and not is_known
    return files.reader.vocabulary(ids, added, numbering, added_first=key != FAST and not numbering, is_open=by_code)


def _assumed(
    files: TokenFiles, settings: Mapping[str, object], vocabulary: Vocabulary | None
) -> dict[str, tuple[str, ...]]:
    """Return the tokens that may have a part to play where files name none: its class's, and those of config.json."""
    ids = vocabulary.ids if vocabulary else {}
    of_class = roles_of_kin(kin_of(settings, files.model.config))
    of_ids = roles_of_ids(said_of_language(files.model.config), ids)
    both = {role: (of_class.get(role), of_ids.get(role)) for role in ROLES}
    return {role: tuple(token for token in each if token in ids) for role, each in both.items()}


def _unread(files: TokenFiles, keys: Sequence[str], problem: str) -> Vocabulary:
    return Vocabulary({}, " ".join(_known_bytes(files, key) for key in keys), problem)


def _known_bytes(files: TokenFiles, key: str) -> str:
    stamp = files.stamps[key]
    return files.parsed(key, _digest) if is_small(stamp) else f"{key} {stamp}"


def _numbering(files: TokenFiles, key: str, settings: Mapping[str, object]) -> str:
    """Return what else decides ids: a class whose code numbers pieces anew, or files such as BARTpho's dict.txt."""
    name = settings.get("tokenizer_class")
    renumbers = key.endswith(".model") and isinstance(name, str) and RENUMBERED.fullmatch(name)
    of_ids = _BESIDE_ANY if renumbers or key == FAST else _OF_FURTHER_IDS
    further = [each for each in sorted(files.stamps) if of_ids.fullmatch(each) and _is_of_no_form(each)]
    code = [name.removesuffix("Fast")] if renumbers and isinstance(name, str) else []
    return " ".join([*code, *(f"{each}={_known_bytes(files, each)}" for each in further)])


def _templates(files: TokenFiles, settings: Mapping[str, object]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the templates that loaders take, and the names of those that other files have otherwise."""
    keys = [key for key in files.stamps if is_template(key) and is_small(files.stamps[key])]
    own, beside = {key: files.parsed(key, _text) for key in keys}, files.json(TEMPLATE_JSON)
    taken = templates_of(own, settings, beside)
    others = (templates_of({}, each) for each in (settings, beside)) if own else ()
    unlike = {name for each in others for name in each if name in taken and each[name] != taken[name]}
    return taken, tuple(sorted(unlike))


def _generation(files: TokenFiles) -> Mapping[str, object] | None:
    if GENERATION_CONFIG not in files.stamps:
        return None
    return _without_writer(files.json(GENERATION_CONFIG))


def _without_writer(document: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in document.items() if key not in _WRITTEN_BY}


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _text(payload: bytes) -> str:
    return payload.decode(errors="replace")
