"""Tokenizers of models: what their ids stand for, the chat template, the end token and how text is generated.

Read only where a merge needs it, and bounded. Files that are equal, as their ETags or their bytes say, are parsed once,
and what is the same of several models is then one object.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar, cast

from stockflow.checkpoints.beside.side_files import SOME_VOCABULARY, is_of_tokenizer, is_of_use
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.cutting import Cutting, flags_of, merges_of
from stockflow.checkpoints.tokens.doubts import Doubts, doubts_of_named, doubts_of_roles, doubts_of_slow
from stockflow.checkpoints.tokens.fast import fast_tokenizer
from stockflow.checkpoints.tokens.said import (
    DEFAULT,
    TEMPLATE_JSON,
    is_template,
    named_tokens,
    roles_of,
    templates_of,
)
from stockflow.checkpoints.tokens.token_rows import stated_sizes, vocabulary_rows
from stockflow.checkpoints.tokens.vocabularies import (
    FORMS,
    OF_PIECES,
    Ids,
    appended,
    decoder_tokens,
    items_of,
    json_of,
    scores_of,
    tekken,
    token_map,
)
from stockflow.storage import Stamp, Store

T = TypeVar("T")

MAX_FILE_BYTES = 64_000_000
"""Of a file that is parsed; Gemma's tokenizer.json has 33 MB."""
FAST, TEKKEN = "tokenizer.json", "tekken.json"
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
_RENUMBERED = re.compile(
    r"(XLMRoberta|Camembert|Barthez|XGLM|XLMProphetNet|MBart(50)?|Nllb|Pegasus|ChatGLM|FNet|PLBart|SeamlessM4T|LayoutXLM"
    r"|MLuke)Tokenizer(Fast)?"
)
"""classes whose code numbers the pieces of a SentencePiece model anew"""
_TELLS_BYTES = re.compile(r"(?!(mtime|mtime_ns|LastModified|Last-Modified|created)=).")
"""versions of objects that are the same for equal bytes only: ETags, and not times"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which id stands for which token."""

    ids: Ids
    """by token; empty if they cannot be read"""
    numbering: str = ""
    """what else decides them, code or bytes that are not read: no more is known of it than whether it is the same"""
    problem: str = ""
    """why they cannot be read"""


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
    """tokens by what they are for"""
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

    @property
    def template(self) -> str | None:
        """The chat template that is taken where none is asked for by name."""
        return self.templates.get(DEFAULT)

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
    reader = _Reader(with_documents)
    files = [_Files(reader, store, each, rows[id(each.specs)]) for store, each in zip(stores, checkpoints, strict=True)]
    first = [_tokenizer(each) for each in files[:1]]  # equal objects of the others are then not read at all
    with ThreadPoolExecutor(max(len(files), 1)) as pool:
        return first + list(pool.map(_tokenizer, files[1:]))


class _Reader:
    """Files of several models, each read and parsed once as far as stores can tell them apart."""

    def __init__(self, with_documents: bool) -> None:
        self.with_documents = with_documents
        self._lock = threading.Lock()
        self._made: dict[object, object] = {}

    def parsed(self, store: Store, key: str, stamp: Stamp, parse: Callable[[bytes], T]) -> T:
        """Return what a file holds; what ``parse`` raises is raised again for equal files."""
        known = (parse, stamp)
        if _TELLS_BYTES.match(stamp.version) and known in self._made:
            return cast(T, self._found(known))
        payload = _payload(store, key, stamp)
        made = (parse, hashlib.sha256(payload).digest())
        with self._lock:  # Python would not parse two at once anyway
            self.once(made, lambda: parse(payload))
        self._made[known] = self._made[made]
        return cast(T, self._found(made))

    def once(self, key: object, make: Callable[[], T]) -> None:
        """Make what has not been made for a key before."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except ValueError as error:
                self._made[key] = error

    def vocabulary(self, ids: Ids, added: Ids, numbering: str, *, added_first: bool) -> Vocabulary:
        """Return ids with the tokens beside them, which loaders of older forms ask first; equal ones are one object."""
        key = (id(ids), tuple(sorted(added.items())), numbering)
        is_plain = added.items() <= ids.items() if added_first else added.keys() <= ids.keys()
        first, then = (added, ids) if added_first else (ids, added)
        with self._lock:
            self.once(key, lambda: Vocabulary(ids if is_plain else {**then, **first}, numbering))
        return cast(Vocabulary, self._found(key))

    def _found(self, key: object) -> object:
        found = self._made[key]
        if isinstance(found, ValueError):
            raise found
        return found


@dataclass(frozen=True, slots=True)
class _Files:
    """The small files of one model."""

    reader: _Reader
    store: Store
    model: Checkpoint
    num_rows: int
    """of its input embedding"""

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """By name, what tells one version of a file from another."""
        return self.model.side_files

    def rows_of(self, vocabulary: Vocabulary | None) -> int:
        """Return how many rows are tokens' in the tensors that have one per token."""
        ids = vocabulary.ids if vocabulary else {}
        sizes = {*stated_sizes(self.model.config), len(ids), max(ids.values(), default=-1) + 1} - {0}
        return self.num_rows or (vocabulary_rows(self.model.specs, sizes) if vocabulary else 0)

    def json(self, key: str) -> dict[str, object]:
        """Return a JSON object, empty if it is not there or none: whether that is a fault is not said here."""
        try:
            return self.parsed(key, json_of) if key in self.stamps else {}
        except ValueError:
            return {}

    def parsed(self, key: str, parse: Callable[[bytes], T]) -> T:
        """Return what a file holds."""
        return self.reader.parsed(self.store, key, self.stamps[key], parse)


def _tokenizer(files: _Files) -> Tokenizer:
    settings = files.json(TOKENIZER_CONFIG)
    vocabulary = _vocabulary(files, settings)
    document = files.json(FAST) if files.reader.with_documents and FAST in files.stamps else None
    return Tokenizer(
        files.rows_of(vocabulary),
        vocabulary,
        _templates(files, settings),
        roles_of(settings, files.json(SPECIAL_TOKENS)),
        _generation(files),
        settings,
        files.json(SPECIAL_TOKENS),
        document,
        _cutting(files, settings),
        {key: _use(files, key) for key in files.stamps if is_of_use(key) and not is_template(key)},
        _doubts(files, settings, vocabulary) if vocabulary and FAST in files.stamps else {},
        dict(_below(files)),
    )


def _below(files: _Files) -> Iterator[tuple[str, Ids]]:
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


def _use(files: _Files, key: str) -> dict[str, object]:
    """Return what a file says of how the model is used; of code and templates, which it is."""
    if key.endswith((".py", ".jinja")):
        return {"sha256": files.parsed(key, _digest)}
    try:
        return _without_writer(files.parsed(key, items_of))
    except ValueError:
        return {}


def _doubts(files: _Files, settings: Mapping[str, object], vocabulary: Vocabulary) -> Doubts:
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


def _cutting(files: _Files, settings: Mapping[str, object]) -> Cutting:
    own: Cutting = {}
    with suppress(ValueError):  # said of its vocabulary
        if FAST in files.stamps:
            own = files.parsed(FAST, fast_tokenizer).cutting
        elif MERGES in files.stamps:
            own = files.parsed(MERGES, merges_of)
        elif model := next((key for key in files.stamps if re.fullmatch(OF_PIECES, key)), None):
            own = files.parsed(model, scores_of)
    unread = [] if FAST in files.stamps else filter(_is_of_no_form, files.stamps)
    beside = {key: files.parsed(key, _digest) for key in unread if _is_small(files.stamps[key])}
    return {**own, **beside, **flags_of(settings)}


def _is_of_no_form(key: str) -> bool:
    """Return whether a file holds a vocabulary, or part of one, in a form that is not read."""
    return bool(_OTHER_FORMS.fullmatch(key)) and not any(form.fullmatch(key) for form, _ in FORMS)


def _vocabulary(files: _Files, settings: Mapping[str, object]) -> Vocabulary | None:
    key, read = next(((key, read) for form, read in FORMS for key in files.stamps if form.fullmatch(key)), ("", None))
    if read is None:
        others = sorted(filter(_is_of_no_form, files.stamps))
        return _unread(files, others, f"{others[0]} is of no form that is read here") if others else None
    try:
        ids = files.parsed(FAST, fast_tokenizer).ids if key == FAST else files.parsed(key, read)
        added = files.parsed(ADDED_TOKENS, token_map) if ADDED_TOKENS in files.stamps else {}
        added = decoder_tokens(settings.get("added_tokens_decoder") or {}) | added
    except ValueError as error:
        return _unread(files, [key], f"{key}: {error}")
    numbering = _numbering(files, key, settings)
    if _OF_PLAIN_FORM.fullmatch(key) and not numbering:
        added = appended(named_tokens(settings, files.json(SPECIAL_TOKENS)), ids, added)
    return files.reader.vocabulary(ids, added, numbering, added_first=key != FAST and not numbering)


def _unread(files: _Files, keys: Sequence[str], problem: str) -> Vocabulary:
    return Vocabulary({}, " ".join(_known_bytes(files, key) for key in keys), problem)


def _known_bytes(files: _Files, key: str) -> str:
    stamp = files.stamps[key]
    return files.parsed(key, _digest) if _is_small(stamp) else f"{key} {stamp}"


def _numbering(files: _Files, key: str, settings: Mapping[str, object]) -> str:
    """Return what else decides ids: a class whose code numbers pieces anew, or files such as BARTpho's dict.txt."""
    name = settings.get("tokenizer_class")
    renumbers = key.endswith(".model") and isinstance(name, str) and _RENUMBERED.fullmatch(name)
    of_ids = _BESIDE_ANY if renumbers or key == FAST else _OF_FURTHER_IDS
    further = [each for each in sorted(files.stamps) if of_ids.fullmatch(each) and _is_of_no_form(each)]
    code = [name.removesuffix("Fast")] if renumbers and isinstance(name, str) else []
    return " ".join([*code, *(f"{each}={_known_bytes(files, each)}" for each in further)])


def _templates(files: _Files, settings: Mapping[str, object]) -> dict[str, str]:
    keys = [key for key in files.stamps if is_template(key) and _is_small(files.stamps[key])]
    return templates_of({key: files.parsed(key, _text) for key in keys}, settings, files.json(TEMPLATE_JSON))


def _generation(files: _Files) -> Mapping[str, object] | None:
    if GENERATION_CONFIG not in files.stamps:
        return None
    return _without_writer(files.json(GENERATION_CONFIG))


def _without_writer(document: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in document.items() if key not in _WRITTEN_BY}


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _text(payload: bytes) -> str:
    return payload.decode(errors="replace")


def _is_small(stamp: Stamp) -> bool:
    return stamp.size <= MAX_FILE_BYTES


def _payload(store: Store, key: str, stamp: Stamp) -> bytes:
    if not _is_small(stamp):
        raise ValueError(f"it has {stamp.size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    payload = bytearray(stamp.size)
    store.read_into(key, 0, memoryview(payload), stamp)
    return bytes(payload)
