"""Where models are: folders, URLs, and names on the Hugging Face hub."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

from stockflow.errors import RecipeError
from stockflow.recipe.wording import NOT_YET, shown
from stockflow.storage import normalize_url
from stockflow.text.redaction import FROM_ENVIRONMENT, has_credentials

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^\s@]+)?", re.ASCII)


def resolve_location(text: str) -> str:
    """Return the normalized path or URL of a model as the recipe names it; a bare ``org/name`` is on the hub.

    Raises:
        RecipeError: empty, a LoRA reference, or a URL with credentials or a query.
    """
    if "://" in text:
        return _resolve_url(text)
    if not text:
        raise RecipeError("expected a folder, a URL or org/name, found an empty text; name the model")
    path = os.path.expanduser(text)
    explicit = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    names_folder = os.path.isdir(path) or (explicit and not os.path.isdir(path.partition("+")[0]))
    if "+" in text and not names_folder:
        raise RecipeError(f"mergekit's LoRA reference {shown(text)} {NOT_YET}; merge the adapter first")
    if not names_folder and not explicit and _HUB_NAME.fullmatch(text):
        return f"hf://{text}"
    return normalized(text)


def normalized(location: str) -> str:
    """Return a path or URL in the form that stores and comparisons use.

    Raises:
        RecipeError: no store can be made of it.
    """
    try:
        return normalize_url(location)
    except RecipeError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise RecipeError(f"{shown(location)} is no usable location: {error}; correct it") from None


def _resolve_url(text: str) -> str:
    scheme = text.partition("://")[0]
    if has_credentials(text):
        raise RecipeError(f"this {scheme}:// URL carries a user and a password; {FROM_ENVIRONMENT}")
    if "?" in text:
        raise RecipeError(f"expected a folder, found a {scheme}:// URL with a query; cut it off at the `?`")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://.*[^/].*", text):
        raise RecipeError(f"expected a URL such as s3://bucket/folder, found {shown(text)}; complete it")
    return normalized(text)


def _location(given: object) -> str:
    if isinstance(given, dict):
        raise RecipeError(f"mergekit's model given as a mapping {NOT_YET}; write its path or URL as a text")
    if not isinstance(given, str):
        raise RecipeError(f"expected a folder, a URL or org/name, found {shown(given)}; put it in quotes")
    return resolve_location(given)


def _prefix(given: str) -> str:
    return _resolve_url(given)


def _no_credentials(given: str) -> str:
    if has_credentials(given) or "?" in given:
        raise RecipeError(f"this URL carries a user and a password, or a query; {FROM_ENVIRONMENT}")
    return given


Location = Annotated[str, PlainValidator(_location), WithJsonSchema({"type": "string"})]
UrlPrefix = Annotated[str, AfterValidator(_prefix)]
Endpoint = Annotated[str, AfterValidator(_no_credentials)]
