"""Layouts of experts: stored tensors that hold all of a layer, and where in them the projection of each expert lies.

Sources: the layouts that Qwen, Llama 4, gpt-oss, GraniteMoE, Step and DBRX are published in.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from stockflow.checkpoints.configs import sections
from stockflow.checkpoints.decodes.low_rank import LowRank, part_of_decode
from stockflow.checkpoints.decodes.stored import Decode, GroupScaled, Plain, plain
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed
from stockflow.checkpoints.files.header import DTYPES, TensorSpec
from stockflow.checkpoints.files.layout import Extent, Pieces
from stockflow.checkpoints.naming import holds_fused_experts
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.quantised import Stored
from stockflow.checkpoints.scale_rules import kind_of
from stockflow.planning.formats import codes_of

_PAIRS = (
    (".gate_up_proj", ".down_proj"),
    (".gate_up_proj.weight", ".down_proj.weight"),
    (".input_linear.weight", ".output_linear.weight"),
)
"""Of names of what holds gate and up, [E, 2I, H], and of what holds down, [E, H, I]."""
_STACKS = ((".up_proj", ".down_proj", ".gate_proj"), (".up_proj.weight", ".down_proj.weight", ".gate_proj.weight"))
"""Of names of what holds up and gate, [E, I, H] each, and of what holds down, [E, H, I]."""
_DBRX = (".experts.mlp.w1", ".experts.mlp.v1", ".experts.mlp.w2")
"""Of names of gate, up and down of DBRX, [E I, H] each, the last of which is stored column by column."""


class Fused(NamedTuple):
    """A stored tensor that holds projections of all experts of a layer."""

    parts: Sequence[TensorSpec]
    """in the order of its bytes; those that share them in the order of their columns, or rows"""
    transposed: Transposed | None = None
    """how the first of those that share bytes is stored, if that is column by column"""
    in_rows: ByRows | None = None
    """how it is stored, given how all are, if its rows are among those of others, or in blocks of codes with these"""
    is_doubtful: bool = False
    """whether its shape does not tell rows from columns; they are then taken to be as in a single projection"""

    @property
    def num_beside(self) -> int:
        """How many projections share bytes."""
        way = self.transposed or self.in_rows
        return way.num_beside if way else 1

    @property
    def is_in_runs(self) -> bool:
        """Whether each part is a run of bytes."""
        return not (self.transposed or self.in_rows)

    def beside(self, number: int, decode: Decode) -> Transposed | ByRows | None:
        """Return how the part of this number among those that share bytes is stored, None if it is a run of them.

        Args:
            number: of the part.
            decode: of all, where they are not transposed.
        """
        if self.transposed:
            return replace(self.transposed, number=number)
        return self.in_rows and replace(self.in_rows, inner=decode, number=number)

    def part(self, number: int, decode: Decode, shape: tuple[int, ...], start: int) -> tuple[Decode, Sequence[int]]:
        """Return how a part is stored, and where in each extent it begins, or that which it shares bytes with.

        Args:
            number: of the part among those that share bytes.
            decode: of the tensor.
            shape: of the tensor.
            start: flat index of what would be its first element if it were a run.
        """
        rows, columns = self.parts[0].shape
        first = start - number * rows * columns
        if self.transposed is None:
            inner, offsets = part_of_decode(decode, shape, first, (self.num_beside * rows, columns))
            return self.beside(number, inner) or inner, offsets
        place, num = replace(self.transposed, number=number), self.num_beside
        offsets = first * place.width, *(0 for _ in decode.widths[1:])
        expert = first // (num * rows * columns)
        if self.transposed.by_turns and isinstance(decode, LowRank):
            whole = _upright(decode, Transposed(place.dtype), (num * rows, columns), expert, 0)
            return ByRows(whole, number, num), offsets
        return _upright(decode, place, (rows, columns), expert, number * rows), offsets


def _upright(decode: Decode, place: Transposed, matrix: tuple[int, int], expert: int, first_row: int) -> Decode:
    """Return a matrix that is stored at a place, with factors added that are meant for all experts as they lie.

    Args:
        decode: of the tensor of all experts.
        place: of the matrix.
        matrix: its rows and columns.
        expert: whose it is.
        first_row: of the second factor, of those that are its own.
    """
    if not isinstance(decode, LowRank):
        return place
    inner = _upright(decode.inner, place, matrix, expert, first_row)
    return replace(decode, inner=inner, matrix=matrix, is_transposed=False, expert=expert, first_row=first_row)


Parts = Mapping[str, Fused]
"""What stored tensors hold, by their names."""


class _Pair(NamedTuple):
    """Two stored tensors that hold the projections of all experts of a layer."""

    gate_up: TensorSpec
    down: TensorSpec

    @property
    def is_straight(self) -> bool:
        """Whether shapes are [E, 2I, H] and [E, H, I]; they cannot be those of the other way, too."""
        num, hidden, inner = self.down.shape
        return self.gate_up.shape == (num, 2 * inner, hidden)

    @property
    def is_transposed(self) -> bool:
        """Whether shapes are [E, H, 2I] and [E, I, H]."""
        num, inner, hidden = self.down.shape
        return self.gate_up.shape == (num, hidden, 2 * inner)

    def parts(self, *, by_turns: bool) -> dict[str, Fused]:
        """Return the projections in each."""
        (num, hidden, inner), straight = self.down.shape, self.is_straight
        if not straight:
            hidden, inner = inner, hidden
        up, down = self.gate_up.dtype, self.down.dtype
        stem = self.gate_up.name.removesuffix(".weight").rpartition(".")[0]
        gates, ups = (_single(stem, role, num, up, (inner, hidden)) for role in ("gate_proj", "up_proj"))
        gates_ups = [part for pair in zip(gates, ups, strict=True) for part in pair]
        downs = _single(stem, "down_proj", num, down, (hidden, inner))
        return {
            self.gate_up.name: Fused(
                gates_ups,
                None if straight else Transposed(up, 0, 2, by_turns),
                ByRows(plain(up)) if straight and by_turns else None,
            ),
            self.down.name: Fused(downs, None if straight else Transposed(down)),
        }


Known = dict[tuple[_Pair, bool], dict[str, Fused]]
"""What pairs hold, with gate and up by turns or not: the same in all models, and of the same objects."""


def all_parts(checkpoints: Sequence[Checkpoint]) -> list[Parts]:
    """Return the parts of each, but of tensors that one of them has as a whole only, or that are doubtful in all."""
    known: Known = {}
    hidden = {size for each in checkpoints for _, section in sections(each.config or {}) if (size := _hidden(section))}
    parts = [_parts(each, hidden, known) for each in checkpoints]
    names = {name for own in parts for name in own}
    pairs = list(zip(checkpoints, parts, strict=True))
    whole = {name for each, own in pairs for name in names & each.specs.keys() - own.keys()}
    whole |= {name for name in names if all(name in own and own[name].is_doubtful for own in parts)}
    return [{name: each for name, each in own.items() if name not in whole} for own in parts] if whole else parts


def is_in_blocks(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor is stored as gpt-oss has its codes: row by row, while its numbers are transposed."""
    held = checkpoint.stored.get(name)
    return held is not None and held.is_in_blocks


def _hidden(section: Mapping[str, object]) -> int | None:
    size = section.get("hidden_size", section.get("d_model"))
    return size if isinstance(size, int) else None


def _parts(checkpoint: Checkpoint, hidden: set[int], known: Known) -> Parts:
    parts, specs = dict[str, Fused](), checkpoint.specs
    for spec in [spec for spec in specs.values() if len(spec.shape) == 3 and spec.kind == "float" and spec.num_elems]:
        for end, other in _PAIRS:
            down = specs.get(spec.name.removesuffix(end) + other) if spec.name.endswith(end) else None
            if down and down.kind == "float" and len(down.shape) == 3:
                parts |= _parts_of_pair(checkpoint, _Pair(spec, down), known)
        for up, down_end, gate in _STACKS:
            if spec.name.endswith(up) and holds_fused_experts(spec.name, 3):
                stem = spec.name.removesuffix(up)
                parts |= _parts_of_stack(checkpoint, stem, [spec.name, stem + gate], stem + down_end, hidden)
    parts |= _parts_of_dbrx(checkpoint)
    found = ((name, _as_parted(checkpoint, name, each)) for name, each in parts.items())
    return {name: each for name, each in found if each}


def _parts_of_pair(checkpoint: Checkpoint, pair: _Pair, known: Known) -> Parts:
    """Return what a pair holds, nothing if its shapes do not say so.

    Gate and up alternate in the tensors of gpt-oss, which have biases.
    """
    by_turns = f"{pair.gate_up.name}_bias" in checkpoint.specs or is_in_blocks(checkpoint, pair.gate_up.name)
    if not (pair.is_transposed or pair.is_straight):
        return {}
    return known.get((pair, by_turns)) or known.setdefault((pair, by_turns), pair.parts(by_turns=by_turns))


def _parts_of_stack(checkpoint: Checkpoint, stem: str, ups: Sequence[str], down: str, hidden: set[int]) -> Parts:
    """Return what tensors hold that have one projection of each expert, whichever way their shapes say that it lies."""
    specs = checkpoint.specs
    names = [name for name in (*ups, down) if name in specs]
    num, rows, columns = specs[ups[0]].shape
    shapes = {specs[name].shape for name in names if name != down}
    if down not in names or shapes != {(num, rows, columns)} or specs[down].shape != (num, columns, rows):
        return {}
    is_straight, is_transposed = columns in hidden, rows in hidden
    parts = {}
    for name in names:
        first, second = (columns, rows) if name == down else (rows, columns)
        turned = is_transposed and not is_straight
        spec, shape = specs[name], (second, first) if turned else (first, second)
        role = name.removesuffix(".weight").rpartition(".")[2]
        own = _single(stem, role, num, spec.dtype, shape)
        transposed = Transposed(spec.dtype) if turned else None
        parts[name] = Fused(own, transposed, is_doubtful=is_straight == is_transposed)
    return parts


def _parts_of_dbrx(checkpoint: Checkpoint) -> Parts:
    """Return what the flat matrices of DBRX hold, whose config says how many experts there are."""
    nums = [num for _, each in sections(checkpoint.config or {}) if isinstance(num := each.get("moe_num_experts"), int)]
    parts: dict[str, Fused] = {}
    for name, spec in checkpoint.specs.items() if nums else ():
        if name.endswith(_DBRX) and len(spec.shape) == 2 and spec.num_elems and spec.shape[0] % nums[0] == 0:
            inner, hidden = spec.shape[0] // nums[0], spec.shape[1]
            role = dict(zip(("w1", "v1", "w2"), ("gate_proj", "up_proj", "down_proj"), strict=True))[name[-2:]]
            shape = (hidden, inner) if role == "down_proj" else (inner, hidden)
            own = _single(name.removesuffix(f".mlp.{name[-2:]}"), role, nums[0], spec.dtype, shape)
            parts[name] = Fused(own, Transposed(spec.dtype) if role == "down_proj" else None)
    return parts


def _single(stem: str, role: str, num: int, dtype: str, shape: tuple[int, int]) -> list[TensorSpec]:
    """Return a projection of every expert, by the names that most families use."""
    experts = stem if stem.endswith("experts") else f"{stem}.experts"
    return [TensorSpec(f"{experts}.{number}.{role}.weight", dtype, shape) for number in range(num)]


def _as_parted(checkpoint: Checkpoint, name: str, fused: Fused) -> Fused | None:
    """Return what a tensor holds, as far as it can be taken apart: codes, and their scales, at the ends of experts.

    Nothing is parted whose parts have the names of tensors that are there.
    """
    held, shape = checkpoint.stored.get(name), checkpoint.specs[name].shape
    if any(part.name in checkpoint.specs for part in fused.parts):
        return None
    if held is None:
        return fused if fused.is_in_runs or name not in checkpoint.joined else None
    num_elems = fused.parts[0].num_elems
    if fused.transposed:
        return fused if _is_turned_with_it(held.decode) else None
    if fused.is_in_runs and _follow(held.decode, shape, num_elems):
        return fused
    by_rows = fused.in_rows or ByRows(held.decode, 0, math.prod(shape[1:]) // num_elems, by_turns=False)
    is_possible = _follow(held.decode, shape, by_rows.num_beside * num_elems)
    return fused._replace(in_rows=by_rows) if is_possible else None


def _is_turned_with_it(decode: Decode) -> bool:
    """Return whether plain numbers, which are transposed, have factors added that are meant for them as they lie."""
    while isinstance(decode, LowRank) and decode.is_transposed:
        decode = decode.inner
    return isinstance(decode, Plain)


def _follow(decode: Decode, shape: tuple[int, ...], num_elems: int) -> bool:
    """Return whether the first elements of codes, and their scales, end where those of the next as many begin."""
    if isinstance(decode, LowRank):
        return not decode.is_transposed and _follow(decode.inner, shape, num_elems)
    first, second = (decode.ranges(shape, start, start + num_elems) for start in (0, num_elems))
    return all(one.stop == two.start or one == two for one, two in zip(first, second, strict=True))


def separated(checkpoint: Checkpoint, parts: Parts) -> Checkpoint:
    """Return a checkpoint with a tensor for each part."""
    if not parts:
        return checkpoint
    specs: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.specs.items():
        if name in parts:
            specs |= {part.name: part for part in parts[name].parts}
        else:
            specs[name] = spec
    extents, stored = dict(checkpoint.extents), {n: held for n, held in checkpoint.stored.items() if n not in parts}
    rules = dict(checkpoint.rules)
    joined = _parts_of_joined(checkpoint, parts)
    extents |= {name: pieces.extents[0] for name, pieces in joined.items()}
    for name, fused in parts.items():
        if name in checkpoint.joined:
            continue
        if fused.is_in_runs and name not in checkpoint.stored:  # as nearly all are
            (file, start), size = checkpoint.extents[name], fused.parts[0].num_bytes
            extents |= {part.name: Extent(file, start + number * size) for number, part in enumerate(fused.parts)}
            continue
        if rule := rules.get(kind_of(name)):
            rules |= {kind_of(part.name): rule for part in fused.parts[:2]}
        for part, held, places in _places(checkpoint, name, fused):
            extents |= zip([holder.name for holder in held.parts], places, strict=True)
            stored |= {} if held.decode.is_plain else {part.name: held}
    return replace(checkpoint, specs=specs, extents=extents, stored=stored, joined=joined, rules=rules)


def _parts_of_joined(checkpoint: Checkpoint, parts: Parts) -> dict[str, Pieces]:
    """Return the tensors that lie in several runs of bytes, and what is in such tensors in their place."""
    joined = {name: pieces for name, pieces in checkpoint.joined.items() if name not in parts}
    for name, fused in parts.items():
        if name in checkpoint.joined:
            ends = accumulate(part.num_elems for part in fused.parts)
            joined |= {
                part.name: checkpoint.joined[name].part(end - part.num_elems, end)
                for part, end in zip(fused.parts, ends, strict=True)
            }
    return joined


def _places(checkpoint: Checkpoint, name: str, fused: Fused) -> Iterator[tuple[TensorSpec, Stored, list[Extent]]]:
    """Yield each part of a tensor, how it is stored, and where what holds it begins."""
    spec, start = checkpoint.specs[name], 0
    whole = checkpoint.stored.get(name, Stored(plain(spec.dtype), (spec,)))
    for index, part in enumerate(fused.parts):
        number = index % fused.num_beside
        decode, offsets = fused.part(number, whole.decode, spec.shape, start)
        files = [checkpoint.extents[other.name] for other in whole.parts]
        places = [Extent(file, at + offset) for (file, at), offset in zip(files, offsets, strict=True)]
        yield part, Stored(decode, _holders(part, name, whole)), places
        start += part.num_elems


def _holders(part: TensorSpec, name: str, whole: Stored) -> tuple[TensorSpec, ...]:
    """Return what holds a part of a tensor, as if it were stored alone: codes and scales, and whatever adds to them."""
    encode = codes_of(whole.decode)
    if encode is None:
        return (part, *(other._replace(name=f"{part.name} {other.name}") for other in whole.parts[1:]))
    (_, scale, *others), shape = whole.parts, part.shape
    if isinstance(encode, GroupScaled):
        shape = part.shape[0], encode.row_bytes * 8 // DTYPES[encode.dtype].bits
    end = scale.name.removeprefix(name) if scale.name.startswith(f"{name}_") else "_scale"
    codes = TensorSpec(part.name, encode.dtype, shape)
    scales = TensorSpec(f"{part.name}{end}", scale.dtype, encode.grid(part.shape))
    return (codes, scales, *(other._replace(name=f"{part.name} {other.name}") for other in others))


def shared_codes(donor: Checkpoint, parts: Parts) -> list[str]:
    """Return the tensors whose codes are in blocks that reach from one part into another, or share a scale with it."""
    return [name for name, fused in parts.items() if name in donor.stored and _share_scales(donor, name, fused)]


def _share_scales(donor: Checkpoint, name: str, fused: Fused) -> bool:
    encode, shape = codes_of(donor.stored[name].decode), donor.specs[name].shape
    if encode is None:
        return False
    by_turns = fused.in_rows is not None and fused.in_rows.by_turns
    num_elems = shape[-1] if by_turns else fused.parts[0].num_elems
    first, second = (encode.ranges(shape, start, start + num_elems)[1] for start in (0, num_elems))
    return first.stop != second.start
