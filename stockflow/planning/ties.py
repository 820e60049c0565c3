"""Tied heads in a merge: a head that some models store and others tie is merged as what it is in each of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from stockflow.checkpoints.configs import Config
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import (
    TiedNames,
    has_head,
    is_copy_in_a_layer,
    is_head,
    may_be_tied,
    original_of,
    tie_flag,
    tied_names,
)
from stockflow.checkpoints.opening import Checkpoint
from stockflow.planning.job import TensorJob
from stockflow.recipe import Recipe
from stockflow.storage import halves_of, redact
from stockflow.text.remarks import Remark
from stockflow.text.strictjson import shown

Value = TypeVar("Value")
State = Literal["own", "redundant", "tied", "lacking"]
"""A tensor of its own; one stored twice; one stored once, for both; one that is not there."""


@dataclass(frozen=True, slots=True)
class HeldTie:
    """A head or copy in one checkpoint."""

    state: State
    original: str | None
    """name there of what it is or would be tied to"""


def held_tie(checkpoint: Checkpoint, names: TiedNames, name: str, shape: tuple[int, ...]) -> HeldTie:
    """Return what the head or copy ``name`` is in a checkpoint.

    Args:
        checkpoint: whose it is, or would be.
        names: those of the checkpoint that may stand for one tensor.
        name: of the head or copy.
        shape: of it in a checkpoint that stores it; one that does not may have another number of tokens.
    """
    own = checkpoint.specs.get(name)
    original = original_of(name, own.shape if own else (None, *shape[1:]), names, checkpoint.specs)
    may_tie = original is not None and (not is_head(name) or tie_flag(checkpoint.config) is not False)
    if name not in checkpoint.specs:
        return HeldTie("tied" if may_tie else "lacking", original)
    is_copy = may_tie and checkpoint.extents[name] in checkpoint.values.copies
    return HeldTie("redundant" if is_copy else "own", original)


def with_tied_heads(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints that agree which of their heads and copies are stored.

    Where the donor stores one, a model that ties it has it too, at the place of its embedding; where the donor ties
    it, one that others store twice is left out. A head that is one of its own somewhere is stored everywhere.
    """
    found = list(checkpoints)
    by_layout = {id(each.specs): tied_names(each.specs) for each in {id(one.specs): one for one in found}.values()}
    scans = [by_layout[id(each.specs)] for each in checkpoints]
    ties = dict.fromkeys(name for names in scans for name in names.ties)
    for name in ties:
        holders = [each for each in checkpoints if name in each.specs]
        if len(holders) < len(checkpoints):
            shape = holders[0].specs[name].shape
            held = [held_tie(each, names, name, shape) for each, names in zip(checkpoints, scans, strict=True)]
            is_apart = is_copy_in_a_layer(name) and any(each.state == "own" for each in held)
            if all(each.state != "lacking" for each in held) and not is_apart:
                found = _agreeing(recipe, found, name, held)
    return found


def missing_head_remedy(name: str, where: str, config: Config | None) -> str:
    """Return what to do where a model of this config lacks the head of its class and does not tie it; else nothing."""
    if not is_head(name) or not has_head(config):
        return ""
    if tie_flag(config) is not False:
        return f"no embedding there has rows as long, so it is tied to none: give {where} the head"
    return (
        f"its config says that it has a head of its own: give {where} the head, or say `tie_word_embeddings: true` "
        "there if head and embedding are one"
    )


def _pairs(jobs: Sequence[TensorJob]) -> Iterator[tuple[TensorJob, TensorJob]]:
    found = {job.output.name: job for job in jobs if may_be_tied(job.output.name)}
    outputs = {name: job.output for name, job in found.items()}
    names = tied_names(outputs)
    for name in names.ties:
        original = original_of(name, outputs[name].shape, names, outputs)
        if original is not None:
            yield found[name], found[original]


@dataclass(frozen=True, slots=True)
class WrittenHead:
    """A head or copy that is written, and what it is in the models it is made of."""

    head: TensorJob
    embedding: TensorJob
    own: tuple[Checkpoint, ...]
    """in which it is a tensor of its own"""
    tied: tuple[Checkpoint, ...]
    """in which it is read from its embedding's place, or stores the same values"""

    @property
    def is_adapted_apart(self) -> bool:
        """Whether adapters alone make it one of its own, of what their models tie."""
        return all(len(halves_of(each.url)) > 1 for each in self.own)

    def is_parted(self, donor: Checkpoint) -> bool:
        """Return whether it is a tensor of its own in one model, while another, or a config, ties it."""
        says_tied = any(tie_flag(each.config) for each in (donor, *self.own, *self.tied))
        return is_head(self.head.output.name) and bool(self.own) and (bool(self.tied) or says_tied)


def written_heads(checkpoints: Sequence[Checkpoint], jobs: Sequence[TensorJob]) -> Iterator[WrittenHead]:
    """Yield the heads and copies that are written with the tensor they may be tied to."""
    for head, embedding in _pairs(jobs):
        kinds: dict[bool, list[Checkpoint]] = {False: [], True: []}
        for operand in head.reading.operands:
            each, extent = checkpoints[operand.checkpoint], operand.extents[0]
            is_stored_alike = extent == each.extents.get(embedding.output.name) or extent in each.values.copies
            kinds[is_stored_alike and _are_read_alike(each, head, embedding)].append(each)
        yield WrittenHead(head, embedding, tuple(kinds[False]), tuple(kinds[True]))


def _are_read_alike(checkpoint: Checkpoint, *jobs: TensorJob) -> bool:
    """Return whether equal bytes are equal numbers: an adapter may change one of two names alone."""
    stored = [checkpoint.stored.get(job.output.name) for job in jobs]
    return len({each and each.decode for each in stored}) == 1


def _agreeing(recipe: Recipe, found: list[Checkpoint], name: str, held: Sequence[HeldTie]) -> list[Checkpoint]:
    is_own = any(each.state == "own" for each in held)
    is_stored = is_own or held[recipe.donor].state == "redundant"
    agreeing = [
        (_with_alias(each, name, tie.original) if is_stored else _without(each, name))
        for each, tie in zip(found, held, strict=True)
    ]
    rule = recipe.rule_for(name)
    if not is_own and (rule is None or rule.action != "skip"):
        donor = agreeing[recipe.donor]
        agreeing[recipe.donor] = replace(donor, remarks=(*donor.remarks, _said(found, name, held, is_stored)))
    return agreeing


def _with_alias(checkpoint: Checkpoint, name: str, original: str | None) -> Checkpoint:
    if name in checkpoint.specs or original is None:
        return checkpoint
    spec = checkpoint.specs[original]
    return replace(
        checkpoint,
        specs={**checkpoint.specs, name: TensorSpec(name, spec.dtype, spec.shape)},
        extents={**checkpoint.extents, name: checkpoint.extents[original]},
        stored=_with(checkpoint.stored, name, original),
        joined=_with(checkpoint.joined, name, original),
    )


def _with(mapping: Mapping[str, Value], name: str, original: str) -> Mapping[str, Value]:
    return {**mapping, name: mapping[original]} if original in mapping else mapping


def _without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    if name not in checkpoint.specs:
        return checkpoint
    return replace(checkpoint, specs=_less(checkpoint.specs, name), extents=_less(checkpoint.extents, name))


def _less(mapping: Mapping[str, Value], name: str) -> dict[str, Value]:
    return {key: value for key, value in mapping.items() if key != name}


def _said(checkpoints: Sequence[Checkpoint], name: str, held: Sequence[HeldTie], is_stored: bool) -> Remark:
    urls = [redact(each.url) for each, tie in zip(checkpoints, held, strict=True) if tie.state == "redundant"]
    original = next(tie.original for tie in held if tie.original)
    becomes = "it is merged and written beside it" if is_stored else "it is not written, as the other models do not"
    copies = (each.values.copies.get(each.extents[name]) for each in checkpoints if name in each.extents)
    is_whole = all(copy.is_whole for copy in copies if copy)
    compared = "" if is_whole else " (in every range that was looked at; a merge compares all of it)"
    text = (
        f"{shown(name)} in {', '.join(urls)} is {shown(original)} again{compared}, which the other models store "
        f"once: {becomes}"
    )
    return Remark("tied-head", text, "note", tuple(urls), (name,))
