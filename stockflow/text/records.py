"""Records that come back from JSON, held against the types of their dataclass field by field."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from stockflow.text.strictjson import parse_text_json, shown

T = TypeVar("T")
Reader = Callable[[object], Any]
"""Returns a plain value as a field holds it, or raises ValueError with what was expected."""

MAX_COUNT = 2**63 - 1
"""Every integer in a record is a count: of bytes, elements, attempts."""


def parse_record(kind: type[T], plain: object) -> T:
    """Return the dataclass that a plain JSON value describes.

    Understands str, int (a count), float, tuples of one type, mappings from str, optional values and dataclasses.

    Raises:
        ValueError: a field is missing, unknown or of another type; with its name, in one short line.
    """
    record: T = _reader(cast(Any, kind))(plain)
    return record


def as_plain(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, its values as they are; ``asdict`` copies them, ten times slower."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def fields_of(payload: bytes, expected_format: str) -> dict[str, object]:
    """Return the fields that a record's JSON text holds beside its format.

    Raises:
        ValueError: it is not a JSON mapping, or not one of the expected format.
    """
    plain = _plain_mapping(parse_text_json(payload, allows_constants=False))
    found = plain.pop("format", None)
    if found != expected_format:
        raise ValueError(f"expected the format {expected_format!r}, found {shown(found)}")
    return plain


@lru_cache(maxsize=256)
def _reader(hint: Any) -> Reader:
    leaves: dict[Any, Reader] = {str: _text, int: _count, float: _number}
    if hint in leaves:
        return leaves[hint]
    if is_dataclass(hint):
        return _fields_reader(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and arguments[1:] == (...,):
        return _sequence_reader(_reader(arguments[0]))
    if origin is Mapping and arguments[0] is str:
        return _mapping_reader(_reader(arguments[1]))
    if NoneType in arguments and len(arguments) == 2:
        present = _reader(next(argument for argument in arguments if argument is not NoneType))
        return lambda plain: None if plain is None else present(plain)
    raise TypeError(f"a record cannot hold {hint}")


def _fields_reader(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}

    def read(plain: object) -> Any:
        given = _plain_mapping(plain)
        if unknown := given.keys() - readers.keys():
            raise ValueError(f"the field {shown(min(unknown))} is unknown")
        if missing := required - given.keys():
            raise ValueError(f"the field {min(missing)!r} is missing")
        return kind(**{name: _named(name, readers[name], value) for name, value in given.items()})

    return read


def _sequence_reader(reader: Reader) -> Reader:
    def read(plain: object) -> tuple[Any, ...]:
        if not isinstance(plain, list):
            raise ValueError(f"expected a list, found {shown(plain)}")
        return tuple([reader(value) for value in plain])

    return read


def _mapping_reader(reader: Reader) -> Reader:
    return lambda plain: {key: _named(key, reader, value) for key, value in _plain_mapping(plain).items()}


def _named(name: str, reader: Reader, plain: object) -> Any:
    try:
        return reader(plain)
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from None


def _plain_mapping(plain: object) -> dict[str, object]:
    if not isinstance(plain, dict):
        raise ValueError(f"expected a mapping, found {shown(plain)}")
    return plain


def _text(plain: object) -> str:
    if not isinstance(plain, str):
        raise ValueError(f"expected a text, found {shown(plain)}")
    return plain


def _count(plain: object) -> int:
    if type(plain) is not int or not 0 <= plain <= MAX_COUNT:
        raise ValueError(f"expected a whole number from 0 to 2**63 - 1, found {shown(plain)}")
    return plain


def _number(plain: object) -> float:
    if type(plain) is int and abs(plain) <= MAX_COUNT:
        return plain
    if type(plain) is not float or not math.isfinite(plain):
        raise ValueError(f"expected a finite number, found {shown(plain)}")
    return plain
