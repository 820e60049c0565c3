"""Adapted tensors: which tensors of a base an adapter changes, and how each of them is stored then."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from stockflow.checkpoints.adapters.checks import (
    Parts,
    check_promises,
    check_vocabulary,
    on_biases,
    on_targets,
    on_task,
)
from stockflow.checkpoints.adapters.config import AdapterConfig, ModuleScales
from stockflow.checkpoints.adapters.experts import expert_factors
from stockflow.checkpoints.adapters.ground import Ground, stores_turned
from stockflow.checkpoints.adapters.keys import NESTED, ORIGINAL, by_module
from stockflow.checkpoints.adapters.opening import NUM_NAMED, Adapter
from stockflow.checkpoints.decodes.low_rank import Added, Lengths, LowRank, ReplacedRows
from stockflow.checkpoints.decodes.stored import Decode, plain
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.heads import is_head, may_be_tied, tied_names
from stockflow.checkpoints.quantised import Stored
from stockflow.errors import CheckpointError
from stockflow.storage import key_of_adapter
from stockflow.text.examples import some
from stockflow.text.remarks import Remark
from stockflow.text.sizes import counted
from stockflow.text.strictjson import shown


@dataclass(slots=True)
class Adapted:
    """What an adapter makes of a base."""

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    """of tensors that the base lacks, or has in another shape"""
    stored: dict[str, Stored] = field(default_factory=dict)
    """of every tensor that it changes; parts of the adapter by their keys"""
    parted: dict[str, str] = field(default_factory=dict)
    """of heads that the base ties and this does not: the tensor of the base whose bytes they begin with"""
    unties: bool = False
    """whether head and embedding are two tensors only because of it"""
    remarks: tuple[Remark, ...] = ()


def adapted(ground: Ground, adapter: Adapter) -> Adapted:
    """Return what an adapter makes of its base.

    Raises:
        CheckpointError: a tensor of the adapter has no place there, or does not fit; all of the former are counted.
    """
    for spec in (each for each in adapter.specs.values() if each.kind != "float"):
        raise CheckpointError(f"{adapter.where}: {shown(spec.name)} is of {spec.dtype}, expected plain numbers")
    try:
        modules = by_module(adapter.specs)
    except ValueError as error:
        raise CheckpointError(f"{adapter.where}: {error}") from None
    binder = _Binder(ground, adapter, modules)
    for module, parts in modules.items():
        binder.bind(module, parts)
    if binder.left:
        count = counted(len(binder.left), "tensor")
        raise CheckpointError(
            f"{adapter.where}: {count} of {len(adapter.specs)} have no place in {ground.where}: "
            f"{some(binder.left, NUM_NAMED)}. Name the base that the adapter was trained on"
        )
    check_promises(ground, adapter, modules)
    binder.untie()
    check_vocabulary(ground, adapter, binder.made.specs)
    binder.made.remarks = (
        *on_biases(ground, adapter, modules),
        *on_targets(ground, adapter, modules),
        *on_task(ground, adapter, binder.brought()),
    )
    return binder.made


class _Binder:
    """Finds the place of every tensor of an adapter, module by module."""

    def __init__(self, ground: Ground, adapter: Adapter, modules: Mapping[str, Parts]) -> None:
        self.ground, self.adapter, self._modules = ground, adapter, modules
        self.scales = ModuleScales(adapter.config, modules)
        self.made = Adapted()
        self.left: list[str] = []
        self._owners: dict[str, str] = {}
        self._module = ""

    def bind(self, module: str, parts: Parts) -> None:
        """Take all tensors of a module."""
        if self._is_embedding_again(module, parts):
            return
        left, self._module = dict(parts), module
        for take in (self._take_base, self._take_product, self._take_tokens, self._take_replaced):
            for part in take(module, left):
                left.pop(part)
        self.left += left.values()

    def untie(self) -> None:
        """Give a head of its own to a model that ties it, where an adapter changes the embedding alone."""
        config, names = self.adapter.config, tied_names(self.ground.specs)
        if names.heads or config.keeps_ties or any(map(is_head, self.made.specs)):
            return
        for name in names.embeddings:
            head, stored = self.ground.head_beside(name), self.made.stored.get(name)
            if stored and not _keeps_tie(stored, config, name) and self.ground.tied_original(head) == name:
                self._part(head, name)

    def brought(self) -> list[TensorSpec]:
        """Return the tensors that the base has no place for, heads but for that are tied there."""
        known, made = self.ground.specs, self.made
        new = [spec for name, spec in made.specs.items() if name not in known and name not in made.parted]
        return [spec for spec in new if not self.ground.tied_original(spec.name)]

    def _is_embedding_again(self, module: str, parts: Parts) -> bool:
        """Return whether a module is the head of a base that ties it, and PEFT wrote the embedding's tensors for it."""
        original, config = self.ground.tied_original(f"{module}.weight"), self.adapter.config
        embeddings = (
            each for each in self._modules if original and self.ground.names.find(f"{each}.weight") == original
        )
        for embedding in embeddings:
            are_same_rows = "tokens" in parts and config.tokens_of(module) == config.tokens_of(embedding)
            is_resized = parts.keys() == {"weight"} and not config.saves(module) and not config.saves(embedding)
            return config.keeps_ties or are_same_rows or (is_resized and "weight" in self._modules[embedding])
        return False

    def _take_base(self, module: str, parts: Parts) -> Iterator[str]:
        """Take copies of the base's own tensors, which count in its place."""
        if "base.weight" in parts and (name := self._weight_of(module)):
            self._replace(name, parts["base.weight"])
            yield "base.weight"
        if "base.bias" in parts and (name := self.ground.names.find(f"{module}.bias")):
            self._replace(name, parts["base.bias"])
            yield "base.bias"

    def _take_product(self, module: str, parts: Parts) -> Iterator[str]:
        is_embedding = "lora_embedding_A" in parts
        pair = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        if not parts.keys() >= set(pair):
            return
        key_a, key_b = (parts[part] for part in pair)
        name = self._weight_of(module)
        if name is None:
            factors = expert_factors(self.ground, self.adapter, self.scales, module, (key_a, key_b))
            for changed, change in factors:
                self._put(changed, change(self._stored_as(changed).decode), key_a, key_b)
            yield from pair if factors else ()
            return
        decode = self._product(module, name, key_a, key_b, is_embedding=is_embedding)
        self._put(name, decode, key_a, key_b)
        yield from pair
        if key := parts.get("lengths"):
            self._put(name, self._lengths(decode, name, key), key)
            yield "lengths"
        if key := parts.get("lora_B.bias"):
            yield from self._add_to_bias(module, key, decode.scale)

    def _product(self, module: str, name: str, key_a: str, key_b: str, *, is_embedding: bool) -> LowRank:
        spec = self._spec(name)
        a, b = self.adapter.specs[key_a], self.adapter.specs[key_b]
        rank = a.shape[0] if a.shape else 0
        rows, columns = (spec.shape[0], math.prod(spec.shape[1:])) if spec.shape else (0, 0)
        fits = rank > 0 and a.num_elems == rank * columns and b.num_elems == rank * rows
        fits_turned = rank > 0 and a.num_elems == rank * rows and b.num_elems == rank * columns and len(spec.shape) == 2
        is_transposed = fits_turned and (not fits or is_embedding or self._is_turned(name))
        if not (fits or is_transposed):
            raise CheckpointError(
                f"{self.adapter.where}: {shown(key_a)} {list(a.shape)} and {shown(key_b)} {list(b.shape)} make no "
                f"change of {shown(name)} {list(spec.shape)} in {self.ground.where}; name the base it was trained on"
            )
        self._check_rank(module, rank)
        scale, matrix = self.scales.scale_of(module, rank), (rows, columns)
        return LowRank(self._stored_as(name).decode, rank, scale, (a.dtype, b.dtype), matrix, is_transposed)

    def _is_turned(self, name: str) -> bool:
        """Return whether a square matrix of a linear layer is stored as ``[in, out]``.

        PEFT goes by the class of the layer, and its config has the flag of the last one that it wrapped.
        """
        return self._turned_elsewhere and not is_head(name)

    @cached_property
    def _turned_elsewhere(self) -> bool:
        """Whether others among the adapted matrices are stored as ``[in, out]``, or config or family says so."""
        seen = {turned for module in self._modules if (turned := self._turned_by_shape(module)) is not None}
        if len(seen) == 1:
            return seen.pop()
        return stores_turned(self.ground.config) or self.adapter.config.fan_in_fan_out

    def _turned_by_shape(self, module: str) -> bool | None:
        """Return whether a matrix that no head is must be one of ``[in, out]``; None if its shape does not tell."""
        parts, name = self._modules[module], self.ground.names.find(f"{module}.weight")
        if name is None or is_head(name) or not parts.keys() >= {"lora_A", "lora_B"}:
            return None
        shape, (a, b) = self._spec(name).shape, (self.adapter.specs[parts[each]].shape for each in ("lora_A", "lora_B"))
        if len(shape) != 2 or len(a) != 2 or len(b) != 2 or shape[0] == shape[1]:
            return None
        return shape == (a[1], b[0]) if {*shape} == {a[1], b[0]} else None

    def _check_rank(self, module: str, rank: int) -> None:
        expected = self.scales.ranks_of(module)
        if rank not in expected:
            raise CheckpointError(
                f"{self.adapter.where}: the factors of {shown(module)} have the rank {rank}, and adapter_config.json "
                f"says {' or '.join(map(str, sorted(expected)))} (`r`, `rank_pattern`); the two do not belong together"
            )

    def _lengths(self, decode: LowRank, name: str, key: str) -> Decode:
        found, spec = self.adapter.specs[key], self._spec(name)
        if decode.is_transposed or found.num_elems != spec.shape[0]:
            raise CheckpointError(
                f"{self.adapter.where}: {shown(key)} {list(found.shape)} scales the columns of {shown(name)} "
                f"{list(spec.shape)} (DoRA of an embedding or a Conv1D), which is not read; merge it with PEFT first"
            )
        return Lengths(decode, found.dtype)

    def _add_to_bias(self, module: str, key: str, scale: float) -> Iterator[str]:
        """Take what LoRA adds to a bias (`lora_bias`)."""
        if name := self.ground.names.find(f"{module}.bias"):
            self._check_shape(key, self._spec(name))
            self._put(name, Added(self._stored_as(name).decode, self.adapter.specs[key].dtype, scale), key)
            yield "lora_B.bias"

    def _take_tokens(self, module: str, parts: Parts) -> Iterator[str]:
        name = self._weight_of(module) if "tokens" in parts else None
        if name:
            key, spec = parts["tokens"], self._spec(name)
            indices = self.adapter.config.tokens_of(module)
            self._check_shape(key, spec._replace(shape=(len(indices), *spec.shape[1:])))
            if max(indices, default=0) >= spec.shape[0] or len(set(indices)) < len(indices):
                raise CheckpointError(
                    f"{self.adapter.where}: `trainable_token_indices` has ids beyond the {spec.shape[0]:,} rows of "
                    f"{shown(name)}, or one twice"
                )
            self._put(name, ReplacedRows(self._stored_as(name).decode, self.adapter.specs[key].dtype, indices), key)
            yield "tokens"

    def _take_replaced(self, module: str, parts: Parts) -> Iterator[str]:
        """Take tensors that stand in for those of the base, or that it lacks and a new module has."""
        for part in list(parts):
            if part.startswith(("lora_", "lengths", "tokens", "base.", ORIGINAL)):
                continue
            whole = f"{module}.{part}" if module else part
            name = self.ground.names.find(whole)
            if name is None and self.adapter.config.saves(module):
                self.made.specs[whole] = self.adapter.specs[parts[part]]._replace(name=whole)
                self.made.unties |= self.ground.tied_original(whole) is not None
                name = whole
            if name:
                self._replace(name, parts[part])
                yield part

    def _weight_of(self, module: str) -> str | None:
        """Return the name of a module's weight; of a head that the base ties, that of a new one."""
        whole = f"{module}.weight"
        name = self.ground.names.find(whole)
        if name is not None or module.endswith(NESTED):
            return name
        original = self.ground.tied_original(whole)
        if original is None:
            return None
        if whole not in self.made.specs:
            self._part(whole, original)
        return whole

    def _part(self, head: str, embedding: str) -> None:
        """Give the model a head of its own, which is what the base ties it to."""
        self.made.specs[head] = self.ground.specs[embedding]._replace(name=head)
        stored = self.ground.stored_as(embedding)
        first, *others = stored.parts
        self.made.stored[head] = replace(stored, parts=(first._replace(name=head), *others))
        self.made.parted[head] = first.name
        self.made.unties = True

    def _claim(self, name: str) -> None:
        """Note whose a tensor of the base is, and refuse a second module that is found to be the same."""
        owner = self._owners.setdefault(name, self._module)
        if owner != self._module:
            raise CheckpointError(
                f"{self.adapter.where}: {shown(owner)} and {shown(self._module)} are both {shown(name)} in "
                f"{self.ground.where}; the adapter is of another model"
            )

    def _replace(self, name: str, key: str) -> None:
        self._claim(name)
        found, own = self.adapter.specs[key], self.ground.specs.get(name)
        if own is not None and found.shape != own.shape:
            is_of_tokens = may_be_tied(f"{name.rpartition('.')[0]}.weight") and found.shape[1:] == own.shape[1:]
            if not (is_of_tokens and found.shape):
                self._check_shape(key, own)
            self.made.specs[name] = own._replace(shape=found.shape)
        self.made.stored[name] = Stored(plain(found.dtype), (self._part_of(key),))

    def _put(self, name: str, decode: Decode, *keys: str) -> None:
        self._claim(name)
        self.made.stored[name] = Stored(decode, (*self._stored_as(name).parts, *map(self._part_of, keys)))

    def _part_of(self, key: str) -> TensorSpec:
        return self.adapter.specs[key]._replace(name=key_of_adapter(key))

    def _stored_as(self, name: str) -> Stored:
        return self.made.stored.get(name) or self.ground.stored_as(name)

    def _spec(self, name: str) -> TensorSpec:
        return self.made.specs.get(name) or self.ground.specs[name]

    def _check_shape(self, key: str, expected: TensorSpec) -> None:
        found = self.adapter.specs[key]
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{self.adapter.where}: {shown(key)} is {list(found.shape)}, expected {list(expected.shape)} for "
                f"{shown(expected.name)} of {self.ground.where}"
            )


def _keeps_tie(stored: Stored, config: AdapterConfig, name: str) -> bool:
    """Return whether what an adapter does to an embedding is done to a tied head, too: its rows, or all of the base."""
    is_whole = len(stored.parts) == 1
    return isinstance(stored.decode, ReplacedRows) or (is_whole and not config.saves(name.removesuffix(".weight")))
