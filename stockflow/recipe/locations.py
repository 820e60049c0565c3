"""Where models are: folders, URLs, and names on the Hugging Face hub."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

from stockflow.errors import RecipeError
from stockflow.recipe.hub_pages import is_page, model_of_page
from stockflow.recipe.store_pages import in_a_store
from stockflow.recipe.wording import NOT_YET, shown
from stockflow.storage import halves_of, is_weights, joined, normalize_url
from stockflow.text.redaction import FROM_ENVIRONMENT, has_credentials

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^\s@]+)?", re.ASCII)
_PLUS = re.compile(r"(?<=[^+\s])\s*\+\s*(?=/|\.{1,2}/|~|[a-z0-9]+://)", re.ASCII)
"""Between ``model+adapter``; a folder's name may hold a plus, too."""
_PICKLED = re.compile(r".*\.(pt|pth|ckpt)", re.IGNORECASE)


def resolve_location(text: str) -> str:
    """Return the normalized path or URL of a model as the recipe names it; a bare ``org/name`` is on the hub.

    Of ``model+adapter`` it is that of both (``storage.joined``). A folder on disk has no revisions: what stands behind
    its ``@`` is left out.

    Raises:
        RecipeError: empty, several adapters, a file of pickled weights, or a URL with credentials or a query.
    """
    model, *adapters = parts_of(text)
    found = _resolved(model)
    for adapter in adapters:
        found = joined(found, _resolved(adapter))
    if len(adapters) > 1 or len(halves_of(found)) > 1 + len(adapters):
        raise RecipeError(
            f"{shown(text)} names more than a model and one adapter; merge by turns, or rename a folder whose name "
            "holds a plus between spaces"
        )
    return found


def parts_of(text: str) -> list[str]:
    """Return the model and the adapter that ``model+adapter`` names, or the model alone."""
    path = os.path.expanduser(text)
    explicit = text.startswith(("/", "./", "../", "~")) or text in (".", "..") or "://" in text
    if "+" not in text or ("://" not in text and os.path.isdir(path)):
        return [text]
    if len(parts := _PLUS.split(text)) > 1:
        return parts
    model, _, adapter = text.partition("+")
    is_there = "://" not in text and (os.path.isdir(os.path.expanduser(model)) or bool(ignored_revision(model)))
    is_pair = model and adapter and (is_there or not explicit)
    return [model, adapter] if is_pair else [text]


def _resolved(text: str) -> str:
    if not text:
        raise RecipeError("expected a folder, a URL or org/name, found an empty text; name the model")
    path = os.path.expanduser(text)
    explicit = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    names_folder = "://" not in text and os.path.isdir(path)
    if not names_folder and _PICKLED.fullmatch(text):
        raise RecipeError(f"{shown(text)} is a file of pickled weights, which {NOT_YET}; save them as safetensors")
    if "://" in text:
        return _resolve_url(text)
    if is_page(text) and not names_folder:
        return model_of_page(text)
    if folder := ignored_revision(text):
        return normalized(folder)
    if not names_folder and not explicit and _HUB_NAME.fullmatch(text) and not is_weights(path):
        return f"hf://{text}"
    return normalized(text)


def ignored_revision(text: str) -> str | None:
    """Return the local folder of a ``folder@revision``, None if it is none."""
    folder, _, revision = text.rpartition("@")
    is_one = folder and revision and "://" not in text and not os.path.isdir(os.path.expanduser(text))
    return folder if is_one and os.path.isdir(os.path.expanduser(folder)) else None


def normalized(location: str) -> str:
    """Return a path or URL in the form that stores and comparisons use.

    Raises:
        RecipeError: no store can be made of it.
    """
    try:
        return normalize_url(location)
    except RecipeError:
        raise
    except FileNotFoundError:
        raise RecipeError(
            f"{shown(location)} is relative to the current folder, which was removed: change to one that is there"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise RecipeError(f"{shown(location)} is no usable location: {error}; correct it") from None


def _resolve_url(text: str) -> str:
    scheme = text.partition("://")[0]
    if has_credentials(text):
        raise RecipeError(f"this {scheme}:// URL carries a user and a password; {FROM_ENVIRONMENT}")
    is_one_file = "?" not in text and text.endswith((".safetensors", ".bin", ".json"))
    if not is_one_file and (place := in_a_store(text)):
        raise RecipeError(f"this {scheme}:// URL is an address of an object store; write {shown(place)}")
    if "?" in text:
        raise RecipeError(f"expected a folder, found a {scheme}:// URL with a query; cut it off at the `?`")
    if is_page(text):
        return model_of_page(text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://.*[^/].*", text):
        raise RecipeError(f"expected a URL such as s3://bucket/folder, found {shown(text)}; complete it")
    return normalized(text)


def location_of(given: object) -> str:
    """Return the location of a model as a recipe gives it."""
    text = written(given)
    if not isinstance(text, str):
        raise RecipeError(f"expected a folder, a URL or org/name, found {shown(text)}; put it in quotes")
    return resolve_location(text)


_PARTS = frozenset({"path", "revision", "model", "lora", "override_architecture"})


def written(given: object) -> object:
    """Return a model that is given as a mapping as the text that names it, ``path[@revision][+lora]``.

    Raises:
        RecipeError: the mapping has other keys than mergekit's.
    """
    if not isinstance(given, dict):
        return given
    if unknown := given.keys() - _PARTS:
        raise RecipeError(f"expected a model as {{path, revision}}, found the key {shown(min(unknown, key=str))}")
    if given.get("override_architecture") is not None:
        raise RecipeError("`override_architecture` is not needed, as names come from the files; remove it")
    model, revision, adapter = written(given.get("model", given.get("path"))), given.get("revision"), given.get("lora")
    if not isinstance(model, str):
        raise RecipeError("expected a model as {path, revision}, found no path; add it")
    text = model if revision is None else f"{model}@{revision}"
    return text if adapter is None else f"{text}+{written(adapter)}"


def _prefix(given: str) -> str:
    return _resolve_url(given)


def _no_credentials(given: str) -> str:
    if has_credentials(given) or "?" in given:
        raise RecipeError(f"this URL carries a user and a password, or a query; {FROM_ENVIRONMENT}")
    return given


Location = Annotated[str, PlainValidator(location_of), WithJsonSchema({"type": ["string", "object"]})]
UrlPrefix = Annotated[str, AfterValidator(_prefix)]
Endpoint = Annotated[str, AfterValidator(_no_credentials)]
