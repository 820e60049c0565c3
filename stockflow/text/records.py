"""Records: JSON documents of a known kind, held against the types of their dataclass field by field."""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache, partial
from types import NoneType
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

from stockflow.errors import CheckpointError
from stockflow.text.redaction import redact
from stockflow.text.sealed import SEAL_KEY, check_seal, seal
from stockflow.text.strictjson import check_num_values, parse_text_json, shown

T = TypeVar("T")
Reader = Callable[[object], Any]
"""Returns a plain value as a field holds it, or raises ValueError with what was expected."""

MAX_COUNT = 2**63 - 1
"""Every integer in a record is a count: of bytes, elements, attempts."""
_PARSING = threading.Lock()
"""One record at a time, however many are fetched: parsing holds the interpreter, and takes several times its text."""


class Place(Protocol):
    """What records are read from: a store."""

    @property
    def url(self) -> str:
        """For messages."""

    def read_head(self, key: str, num_bytes: int, /) -> tuple[bytes, Any]:
        """Return the first bytes of an object, and its state."""


@dataclass(frozen=True)
class RecordKind(Generic[T]):
    """How records of one kind are written and read; whoever has the dataclass of a kind declares it beside that."""

    noun: str
    """with its article, as in ``a receipt``"""
    decode: Callable[[dict[str, object]], T]
    """from the fields beside format and seal; raises ValueError; of a plain dataclass ``partial(parse_record, it)``"""
    max_bytes: int
    max_values: int
    format: str | None = None
    """what the record says it is; None: nothing"""
    is_sealed: bool = False
    """whether it ends with a digest of itself"""
    allows_constants: bool = False
    """whether NaN and the infinities are numbers"""
    indent: int | None = None
    """of the lines it is written in; None: one line"""

    def encode(self, record: T) -> bytes:
        """Return the text of a dataclass's record."""
        plain = {**({"format": self.format} if self.format else {}), **as_plain(record)}
        record_text = json.dumps(plain, default=as_plain, ensure_ascii=False, indent=self.indent)
        return seal(record_text) if self.is_sealed else record_text.encode()

    def parse(self, payload: bytes, where: str) -> T:
        """Return what a record says; its seal, which who forges it can forge, is ``read``'s to check.

        Raises:
            CheckpointError: it is none of this kind, or more than is read of one.
        """
        try:
            if len(payload) > self.max_bytes:
                raise ValueError(f"it is larger than {self.max_bytes:,} bytes, the most that is read of one")
            check_num_values(payload, self.max_values)
            plain = _plain_mapping(parse_text_json(payload, allows_constants=self.allows_constants))
            if self.format:
                _take_format(plain, self.format)
            if self.is_sealed:
                plain.pop(SEAL_KEY, None)
            return self.decode(plain)
        except ValueError as error:
            raise CheckpointError(f"{where} is not {self.noun} of stockflow: {error}") from None

    def read(self, store: Place, key: str) -> T:
        """Return the record that lies in a store.

        Raises:
            NotFoundError: there is none.
            CheckpointError: see ``parse``; or it is not as it was written.
        """
        payload, _ = store.read_head(key, self.max_bytes + 1)
        where = f"{redact(store.url)}/{key}"
        with _PARSING:
            record = self.parse(payload, where)
        if self.is_sealed:
            check_seal(payload, where)
        return record


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


def _take_format(plain: dict[str, object], expected: str) -> None:
    found = plain.pop("format", None)
    if found != expected:
        raise ValueError(f"expected the format {expected!r}, found {shown(found)}")


def text(plain: object) -> str:
    """Return a text, or raise ValueError."""
    if not isinstance(plain, str):
        raise ValueError(f"expected a text, found {shown(plain)}")
    return plain


def _word(known: Sequence[object], plain: object) -> object:
    if plain not in known:
        raise ValueError(f"expected one of {', '.join(map(str, known))}, found {shown(plain)}")
    return plain


def count(plain: object) -> int:
    """Return a whole number of 63 bits, or raise ValueError."""
    if type(plain) is not int or not 0 <= plain <= MAX_COUNT:
        raise ValueError(f"expected a whole number from 0 to 2**63 - 1, found {shown(plain)}")
    return plain


@lru_cache(maxsize=256)
def _reader(hint: Any) -> Reader:
    leaves: dict[Any, Reader] = {str: text, int: count, float: _number}
    if hint in leaves:
        return leaves[hint]
    if is_dataclass(hint):
        return _fields_reader(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return partial(_word, arguments)
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
        if given.keys() != readers.keys():
            if unknown := given.keys() - readers.keys():
                raise ValueError(f"the field {shown(min(unknown))} is unknown")
            if missing := required - given.keys():
                raise ValueError(f"the field {min(missing)!r} is missing")
        return kind(**_each(given, readers.__getitem__))

    return read


def _sequence_reader(reader: Reader) -> Reader:
    def read(plain: object) -> tuple[Any, ...]:
        if not isinstance(plain, list):
            raise ValueError(f"expected a list, found {shown(plain)}")
        return tuple([reader(value) for value in plain])

    return read


def _mapping_reader(reader: Reader) -> Reader:
    return lambda plain: _each(_plain_mapping(plain), lambda _: reader)


def _each(given: Mapping[str, object], reader_of: Callable[[str], Reader]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    name = ""
    try:
        for name, plain in given.items():
            values[name] = reader_of(name)(plain)
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from None
    return values


def _plain_mapping(plain: object) -> dict[str, object]:
    if not isinstance(plain, dict):
        raise ValueError(f"expected a mapping, found {shown(plain)}")
    return plain


def _number(plain: object) -> float:
    if type(plain) is int and abs(plain) <= MAX_COUNT:
        return plain
    if type(plain) is not float or not math.isfinite(plain):
        raise ValueError(f"expected a finite number, found {shown(plain)}")
    return plain
