"""Targets: which tensors of two checkpoints an adapter changes by factors, holds whole, or cannot hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stockflow.checkpoints.adapters.ground import stores_turned
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import has_head, head_beside, is_head, tie_flag, tied_names
from stockflow.checkpoints.naming import kind_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.kernels.floats import FORMATS
from stockflow.planning.spans import SPAN_ELEMS
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown

_NOT_LINEAR = frozenset({"norm", "router", "embedding"})
"""Kinds of modules that PEFT puts no factors of linear layers on."""
_BUFFER = ".rotary_emb.inv_freq"
NUM_NAMED = 8


@dataclass(frozen=True, slots=True)
class FactorTarget:
    """A matrix that may be changed by factors."""

    name: str
    shape: tuple[int, int]
    is_embedding: bool = False
    is_turned: bool = False
    """whether the factors are those of the transposed matrix"""

    @property
    def module(self) -> str:
        """Name of the module whose weight it is."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one architecture."""

    base: Checkpoint
    tuned: Checkpoint
    takes_embeddings: bool
    """whether embeddings are changed by factors"""

    @cached_property
    def is_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        flag, stores_head = tie_flag(self.base.config), bool(tied_names(self.base.specs).heads)
        return has_head(self.base.config) and (flag is True or (flag is None and not stores_head))

    @cached_property
    def targets(self) -> tuple[FactorTarget, ...]:
        """Matrices that may be changed by factors."""
        return tuple(target for spec in self.base.specs.values() if (target := self._target(spec)))

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Names of all other tensors that have elements."""
        names = {target.name for target in self.targets}
        return tuple(name for name, spec in self.base.specs.items() if name not in names and spec.num_elems)

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Names of embeddings of tokens."""
        return frozenset(tied_names(self.base.specs).embeddings)

    def _target(self, spec: TensorSpec) -> FactorTarget | None:
        is_matrix = len(spec.shape) == 2 and spec.num_elems and spec.shape[1] <= SPAN_ELEMS
        if not is_matrix or not spec.name.endswith(".weight") or not self._has_numbers(spec.name):
            return None
        shape = (spec.shape[0], spec.shape[1])
        if spec.name in self.embeddings:
            is_taken = self.takes_embeddings and not self.is_tied
            return FactorTarget(spec.name, shape, is_embedding=True, is_turned=True) if is_taken else None
        if kind_of(spec.name) in _NOT_LINEAR:
            return None
        return FactorTarget(spec.name, shape, is_turned=stores_turned(self.base.config) and not is_head(spec.name))

    def _has_numbers(self, name: str) -> bool:
        return self.base.specs[name].dtype in FORMATS and self.tuned.specs[name].dtype in FORMATS

    @cached_property
    def linear_modules(self) -> frozenset[str]:
        """Names of the linear layers."""
        return frozenset(target.module for target in self.targets if not target.is_embedding)

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[str]]:
        """Names of the tensors of every module that has no modules within."""
        found: dict[str, list[str]] = {}
        for name in self.base.specs:
            found.setdefault(module_of(name), []).append(name)
        outer = {""} | {module[:dot] for module in found for dot in range(len(module)) if module[dot] == "."}
        return {module: names for module, names in found.items() if module not in outer}

    def heads_beside(self, name: str) -> Sequence[str]:
        """Return the name of the head that an embedding is, too, if it is."""
        is_head_too = self.is_tied and name in self.embeddings
        return [head_beside(name, self.base.specs, self.base.config)] if is_head_too else []


def paired(base: Checkpoint, tuned: Checkpoint, *, takes_embeddings: bool) -> Pair:
    """Return two checkpoints as a pair, without what no loader reads.

    Raises:
        PlanError: they differ in names or shapes.
    """
    pair = Pair(_without_unread(base), _without_unread(tuned), takes_embeddings)
    _check_names(pair)
    for name, spec in pair.base.specs.items():
        found = pair.tuned.specs[name]
        if found.shape != spec.shape:
            is_vocabulary = found.shape[1:] == spec.shape[1:] and kind_of(name) in ("embedding", "head")
            why = "rows were added to its vocabulary" if is_vocabulary else "they are of two architectures"
            raise PlanError(
                f"{shown(name)} is {list(spec.shape)} in {_where(base)} and {list(found.shape)} in {_where(tuned)}: "
                f"{why}, and an adapter changes no shapes. Name a base of equal shapes"
            )
    return pair


def _without_unread(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out rotary frequencies, which loaders compute, and a head that the config ties to the embedding."""
    is_tied = tie_flag(checkpoint.config) is True
    specs = {
        name: spec
        for name, spec in checkpoint.specs.items()
        if not name.endswith(_BUFFER) and not (is_tied and is_head(name))
    }
    return replace(checkpoint, specs=specs)


def _check_names(pair: Pair) -> None:
    for one, other in ((pair.base, pair.tuned), (pair.tuned, pair.base)):
        if only := [name for name in one.specs if name not in other.specs]:
            raise PlanError(
                f"{counted(len(only), 'tensor')} of {_where(one)} {_are(only)} not in {_where(other)}: "
                f"{some(only, NUM_NAMED)}. An adapter neither adds nor removes tensors; name the base that the other "
                "was tuned from"
            )


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _where(checkpoint: Checkpoint) -> str:
    return redact(checkpoint.url)


@dataclass(frozen=True)
class KeptWhole:
    """What of changed tensors that do not decompose is written."""

    modules: tuple[str, ...] = ()
    """that are saved whole"""
    biases: tuple[str, ...] = ()
    """names of biases of linear layers"""


def kept_whole(pair: Pair, changed: Sequence[str], *, keep: bool) -> KeptWhole:
    """Return how changed tensors that do not decompose are written.

    Raises:
        PlanError: PEFT can hold some in no way, or they are not to be kept.
    """
    impossible = [name for name in changed if not _is_possible(pair, name)]
    if impossible:
        raise PlanError(
            f"{_changed(impossible)}, which PEFT neither adapts nor saves whole: {some(impossible, NUM_NAMED)}. "
            f"{_reason(pair, impossible[0])}; merge checkpoints instead of adapters"
        )
    if changed and not keep:
        raise PlanError(
            f"{_changed(changed)} that no factors hold: {some(changed, NUM_NAMED)}. --keep-whole writes them "
            "whole beside the factors (`modules_to_save` and `bias` of PEFT)" + _on_embeddings(pair, changed)
        )
    biases = tuple(name for name in changed if _is_bias(pair, name))
    saved = dict.fromkeys(module_of(name) for name in changed if name not in biases)
    return KeptWhole(tuple(saved), tuple(name for name in biases if module_of(name) not in saved))


def _changed(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'tensor')} changed"


def _on_embeddings(pair: Pair, changed: Sequence[str]) -> str:
    if not any(name in pair.embeddings for name in changed):
        return ""
    if pair.is_tied:
        return "; the embedding is the head, too, and PEFT adds factors of both when it merges"
    return "; --embeddings writes factors of embeddings"


def module_of(name: str) -> str:
    """Return the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def _is_bias(pair: Pair, name: str) -> bool:
    return name.endswith(".bias") and module_of(name) in pair.linear_modules


def _is_possible(pair: Pair, name: str) -> bool:
    parameters = pair.parameters.get(module_of(name), ())
    are_numbers = bool(parameters) and all(pair.tuned.specs[each].dtype in FORMATS for each in parameters)
    return are_numbers or (_is_bias(pair, name) and pair.tuned.specs[name].dtype in FORMATS)


def _reason(pair: Pair, name: str) -> str:
    spec = pair.tuned.specs[name]
    if spec.dtype not in FORMATS:
        return f"The first is of {spec.dtype}"
    return "The first is a parameter of a module that has others within"
