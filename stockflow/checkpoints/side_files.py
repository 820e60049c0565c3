"""Files beside the weights that a loader of the model needs: which names are copied into an output, and why.

What is copied is published, so the list says what is, not what is not: a key, a note, a script or the state of a
trainer that lies in the folder stays there. Code is copied where the model's own configs name it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (
        r"tokenizer\.json", r"tokenizer_config\.json", r"special_tokens_map\.json", r"added_tokens\.json",
        r"vocab\.(json|txt|bpe)", r"merges\.txt", r"bpe\.codes", r"dict\.txt", r"encoder\.json", r"normalizer\.json",
        r"vocab-(src|tgt)\.json", r"entity_vocab\.json", r"emoji\.json", r"alphabet\.json", r"tekken\.json",
        r".+\.model", r"tokenizer\.model\.v\d+", r".+\.spm", r".+\.tiktoken", r"prophetnet\.tokenizer",
    ),
    "template": (r".+\.jinja", r"chat_template\.json"),
    "processor": (r"(.+_)?(pre)?processor_config\.json", r"feature_extractor_config\.json"),
    "generation": (r"generation_config\.json",),
    "sentence embeddings": (r"modules\.json", r"config_sentence_transformers\.json", r"sentence_.+_config\.json"),
    "framework": (r"configuration\.json",),
    "licence": (
        r"(?i:(model[-_]|third[-_]party[-_])?(licen[cs]e|copying|notices?)"
        r"([-_](model|code|weights|data|apache(-2\.0)?|mit|bsd|cc|en|zh))?(\.(txt|md|rst|pdf))?)",
        r"(?i:(acceptable[-_])?use[-_]policy(\.(txt|md|rst|pdf))?)",
    ),
}  # fmt: skip
"""Patterns of whole names by what they are for. SentencePiece's ``.model`` has a different name in every family."""
_KNOWN = re.compile("|".join(pattern for patterns in KINDS.values() for pattern in patterns))
_NAMES_CODE = re.compile(r"tokenizer_config\.json|(.+_)?(pre)?processor_config\.json")
"""configs beside config.json that may have an ``auto_map``"""
_REFERENCE = re.compile(r"(\w+)\.\w+")
"""``modeling_x.XForCausalLM``; one with ``--`` in it names the code of another repository"""
_FROM_MODULE = re.compile(r"^[ \t]*(?:from[ \t]+\.(\w+)\b|import[ \t]+\.(\w+)\b)", re.MULTILINE)
_FROM_PACKAGE = re.compile(r"^[ \t]*from[ \t]+\.[ \t]+import[ \t]+(?:\(([^()]*)\)|([^\n(]*))", re.MULTILINE)

ReadJson = Callable[[str], Mapping[str, object]]
ReadText = Callable[[str], str]


def is_known(name: str) -> bool:
    """Return whether a file is of a kind that every loader of such a model looks for."""
    return bool(_KNOWN.fullmatch(name))


def code_files(
    names: Iterable[str], config: Mapping[str, object] | None, read_json: ReadJson, read_text: ReadText
) -> set[str]:
    """Return the Python files that the configs name for loaders, and those that these import from beside them.

    Args:
        names: the files of the folder; without a Python file among them nothing is read.
        config: what config.json says.
        read_json: returns what another config says.
        read_text: returns the source of a Python file.
    """
    present = {name for name in names if name.endswith(".py")}
    if not present:
        return set()
    others = [read_json(name) for name in sorted(names) if _NAMES_CODE.fullmatch(name)]
    waiting = {name for each in (config or {}, *others) for name in _named_code(each)} & present
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= (set(_imported(read_text(name))) & present) - found
    return found


def _named_code(config: Mapping[str, object]) -> Iterator[str]:
    for reference in _texts([config.get("auto_map"), config.get("custom_pipelines")]):
        if match := _REFERENCE.fullmatch(reference):
            yield f"{match[1]}.py"


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def _imported(source: str) -> Iterator[str]:
    """Yield the files that ``from .x import``, ``import .x`` and ``from . import x, y`` stand for."""
    for match in _FROM_MODULE.finditer(source):
        yield f"{match[1] or match[2]}.py"
    for match in _FROM_PACKAGE.finditer(source):
        for name in re.findall(r"(\w+)(?:[ \t]+as[ \t]+\w+)?", match[1] or match[2]):
            yield f"{name}.py"
