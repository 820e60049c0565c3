"""Values of parameters as a recipe gives them: one, or one after the other over the layers, or several with filters."""

import math
import re
from typing import Annotated, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from stockflow.errors import RecipeError
from stockflow.methods.parameters import FROM_BASE, Parameter, Scalar
from stockflow.methods.protocol import Method
from stockflow.recipe.wording import shown

_LISTS = "give one value, a list of values over the layers, or a list of {filter, value}"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


def _scalar(given: object) -> Scalar:
    """Return a bool, a finite float or a text; YAML reads ``1e-5`` as text, here it is a number."""
    if isinstance(given, bool):
        return given
    if given is None or isinstance(given, dict | list | tuple):
        raise RecipeError(f"expected a number, true/false or a word, found {shown(given)}; {_LISTS}")
    if isinstance(given, str) and not _NUMBER.fullmatch(given.strip()):
        return given
    try:
        number = float(cast(float | str, given)) + 0.0
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecipeError(f"expected a finite number, found {shown(given)}; correct it")
    return number


def _over_layers(given: object) -> object:
    if given == []:
        raise RecipeError("expected at least one value over the layers, found none; give one")
    return given if isinstance(given, list | tuple) else [given]


UNDER_STOCKFLOW = ("on_negative", "seed")
"""Parameters of methods that a recipe gives under `stockflow:`."""


def parameters_of(method: Method) -> dict[str, Parameter]:
    """Return the parameters that recipes give under `parameters`, by name."""
    elsewhere = (*UNDER_STOCKFLOW, FROM_BASE)
    return {each.name: each for each in method.parameters if each.name not in elsewhere}


_FLAGS = dict.fromkeys(("true", "yes", "on", "t", "y"), True) | dict.fromkeys(("false", "no", "off", "f", "n"), False)
"""Words that stand for a flag, in capitals or not; YAML itself reads some of them so, if they are not quoted."""


def as_kind(parameter: Parameter, value: Scalar) -> Scalar:
    """Return a value as its parameter takes it: of a flag also 1, 0 and words such as `yes`; others as they are."""
    if parameter.kind != "flag" or value in parameter.choices:
        return value
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower(), value)
    return bool(value) if value in (0, 1) else value


def _conditionals(given: object) -> object:
    if given is None:
        raise RecipeError(f"expected a value, found nothing; {_LISTS}")
    if not isinstance(given, list | tuple):
        return [given if isinstance(given, dict) else {"value": given}]
    mappings = [isinstance(item, dict | BaseModel) for item in given]
    if any(mappings) and not all(mappings):
        raise RecipeError(f"expected either values or mappings, found both in one list; {_LISTS}")
    return given if all(mappings) else [{"value": given}]


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


_Value = Annotated[Scalar, PlainValidator(_scalar, json_schema_input_type=Scalar)]
Gradient = Annotated[
    tuple[_Value, ...], BeforeValidator(_over_layers, json_schema_input_type=Scalar | tuple[Scalar, ...])
]
"""Values from the first layer to the last, evenly spaced; one value is the same everywhere."""


class Conditional(Part):
    """The values of a parameter and the tensors they are for."""

    filter: str | None = Field(default=None, description="part of the tensor's name; `*` or nothing matches all")
    value: Gradient = Field(description="number, true/false or word; a list goes from the first layer to the last")


def matches(text: str | None, tensor_name: str) -> bool:
    """Return whether a filter is for a tensor."""
    return text is None or text == "*" or text in tensor_name


_SettingInput = Scalar | tuple[Scalar, ...] | Conditional | tuple[Conditional, ...]
Setting = Annotated[tuple[Conditional, ...], BeforeValidator(_conditionals, json_schema_input_type=_SettingInput)]
Settings = dict[str, Setting]
