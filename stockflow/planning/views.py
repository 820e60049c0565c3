"""Views: a checkpoint under the names of another, where both name the same tensors in two ways, or in two layouts."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product, takewhile

from stockflow.checkpoints.adapters.factors import factors_said, factors_within
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import WRAPPERS
from stockflow.checkpoints.opening import Checkpoint
from stockflow.checkpoints.tokens.token_rows import has_tokens
from stockflow.storage import redact
from stockflow.text.examples import such
from stockflow.text.remarks import Remark
from stockflow.text.sizes import are, counted
from stockflow.text.strictjson import shown

_TRANSPARENT = frozenset(part for part in WRAPPERS if part.startswith("_"))
"""Those that stand anywhere in a name."""
_SPELLINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
    "backbone.embedding.weight": "backbone.embeddings.weight",
}
"""Ends of names that loaders take for one another: those of TensorFlow's layers, of weight norms, of Mamba's."""
_PARAMETERS = (("weight", "", "scale", "gamma"), ("bias", "beta"))
"""What a parameter of a module is called; nothing where it has the module's name."""
_NUMBER = re.compile(r"\d+")
NUM_VOTES = 100
MAX_RENAMINGS = 8
LEAST_SHARE = 0.9
"""Of the tensors that a checkpoint has besides, so many are the donor's under other names, or these are much of it."""
MUCH = 0.1
"""Share of the donor's elements that other names, or another layout, explain whatever is left over."""
SAME_SIZE = 0.01
"""How far apart two layouts of the same weights may be, in elements: buffers differ."""


@dataclass(frozen=True, slots=True)
class _Renaming:
    """What stands for what at the begin of names."""

    donors: str
    others: str

    @property
    def is_wrapper(self) -> bool:
        """Whether the two differ in wrappers alone, or in what loaders take for one another."""
        if _spelled(self.donors) == _spelled(self.others):
            return True
        left, right = (Counter(prefix.split(".")) for prefix in (self.donors, self.others))
        return set((left - right) + (right - left)) <= WRAPPERS | {""}

    @property
    def is_other_layer(self) -> bool:
        """Whether the two are numbered, and differently: that is another place, not another name."""
        left, right = ([part for part in prefix.split(".") if part.isdigit()] for prefix in (self.donors, self.others))
        return len(left) == len(right) and left != right

    @property
    def is_numbered(self) -> bool:
        """Whether one of the two tells a layer."""
        return any(part.isdigit() for prefix in (self.donors, self.others) for part in prefix.split("."))

    def is_of_stack(self, layer: "_Renaming") -> bool:
        """Return whether a layer is another one of the same stack under another name, if this is what differs."""
        return _NUMBER.sub("", self.of(layer.donors)) == _NUMBER.sub("", layer.others)

    def of(self, name: str) -> str:
        """Return the other's name of a tensor of the donor's, if that has what stands for it."""
        return self.others + name[len(self.donors) :] if name.startswith(self.donors) else ""


_SAME = _Renaming("", "")


def under_names_of(donor: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a checkpoint as it is to be read, with what is to be said of that among its remarks.

    Tensors that are the donor's but for their names get its names. Where these differ in more than a wrapper, the
    remark is a refusal, and what else does not fit is found as if it were accepted.
    """
    if other.specs.keys() == donor.specs.keys():
        return other
    names, renamings = _pairs(donor, other)
    if not names:
        return other
    return replace(renamed(other, names), remarks=(*other.remarks, _said(donor, other, renamings, len(names))))


def other_layout(donor: Checkpoint, other: Checkpoint) -> str | None:
    """Return that a checkpoint holds the donor's weights in other tensors, None if it does not seem so."""
    if other.specs.keys() == donor.specs.keys():
        return None
    lacking, besides = _apart(donor, other)
    if lacking and (factors := factors_within({name: other.specs[name] for name in besides})):
        return factors_said(redact(other.url), factors)
    if not lacking or not besides:
        return None
    for whole, part, names in ((donor, other, besides), (other, donor, lacking)):
        if folder := _folder_of(whole, names):
            return (
                f"{redact(part.url)} is what {redact(whole.url)} has in its folder {shown(folder)}: name "
                f"{redact(whole.url)}/{folder} in the place of the latter if that part is what is merged"
            )
    held, expected = (
        sum(each.specs[name].num_elems for name in names) for each, names in ((other, besides), (donor, lacking))
    )
    is_as_much = _is_much(lacking, donor) and abs(held - expected) <= SAME_SIZE * expected
    if min(len(lacking), len(besides)) < 2 or not is_as_much:
        return None
    return (
        f"{redact(other.url)} has {such(besides)} where "
        f"{redact(donor.url)} has {len(lacking):,} such as {shown(lacking[0])}, with as many elements: the same "
        "weights in another layout; save both with one version of one library"
    )


def _folder_of(whole: Checkpoint, names: Sequence[str]) -> str:
    """Return the folder of a model of several parts in which all tensors are that another model has besides."""
    folders = {name.partition("/")[0] for name in whole.specs if "/" in name}
    return next((each for each in sorted(folders) if all(f"{each}/{name}" in whole.specs for name in names)), "")


def _apart(donor: Checkpoint, other: Checkpoint) -> tuple[list[str], list[str]]:
    """Return what one lacks and what it has besides, in the order of each."""
    lacking = [name for name in donor.specs if name not in other.specs]
    return lacking, [name for name in other.specs if name not in donor.specs]


def _pairs(donor: Checkpoint, other: Checkpoint) -> tuple[dict[str, str], list[_Renaming]]:
    """Return the other's names by the donor's, and in what they differ, if these explain nearly all, or much of it.

    Both may have parts that the other lacks, such as towers, and parts of other shapes under like names.
    """
    lacking, besides = _apart(donor, other)
    bare = {_spelled(_unwrapped(name)): name for name in besides}
    found = {name: theirs for name in lacking if (theirs := bare.get(_spelled(_unwrapped(name))))}
    inside = {part for pair in found.items() for name in pair for part in name.split(".")} & _TRANSPARENT
    spelled = {_Renaming(ours, theirs) for ours, theirs in zip(_ends(found), _ends(found.values()), strict=True)}
    renamings = [_Renaming("", f"{part}.") for part in sorted(inside)[:1]]
    renamings += sorted((each for each in spelled if each.donors != each.others), key=str)
    parts = _renamed_parts(donor, other, [name for name in lacking if name not in found], besides)
    whole = _joined(found, parts)
    ends = _other_ends(donor, other, [name for name in lacking if name not in whole], (_SAME, *parts))
    if len(whole) + len(ends) < LEAST_SHARE * len(besides):
        parts = {renaming: names for renaming, names in parts.items() if not renaming.is_numbered}
        whole = _joined(found, parts)
        whole, renamings = (whole, [*renamings, *parts]) if _is_much(whole, donor) else ({}, [])
        ends = _other_ends(
            donor, other, [name for name in lacking if name not in whole], [_SAME, *parts] if whole else [_SAME]
        )
    else:
        renamings += parts
    return whole | ends, [*renamings, *_renamings_of_ends(ends)]


def _other_ends(
    donor: Checkpoint, other: Checkpoint, lacking: Iterable[str], renamings: Iterable[_Renaming]
) -> dict[str, str]:
    """Return the other's names of tensors of which it calls the module alike, and the parameter otherwise or not."""
    found: dict[str, str] = {}
    for name, renaming in product(lacking, renamings):
        for theirs in _with_other_end(renaming.of(name)):
            spec = other.specs.get(theirs)
            if spec and theirs not in donor.specs and spec.shape == donor.specs[name].shape:
                found.setdefault(theirs, name)
    return {name: theirs for theirs, name in found.items()}


def _with_other_end(name: str) -> Iterator[str]:
    """Yield what else a parameter may be called."""
    for ends in _PARAMETERS:
        for end in ends:
            if end and name.endswith(f".{end}"):
                stem = name.removesuffix(f".{end}")
                yield from (f"{stem}.{instead}" if instead else stem for instead in ends if instead != end)
    yield f"{name}.weight"


def _renamings_of_ends(names: Mapping[str, str]) -> list[_Renaming]:
    """Return what stands for what at the ends of names; the names themselves where these are few."""
    if len(names) <= MAX_RENAMINGS:
        return [_Renaming(name, theirs) for name, theirs in names.items()]
    ends = dict.fromkeys((_end(name), _end(theirs)) for name, theirs in names.items())
    return [_Renaming(*pair) for pair in list(ends)[:MAX_RENAMINGS]]


def _joined(found: Mapping[str, str], parts: Mapping[_Renaming, Mapping[str, str]]) -> dict[str, str]:
    return dict(chain(found.items(), *(names.items() for names in parts.values())))


def _renamed_parts(
    donor: Checkpoint, other: Checkpoint, lacking: Sequence[str], besides: Sequence[str]
) -> dict[_Renaming, dict[str, str]]:
    """Return the other's names by the donor's for each renaming under which all shapes fit, the likeliest first.

    There are none where layers have other numbers in what else would be one stack.
    """
    parts: dict[_Renaming, dict[str, str]] = {}
    held = set(besides)
    for _ in range(MAX_RENAMINGS):
        renaming = _likeliest(lacking, sorted(held))
        if renaming is None:
            break
        if renaming.is_other_layer and any(each.is_of_stack(renaming) for each in (_SAME, *parts)):
            return {}
        names = {name: theirs for name in lacking if (theirs := renaming.of(name)) in held}
        held -= set(names.values())
        lacking = [name for name in lacking if name not in names]
        are_alike = all(_are_alike(donor.specs[name], other.specs[theirs]) for name, theirs in names.items())
        if are_alike and not renaming.is_other_layer:
            parts[renaming] = names
    return parts


def _is_much(names: Iterable[str], donor: Checkpoint) -> bool:
    whole = sum(spec.num_elems for spec in donor.specs.values())
    return sum(donor.specs[name].num_elems for name in names) >= MUCH * max(whole, 1)


def _are_alike(ours: TensorSpec, theirs: TensorSpec) -> bool:
    """Return whether two tensors may be one under two names; vocabularies may have more or fewer tokens."""
    return ours.shape == theirs.shape or (ours.shape[1:] == theirs.shape[1:] and has_tokens(ours.name))


def _likeliest(lacking: Sequence[str], besides: Sequence[str]) -> _Renaming | None:
    """Return in what names differ that have most of their parts in common, by vote."""
    by_end: dict[str, list[list[str]]] = {}
    for name in lacking:
        by_end.setdefault(_end(name), []).append(name.split("."))
    votes: Counter[_Renaming] = Counter()
    for name in besides[:: max(len(besides) // NUM_VOTES, 1)]:
        theirs = name.split(".")
        ours = max(by_end.get(_end(name), ()), key=lambda each: _common_end(each, theirs), default=None)
        if ours:
            shared = _common_end(ours, theirs)
            votes[_Renaming(_prefix(ours, shared), _prefix(theirs, shared))] += 1
    return votes.most_common(1)[0][0] if votes else None


def _unwrapped(name: str) -> str:
    """Return a name without what wraps single modules."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT) if "._" in f".{name}" else name


def _spelled(name: str) -> str:
    """Return a name with the usual one of the ends that loaders take for one another."""
    end = _end_among(_SPELLINGS, name)
    return name.removesuffix(end) + _SPELLINGS[end] if end else name


def _ends(names: Iterable[str]) -> list[str]:
    """Return the ends of names of which loaders take one for another, empty for others."""
    ends = (*_SPELLINGS, *_SPELLINGS.values())
    return [_end_among(ends, name) for name in names]


def _end_among(ends: Iterable[str], name: str) -> str:
    """Return the first of these that a name ends with, in whole parts; empty if there is none."""
    return next((end for end in ends if f".{name}".endswith(f".{end}")), "")


def _end(name: str) -> str:
    """Return the last two parts of a name."""
    return ".".join(name.rsplit(".", 2)[-2:])


def _prefix(parts: Sequence[str], num_shared: int) -> str:
    return "".join(f"{part}." for part in parts[: len(parts) - num_shared])


def _common_end(left: Sequence[str], right: Sequence[str]) -> int:
    """Return how many last parts two names have in common."""
    pairs = zip(reversed(left), reversed(right), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint with new names for some of its tensors, by what they are called there."""
    new_names = {old: new for new, old in names.items()}
    specs = {new_names.get(name, name): spec for name, spec in checkpoint.specs.items()}
    return replace(
        checkpoint,
        specs={name: spec if spec.name == name else spec._replace(name=name) for name, spec in specs.items()},
        extents={**checkpoint.extents, **{new: checkpoint.extents[old] for old, new in new_names.items()}},
        stored={new_names.get(name, name): each for name, each in checkpoint.stored.items()},
        joined={new_names.get(name, name): each for name, each in checkpoint.joined.items()},
    )


def _said(donor: Checkpoint, other: Checkpoint, renamings: Sequence[_Renaming], count: int) -> Remark:
    ours, theirs = redact(donor.url), redact(other.url)
    instead = ", ".join(f"{shown(each.others)} for {shown(each.donors)}" for each in renamings)
    those = "that" if count == 1 else "those"
    text = f"{counted(count, 'tensor')} of {theirs} {are(count)} {those} of {ours} with {instead}"
    values = {each.donors: each.others for each in renamings}
    if all(renaming.is_wrapper for renaming in renamings):
        return Remark("other-names", f"{text}, and read as such", "note", (theirs,), values=values)
    return Remark(
        "other-names", f"{text}; they can be read as such if they mean the same", "refusal", (theirs,), values=values
    )
