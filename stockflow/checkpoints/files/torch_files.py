"""Files of ``torch.save``: a zip archive with a pickle that says which tensor lies in which member.

The pickle is read without running it (``pickles``), and of the members only places are learned: tensors are read by
range like those of safetensors. Source: ``torch/serialization.py`` and ``torch/_utils.py`` of PyTorch 2.13.
"""

from collections.abc import Mapping
from typing import NamedTuple

from stockflow.checkpoints.files.archives import TAIL_BYTES, Archive, Member, members_of
from stockflow.checkpoints.files.disguises import disguise_of
from stockflow.checkpoints.files.header import MAX_INTEGER, FileContents, PlacedTensor, TensorSpec, is_text, width_of
from stockflow.checkpoints.files.pickles import Global, Made, Pairs, Persistent, read_pickle
from stockflow.errors import CheckpointError
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

SUFFIX = ".bin"
MAX_PICKLE_BYTES = 32_000_000
"""Some 150 bytes are written per tensor."""
MAX_STEPS = 8_000_000
MAX_DIMENSIONS = 64
"""of PyTorch"""
_WRAPPER = "state_dict"
"""Key under which trainers put the tensors beside what they know of a run."""

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
"""of tensors that are saved with the bytes of a storage without a dtype"""
_BY_NAME = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", **_DTYPES,
}  # fmt: skip
_OTHERS = ("complex32", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2")
"""which safetensors do not have, or not under a name"""
DTYPES = frozenset(Global("torch", name) for name in (*_BY_NAME, *_OTHERS))
"""What PyTorch calls element types."""
SIZE = Global("torch", "Size")
_UNTYPED = Global("torch.storage", "UntypedStorage")
_REBUILD = Global("torch._utils", "_rebuild_tensor")
_REBUILD_2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_3 = Global("torch._utils", "_rebuild_tensor_v3")
_PARAMETERS = (
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
)
ALLOWED = frozenset(
    {
        Global("collections", "OrderedDict"),
        SIZE,
        _UNTYPED,
        _REBUILD,
        _REBUILD_2,
        _REBUILD_3,
        *_PARAMETERS,
        *(Global("torch", name) for name in (*_STORAGES, *_DTYPES)),
    }
)
"""What a pickle of tensors may name."""
_AS_SAFETENSORS = "load it with PyTorch and write its tensors with `safetensors.torch.save_file`"
_AGAIN = "fetch the file again"
_SPLIT = "write the model in several files"


class Description(NamedTuple):
    """What a file says of itself: equal descriptions of equal places mean equal tensors."""

    pickle: bytes
    members: tuple[tuple[str, Member], ...]
    """with the names that storages have in the pickle"""


def is_torch_file(name: str) -> bool:
    """Return whether a file is one by its name."""
    return name.endswith(SUFFIX)


def describe(archive: Archive, head: bytes, tail_bytes: int = TAIL_BYTES) -> Description:
    """Return pickle and members of a file.

    Args:
        archive: where it lies.
        head: its first bytes.
        tail_bytes: of its end, that are read at first.

    Raises:
        CheckpointError: it is of before PyTorch 1.6, something else, damaged, or its bytes are in another order.
    """
    where = archive.where
    if not head.startswith(b"PK\3\4"):
        raise CheckpointError(f"{where} {_not_a_zip(head, archive.size)}")
    members = members_of(archive, tail_bytes)
    folder = _folder_of(members, where)
    _refuse_packed(members, where)

    def read(name: str, most: int) -> bytes:
        start, size, _ = members.get(f"{folder}/{name}", Member(0, 0))
        if size > most:
            raise CheckpointError(f"{where}: its {name} has {size:,} bytes, and at most {most:,} are read; {_SPLIT}")
        return head[start : start + size] if start + size <= len(head) else archive.read(start, size)

    order = read("byteorder", 64)
    if order not in (b"", b"little"):
        raise CheckpointError(f"{where}: its bytes are in the order {shown(order)}, expected little; {_AS_SAFETENSORS}")
    data = f"{folder}/data/"
    own = tuple((name.removeprefix(data), member) for name, member in members.items() if name.startswith(data))
    return Description(read("data.pkl", MAX_PICKLE_BYTES), own)


def contents_of(description: Description, where: str) -> FileContents:
    """Return the tensors of a file.

    Raises:
        CheckpointError: it holds something else than a mapping from names to tensors, or tensors that are no runs of
            bytes; it names what tensors do not need, or is damaged.
    """
    found = read_pickle(description.pickle, ALLOWED, MAX_STEPS, where)
    if not isinstance(found, Pairs):
        raise CheckpointError(f"{where} holds no mapping from names to tensors; {_AS_SAFETENSORS}")
    entries = _entries(_unwrapped(found), where)
    members = dict(description.members)
    others = tuple(name for name, value in entries.items() if not isinstance(value, Made))
    views = {name: _view(name, value, where) for name, value in entries.items() if isinstance(value, Made)}
    _refuse_scattered(views, where)
    placed = [_placed(name, view, members, where) for name, view in views.items()]
    return FileContents(sorted(placed, key=lambda each: each.start), others)


def lone_tensor(archive: Archive, head: bytes, tail_bytes: int, name: str) -> PlacedTensor:
    """Return the only tensor of a file that holds no mapping.

    Raises:
        CheckpointError: as ``describe`` and ``contents_of``.
    """
    described = describe(archive, head, tail_bytes)
    found = read_pickle(described.pickle, ALLOWED, MAX_STEPS, archive.where)
    if not isinstance(found, Made):
        raise CheckpointError(f"{archive.where}: expected the tensor {shown(name)}, found none; {_AGAIN}")
    view = _view(name, found, archive.where)
    _refuse_scattered({name: view}, archive.where)
    return _placed(name, view, dict(described.members), archive.where)


def _not_a_zip(head: bytes, size: int) -> str:
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        return f"was written by a PyTorch of before 1.6, in a form that cannot be read by range; {_AS_SAFETENSORS}"
    return disguise_of(head, size) or f"is no file of `torch.save`, which is a zip archive; {_AS_SAFETENSORS}"


def _folder_of(members: Mapping[str, Member], where: str) -> str:
    """Return the folder that all members are in."""
    folders = [folder for folder, _, file in (name.partition("/") for name in members) if file == "data.pkl"]
    if len(folders) != 1:
        raise CheckpointError(f"{where} is no file of `torch.save`: it has no data.pkl; {_AS_SAFETENSORS}")
    if f"{folders[0]}/constants.pkl" in members:
        raise CheckpointError(f"{where} is a program of TorchScript; take the model it was made from")
    return folders[0]


def _refuse_packed(members: Mapping[str, Member], where: str) -> None:
    packed = [name for name, member in members.items() if not member.is_stored]
    if packed:
        raise CheckpointError(
            f"{where}: its member {shown(packed[0])} is compressed or encrypted, and cannot be read by range; load it "
            "with PyTorch and write it again with `torch.save`"
        )


def _unwrapped(found: Pairs) -> Pairs:
    """Return what a file holds, where it has a ``state_dict`` with those tensors alone."""
    inner = [value for name, value in found if name == _WRAPPER and isinstance(value, Pairs)]
    beside = [(name, None if isinstance(value, Made) else value) for name, value in found if name != _WRAPPER]
    return Pairs([*inner[0], *beside]) if len(inner) == 1 else found


def _entries(found: Pairs, where: str) -> dict[str, object]:
    entries = {}
    for name, value in found:
        if not isinstance(name, str) or name in entries or not is_text(name):
            raise CheckpointError(f"{where}: expected each tensor under a name of its own, found {shown(name)}")
        if isinstance(value, Pairs) and any(isinstance(inner, Made) for _, inner in value):
            raise CheckpointError(
                f"{where}: tensors lie one level down, under {shown(name)}; load it with PyTorch and write those of "
                "the model alone"
            )
        entries[name] = value
    return entries


class _View(NamedTuple):
    """A tensor within a storage; lengths count elements."""

    storage: str
    storage_bytes: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(name: str, made: Made, where: str) -> _View:
    try:
        return _rebuilt(made)
    except _UnreadTensor as unread:
        raise CheckpointError(f"{where}: tensor {shown(name)} {unread}; {_AS_SAFETENSORS}") from None
    except (TypeError, ValueError, IndexError):
        raise CheckpointError(f"{where}: tensor {shown(name)} is described by what makes no tensor; {_AGAIN}") from None


class _UnreadTensor(Exception):
    """What a tensor is, instead of numbers in a storage."""


def _rebuilt(made: Made) -> _View:
    if made.by in _PARAMETERS:
        made = made.args[0] if isinstance(made.args[0], Made) else made
    storage, offset, shape, strides = made.args[:4]
    if made.by not in (_REBUILD, _REBUILD_2, _REBUILD_3) or not isinstance(storage, Persistent):
        raise _UnreadTensor(f"is made by {shown(made.by.name)}, which is not read")
    kind, storage_type, key, _, length = storage.id if isinstance(storage.id, tuple) else ()
    if kind != "storage" or not isinstance(key, str):
        raise ValueError
    dtype = _dtype_of(storage_type, made.args[6] if made.by == _REBUILD_3 else storage_type)
    width = 1 if storage_type == _UNTYPED else width_of(dtype)
    (offset, length), shape, strides = sizes_of((offset, length)), sizes_of(shape), sizes_of(strides)
    if len(shape) != len(strides):
        raise ValueError
    return _View(key, length * width, dtype, offset, shape, strides)


def _dtype_of(storage: object, dtype: object) -> str:
    if not isinstance(dtype, Global) or not isinstance(storage, Global):
        raise ValueError
    names = _DTYPES if storage == _UNTYPED else _STORAGES
    if dtype.name not in names:
        raise ValueError
    return names[dtype.name]


def dtype_of(name: str) -> str | None:
    """Return what safetensors call a dtype of PyTorch; None if they do not have it."""
    return _BY_NAME.get(name)


def sizes_of(values: object) -> tuple[int, ...]:
    """Return what are plain sizes, of ``torch.Size`` too.

    Raises:
        ValueError: they are none.
    """
    if isinstance(values, Made):  # torch.Size
        (values,) = values.args
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise ValueError
    if not all(type(value) is int and 0 <= value <= MAX_INTEGER for value in values):
        raise ValueError
    return tuple(values)


def _refuse_scattered(views: Mapping[str, _View], where: str) -> None:
    """Refuse tensors whose elements, row by row, are no run of their storage."""
    scattered = [name for name, view in views.items() if not _is_run(view)]
    if scattered:
        count = counted(len(scattered), "tensor")
        first = scattered[0]
        raise CheckpointError(
            f"{where}: {count} {are(len(scattered))} stored transposed, expanded or with gaps, such as {shown(first)} "
            f"of shape {list(views[first].shape)} and strides {list(views[first].strides)}; load the file with "
            "PyTorch, make them `.contiguous()` and write it again"
        )


def _is_run(view: _View) -> bool:
    if 0 in view.shape:
        return True
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _placed(name: str, view: _View, members: Mapping[str, Member], where: str) -> PlacedTensor:
    spec = TensorSpec(name, view.dtype, view.shape)
    member = members.get(view.storage)
    start = view.offset * width_of(view.dtype)
    if member is None or view.storage_bytes > member.size or start + spec.num_bytes > view.storage_bytes:
        held = "is not there" if member is None else f"has {member.size:,} bytes"
        raise CheckpointError(
            f"{where}: tensor {shown(name)} of {view.dtype} {shown(list(view.shape))} lies in the member data/"
            f"{shown(view.storage)[1:-1]}, which {held}: expected {start + spec.num_bytes:,} there; {_AGAIN}"
        )
    return PlacedTensor(spec, member.start + start)
