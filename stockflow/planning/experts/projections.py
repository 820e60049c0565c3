"""Experts: tensors that hold all of a layer, seen as one per projection and expert; how an output gets such tensors.

What is decided as one is the projection of an expert, however it is stored. In a fused tensor it is a run of bytes, so
that seeing it costs an offset, and writing it an order.
"""

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, takewhile
from typing import NamedTuple

from stockflow.checkpoints.decodes.stored import plain
from stockflow.checkpoints.decodes.transposed import ByRows, Transposed
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import holds_fused_experts, projection_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.planning.experts.layouts import Fused, Parts, all_parts, separated, shared_codes
from stockflow.planning.formats import codes_of
from stockflow.planning.job import TensorJob
from stockflow.planning.views import renamed
from stockflow.recipe import Recipe
from stockflow.recipe.slices import slices_of
from stockflow.storage import redact
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

_BLOCK = re.compile(r"(?<=\.)(mlp|block_sparse_moe|feed_forward|ffn|moe)(?=\.)")
"""What families call the part of a layer that has experts."""
ONE_BY_ONE = frozenset[Hashable]()
"""The way of storing experts that needs no word: a tensor for each projection."""


class Whole(NamedTuple):
    """What of the output a projection is a part of."""

    numbers: TensorSpec
    """the tensor, if plain numbers are written"""
    encode: Transposed | ByRows | None = None
    """how it is stored there, where that is no run of bytes"""
    codes: tuple[TensorSpec, ...] = ()
    """codes and scales, where these are kept"""

    def named(self, rename: Callable[[str], str]) -> "Whole":
        """Return the same under other names."""
        numbers, *codes = (each._replace(name=rename(each.name)) for each in (self.numbers, *self.codes))
        return self._replace(numbers=numbers, codes=tuple(codes))


@dataclass(frozen=True)
class Experts:
    """Checkpoints with one tensor per projection and expert, and what the output makes of these."""

    checkpoints: Sequence[Checkpoint]
    wholes: Mapping[str, Whole] = field(default_factory=dict)
    """by the name of a projection in what gives the output its names"""

    def whole(self, own_name: str, name: str) -> Whole | None:
        """Return what a target is a part of, None if it is a tensor itself.

        Args:
            own_name: of the target, in the donor.
            name: in the output, where layers may have other numbers.
        """
        whole = self.wholes.get(own_name)
        if whole is None or own_name == name:
            return whole
        shared = len(_common_end(own_name, name))
        before, instead = own_name[: len(own_name) - shared], name[: len(name) - shared]
        return whole.named(lambda each: instead + each.removeprefix(before))


def seen_one_by_one(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> Experts:
    """Return the checkpoints as they are merged: a tensor for each projection of an expert, under the donor's names.

    Raises:
        PlanError: the recipe asks for a layout or a scope that these cannot have.
    """
    asked, widened = recipe.stockflow.experts, recipe.stockflow.scope in ("tensor", "leading")
    parts = all_parts(checkpoints)
    in_codes = recipe.stockflow.output_format == "fp8_block"
    is_fused = asked == "fused" or (asked is None and bool(parts[recipe.donor]) and not in_codes)
    if asked == "fused" and (in_codes or (recipe.keeps_codes and checkpoints[recipe.donor].stored)):
        raise PlanError(
            "`experts: fused` writes plain numbers; leave it out, or ask for them: "
            "`stockflow: {output_format: bfloat16}`"
        )
    _refuse_blocks(recipe, checkpoints[recipe.donor], () if widened else parts[recipe.donor], asked=asked)
    checkpoints = _with_wholes_said(recipe.donor, checkpoints, parts[recipe.donor], asked=asked)
    if not any(parts) and not is_fused:
        return Experts(checkpoints)
    if recipe.keeps_codes and is_fused and (shared := shared_codes(checkpoints[recipe.donor], parts[recipe.donor])):
        checkpoints = _shared_kept(recipe.donor, checkpoints, shared)
        parts = [{name: each for name, each in own.items() if name not in shared} for own in parts]
        if not any(parts):
            return Experts(checkpoints)
    if widened and is_fused:
        _refuse_parted(recipe, parts)
        return Experts(checkpoints)
    seen = [_doubted(separated(*each), each[1]) for each in zip(checkpoints, parts, strict=True)]
    donor, wholes = seen[recipe.donor], dict[str, Whole]()
    for number in _givers(recipe, checkpoints, parts) if is_fused else ():
        for name, each in parts[number].items():
            found = zip(each.parts, _wholes(checkpoints[number], name, each), strict=False)
            wholes |= {part.name: whole for part, whole in found}
    if asked == "fused":
        donor, further = _gathered(donor, wholes)
        wholes |= {name: Whole(spec) for name, spec in further.items()}
    seen[recipe.donor] = _remarked(donor, recipe, checkpoints, parts, is_fused=is_fused)
    return Experts([each if each is donor else _under_names_of(donor, each) for each in seen], wholes)


def _wholes(donor: Checkpoint, name: str, fused: Fused) -> Iterator[Whole]:
    """Yield what each projection in a tensor of the donor is a part of, as it is written; those of gpt-oss over again.

    Plain numbers of gpt-oss are transposed, and its codes are not.
    """
    spec, held = donor.specs[name], donor.stored.get(name)
    encode = codes_of(held.decode) if held else None
    codes = held.parts[: len(encode.widths)] if held and encode else ()
    if held and held.is_in_blocks:
        numbers = spec._replace(shape=(spec.shape[0], spec.shape[2], spec.shape[1]))
        for number in cycle(range(fused.num_beside)):
            yield Whole(numbers, Transposed(spec.dtype, number, fused.num_beside, by_turns=True), codes)
    for number in cycle(range(fused.num_beside)):
        yield Whole(spec, fused.beside(number, plain(spec.dtype)), codes)


def _givers(recipe: Recipe, checkpoints: Sequence[Checkpoint], parts: Sequence[Parts]) -> list[int]:
    """Return the checkpoints whose names the output has, the donor last.

    Raises:
        PlanError: layers come from models that store experts in several ways, and the output is to have one.
    """
    others = {recipe.checkpoints.index(each.recipe.checkpoints[0]) for each in slices_of(recipe)} - {recipe.donor}
    ways = {number: _way(checkpoints[number], parts[number]) for number in (*sorted(others), recipe.donor)}
    if others and (len(set(ways.values()) - {None}) > 1 or ONE_BY_ONE in ways.values()):
        urls = ", ".join(redact(checkpoints[number].url) for number in ways)
        raise PlanError(
            f"layers come from {urls}, which do not all store experts in tensors that hold all of a layer, and in one "
            "way; say `stockflow: {experts: separate}`, so that all are written one by one"
        )
    return list(ways)


def _way(checkpoint: Checkpoint, parts: Parts) -> frozenset[Hashable] | None:
    """Return how a checkpoint stores experts; None if it has none."""
    if not parts:
        return ONE_BY_ONE if any(map(projection_of, checkpoint.specs)) else None
    return frozenset(
        (name.rpartition(".experts")[2], each.num_beside, way and (way.number, way.by_turns))
        for name, each in parts.items()
        for way in (each.transposed,)
    )


def _doubted(checkpoint: Checkpoint, parts: Parts) -> Checkpoint:
    """Return a checkpoint with what is to be accepted of tensors that do not tell rows from columns."""
    names = [name for name, each in parts.items() if each.is_doubtful]
    if not names:
        return checkpoint
    url = redact(checkpoint.url)
    text = (
        f"{counted(len(names), 'tensor')} of {url} such as {shown(names[0])} {are(len(names))} of all experts, and "
        "neither shapes nor config tell rows from columns, while other models store experts one by one; they can be "
        "read as [experts, out, in] if that is what they are"
    )
    remark = Remark("square-experts", text, "refusal", (url,), tuple(names))
    return replace(checkpoint, remarks=(*checkpoint.remarks, remark))


def part_of(job: TensorJob, whole: Whole) -> TensorJob:
    """Return a job as one of those that write a tensor of all experts, which has the dtype of its parts."""
    if job.result.rule:
        return replace(job, wholes=whole.codes)
    dtype, encode = job.output.dtype, whole.encode
    if isinstance(encode, Transposed):
        encode = replace(encode, dtype=dtype)
    elif encode:
        encode = replace(encode, inner=plain(dtype))
    results = tuple([replace(each, encode=encode) for each in job.results]) if encode else job.results
    return replace(job, wholes=(whole.numbers._replace(dtype=dtype),), results=results)


def unlike_parts(jobs: Iterable[TensorJob]) -> Iterator[str]:
    """Yield which tensors of all experts would be of several dtypes."""
    dtypes: dict[str, set[str]] = {}
    for job in jobs:
        if job.whole:
            dtypes.setdefault(job.whole.name, set()).add(job.whole.dtype)
    for name, found in dtypes.items():
        if len(found) > 1:
            several = " and ".join(sorted(found))
            yield f"the experts of {shown(name)} come as {several}, and a tensor has one dtype; give a `dtype`"


def _with_wholes_said(
    number: int, checkpoints: Sequence[Checkpoint], parts: Collection[str], *, asked: str | None
) -> Sequence[Checkpoint]:
    """Return the checkpoints, with what is to be said of the donor's codes of all experts that stay together.

    Raises:
        PlanError: the recipe asks for them one by one.
    """
    donor, specs = checkpoints[number], checkpoints[number].specs
    names = [name for name in donor.stored if len(specs[name].shape) == 3 and name not in parts]
    names = [name for name in names if holds_fused_experts(name, 3)]
    if not names:
        return checkpoints
    text = (
        f"{counted(len(names), 'tensor')} of {redact(donor.url)} such as {shown(names[0])} {are(len(names))} codes of "
        "all experts that are not taken apart, as they are transposed or alone"
    )
    if asked == "separate":
        raise PlanError(f"{text}; leave `experts: separate` out")
    said = Remark("expert-layouts", f"{text}: they are decided expert by expert", "note", (redact(donor.url),))
    with_said = replace(donor, remarks=(*donor.remarks, said))
    return [with_said if each is donor else each for each in checkpoints]


def _refuse_blocks(recipe: Recipe, donor: Checkpoint, parts: Collection[str], *, asked: str | None) -> None:
    """Raise where codes of gpt-oss would be written as no model of its kind is stored: its numbers are transposed.

    Args:
        recipe: says what is written.
        donor: has the codes.
        parts: names of the tensors that are parted.
        asked: for the layout of the output.
    """
    names = [name for name, held in donor.stored.items() if held.is_in_blocks]
    if recipe.keeps_codes and asked == "separate" and names:
        raise PlanError(
            f"`experts: separate` would write the codes of {shown(names[0])} one by one, as no model has them; leave "
            "it out, or ask for plain numbers: `stockflow: {output_format: bfloat16}`"
        )
    whole = [] if recipe.keeps_codes else [name for name in names if name not in parts]
    if whole:
        raise PlanError(
            f"{counted(len(whole), 'tensor')} of {redact(donor.url)} such as {shown(whole[0])} {are(len(whole))} codes "
            "whose plain numbers are stored transposed: they are written so where gate, up and down are there, expert "
            "by expert. Leave `scope` out, or keep the codes: `stockflow: {output_format: keep}`"
        )


def _refuse_parted(recipe: Recipe, parts: Sequence[Parts]) -> None:
    """Raise where a recipe has several experts decided as one, and not every model stores them so."""
    layouts = [{name: each.transposed is None for name, each in own.items()} for own in parts]
    if not parts[recipe.donor] or any(layout != layouts[recipe.donor] for layout in layouts):
        raise PlanError(
            f"`scope: {recipe.stockflow.scope}` decides the experts of a tensor as one, and some models store them one "
            "by one, or transposed; leave the scope out, or say `stockflow: {experts: separate}`"
        )


def _shared_kept(number: int, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Sequence[Checkpoint]:
    """Return the checkpoints, with what is to be said where the donor's codes are kept that projections share.

    Raises:
        PlanError: not every model stores these as one.
    """
    donor = checkpoints[number]
    are_shared = (
        f"{counted(len(names), 'tensor')} of {redact(donor.url)} such as {shown(names[0])} {are(len(names))} in blocks "
        "of codes that reach from one projection into the next"
    )
    others = [
        each.url
        for each in checkpoints
        if any(name not in each.specs or each.specs[name].shape != donor.specs[name].shape for name in names)
    ]
    if others:
        raise PlanError(
            f"{are_shared}, and kept only where all models store them as one: {', '.join(map(redact, others))} do not. "
            "Write codes one by one, `stockflow: {experts: separate}`, or plain numbers, `stockflow: {output_format: "
            "bfloat16}`"
        )
    text = f"{are_shared}: gate and up of an expert are decided together"
    remark = Remark("expert-layouts", text, "note", (redact(donor.url),), tuple(names))
    kept = replace(donor, remarks=(*donor.remarks, remark))
    return [kept if each is donor else each for each in checkpoints]


class _Layer:
    """The projections of the experts of a layer, which are stored one by one."""

    def __init__(self, stem: str, own: Mapping[tuple[int, str], TensorSpec], url: str) -> None:
        """Take them by number and role.

        Raises:
            PlanError: they are not alike.
        """
        self._stem, self._own, self._num = stem, own, len(own) // 3
        if not self._is_whole():
            found = ", ".join(sorted({f"{spec.dtype} {list(spec.shape)}" for spec in own.values()})[:4])
            raise PlanError(
                f"the experts of {shown(stem)} in {redact(url)} cannot be put into one tensor: expected gate, up and "
                f"down of each, of equal shapes and one dtype, found {counted(len(own), 'tensor')}, {found}; leave "
                "`experts: fused` out"
            )

    def _is_whole(self) -> bool:
        _, dtype, shape = self._own.get((0, "gate"), ("", "", ()))
        shapes = {"gate": shape, "up": shape, "down": shape[::-1]}
        expected = {(number, role): (dtype, each) for number in range(self._num) for role, each in shapes.items()}
        return len(shape) == 2 and {key: spec[1:] for key, spec in self._own.items()} == expected

    def parts(self) -> list[TensorSpec]:
        """Return them in the order in which a tensor of gate and up, and then one of down, holds them."""
        gate_up = [self._own[number, role] for number in range(self._num) for role in ("gate", "up")]
        return gate_up + [self._own[number, "down"] for number in range(self._num)]

    def wholes(self) -> list[TensorSpec]:
        """Return the tensor that each of these is a part of, in the same order."""
        _, dtype, (inner, hidden) = self._own[0, "gate"]
        gate_up = TensorSpec(f"{self._stem}.gate_up_proj", dtype, (self._num, 2 * inner, hidden))
        down = TensorSpec(f"{self._stem}.down_proj", dtype, (self._num, hidden, inner))
        return [gate_up] * 2 * self._num + [down] * self._num


def _gathered(donor: Checkpoint, done: Collection[str]) -> tuple[Checkpoint, dict[str, TensorSpec]]:
    """Return the donor with its single projections in the order of tensors that hold all, and these."""
    stems: dict[str, dict[tuple[int, str], TensorSpec]] = {}
    for name, spec in donor.specs.items():
        if name not in done and (single := projection_of(name)):
            stems.setdefault(single.stem, {})[single.expert, single.role] = spec
    layers = [_Layer(stem, own, donor.url) for stem, own in stems.items()]
    firsts = [next(iter(own.values())).name for own in stems.values()]
    order = dict(zip(firsts, layers, strict=True))
    wholes = {part.name: whole for each in layers for part, whole in zip(each.parts(), each.wholes(), strict=True)}
    specs: dict[str, TensorSpec] = {}
    for name, spec in donor.specs.items():
        own = order[name].parts() if name in order else [] if name in wholes else [spec]
        specs |= {part.name: part for part in own}
    return replace(donor, specs=specs), wholes


def _under_names_of(donor: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the donor's names of what families call differently: `w1` and `gate_proj`."""
    lacking, besides = donor.specs.keys() - other.specs.keys(), other.specs.keys() - donor.specs.keys()
    if not lacking or not besides:
        return other
    theirs = {_of_any_family(name): name for name in besides}
    names = {name: found for name in lacking if (found := theirs.get(_of_any_family(name)))}
    if not any(map(projection_of, names)):
        return other
    url, example = redact(other.url), min(names)
    text = (
        f"{counted(len(names), 'tensor')} of {url} {are(len(names))} those of {redact(donor.url)} under the names of "
        f"another family, {shown(names[example])} for {shown(example)}, and read as such"
    )
    remark = Remark("other-names", text, "note", (url,), values={example: names[example]})
    return replace(renamed(other, names), remarks=(*other.remarks, remark))


def _of_any_family(name: str) -> str:
    """Return a name that is the same in all families."""
    single = projection_of(name)
    return _BLOCK.sub("moe", f"{single.stem}.{single.expert}.{single.role}" if single else name)


def _remarked(
    donor: Checkpoint, recipe: Recipe, checkpoints: Sequence[Checkpoint], parts: Sequence[Parts], *, is_fused: bool
) -> Checkpoint:
    """Return the donor with what is to be said of models whose experts are stored otherwise than they are written."""
    others = [redact(each.url) for each, own in zip(checkpoints, parts, strict=True) if bool(own) != is_fused]
    if not others:
        return donor
    ways = ["one by one", "in tensors that hold all of a layer"]
    says = "the recipe says" if recipe.stockflow.experts else f"in {redact(donor.url)}"
    text = (
        f"{', '.join(others)} {'stores' if len(others) == 1 else 'store'} experts {ways[not is_fused]}; they "
        f"are read as such, and written {ways[is_fused]}, as {says}"
    )
    remark = Remark("expert-layouts", text, "note", tuple(others))
    return replace(donor, remarks=(*donor.remarks, remark))


def _common_end(left: str, right: str) -> str:
    """Return what two names end in alike."""
    pairs = zip(reversed(left), reversed(right), strict=False)
    num = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return left[len(left) - num :]
