"""Misfits: tensors that checkpoints lack, have besides or hold otherwise; grouped before they are told."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

MOST = 0.5
"""A share of a model's elements beyond which no rule is proposed: what would be left is no merge."""
MAX_FILTERS = 4
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor that stands against a merge."""

    name: str
    predicate: str
    """what is said of it behind ``is``"""
    remedy: str = ""
    """what can be done, with THEM for ``it`` or ``them``"""
    action: str = ""
    """of the rules that do it"""


THEM = "{them}"


@dataclass(frozen=True, slots=True)
class _Cluster:
    """Tensors that share a misfit and a place in the tree of names."""

    names: tuple[str, ...]
    where: str = ""
    """what they share, in words"""


def told(misfits: Sequence[Misfit], specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield a sentence per group of misfits, in the order of their first ones.

    Args:
        misfits: what was found.
        specs: every tensor of every checkpoint by name, for what a filter would match and how much a group is.
    """
    alike: dict[Misfit, list[str]] = {}
    for each in misfits:
        alike.setdefault(replace(each, name=""), []).append(each.name)
    for misfit, names in alike.items():
        for cluster in _clusters(names, specs):
            yield "; ".join(filter(None, _sentences(misfit, cluster, specs)))


def _sentences(misfit: Misfit, cluster: _Cluster, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    names = cluster.names
    if len(names) == 1:
        yield f"{shown(names[0])} is {misfit.predicate}"
        yield misfit.remedy.replace(THEM, "it")
        return
    yield f"{counted(len(names), 'tensor')} {cluster.where} are {misfit.predicate}"
    if misfit.action and _share(names, specs) > MOST:
        yield "that is most of a model, so no rule makes a merge of it: are these the models you mean?"
        return
    yield misfit.remedy.replace(THEM, "them")
    if misfit.action and (found := _filters(names, specs)):
        rules = ", ".join(f"{{filter: {json.dumps(text)}, action: {misfit.action}}}" for text in found)
        yield f"to paste: `stockflow: {{rules: [{rules}]}}`"


def _share(names: Collection[str], specs: Mapping[str, TensorSpec]) -> float:
    whole = sum(spec.num_elems for spec in specs.values())
    return sum(specs[name].num_elems for name in names) / whole if whole else 0.0


def _clusters(names: Sequence[str], universe: Collection[str]) -> Iterator[_Cluster]:
    """Yield whole branches of the tree of names, and single tensors; those that differ in numbers together."""
    if len(names) == 1:
        yield _Cluster((names[0],))
        return
    branches: dict[str, list[str]] = {}
    part, whole = _branch_sizes(names), _branch_sizes(universe)
    for name in names:
        whole_branch = next((each for each in _branches(name) if part[each] == whole[each] > 1), name)
        branches.setdefault(_NUMBER.sub("*", whole_branch), []).append(name)
    for pattern, members in branches.items():
        yield _Cluster(tuple(members), _where(pattern, members))


def _where(pattern: str, members: Sequence[str]) -> str:
    if not pattern.endswith(".") and pattern:
        return f"like {shown(members[0])}"
    if "*" not in pattern:
        return f"of {shown(pattern)}" if pattern else "of it, all there are,"
    depth = pattern.index("*")
    numbers = sorted({int(number[0]) for name in members if (number := re.match(r"\d+", name[depth:]))})
    between = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"of {shown(pattern)} ({between})"


def _branches(name: str) -> Iterator[str]:
    """Yield the branches that a tensor is on, from the root: ``""``, ``model.``, ``model.layers.`` ..."""
    yield ""
    yield from (name[: dot.end()] for dot in re.finditer(r"\.", name))


def _branch_sizes(names: Iterable[str]) -> Counter[str]:
    return Counter(branch for name in names for branch in _branches(name))


def _filters(names: Sequence[str], universe: Collection[str]) -> list[str]:
    """Return parts of names that match these tensors and no others, as few as there are; [] where there are none."""
    wanted = frozenset(names)
    for found in (_shared_parts(names), sorted({_longest_branch([name]) for name in names})):
        if len(found) > MAX_FILTERS:
            continue
        singly = [[text] for text in found]
        for texts in (*singly, found):
            if all(texts) and {name for name in universe if any(text in name for text in texts)} == wanted:
                return texts
    return []


def _shared_parts(names: Sequence[str]) -> list[str]:
    """Return what all names share between their numbers, the longest first."""
    first = names[0]
    parts = [part for part in (_longest_branch(names), *_NUMBER.split(first)) if len(part) > 1]
    shared = [part for part in parts if all(part in name for name in names)]
    return sorted(dict.fromkeys(shared), key=len, reverse=True)[:MAX_FILTERS]


def _longest_branch(names: Sequence[str]) -> str:
    candidates = [branch for branch in _branches(names[0]) if all(name.startswith(branch) for name in names)]
    return candidates[-1]
