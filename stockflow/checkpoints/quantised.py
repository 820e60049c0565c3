"""Quantised tensors: codes, scales and shapes paired into the tensors they stand for, by what the headers hold.

Names, dtypes, neighbours and shapes decide; a config confirms. Sources: the layouts that DeepSeek, Qwen, MiniMax,
Mistral, Kimi and gpt-oss are published in; compressed-tensors; modelopt; OCP Microscaling Formats v1.0.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

from stockflow.checkpoints.decodes.stored import BlockScaled, Codes, Decode, GroupScaled, Whole
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.packed import by_module
from stockflow.errors import CheckpointError
from stockflow.text.strictjson import shown

Siblings = Mapping[str, TensorSpec]
"""What lies in one module, by what its name has beyond the module's."""
Shape = tuple[int, ...]

NOMINAL_DTYPE = "BF16"
"""What codes with scales count as where no dtype is asked for: models in such formats compute in it."""
STATIC_SCALES = frozenset({
    "input_scale", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
    "k_scale", "v_scale", "q_scale", "prob_scale",
})  # fmt: skip
"""Scales of activations, fixed when a model was quantised; they are no weights."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("F8_E8M0", "U8")
_GRIDS = ((128, 128), (1, 128), (64, 64), (32, 32), (256, 256), (1, 64), (1, 32), (1, 16))
"""Blocks that are in use, for models whose config names none."""
BLOCKS = "_blocks"
"""End of the names of codes of gpt-oss."""
MX_GROUP, NV_GROUP = 32, 16


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor lies in a checkpoint that does not store it as plain numbers."""

    decode: Decode
    parts: tuple[TensorSpec, ...]
    """what holds it, in the order of the decode's extents, by names of its checkpoint"""
    beside: tuple[TensorSpec, ...] = ()
    """what only says how large it is"""

    @property
    def is_in_blocks(self) -> bool:
        """Whether codes lie as gpt-oss has them: row by row, while plain numbers of that model are transposed."""
        return self.parts[0].name.endswith(BLOCKS)


class Scheme(NamedTuple):
    """What a config says of the codes of some modules; None where it says nothing."""

    bits: int | None = None
    group: int | None = None
    type: str | None = None
    """``int`` or ``float``"""
    symmetric: bool | None = None


@dataclass(frozen=True, slots=True)
class Hints:
    """What a config says of quantised weights."""

    block: tuple[int, int] | None = None
    schemes: tuple[Scheme, ...] = ()

    def allows(self, type_: str) -> bool:
        """Return whether there may be codes of four bits without zero points."""
        return not self.schemes or any(self._of_four_bits(type_))

    def groups(self, type_: str) -> list[int | None]:
        """Return how many of such codes have a scale together, by each scheme; None where it does not say."""
        return [scheme.group or None for scheme in self._of_four_bits(type_)] or [None]

    def _of_four_bits(self, type_: str) -> Iterator[Scheme]:
        for scheme in self.schemes:
            if scheme.bits in (None, 4) and scheme.type in (None, type_) and scheme.symmetric is not False:
                yield scheme


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a checkpoint, each as the numbers it stands for."""

    specs: Mapping[str, TensorSpec]
    """by name; quantised ones count as of ``NOMINAL_DTYPE``"""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """those that are quantised"""
    static_scales: Mapping[str, TensorSpec] = field(default_factory=dict)
    """scales of activations beside them"""


def sized_by(specs: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return what holds the shapes of codes that fill their containers up."""
    return tuple(
        spec
        for name, spec in specs.items()
        if name.endswith(".weight_shape") and spec.kind == "integer" and spec.num_elems == 2
    )


def hints_of(config: Mapping[str, object] | None) -> Hints:
    """Return what a config says, at its top or in the config of its language model."""
    for said in _quantizations(config or {}):
        block, schemes = said.get("weight_block_size"), list(_schemes(said))
        for weights in schemes:
            block = block or weights.get("block_structure")
        is_block = isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block)
        known = (scheme for scheme in map(_scheme, schemes or [said]) if scheme != Scheme())
        return Hints((block[0], block[1]) if is_block and isinstance(block, list) else None, tuple(known))
    return Hints()


def _scheme(said: Mapping[str, object]) -> Scheme:
    bits, group = said.get("num_bits", said.get("bits")), said.get("group_size")
    type_, symmetric = said.get("type"), said.get("symmetric")
    return Scheme(
        bits if isinstance(bits, int) and _is_size(bits) else None,
        group if isinstance(group, int) and _is_size(group) else None,
        type_ if isinstance(type_, str) else None,
        symmetric if isinstance(symmetric, bool) else None,
    )


def tensors_of(specs: Mapping[str, TensorSpec], hints: Hints, shapes: Mapping[str, Shape], where: str) -> Tensors:
    """Return what a checkpoint holds, codes and scales paired; what cannot be paired stays as it is.

    Args:
        specs: what its headers say.
        hints: what its config says.
        shapes: shapes that were read, by name of the tensor that holds one.
        where: names the checkpoint in messages.

    Raises:
        CheckpointError: codes and scales do not fit together, or not what the config says.
    """
    if not any(DTYPES[dtype].kind != "float" for dtype in {spec.dtype for spec in specs.values()}):
        return Tensors(specs)
    found = dict[str, tuple[str, Shape, Stored]]()
    for siblings in by_module(specs).values():
        for own, code in siblings.items():
            pair = _paired(own, code, siblings, hints, shapes)
            if isinstance(pair, str):
                raise CheckpointError(f"{where}: {shown(code.name)} {pair}")
            if pair is not None:
                name = code.name.removesuffix(own) + pair[0]
                found[code.name] = name, pair[1], pair[2]
    return _together(specs, found) if found else Tensors(specs)


def _together(specs: Mapping[str, TensorSpec], found: Mapping[str, tuple[str, Shape, Stored]]) -> Tensors:
    """Return the tensors with what is quantised in the place of its codes."""
    within = {each.name for _, _, stored in found.values() for each in (*stored.parts, *stored.beside)}
    static = {name: spec for name, spec in specs.items() if name.rpartition(".")[2] in STATIC_SCALES}
    within.update(static)
    logical = dict[str, TensorSpec]()
    for name, spec in specs.items():
        if name in found:
            own, shape, _ = found[name]
            logical[own] = TensorSpec(own, NOMINAL_DTYPE, shape)
        elif name not in within:
            logical[name] = spec
    return Tensors(logical, {name: stored for name, _, stored in found.values()}, static)


def _quantizations(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict):
            if key in ("quantization_config", "compression_config"):
                yield value
            elif key.endswith("_config"):
                yield from _quantizations(value)


def _schemes(said: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


@cache
def block_scaled(dtype: str, scale_dtype: str, block: tuple[int, int]) -> BlockScaled:
    """Return the one value for these: a plan has a million operands."""
    return BlockScaled(dtype, scale_dtype, block)


@cache
def group_scaled(
    dtype: str, codes: Codes, scale_dtype: str, group: int, num_columns: int, whole: Whole = ""
) -> GroupScaled:
    """Return the one value for these."""
    return GroupScaled(dtype, codes, scale_dtype, group, num_columns, whole)


Pair = tuple[str, Shape, Stored]
"""The last part of a tensor's name, its shape and how it is stored."""


def _paired(
    own: str, code: TensorSpec, siblings: Siblings, hints: Hints, shapes: Mapping[str, Shape]
) -> Pair | str | None:
    """Return what a code stands for, what is wrong with it, or None if it is none that is read."""
    if own == "weight_packed":
        return _compressed(code, siblings, hints, shapes)
    if own.endswith(BLOCKS) and code.dtype == "U8" and len(code.shape) > 2:
        return _blocks(own.removesuffix(BLOCKS), code, siblings)
    if code.dtype in _FP8 and not own.endswith(("_scale", "scale", "scale_inv")):
        return _eight_bits(own, code, siblings, hints)
    if code.dtype in ("U8", "I8") and own == "weight" and len(code.shape) == 2:
        return _four_bits(own, code, siblings)
    return None


def _eight_bits(own: str, code: TensorSpec, siblings: Siblings, hints: Hints) -> Pair | str | None:
    names = (f"{own}_scale_inv", f"{own}_scale", f"qscale_{own}", *(("scale", "scale_inv") if own == "weight" else ()))
    scale = next((siblings[name] for name in names if name in siblings), None)
    if scale is None or not code.num_elems:
        return None
    is_exponent = scale.dtype in _EXPONENTS
    if scale.kind != "float" and not is_exponent:
        return f"has scales of {scale.dtype} in {shown(scale.name)}, expected floats or exponents (F8_E8M0, U8)"
    block = _block(code.shape, _grid_of(scale.shape), hints, is_exponent=is_exponent)
    if isinstance(block, str):
        return f"has the shape {list(code.shape)} and {shown(scale.name)} {list(scale.shape)}: {block}"
    scale_dtype = "F8_E8M0" if is_exponent else scale.dtype
    return own, code.shape, Stored(block_scaled(code.dtype, scale_dtype, block), (code, scale))


def _grid_of(shape: Shape) -> Shape:
    """Return the shape of a grid of scales; modelopt stores [rows, 1, columns, 1]."""
    return (shape[0], shape[2]) if len(shape) == 4 and shape[1] == shape[3] == 1 else shape


@lru_cache
def _block(shape: Shape, grid: Shape, hints: Hints, *, is_exponent: bool) -> tuple[int, int] | str:
    """Return rows and columns of the blocks that a grid of scales is for, or what is wrong."""
    rows, columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    matrices = math.prod(shape[:-2])
    if math.prod(grid) == matrices and (matrices == 1 or grid[0] == matrices):
        return rows, columns
    if math.prod(grid) == matrices * rows and grid in (shape[:-1], (*shape[:-1], 1)):
        return 1, columns
    if grid[:-2] != shape[:-2] or len(grid) < 2:
        return "the grid has other dimensions than the codes"
    asked = hints.block
    fitting = [each for each in (*((asked,) if asked else ()), *_GRIDS) if _counts(shape, each) == grid[-2:]]
    if asked is not None and asked not in fitting and not (is_exponent and (1, MX_GROUP) in fitting):
        expected = [*shape[:-2], *_counts(shape, asked)]
        return f"the blocks {list(asked)} that its config names make a grid of {expected}; one of the two is not true"
    if not fitting:
        return "no blocks that are in use make such a grid, and its config names none (`weight_block_size`)"
    return (1, MX_GROUP) if is_exponent and asked not in fitting and (1, MX_GROUP) in fitting else fitting[0]


def _counts(shape: Shape, block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _compressed(code: TensorSpec, siblings: Siblings, hints: Hints, shapes: Mapping[str, Shape]) -> Pair | str | None:
    """Codes and scales of compressed-tensors."""
    scale, whole = siblings.get("weight_scale"), siblings.get("weight_global_scale")
    size = siblings.get("weight_shape")
    beside = (size,) if size is not None else ()
    if (
        scale is None
        or len(code.shape) != 2
        or len(scale.shape) != 2
        or {"weight_zero_point", "weight_g_idx"} & set(siblings)
    ):
        return None
    known = shapes.get(size.name) if size is not None else None
    if code.dtype == "U8" and hints.allows("float"):
        if known and known != (held := (code.shape[0], 2 * code.shape[1])):
            return f"holds the codes of {list(held)} numbers, and beside it is the shape {list(known)}: one is not true"
        group = NV_GROUP if whole is not None else MX_GROUP
        return _nibbles("weight", code, scale, group, whole=whole, does="divides", beside=beside)
    if code.dtype != "I32" or scale.kind != "float" or not hints.allows("int"):
        return None
    room, num_groups = 8 * code.shape[1], scale.shape[1]
    columns, said = known[-1] if known else room, hints.groups("int")
    derived = columns if num_groups == 1 else room // num_groups if num_groups and room % num_groups == 0 else 0
    asked = [derived if each is None else each for each in said]
    group = next((each for each in asked if each and -(-columns // each) == num_groups), 0)
    if not group or not room - 8 < columns <= room or (known and known[0] != code.shape[0]):
        return _no_groups(code, scale, next(filter(None, said), None), known)
    stored = group_scaled("I32", "I4", scale.dtype, group, columns)
    return "weight", (code.shape[0], columns), Stored(stored, (code, scale), beside)


def _no_groups(code: TensorSpec, scale: TensorSpec, group: int | None, known: Shape | None) -> str:
    says = f"{group} columns to a scale" if group else "no size of groups"
    size = f"the shape {list(known)}" if known else "no shape that was read"
    return (
        f"has {list(code.shape)} words of eight codes and scales {list(scale.shape)}; the config says {says}, and "
        f"there is {size} beside it: these do not go together"
    )


def _blocks(own: str, code: TensorSpec, siblings: Siblings) -> Pair | None:
    """MXFP4 as gpt-oss stores it: groups of 32 are a dimension of their own."""
    scale = siblings.get(f"{own}_scales")
    if scale is None or code.shape[:-1] != scale.shape or code.shape[-1] * 2 != MX_GROUP or scale.dtype != "U8":
        return None
    columns = code.shape[-2] * MX_GROUP
    stored = group_scaled(code.dtype, "F4", "F8_E8M0", MX_GROUP, columns)
    return own, (*code.shape[:-2], columns), Stored(stored, (code, scale))


def _four_bits(own: str, code: TensorSpec, siblings: Siblings) -> Pair | str | None:
    """MXFP4 and NVFP4 whose codes have the name of the weight."""
    scale, whole = siblings.get("weight_scale", siblings.get("scale")), siblings.get("weight_scale_2")
    if scale is None or len(scale.shape) != 2 or scale.shape[0] != code.shape[0]:
        return None
    if whole is not None and scale.dtype == "F8_E4M3":
        return _nibbles(own, code, scale, NV_GROUP, whole=whole, does="multiplies")
    return _nibbles(own, code, scale, MX_GROUP) if scale.dtype in _EXPONENTS else None


def _nibbles(
    own: str,
    code: TensorSpec,
    scale: TensorSpec,
    group: int,
    *,
    whole: TensorSpec | None = None,
    does: Whole = "",
    beside: tuple[TensorSpec, ...] = (),
) -> Pair | str | None:
    columns = 2 * code.shape[1]
    expected = (code.shape[0], -(-columns // group))
    if scale.shape != expected:
        found = f"has the shape {list(code.shape)} and {shown(scale.name)} {list(scale.shape)}"
        return f"{found}, expected {list(expected)}"
    if whole is None:
        if scale.dtype not in _EXPONENTS:
            return None
        stored = group_scaled(code.dtype, "F4", "F8_E8M0", group, columns)
        return own, (code.shape[0], columns), Stored(stored, (code, scale), beside)
    if scale.dtype != "F8_E4M3" or whole.dtype != "F32" or whole.num_elems != 1:
        found = f"has {scale.dtype} scales and {shown(whole.name)} of {whole.dtype} {list(whole.shape)}"
        return f"{found}, expected F8_E4M3 and one F32"
    stored = group_scaled(code.dtype, "F4", scale.dtype, group, columns, does)
    return own, (code.shape[0], columns), Stored(stored, (code, scale, whole), beside)
