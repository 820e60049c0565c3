"""Sizes, dtypes and the names of methods, as a recipe writes them."""

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.recipe.wording import NOT_YET, nearest, shown
from stockflow.text.remarks import CODES

OutputFormat = Literal["keep", "bfloat16", "float16", "float32", "fp8_block"]
OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""Names of dtypes in a recipe, and in a safetensors header."""
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

MERGEKIT_METHODS = frozenset({
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough", "model_stock", "arcee_fusion",
    "nearswap", "sce", "ram", "ramplus_tl", "task_arithmetic", "ties", "dare_linear", "dare_ties",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
})  # fmt: skip
"""Its names; those that are not ours are refused by name."""
_LAYER = "{layer}"
_UNITS = {"": 1} | {
    unit: base**power
    for base, units in ((1000, ("kb", "mb", "gb", "tb")), (1024, ("kib", "mib", "gib", "tib")))
    for power, unit in enumerate(units, 1)
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``5GB``, ``256MiB`` or ``1000`` stands for.

    Raises:
        RecipeError: not a positive size with a known unit.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() if match else None
    num_bytes = Fraction(match[1]) * _UNITS[unit] if match and unit in _UNITS else Fraction(0)
    if num_bytes < 1 or num_bytes.denominator != 1:
        raise RecipeError(
            f"expected a size such as 5GB, 256MiB or a number of bytes, found {shown(text)}; "
            "units are kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024)"
        )
    return int(num_bytes)


def _dtype(given: object) -> str:
    name = given.removeprefix("torch.") if isinstance(given, str) else ""
    if name not in OUTPUT_DTYPES:
        hint = f"did you mean `{_SHORT_DTYPES[name]}`?" if name in _SHORT_DTYPES else "choose one"
        raise RecipeError(f"expected one of {', '.join(OUTPUT_DTYPES)}, found {shown(given)}; {hint}")
    return name


def _size(given: object) -> int:
    return parse_size(given if isinstance(given, str) else str(given))


def _method_name(given: str) -> str:
    if given in METHODS:
        return given
    if given in MERGEKIT_METHODS:
        raise RecipeError(f"mergekit's method `{given}` {NOT_YET}; known methods: {', '.join(METHODS)}")
    raise RecipeError(f"unknown method {shown(given)}; {nearest(given.lower(), METHODS)}")


def text_around_layer(pattern: str) -> tuple[str, str]:
    """Return what stands before and behind the number of a layer."""
    before, _, behind = pattern.partition(_LAYER)
    return before, behind


def _layer_pattern(given: str) -> str:
    if given.count(_LAYER) != 1:
        raise RecipeError(f"expected a text with {_LAYER} where the number stands, found {shown(given)}; correct it")
    return given


def _layer_range(given: object) -> tuple[int, int]:
    ends = list(given) if isinstance(given, list | tuple) else []
    found = f"found [{', '.join(map(shown, ends))}]" if ends else f"found {shown(given)}"
    if len(ends) != 2 or not all(type(end) is int and end >= 0 for end in ends):
        raise RecipeError(f"expected [first, behind the last], two numbers of layers, {found}; correct it")
    if ends[0] >= ends[1]:
        raise RecipeError(
            f"expected a second number above the first, as it is behind the last layer, {found}; correct it"
        )
    return ends[0], ends[1]


def _remark_code(given: str) -> str:
    if given not in CODES:
        raise RecipeError(f"unknown code {shown(given)}; {nearest(given, CODES)}")
    return given


LayerPattern = Annotated[str, AfterValidator(_layer_pattern)]
LayerRange = Annotated[
    tuple[int, int], PlainValidator(_layer_range), WithJsonSchema({"type": "array", "items": {"type": "integer"}})
]
MethodName = Annotated[str, AfterValidator(_method_name)]
RemarkCode = Annotated[str, AfterValidator(_remark_code)]
Size = Annotated[int | None, PlainValidator(_size), WithJsonSchema({"type": ["integer", "string"]})]
DType = Annotated[
    str,
    PlainValidator(_dtype),
    WithJsonSchema({"enum": [prefix + name for prefix in ("", "torch.") for name in OUTPUT_DTYPES]}),
]
