"""Settings: what may be said about a merge, a plan, a look at models, each in one line with the words that explain it.

The functions of the Python API take them as keywords (``**settings: Unpack[MergeSettings]``), commands show them as
options, `submit` and the commands that are proposed next say them again. Light: the help of a command reads this.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import Parameter, Signature, cleandoc, signature
from itertools import count
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Protocol, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

from stockflow.errors import PlanError, RecipeError

ExecutorName = Literal["local", "ray"]
FactorName = Literal["float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
Size = int | str
"""Bytes, or a text such as ``2GiB``."""
Rate = str | float
Location = str | os.PathLike[str]
"""A folder or a URL; of a checkpoint also ``org/name`` on the hub."""
_BITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBERS = count()
_F = TypeVar("_F")


class Parse(Protocol):
    """Makes a value of what was given; a message about it names the option."""

    def __call__(self, option: str, given: Any, /) -> Any:
        """Return the value.

        Raises:
            UserError: it is none.
        """


def num_bytes(option: str, size: Size | None) -> int | None:
    """Return a size in bytes, or None if none is given; a message about it names the option."""
    from stockflow.recipe import parse_size

    try:
        return None if size is None else parse_size(str(size))
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None


def rate(option: str, given: Rate | None) -> float | None:
    """Return bytes per second from ``10Gbit/s``, ``1.25GB/s`` or a number; a message about it names the option."""
    if given is None:
        return None
    text = given.strip() if isinstance(given, str) else f"{given}/s"
    bits = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([kMGT])bit/s", text)
    with suppress(RecipeError):
        found = float(bits[1]) * _BITS[bits[2]] / 8 if bits else num_bytes(option, text.removesuffix("/s"))
        if found and text.endswith("/s"):
            return float(found)
    raise RecipeError(f"{option}: expected a rate such as 10Gbit/s or 1.25GB/s, found {given!r}")


def seconds(option: str, given: Rate | None) -> float | None:
    """Return seconds from ``30ms``, ``0.03s`` or a number; a message about it names the option."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?(ms|s)", given.strip() if isinstance(given, str) else f"{given}s")
    if not found:
        raise RecipeError(f"{option}: expected a time such as 30ms or 0.03s, found {given!r}")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def price(option: str, given: float | None) -> float | None:
    """Return a price; a message about it names the option."""
    if given is not None and not math.isfinite(given):
        raise RecipeError(f"{option}: expected a price per hour, found {given}")
    return given


def share(option: str, given: float | None) -> float | None:
    """Return a share above 0; a message about it names the option."""
    if given is not None and not 0 < given <= 1:
        raise RecipeError(f"{option}: expected a share above 0 and up to 1, such as 0.99, found {given}")
    return given


def labels_of(option: str, given: Mapping[str, str] | Sequence[str] | None) -> Mapping[str, str]:
    """Return labels by name, also from ``KEY=VALUE``."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    labels = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise PlanError(f"{option} {pair}: expected KEY=VALUE, such as pool=spot")
        labels[name] = value
    return labels


@dataclass(frozen=True)
class Setting:
    """How a setting is explained, said and checked; its name and type are the key's."""

    help: str
    default: Any = None
    flag: str = ""
    """of the command line, if not the name"""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    parse: Parse | None = None
    repeats: bool = False
    """said once per value"""
    rank: int = 0
    number: int = field(default_factory=lambda: next(_NUMBERS))
    """settings are shown by rank, then in the order in which they are declared"""


class ReadSettings(TypedDict, total=False):
    """What everything takes that reads checkpoints."""

    memory: Annotated[Size | None, Setting(
        "Bound of one worker process, such as 2GiB. Default: 80 % of what the machine allows. Ray: of what the "
        "driver's machine allows, divided by its cores or by --workers, if fewer; say it where nodes are others.",
        parse=num_bytes,
    )]  # fmt: skip
    follow_links: Annotated[Sequence[Location], Setting(
        "Folder that links of weights may lead into; may be repeated. Otherwise links are followed inside a "
        "checkpoint's folder and in the hub's cache.",
        (), metavar="DIR", repeats=True, rank=1,
    )]  # fmt: skip


class DiffSettings(ReadSettings, total=False):
    """What a comparison takes."""

    workers: Annotated[int | None, Setting(
        "Local: compute threads (default: one per core). Ray: worker processes.", least=1
    )]  # fmt: skip
    executor: Annotated[ExecutorName | None, Setting(
        "Where the work is done. Default: ray if RAY_ADDRESS is set, else local."
    )]  # fmt: skip


class ExtractSettings(DiffSettings, total=False):
    """What an extraction takes."""

    rank: Annotated[int, Setting("Of the factors of a matrix, at most.", 16, metavar="R", least=1, most=65536)]
    energy: Annotated[float | None, Setting(
        "Take the least rank, up to R, that keeps this share of the squared Frobenius norm of a change, such as 0.99. "
        "Default: R.", metavar="SHARE", parse=share,
    )]  # fmt: skip
    dtype: Annotated[FactorName, Setting("Of the factors.", "float32")]
    keep_whole: Annotated[bool, Setting(
        "Write whole what changed and does not decompose: norms, biases, routers, embeddings. Default: refuse it.",
        False,
    )]  # fmt: skip
    embeddings: Annotated[bool, Setting("Write factors of embeddings, too, where no head is tied to them.", False)]
    overwrite: Annotated[bool, Setting("Replace an adapter that the output holds.", False)]


class _Working(TypedDict, total=False):
    device: Annotated[DeviceName, Setting("auto takes a GPU if torch is installed and sees one.", "auto")]


class SurveySettings(DiffSettings, _Working, total=False):
    """What inspect and audit take."""

    gpus_per_worker: Annotated[float, Setting("Ray: GPUs per worker; a fraction lets several share one.", 0.0, least=0)]


class _Writing(TypedDict, total=False):
    shard_size: Annotated[Size | None, Setting(
        "Largest output shard, such as 5GB. Default: a 256th of the output, from 256 MB to 5 GB.", parse=num_bytes
    )]  # fmt: skip
    overwrite: Annotated[bool, Setting("Replace what the output prefix holds.", False)]
    allow_unmerged: Annotated[bool, Setting(
        "Obey rules by which every tensor comes from one model: the output is no merge.", False
    )]  # fmt: skip
    strict: Annotated[
        bool, Setting("Refuse all that is otherwise only said of inputs, and not accepted by the recipe.", False)
    ]
    verify_inputs: Annotated[bool, Setting(
        "Read all that is read of remote models a second time, over another connection, and compare.", False
    )]  # fmt: skip
    random_seed: Annotated[int | None, Setting(
        "What methods that draw, draw by. Default: the recipe's `stockflow: {seed: 0}`.", least=0, most=2**63 - 1
    )]  # fmt: skip


class MergeSettings(SurveySettings, _Writing, total=False):
    """What a merge takes."""

    labels: Annotated[Mapping[str, str] | None, Setting(
        "Ray: workers go to nodes with this label; may be repeated.",
        flag="--label", metavar="KEY=VALUE", repeats=True, parse=labels_of,
    )]  # fmt: skip
    worker_timeout: Annotated[float | None, Setting(
        "Ray: give up if no worker comes within this. Default: 900.", metavar="SECONDS", least=1
    )]  # fmt: skip
    shard_timeout: Annotated[float | None, Setting(
        "Ray: a shard not done within this goes to another worker.", metavar="SECONDS", least=1
    )]  # fmt: skip


class PlanSettings(DiffSettings, _Working, _Writing, total=False):
    """What a plan takes: what decides about the merge, and what its time and its cost depend on."""

    read_rate: Annotated[Rate | None, Setting(
        "Of one worker from the inputs' store or disk, such as 10Gbit/s. Default: calibrated.", parse=rate
    )]  # fmt: skip
    write_rate: Annotated[Rate | None, Setting(
        "Network of one worker to the output's store, such as 1GB/s. Default: calibrated.", parse=rate
    )]  # fmt: skip
    latency: Annotated[Rate | None, Setting(
        "One small request to a store, such as 30ms. Default: calibrated.", parse=seconds
    )]  # fmt: skip
    request_rate: Annotated[float | None, Setting(
        "Requests per second the store takes. Default: no limit.", least=1e-3
    )]  # fmt: skip
    calibration: Annotated[Location | None, Setting(
        "Constants of the model. Default: what `stockflow calibrate` wrote, else built in.", metavar="FILE"
    )]  # fmt: skip
    machine_price: Annotated[float | None, Setting(
        "What one machine costs per hour, in any currency. Default: no cost is told.", least=0, parse=price
    )]  # fmt: skip


def settings_of(*kinds: type) -> dict[str, tuple[Any, Setting]]:
    """Return type and setting by name, in the order in which they are shown."""
    found = {}
    for kind in kinds:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            declared, setting = get_args(hint)
            found[name] = declared, setting
    return dict(sorted(found.items(), key=lambda item: (item[1][1].rank, item[1][1].number)))


def flag_of(name: str, setting: Setting) -> str:
    """Return the option of the command line."""
    return setting.flag or f"--{name.replace('_', '-')}"


def choices_of(declared: Any) -> tuple[object, ...]:
    """Return the texts that a setting is one of, and None if that is one; nothing if it is free."""
    if get_origin(declared) is Literal:
        return get_args(declared)
    kinds = get_args(declared)
    literal = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    return (None, *get_args(literal)) if literal else ()


def resolved(kind: type, given: Mapping[str, Any]) -> SimpleNamespace:
    """Return every setting of a kind as the code takes it: checked, parsed, those not given at their default.

    Raises:
        TypeError: one is unknown.
        UserError: a value cannot be.
    """
    settings = settings_of(kind)
    if unknown := given.keys() - settings.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}; expected some of {', '.join(settings)}")
    return SimpleNamespace(
        **{
            name: checked(name, declared, setting, given.get(name, setting.default))
            for name, (declared, setting) in settings.items()
        }
    )


def checked(option: str, declared: Any, setting: Setting, value: Any) -> Any:
    """Return one value as the code takes it; a message about it names the option."""
    choices = choices_of(declared)
    if choices and value not in choices:
        raise RecipeError(f"{option}: expected one of {', '.join(map(repr, choices))}, found {value!r}")
    is_free = not choices and setting.parse not in (num_bytes, labels_of)
    if is_free and not any(_fits(kind, value) for kind in _kinds_of(declared)):
        kinds = " or ".join(_WORDS.get(get_origin(kind) or kind, "a path") for kind in _kinds_of(declared))
        raise RecipeError(f"{option}: expected {kinds}, found {value!r}")
    if setting.least is not None and value is not None and value < setting.least:
        raise RecipeError(f"{option}: expected at least {setting.least:g}, found {value}")
    if isinstance(value, Real) and not isinstance(value, bool | int | float):
        value = int(value) if isinstance(value, Integral) else float(value)
    return setting.parse(option, value) if setting.parse else value


_WORDS = {
    int: "an integer", float: "a number", bool: "True or False", str: "a text", NoneType: "None", Sequence: "a list",
}  # fmt: skip


def _kinds_of(declared: Any) -> tuple[Any, ...]:
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)


def _fits(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if get_origin(kind) is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return isinstance(value, get_origin(kind) or kind)


def as_words(given: Mapping[str, Any], *kinds: type) -> list[str]:
    """Return settings as words of a command line; those at their default are left out."""
    return [
        word
        for name, (_, setting) in settings_of(*kinds).items()
        if name in given and given[name] is not None and given[name] != setting.default
        for word in _words(flag_of(name, setting), setting, given[name])
    ]


def _words(flag: str, setting: Setting, value: Any) -> Iterator[str]:
    if setting.repeats:
        values = (f"{key}={one}" for key, one in value.items()) if isinstance(value, Mapping) else map(str, value)
        yield from (word for one in values for word in (flag, one))
    elif value is True:
        yield flag
    elif value is not False:
        yield from (flag, str(int(value) if isinstance(value, float) and value.is_integer() else value))


def explains(kind: type, *, without: Sequence[str] = ()) -> "_Decorator":
    """Return a decorator: signature and docstring of a function of ``**settings`` name every one of them."""

    def decorate(function: _F) -> _F:
        settings = {name: found for name, found in settings_of(kind).items() if name not in without}
        shown = signature(function)  # type: ignore[arg-type]
        own = [each for each in shown.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        named = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=setting.default, annotation=declared)
            for name, (declared, setting) in settings.items()
        ]
        ordered = sorted([*own, *named], key=lambda each: each.kind)
        function.__signature__ = Signature(ordered, return_annotation=shown.return_annotation)  # type: ignore[attr-defined]
        if function.__doc__:
            lines = "\n".join(f"    {name}: {setting.help}" for name, (_, setting) in settings.items())
            marked = re.compile(r"^    \*\*settings: .*$", re.MULTILINE)
            function.__doc__ = marked.sub(lambda _: lines, cleandoc(function.__doc__))
        return function

    return decorate


class _Decorator(Protocol):
    def __call__(self, function: _F, /) -> _F: ...
