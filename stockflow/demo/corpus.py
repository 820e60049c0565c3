"""Text that every Python machine has: the sources of its own standard library, as byte tokens.

The base model reads the single-file modules. Each theme is a family of packages, the text of one
fine-tuning. Every eighth file of each theme is held out: no model reads it.
"""

import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from stockflow.errors import NotFoundError

THEMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "concurrency": ("asyncio", "concurrent", "multiprocessing"),
        "network": ("email", "http", "urllib", "wsgiref", "xmlrpc"),
        "formats": ("html", "json", "logging", "tomllib", "xml", "zoneinfo"),
        "testing": ("unittest",),
    }
)

# The token ids of transformers' ByT5Tokenizer, which needs no vocabulary file: <pad>, </s>, <unk>, 256 bytes.
END_OF_FILE = 1
FIRST_BYTE = 3
VOCAB_SIZE = FIRST_BYTE + 256

_HELD_OUT_EVERY = 8


def base_text() -> Tensor:
    """Return the tokens of the library's single-file modules."""
    return _tokens(sorted(_library().glob("*.py")))


def tuning_text(theme: str) -> Tensor:
    """Return the tokens of a theme's packages, without the held-out files."""
    sources = _sources(theme)
    held_out = set(sources[::_HELD_OUT_EVERY])
    return _tokens(source for source in sources if source not in held_out)


def held_out_text(theme: str) -> Tensor:
    """Return the tokens of a theme's files that no model reads."""
    return _tokens(_sources(theme)[::_HELD_OUT_EVERY])


def _sources(theme: str) -> list[Path]:
    return [source for package in THEMES[theme] for source in sorted((_library() / package).rglob("*.py"))]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _tokens(sources: Iterable[Path]) -> Tensor:
    """Tokens of the sources in the order given, each closed by an end-of-file token."""
    end = torch.tensor([END_OF_FILE])
    files = []
    for source in sources:
        text = bytearray(source.read_bytes())
        if text:
            files += [torch.frombuffer(text, dtype=torch.uint8).long() + FIRST_BYTE, end]
    if not files:
        raise NotFoundError(
            f"the demo trains on the standard library's sources, and {str(_library())!r} has none; "
            f"run it with a Python that is installed with its .py files"
        )
    return torch.cat(files)
