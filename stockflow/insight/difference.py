"""What a comparison of two checkpoints found: per tensor, and summed up by layer and kind; in words and in numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from stockflow.checkpoints.naming import KINDS, kind_of, layer_of
from stockflow.storage import redact
from stockflow.text import notebook
from stockflow.text.escaping import in_a_line
from stockflow.text.redaction import command_line
from stockflow.text.sizes import are, counted, gb
from stockflow.text.tables import grid

NUM_SHOWN = 20
"""Names and groups a summary lists."""
NUM_FARTHEST = 10
"""Tensors a summary lists."""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A tensor that both have and that cannot be compared: shapes differ, or dtypes of which one is no float."""

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{in_a_line(self.name)}: {self.dtype_a} {list(self.shape_a)} against {self.dtype_b} {list(self.shape_b)}"
        )


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How two tensors of equal name and shape differ.

    Numbers are there for BF16, F16, F32 and F64; where dtypes differ, in the format that holds both exactly. Pairs of
    elements with NaN or infinity on a side are counted, differ where their bits do, and are in no other number.
    All else is compared by bits only.
    """

    name: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    num_elems: int
    """bytes instead of elements for dtypes smaller than a byte"""
    num_differing: int
    """elements whose bits differ"""
    first_differing: int | None
    """flat index of the first of them"""
    norm_a: float | None = None
    norm_b: float | None = None
    distance: float | None = None
    """Euclidean norm of the change ``b - a``"""
    largest_change: float | None = None
    """largest absolute one"""
    largest_at: int | None = None
    """its flat index, the first of several; None if nothing changed"""
    most_roundings: int | None = None
    """most numbers of the format that lie between two elements, plus one; None where one of the two is in codes"""
    roundings: tuple[int, ...] = ()
    """how many elements are 0, 1, 2 and more roundings apart; 0.0 and -0.0 are 0 apart and differ"""
    num_nonfinite: int = 0
    """pairs with NaN or infinity on a side"""

    @property
    def is_equal(self) -> bool:
        """Whether dtypes and all bits are the same."""
        return not self.num_differing and self.dtype_a == self.dtype_b

    @property
    def relative_distance(self) -> float | None:
        """``|a - b| / |a|``; None where it has no answer: a is zero and b is not, no floats, or norms overflow."""
        return relative(self.distance, self.norm_a)

    @property
    def cosine(self) -> float | None:
        """Cosine between a and b; None where one is zero, no floats, or norms overflow.

        ``a b = (|a|**2 + |b|**2 - |a - b|**2) / 2``, and errors of the norms cancel in the quotient.
        """
        if self.norm_a is None or self.norm_b is None or self.distance is None:
            return None
        product = self.norm_a * self.norm_b
        if not product or not math.isfinite(self.norm_a) or not math.isfinite(self.norm_b):
            return None
        ratio = self.norm_a / self.norm_b
        cosine = (ratio + 1.0 / ratio - (self.distance / self.norm_a) * (self.distance / self.norm_b)) / 2.0
        return min(1.0, max(-1.0, cosine))

    def facts(self) -> dict[str, object]:
        """Return it for programs; what is not finite is None."""
        derived = {"relative_distance": self.relative_distance, "cosine": self.cosine}
        stated = {**asdict(self), **derived, "is_equal": self.is_equal}
        return {key: _finite(value) for key, value in stated.items()}


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """The tensors of a layer, or of a kind, taken together."""

    name: str
    num_tensors: int
    num_differing_tensors: int
    num_elems: int
    num_differing: int
    relative_distance: float | None
    """of all their floats as one vector"""
    roundings: tuple[int, int, int, int]
    """how many of their floats are 0, 1, 2 and more roundings apart"""
    most_roundings: int
    largest_change: float | None
    largest_in: str | None
    """the tensor it is in"""


@dataclass(frozen=True)
class CheckpointDifference:
    """How two checkpoints differ."""

    url_a: str
    url_b: str
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    unmatched: tuple[Unmatched, ...]
    tensors: tuple[TensorDifference, ...]
    """those that both have, in the order of a's files"""
    num_bytes: int
    """read of both"""
    seconds: float

    @cached_property
    def differing(self) -> tuple[TensorDifference, ...]:
        """Those that are not equal, the relatively farthest first."""
        found = [tensor for tensor in self.tensors if not tensor.is_equal]
        return tuple(sorted(found, key=lambda tensor: -_or_infinity(tensor.relative_distance)))

    @property
    def is_equal(self) -> bool:
        """Whether names, shapes, dtypes and all bits are the same."""
        return not (self.only_in_a or self.only_in_b or self.unmatched or self.differing)

    def by_layer(self) -> tuple[GroupDifference, ...]:
        """Return the differences by layer, by their numbers; ``-`` are the tensors that are in none, at the end."""
        groups: dict[int | None, list[TensorDifference]] = {}
        for tensor in self.tensors:
            groups.setdefault(layer_of(tensor.name), []).append(tensor)
        in_order = sorted(groups, key=lambda layer: (layer is None, layer or 0))
        return tuple(_together("-" if layer is None else str(layer), groups[layer]) for layer in in_order)

    def by_kind(self) -> tuple[GroupDifference, ...]:
        """Return the differences by kind of module, in the order of ``naming.KINDS``."""
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            groups.setdefault(kind_of(tensor.name), []).append(tensor)
        return tuple(_together(kind, groups[kind]) for kind in KINDS if kind in groups)

    def facts(self) -> dict[str, object]:
        """Return all of it for programs: what is not finite is None."""
        return {
            "a": redact(self.url_a),
            "b": redact(self.url_b),
            "is_equal": self.is_equal,
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "unmatched": [asdict(each) for each in self.unmatched],
            "bytes_read": self.num_bytes,
            "seconds": self.seconds,
            "layers": [_group_facts(group) for group in self.by_layer()],
            "kinds": [_group_facts(group) for group in self.by_kind()],
            "tensors": [tensor.facts() for tensor in self.tensors],
        }

    def lines(self) -> Iterator[str]:
        """Yield a summary for people."""
        a, b = redact(self.url_a), redact(self.url_b)
        rate = f"{gb(self.num_bytes)} in {self.seconds:.1f} s"
        if self.is_equal:
            yield f"equal: {counted(len(self.tensors), 'tensor')} of {a} and {b}, bit for bit; {rate}"
            return
        yield f"{a} and {b} differ; {rate}"
        for names, where in ((self.only_in_a, a), (self.only_in_b, b)):
            yield from _listed(f"{counted(len(names), 'tensor')} {are(len(names))} only in {where}", names)
        yield from _listed(
            f"{counted(len(self.unmatched), 'tensor')} cannot be compared", [str(each) for each in self.unmatched]
        )
        num_differing = len(self.differing)
        yield f"  {num_differing} of {len(self.tensors)} tensors that both have differ"
        if not num_differing:
            return
        yield from _table("layer", [group for group in self.by_layer() if group.num_differing_tensors])
        yield from _table("kind", [group for group in self.by_kind() if group.num_differing_tensors])
        yield ""
        yield f"  tensors, the relatively farthest first{_cut(num_differing, NUM_FARTHEST)}"
        for tensor in self.differing[:NUM_FARTHEST]:
            yield f"    {in_a_line(tensor.name)}: {in_words(tensor)}"
        yield f"next: {command_line('stockflow', 'diff', self.url_a, self.url_b, '--json')}  # lists every tensor"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """Return tables for a notebook: layers, kinds, and the tensors that differ."""
        differing = f"{len(self.differing)} of {len(self.tensors)} tensors differ"
        head = {
            "a": redact(self.url_a),
            "b": redact(self.url_b),
            "only in a": ", ".join(self.only_in_a[:NUM_SHOWN]) or None,
            "only in b": ", ".join(self.only_in_b[:NUM_SHOWN]) or None,
            "not comparable": ", ".join(map(str, self.unmatched[:NUM_SHOWN])) or None,
        }
        columns = ("name", "num_differing", "num_elems", "relative_distance", "cosine", "largest_change")
        rows = [[getattr(tensor, column) for column in columns] for tensor in self.differing[:NUM_SHOWN]]
        groups = [
            [group.name, group.num_differing_tensors, group.num_tensors, group.relative_distance]
            for group in self.by_layer()
            if group.num_differing_tensors
        ]
        return notebook.block(
            "diff: equal, bit for bit" if self.is_equal else f"diff: {differing}",
            notebook.facts({key: value for key, value in head.items() if value is not None}),
            notebook.table(("layer", "tensors that differ", "of", "relative distance"), groups),
            notebook.table(("tensor", "elements that differ", "of", *columns[3:]), rows),
        )


def in_words(tensor: TensorDifference) -> str:
    """Return how a tensor differs, in one line."""
    parts = []
    if tensor.dtype_a != tensor.dtype_b:
        parts.append(f"{tensor.dtype_a} against {tensor.dtype_b}")
    if not tensor.num_differing:
        return ", ".join([*parts, "equal numbers"])
    parts.append(f"{tensor.num_differing:,} of {tensor.num_elems:,} elements differ")
    if tensor.distance is None:
        return ", ".join([*parts, f"the first at {tensor.first_differing:,}"])
    parts.append(f"relative distance {shown(tensor.relative_distance)}, cosine {_precise(tensor.cosine)}")
    if tensor.largest_at is not None:
        parts.append(f"largest change {shown(tensor.largest_change)} at {tensor.largest_at:,}")
    if tensor.most_roundings is not None:
        parts.append(f"up to {tensor.most_roundings:,} roundings apart")
    if tensor.num_nonfinite:
        parts.append(f"NaN or infinity in {tensor.num_nonfinite:,}")
    return ", ".join(parts)


def relative(distance: float | None, norm: float | None) -> float | None:
    """Return the quotient; 0 for no distance, None where there is no answer."""
    if distance is None or norm is None or not math.isfinite(distance) or not math.isfinite(norm):
        return None
    return 0.0 if not distance else distance / norm if norm else None


def shown(value: float | None) -> str:
    """Return a number for people."""
    return "-" if value is None else f"{value:.4g}"


def _together(name: str, members: Sequence[TensorDifference]) -> GroupDifference:
    floats = [tensor for tensor in members if tensor.distance is not None]
    changed = [tensor for tensor in floats if tensor.largest_at is not None]
    largest = max(changed, key=lambda tensor: tensor.largest_change or 0.0, default=None)
    distance, norm = (math.hypot(*(getattr(tensor, side) for tensor in floats)) for side in ("distance", "norm_a"))
    counts = [sum(tensor.roundings[place] for tensor in floats if tensor.roundings) for place in range(4)]
    return GroupDifference(
        name=name,
        num_tensors=len(members),
        num_differing_tensors=sum(not tensor.is_equal for tensor in members),
        num_elems=sum(tensor.num_elems for tensor in members),
        num_differing=sum(tensor.num_differing for tensor in members),
        relative_distance=relative(distance, norm) if floats else None,
        roundings=(counts[0], counts[1], counts[2], counts[3]),
        most_roundings=max((tensor.most_roundings or 0 for tensor in floats), default=0),
        largest_change=largest.largest_change if largest else None,
        largest_in=largest.name if largest else None,
    )


def _group_facts(group: GroupDifference) -> dict[str, object]:
    return {key: _finite(value) for key, value in asdict(group).items()}


def _table(title: str, groups: Sequence[GroupDifference]) -> Iterator[str]:
    yield ""
    heads = (title, "differ", "elements", "distance", "> 2 roundings", "largest change")
    yield from grid([heads, *map(_cells, groups[:NUM_SHOWN])], left=(0, len(heads) - 1))
    if len(groups) > NUM_SHOWN:
        yield f"  ... and {len(groups) - NUM_SHOWN} more"


def _cells(group: GroupDifference) -> tuple[str, ...]:
    return (
        group.name,
        f"{group.num_differing_tensors} of {group.num_tensors}",
        f"{100.0 * group.num_differing / max(group.num_elems, 1):.3g} %",
        shown(group.relative_distance),
        f"{100.0 * group.roundings[3] / sum(group.roundings):.3g} %" if sum(group.roundings) else "-",
        "-" if group.largest_in is None else f"{shown(group.largest_change)} in {in_a_line(group.largest_in)}",
    )


def _listed(title: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"  {title}{_cut(len(names))}"
        yield from (f"    {in_a_line(name)}" for name in names[:NUM_SHOWN])


def _cut(number: int, most: int = NUM_SHOWN) -> str:
    return f" (the first {most} of {number})" if number > most else ""


def _precise(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
