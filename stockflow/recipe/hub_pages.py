"""Pages of the Hugging Face hub, as a browser shows their addresses: which model, revision and folder they are of."""

import re
from urllib.parse import unquote

from stockflow.errors import RecipeError

_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)(?:/(.*))?", re.IGNORECASE)
_OTHERS = ("datasets", "spaces", "papers", "docs", "collections", "blog", "models", "organizations", "settings", "join")
"""What the first part of an address names besides an organisation."""
_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def is_page(text: str) -> bool:
    """Return whether a text is an address of the hub."""
    return bool(_PAGE.fullmatch(text))


def model_of_page(address: str) -> str:
    """Return ``hf://org/name[@revision][/folder]`` for the address of a model, one of its folders or of its files.

    Raises:
        RecipeError: it is of no model.
    """
    match = _PAGE.fullmatch(address)
    assert match is not None
    path = (match[1] or "").partition("#")[0].rstrip("/")
    organisation, name, kind, revision, *rest = (*map(unquote, path.split("/")), *[""] * 4)
    if organisation in _OTHERS or not _NAME.fullmatch(organisation) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{address!r} is a page of the hub, but not of a model; write ORG/NAME, or its page's address"
        )
    model = f"hf://{organisation}/{name}"
    if kind in ("", "discussions", "settings"):
        return model
    if kind not in ("tree", "blob", "resolve", "raw", "commit", "commits") or not revision:
        raise RecipeError(f"{address!r} is a page about a model of the hub; write {organisation}/{name}")
    if "/" in revision and not _PULL_REQUEST.fullmatch(revision):
        raise RecipeError(f"the revision {revision!r} has a slash, which is not read; name its commit")
    inner = [part for part in rest if part]
    folders = inner if kind in ("tree", "commits") else inner[:-1]
    return "/".join([f"{model}@{revision}", *folders])
