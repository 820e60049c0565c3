"""Values of parameters as a recipe gives them: one value, or a list of values with filters."""

import math
import re
from typing import Annotated, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from stockflow.errors import RecipeError
from stockflow.methods.protocol import Scalar
from stockflow.recipe.wording import NOT_YET, shown

_LISTS = "give one value, or a list of {filter, value}"
_GRADIENT = f"mergekit's gradients (a list of values over the layers): this {NOT_YET}; {_LISTS}"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


def _scalar(given: object) -> Scalar:
    """Return a bool, a finite float or a text; YAML reads ``1e-5`` as text, here it is a number."""
    if isinstance(given, bool):
        return given
    if isinstance(given, list):
        raise RecipeError(_GRADIENT)
    if isinstance(given, dict):
        raise RecipeError(f"expected a number, true/false or a word, found a mapping; {_LISTS}")
    if isinstance(given, str) and not _NUMBER.fullmatch(given):
        return given
    try:
        number = float(cast(float | str, given)) + 0.0
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecipeError(f"expected a finite number, found {shown(given)}; correct it")
    return number


def _conditionals(given: object) -> object:
    if given is None or given == []:
        raise RecipeError(f"expected a value, found nothing; {_LISTS}")
    if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
        raise RecipeError(_GRADIENT)
    if isinstance(given, list | tuple):
        return given
    return [given if isinstance(given, dict) else {"value": given}]


class Part(BaseModel):
    """A mapping in a recipe: unknown keys are refused, and a known key without a value is absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        return {key: value for key, value in given.items() if value is not None or key not in known}


class Conditional(Part):
    """One value of a parameter and the tensors it is for."""

    filter: str | None = Field(default=None, description="part of the tensor's name; `*` or nothing matches all")
    value: Annotated[Scalar, PlainValidator(_scalar, json_schema_input_type=Scalar)] = Field(
        description="number, true/false or word"
    )


def matches(text: str | None, tensor_name: str) -> bool:
    """Return whether a filter is for a tensor."""
    return text is None or text == "*" or text in tensor_name


_SettingInput = Scalar | Conditional | tuple[Conditional, ...]
Setting = Annotated[tuple[Conditional, ...], BeforeValidator(_conditionals, json_schema_input_type=_SettingInput)]
Settings = dict[str, Setting]
