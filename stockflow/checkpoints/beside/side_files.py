"""Files beside the weights that a loader of the model needs: which names are copied into an output, and why.

What is copied is published, so the list says what is, not what is not: a key, a note, a script or the state of a
trainer that lies in the folder stays there. Code is copied where the model's own configs name it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

SOME_VOCABULARY = r"(.+[_-])?vocab(ulary)?([_-].+)?\.(json|txt|bpe)|dict(\.\w+)?\.txt"
"""Names of files of a vocabulary, of which code beside the model reads some: ``rwkv_vocab_v20230424.txt``."""
KINDS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (
        r"tokenizer\.json", r"tokenizer_config\.json", r"special_tokens_map\.json", r"added_tokens\.json",
        SOME_VOCABULARY, r"merges\.txt", r"bpe\.codes", r"encoder\.json", r"normalizer\.json",
        r"emoji\.json", r"alphabet\.json", r"tekken\.json",
        r".+\.model", r"tokenizer\.model\.v\d+", r".+\.spm", r".+\.tiktoken", r"prophetnet\.tokenizer",
    ),
    "template": (r".+\.jinja", r"chat_template\.json"),
    "processor": (r"(.+_)?(pre)?processor_config\.json", r"feature_extractor_config\.json"),
    "generation": (r"generation_config\.json",),
    "sentence embeddings": (
        r"modules\.json", r"config_sentence_transformers\.json", r"sentence_.+_config\.json", r"router_config\.json",
    ),
    "quantisation": (r"hf_quant_config\.json",),
    "framework": (
        r"configuration\.json", r"config_setfit\.json", r"gliner_config\.json", r"open_clip_config\.json",
        r"artifact\.metadata", r"speaker_embeddings_path\.json", r"spk_dict\.pt",
    ),
    "licence": (
        r"(?i:(model[-_]|third[-_]party[-_])?(licen[cs]e|copying|notices?)"
        r"([-_](model|code|weights|data|apache(-2\.0)?|mit|bsd|cc|en|zh))?(\.(txt|md|rst|pdf))?)",
        r"(?i:(acceptable[-_])?use[-_]policy(\.(txt|md|rst|pdf))?)",
    ),
}  # fmt: skip
"""Patterns of whole names by what they are for. SentencePiece's ``.model`` has a different name in every family."""
_KNOWN = re.compile("|".join(pattern for patterns in KINDS.values() for pattern in patterns))
_OF_TOKENIZER = re.compile("|".join(KINDS["tokenizer"]))
_TEMPLATE = re.compile("|".join(KINDS["template"]))
MISTRAL_CONFIG = "params.json"
CONFIGS_OF_LIBRARIES = ("gliner_config.json", "open_clip_config.json", MISTRAL_CONFIG)
"""What these libraries read in the place of config.json."""
_OF_LIBRARIES = (r"config_setfit\.json", *map(re.escape, CONFIGS_OF_LIBRARIES))
_OF_PIPELINES = (r"model_index\.json", r"scheduler_config\.json", r".+\.py")
_OF_USE = re.compile("|".join((*KINDS["processor"], *KINDS["sentence embeddings"], *_OF_PIPELINES, *_OF_LIBRARIES)))
_PLACES = (
    (re.compile(""), _KNOWN),
    (re.compile("additional_chat_templates"), re.compile(r".+\.jinja")),
    (re.compile(r"(\w+_)?tokenizer"), _OF_TOKENIZER),
    (re.compile(r"(speaker_embeddings|voices)(/\w+)?"), re.compile(r".+\.(np[yz]|pt)")),
)
"""folders, and what is known in them: templates beside the first one, tokenizers of a processor, voices of Bark"""
_IN_MODULE = re.compile(r".*config\.json|" + _KNOWN.pattern)
_NAMES_CODE = re.compile(r"tokenizer_config\.json|(.+_)?(pre)?processor_config\.json")
"""configs beside config.json that may have an ``auto_map``"""
_REFERENCE = re.compile(r"([\w./]+)\.\w+")
"""``modeling_x.XForCausalLM``; one with ``--`` in it names the code of another repository"""
_OF_ONE_FILE = re.compile(r"[a-z_]\w*\.[A-Z]\w*")
"""``custom_st.Transformer``: a class in a file beside the model; classes of libraries lie deeper"""
_FROM = re.compile(r"^[ \t]*from[ \t]+(\.+)([\w.]*)[ \t]+import[ \t]+(?:\(([^()]*)\)|([^\n(]*))", re.MULTILINE)
_OPENED = re.compile(r"""["']([\w-][\w.-]*\.(?:txt|model|tiktoken|vocab|bpe))["']""")
_IMPORT = re.compile(r"^[ \t]*import[ \t]+\.(\w+)\b", re.MULTILINE)

ReadJson = Callable[[str], object]
ReadText = Callable[[str], str]


def is_known(key: str) -> bool:
    """Return whether a file is of a kind that every loader of such a model looks for."""
    folder, _, name = key.rpartition("/")
    return any(place.fullmatch(folder) and kind.fullmatch(name) for place, kind in _PLACES)


def is_of_tokenizer(key: str) -> bool:
    """Return whether a file is part of a tokenizer."""
    return bool(_OF_TOKENIZER.fullmatch(key.rpartition("/")[2]))


def is_tokenizer_or_template(key: str) -> bool:
    """Return whether a file is part of a tokenizer, or a chat template for it."""
    return is_of_tokenizer(key) or bool(_TEMPLATE.fullmatch(key.rpartition("/")[2]))


def is_of_use(key: str) -> bool:
    """Return whether a file says how a model is used: of what parts it is, what is done before and behind it, code."""
    folder, _, name = key.rpartition("/")
    return bool(_OF_USE.fullmatch(name)) or (bool(folder) and (name == "config.json" or name.endswith(".jinja")))


def module_files(keys: Iterable[str], folders: Collection[str]) -> Iterator[str]:
    """Yield what the modules in these folders are made of, beside weights: configs, tokenizers, licences."""
    tops = tuple(f"{folder}/" for folder in folders)
    for key in keys:
        if key.startswith(tops) and _IN_MODULE.fullmatch(key.rpartition("/")[2]):
            yield key


def code_files(
    keys: Iterable[str],
    config: Mapping[str, object] | None,
    references: Iterable[str],
    read_json: ReadJson,
    read_text: ReadText,
) -> tuple[set[str], list[str]]:
    """Return the Python files that configs name for loaders, what these import and open, and which are missing.

    Args:
        keys: the files of the folder and its subfolders; without a Python file among them nothing is read.
        config: what config.json says.
        references: dotted names of classes that other documents name.
        read_json: returns what another config says.
        read_text: returns the source of a Python file.
    """
    present = {key for key in keys if key.endswith(".py")}
    others = [read_json(key) for key in sorted(keys) if _NAMES_CODE.fullmatch(key)] if present else []
    configs = [each for each in (config, *others) if isinstance(each, dict)]
    of_models = list(_texts([each.get("auto_map") for each in configs]))
    of_pipelines = _texts([each.get("custom_pipelines") for each in configs])
    waiting = {file for each in (*of_models, *of_pipelines, *references) for file in _files_of(each)} & present
    named = [*of_models, *(each for each in references if _OF_ONE_FILE.fullmatch(each))]
    missing = [files[0] for each in named if (files := list(_files_of(each))) and not present & set(files)]
    found: set[str] = set()
    while waiting:
        key = waiting.pop()
        source = read_text(key)
        found |= {key, *(_opened(key, source) & set(keys))}
        waiting |= (set(_imported(key, source)) & present) - found
        missing += [files[0] for files in _needed(key, source) if not present & set(files)]
    return found, list(dict.fromkeys(missing))


def _opened(key: str, source: str) -> set[str]:
    """Return the vocabularies that code may open beside itself, of which it has the whole names."""
    folder, dot, _ = key.rpartition("/")
    return {f"{folder}{dot}{name}" for name in _OPENED.findall(source)}


def _files_of(reference: str) -> Iterator[str]:
    match = _REFERENCE.fullmatch(reference)
    parts = match[1].replace(".", "/").split("/") if match else []
    if all(parts) and parts:
        yield from _module_files(parts)


def _module_files(parts: Sequence[str]) -> Iterator[str]:
    """Yield where Python looks for a module, and for the packages it is in."""
    yield "/".join(parts) + ".py"
    for number in range(1, len(parts) + 1):
        yield "/".join((*parts[:number], "__init__.py"))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def _needed(key: str, source: str) -> Iterator[Sequence[str]]:
    """Yield where each module may be that code imports from its own folder, without which transformers stops."""
    modules = [*_IMPORT.findall(source), *(name for dots, name, *_ in _FROM.findall(source) if dots == "." and name)]
    for module in modules:
        yield list(_module_files([*key.split("/")[:-1], *module.split(".")]))


def _imported(key: str, source: str) -> Iterator[str]:
    """Yield the files that ``from .x.y import z``, ``import .x`` and ``from . import x, y`` may stand for."""
    here = key.split("/")[:-1]
    for match in _IMPORT.finditer(source):
        yield from _module_files([*here, match[1]])
    for match in _FROM.finditer(source):
        climbed = len(match[1]) - 1
        if climbed > len(here):
            continue
        base = [*here[: len(here) - climbed], *filter(None, match[2].split("."))]
        if match[2]:
            yield from _module_files(base)
        for name in re.findall(r"(\w+)(?:[ \t]+as[ \t]+\w+)?", match[3] or match[4]):
            yield from _module_files([*base, name])
