"""What a recipe says of the output's vocabulary and chat template, in mergekit's words."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, WithJsonSchema

from stockflow.errors import RecipeError
from stockflow.recipe.locations import Location, location_of
from stockflow.recipe.settings import Part
from stockflow.recipe.wording import shown

WORDS = ("base", "union")
MAX_MULTIPLE = 1 << 20


def _source(given: object) -> str:
    return given if isinstance(given, str) and given in WORDS else location_of(given)


def _token_source(given: object) -> object:
    return {"kind": "model", "model": given} if isinstance(given, str) else given


def _template(given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        raise RecipeError(f"expected `auto`, a name or a template, found {shown(given)}; correct it")
    return given


def _multiple(given: object) -> int:
    if type(given) is not int or not 1 <= given <= MAX_MULTIPLE:
        raise RecipeError(f"expected an integer from 1 to {MAX_MULTIPLE:,}, found {shown(given)}; correct it")
    return given


VocabularySource = Annotated[str, PlainValidator(_source), WithJsonSchema({"type": "string"})]
Multiple = Annotated[int, PlainValidator(_multiple), WithJsonSchema({"type": "integer", "minimum": 1})]
ChatTemplate = Annotated[str, PlainValidator(_template), WithJsonSchema({"type": "string"})]


class TokenSource(Part):
    """Where the row of a token comes from."""

    kind: Literal["zero", "model", "model_token"] = Field(description="zeros, a model's row of it, or of another token")
    model: Location | None = Field(default=None, description="the model whose row it is")
    token: str | None = Field(default=None, description="another token of that model")
    token_id: StrictInt | None = Field(default=None, description="or its id")


class TokenEntry(Part):
    """The row of one token: for models that lack it, or for all."""

    source: Annotated[TokenSource, BeforeValidator(_token_source)] = Field(description="a model, or a kind of source")
    force: StrictBool = Field(default=False, description="whether models that have the token take it, too")


class TokenizerEntry(Part):
    """The vocabulary of the output."""

    source: VocabularySource = Field(default="union", description="`base`, `union`, or a model")
    tokens: dict[str, TokenEntry] = Field(default={}, description="rows of single tokens")
    pad_to_multiple_of: Multiple | None = Field(default=None, description="what the number of rows is a multiple of")
