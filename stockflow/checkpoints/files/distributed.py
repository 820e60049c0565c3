"""Folders of ``torch.distributed.checkpoint`` (DCP): which runs of bytes of which files hold which tensor.

``.metadata`` is a pickle, which is read without running it (``pickles``): the shape of each tensor, the chunks it was
cut into, and where each lies. A chunk is a file of ``torch.save`` within a ``.distcp`` file. A tensor is read where its
chunks, one after the other, are its elements in order, as they are where it was sharded along its first dimension.
Source: ``torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py`` of PyTorch 2.13.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stockflow.checkpoints.files.documents import is_key
from stockflow.checkpoints.files.header import TensorSpec, is_text
from stockflow.checkpoints.files.pickles import ORDERED_DICT, Global, Made, Pairs, read_pickle
from stockflow.checkpoints.files.torch_files import DTYPES, SIZE, dtype_of, sizes_of
from stockflow.errors import CheckpointError
from stockflow.text.strictjson import shown

METADATA_FILE = ".metadata"
SUFFIX = ".distcp"
MAX_METADATA_BYTES = 128_000_000
MAX_STEPS = 20_000_000
"""A chunk takes some 40."""

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_TENSOR = Global(_METADATA, "TensorStorageMetadata")
_INDEX = Global(_METADATA, "MetadataIndex")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_WHOLE = Global(_METADATA, "Metadata")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
ALLOWED = frozenset(
    {
        ORDERED_DICT, SIZE, _TENSOR, _INDEX, _INFO, _WHOLE, Global("torch.serialization", "_get_layout"),
        *(Global(_METADATA, name) for name in (
            "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        *(Global(_OLD_METADATA, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
        *(Global(module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    }
)  # fmt: skip
"""What metadata may name, beside dtypes."""
_TRAINING = re.compile(
    r"optim\w*|lr_schedulers?|schedulers?|dataloaders?|train_state|trainer|rng\w*|client_state"
    r"|(chained_\d+\.)?optim(izer)?\.(state|param_groups|param_state)\..+"
)
"""Keys of the state of a run beside the model's."""
_EXTRA = re.compile(r"(.+\.)?_extra_state(\W.*|\d*)")
_AROUND = ("model", "state_dict", "module", "app", "model_state_dict")
"""Keys under which a model's tensors are saved beside an optimizer's."""


class Chunk(NamedTuple):
    """A run of elements of a tensor, and the part of a file that holds it."""

    file: str
    start: int
    """absolute byte offset of the part"""
    size: int
    """of the part, in bytes: a whole file of ``torch.save``"""
    shape: tuple[int, ...]


class Sharded(NamedTuple):
    """A tensor and what it is made of."""

    spec: TensorSpec
    pieces: tuple[Chunk, ...]
    """in the order of its elements; those without elements left out"""


class Contents(NamedTuple):
    """What metadata says of a model."""

    tensors: tuple[Sharded, ...]
    others: tuple[str, ...]
    """names of what is no tensor of the model: states of optimizers and of the run, values that are no tensors"""


def parse_metadata(payload: bytes, where: str, is_settled: Callable[[str], bool]) -> Contents:
    """Return the tensors of a model.

    Args:
        payload: of the metadata.
        where: names it in messages.
        is_settled: whether rules say of a tensor that it need not be there.

    Raises:
        CheckpointError: the metadata is damaged, names what it does not need, or describes tensors that are not read.
    """
    found = read_pickle(payload, ALLOWED | DTYPES, MAX_STEPS, where)
    try:
        return _contents(found, where, is_settled)
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise CheckpointError(
            f"{where} describes no checkpoint that is known; write it again with a recent PyTorch, or in safetensors"
        ) from None


def _contents(found: object, where: str, is_settled: Callable[[str], bool]) -> Contents:
    state = _attributes(found, _WHOLE)
    places = {_index_of(key): _place_of(value, where) for key, value in _pairs(state["storage_data"])}
    paths = {_text(name): _path(path) for name, path in _pairs(state.get("planner_data") or Pairs())}
    entries = {_text(name): made for name, made in _pairs(state["state_dict_metadata"])}
    tensors = {
        key: made
        for key, made in entries.items()
        if isinstance(made, Made) and made.by == _TENSOR and not _EXTRA.fullmatch(key)
    }
    names = _names({key: paths.get(key, (key,)) for key in tensors})
    return Contents(
        tuple(_sharded(key, name, tensors[key], places, where) for key, name in names.items() if not is_settled(name)),
        tuple(key for key in entries if key not in names),
    )


class _Part(NamedTuple):
    file: str
    start: int
    size: int


Offsets = tuple[int, ...]
_Places = Mapping[tuple[str, Offsets], _Part]


def _sharded(key: str, name: str, made: Made, places: _Places, where: str) -> Sharded:
    state = _attributes(made, _TENSOR)
    properties = state["properties"]
    dtype = _dtype(properties, f"{where}: tensor {shown(name)}")
    shape = sizes_of(state["size"])
    chunks = {offsets: sizes for offsets, sizes in map(_chunk, _list(state["chunks"])) if 0 not in sizes}
    runs = sorted((_first(offsets, shape), offsets, sizes) for offsets, sizes in chunks.items())
    if not _are_in_a_row(runs, shape):
        cut = f"{len(runs)} chunks such as {list(runs[0][2])} at {list(runs[0][1])}" if runs else "no chunks"
        raise CheckpointError(
            f"{where}: tensor {shown(name)} of shape {list(shape)} is in {cut}, which are not its elements one after "
            "the other: only what is whole or sharded along the first dimension is read; make one file of it (`python "
            "-m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`), and safetensors of that"
        )
    pieces = tuple(Chunk(*places[key, offsets], sizes) for _, offsets, sizes in runs)
    return Sharded(TensorSpec(name, dtype, shape), pieces)


def _first(offsets: Offsets, shape: Sequence[int]) -> int:
    """Return the number of a chunk's first element in its tensor, row by row."""
    if len(offsets) != len(shape):
        raise ValueError
    number = 0
    for offset, size in zip(offsets, shape, strict=True):
        number = number * size + offset
    return number


def _are_in_a_row(runs: Sequence[tuple[int, Offsets, Offsets]], shape: Sequence[int]) -> bool:
    """Return whether chunks are runs of a tensor's elements, and follow each other from the first to the last."""
    end = 0
    for first, offsets, sizes in runs:
        if first != end or not _is_run(offsets, sizes, shape):
            return False
        end += math.prod(sizes)
    return end == math.prod(shape)


def _is_run(offsets: Offsets, sizes: Offsets, shape: Sequence[int]) -> bool:
    """Return whether all dimensions behind the first one that is longer than 1 are whole."""
    if not len(offsets) == len(sizes) == len(shape):
        return False
    behind = next((number + 1 for number, size in enumerate(sizes) if size > 1), len(sizes))
    return sizes[behind:] == tuple(shape[behind:]) and not any(offsets[behind:])


def _names(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return what the tensors of the model are called in it; where one key holds a model, the others hold none."""
    own = dict(paths)
    while True:
        own = {key: path for key, path in own.items() if not _TRAINING.fullmatch(path[0])}
        around = {path[0] for path in own.values() if len(path) > 1 and path[0] in _AROUND}
        if len(around) != 1:
            break
        own = {key: path[1:] for key, path in own.items() if len(path) > 1 and path[0] in around}
    names = {key: ".".join(path) for key, path in own.items()}
    return names if len(set(names.values())) == len(names) else {key: key for key in own}


def _attributes(made: object, by: Global) -> dict[str, object]:
    if not isinstance(made, Made) or made.by != by:
        raise ValueError
    return {_text(name): value for name, value in _pairs(made.state)}


def _index_of(made: object) -> tuple[str, Offsets]:
    state = _attributes(made, _INDEX)
    offset = state.get("offset")
    return _text(state["fqn"]), () if offset is None else sizes_of(offset)


def _place_of(made: object, where: str) -> _Part:
    state = _attributes(made, _INFO)
    file, start, size = state["relative_path"], state["offset"], state["length"]
    if not isinstance(file, str) or not is_key(file):
        raise CheckpointError(f"{where} names the file {shown(file)}, which is none of its folder")
    if state.get("transform_descriptors"):
        raise CheckpointError(
            f"{where}: chunks in {shown(file)} are compressed or changed in another way, and cannot be read by range; "
            "write it again without"
        )
    return _Part(file, *sizes_of([start, size]))


def _chunk(made: object) -> tuple[Offsets, Offsets]:
    state = _attributes(made, Global(_METADATA, "ChunkStorageMetadata"))
    return sizes_of(state["offsets"]), sizes_of(state["sizes"])


def _dtype(properties: object, what: str) -> str:
    """Return the dtype of a tensor: the first of the values that its properties are saved as."""
    state = properties.state if isinstance(properties, Made) else None
    dtype = state[0] if isinstance(state, tuple) else dict(_pairs(state))["dtype"]
    if not isinstance(dtype, Global):
        raise ValueError
    found = dtype_of(dtype.name)
    if found is None:
        raise CheckpointError(f"{what} is of {dtype}, which safetensors do not have; convert it")
    return found


def _pairs(value: object) -> Iterator[tuple[object, object]]:
    if not isinstance(value, Pairs):
        raise ValueError
    return iter(value)


def _list(value: object) -> Iterable[object]:
    if type(value) is not list:
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise ValueError
    return value


def _path(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple) or not value or not all(type(each) in (str, int) for each in value):
        raise ValueError
    return tuple(map(str, value))
