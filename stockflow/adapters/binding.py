"""Binding of adapters that are merged: what becomes of each module, by the weights of a recipe; pure."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stockflow.adapters.combination import CombinationPlan, CombinedModule, CombinedTensor, FactorShare, Sources
from stockflow.adapters.peft import key_of_whole
from stockflow.adapters.sources import AdapterSource, Parts
from stockflow.checkpoints.adapters.keys import NESTED
from stockflow.checkpoints.adapters.names import unwrapped
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.errors import CheckpointError, PlanError
from stockflow.methods.gram import Gram
from stockflow.methods.protocol import Linear
from stockflow.planning.make import promoted
from stockflow.recipe import Recipe
from stockflow.text.strictjson import shown

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_FACTORS = frozenset(part for pair in _PAIRS for part in pair)
_NEEDS_BASE = {
    "lengths": "rows of DoRA have the length of base and change together",
    "lora_B.bias": "biases of factors (`lora_bias`) are not added up",
    "tokens": "rows of tokens that stand for the base's are not added up",
}
NEGLIGIBLE = 1e-12
"""Share of the base below which it is rounding of weights that sum to 1."""
MAX_NAMED = 8
WAY_ON = "Remove `output: adapter` to merge the models themselves"


def plan_combination(recipe: Recipe, sources: Sources, output_url: str) -> CombinationPlan:
    """Return what the adapters of a recipe make together.

    Raises:
        PlanError: a part of them is none of an adapter when merged, or the factors do not fit together.
        CheckpointError: an adapter's tensors and its config do not belong together.
    """
    binding = _Binding(recipe, sources)
    for module in dict.fromkeys(name for source in sources if source for name in source.names):
        binding.bind(module)
    if binding.problems:
        more = len(binding.problems) - MAX_NAMED
        raise PlanError(
            "\n  ".join(
                [
                    f"these adapters make no adapter together. {WAY_ON}",
                    *binding.problems[:MAX_NAMED],
                    *([f"... and {more} more"] if more > 0 else []),
                ]
            )
        )
    if not binding.modules:
        raise PlanError("no module has factors in these adapters, and PEFT loads no adapter without")
    return binding.plan(output_url)


class _Binding:
    """Finds what becomes of each module."""

    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        self.modules: list[CombinedModule] = []
        self.tensors: list[CombinedTensor] = []
        self.problems: list[str] = []
        self._recipe, self._sources = recipe, sources
        self._saved: dict[str, None] = {}
        self._turned = {source.adapter.config.fan_in_fan_out for source in sources if source}
        if len(self._turned) > 1:
            self.problems.append("some store weights as [in, out] (`fan_in_fan_out`), and some do not")

    def bind(self, module: str) -> None:
        """Take what all adapters have of a module, named without wrappers."""
        weights = coefficients(self._recipe, f"{module}.weight", len(self._sources))
        held = {number: source.parts(module) for number, source in enumerate(self._sources) if source}
        counted_parts = {number: parts for number, parts in held.items() if parts and weights[number]}
        if not counted_parts:
            return
        own = self._own(next(iter(counted_parts)), module)
        if problem := self._obstacle(own, counted_parts):
            self.problems.append(f"{shown(own)}: {problem}")
            return
        self._add_factors(own, counted_parts, weights)
        whole = {part for parts in counted_parts.values() for part in parts if part not in _FACTORS}
        for part in sorted(whole):
            self._add_whole(own, part, counted_parts, weights)

    def _own(self, number: int, module: str) -> str:
        """Return what an adapter calls a module."""
        return self._source(number).names[unwrapped(module)]

    def _source(self, number: int) -> AdapterSource:
        source = self._sources[number]
        assert source is not None
        return source

    def _obstacle(self, module: str, held: Mapping[int, Parts]) -> str | None:
        """Return what of a module cannot be put together."""
        for number, parts in held.items():
            where = self._source(number).where
            for part in parts:
                if part in _NEEDS_BASE:
                    return f"{_NEEDS_BASE[part]} ({where})"
            if _is_of_experts(self._source(number), module):
                return f"its factors are of all experts of a layer at once ({where})"
        return None

    def _add_factors(self, module: str, held: Mapping[int, Parts], weights: Sequence[float]) -> None:
        shares, shapes, kinds = [], set(), set()
        for number, parts in held.items():
            for pair in _PAIRS:
                if parts.keys() >= set(pair):
                    keys = parts[pair[0]], parts[pair[1]]
                    share, shape = self._share(number, self._own(number, module), keys, weights[number])
                    shares.append(share)
                    shapes.add(shape)
                    kinds.add(pair)
        if not shares:
            return
        if len(shapes) > 1 or len(kinds) > 1 or None in shapes:
            found = " and ".join(str(list(shape)) if shape else "no matrix" for shape in sorted(shapes, key=str))
            self.problems.append(f"{shown(module)}: its factors make changes of several shapes: {found}")
            return
        (shape,) = shapes
        assert shape is not None
        total = sum(share.rank for share in shares)
        rank = min(total, self._recipe.stockflow.rank or total)
        self.modules.append(CombinedModule(module, kinds == {_PAIRS[1]}, tuple(shares), shape, rank))

    def _share(
        self, number: int, module: str, keys: tuple[str, str], weight: float
    ) -> tuple[FactorShare, tuple[int, int] | None]:
        """Return what an adapter gives to a module, and the shape of its product; None if the two make none."""
        source = self._source(number)
        a, b = (source.spec(key) for key in keys)
        if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0):
            return FactorShare(number, keys, 0, weight), None
        rank, scales = a.shape[0], source.scales
        if rank not in scales.ranks_of(module):
            expected = " or ".join(map(str, sorted(scales.ranks_of(module))))
            raise CheckpointError(
                f"{source.where}: the factors of {shown(module)} have the rank {rank}, and adapter_config.json says "
                f"{expected} (`r`, `rank_pattern`); the two do not belong together"
            )
        return FactorShare(number, keys, rank, weight * scales.scale_of(module, rank)), (b.shape[0], a.shape[1])

    def _add_whole(self, module: str, part: str, held: Mapping[int, Parts], weights: Sequence[float]) -> None:
        """Add a tensor that is held whole; it is a sum of all only if the base has no share in it."""
        counting = [number for number, weight in enumerate(weights) if abs(weight) > NEGLIGIBLE]
        lacking = [number for number in counting if part not in held.get(number, {})]
        name = f"{module}.{part}".replace(".base.", f"{NESTED}.")
        if lacking:
            source = self._sources[lacking[0]]
            where = source.where if source else "the base, which has a share of the result"
            self.problems.append(f"{shown(name)} is held whole, and not by {where}")
            return
        shares = tuple((number, held[number][part], weights[number]) for number in counting)
        specs = [self._source(number).spec(key) for number, key, _ in shares]
        if len({spec.shape for spec in specs}) > 1:
            shapes = " and ".join(str(list(spec.shape)) for spec in specs)
            self.problems.append(f"{shown(name)} is held whole, of several shapes: {shapes}")
            return
        is_saved = any(self._source(number).adapter.config.saves(self._own(number, module)) for number in counting)
        if is_saved and not part.startswith("base."):
            self._saved[module] = None
        elif part.endswith("bias"):
            name = f"{module}{NESTED if any(each.module == module for each in self.modules) else ''}.bias"
        dtype = self._recipe.output_dtype or promoted(spec.dtype for spec in specs)
        self.tensors.append(CombinedTensor(TensorSpec(key_of_whole(name), dtype, specs[0].shape), shares))

    def plan(self, output_url: str) -> CombinationPlan:
        """Return all of it."""
        shares = [share for each in self.modules for share in each.shares]
        used = [self._source(share.source).spec(key) for share in shares for key in share.keys]
        whole = [self._source(number).spec(key) for each in self.tensors for number, key, _ in each.shares]
        saved = tuple(self._saved)
        biases = [each for each in self.tensors if each.spec.name.endswith(".bias")]
        told = [source.base for source in self._sources if source and source.base]
        return CombinationPlan(
            output_url=output_url,
            base=self._recipe.base_model or next(iter(told), None),
            urls=tuple(source.store.url for source in self._sources if source),
            dtype=self._recipe.output_dtype or promoted(spec.dtype for spec in used),
            modules=tuple(self.modules),
            tensors=tuple(self.tensors),
            saved=saved,
            has_biases=any(not each.spec.name.startswith(tuple(map(_key_start, saved))) for each in biases),
            is_turned=True in self._turned,
            task=self._task(),
            num_read=sum(spec.num_bytes for spec in (*used, *whole)),
        )

    def _task(self) -> str | None:
        """Return the task that all were trained for.

        Raises:
            PlanError: there are several, whose heads and losses differ.
        """
        told = {task: source.where for source in self._sources if source and (task := source.adapter.config.task)}
        if len(told) > 1:
            (one, where), (other, there), *_ = told.items()
            raise PlanError(
                f"{where} was trained for {shown(one)}, and {there} for {shown(other)}; an adapter is for one task. If "
                "they are of one, let `task_type` in adapter_config.json say so"
            )
        return next(iter(told), None)


def _key_start(module: str) -> str:
    return key_of_whole(f"{module}.")


def _is_of_experts(source: AdapterSource, module: str) -> bool:
    return bool(source.adapter.config.parameters_of(module.removesuffix(NESTED)))


def coefficients(recipe: Recipe, name: str, num_sources: int) -> Sequence[float]:
    """Return the weight of each of a recipe's locations in a tensor; they sum to 1.

    Raises:
        PlanError: they do not, so that the base itself would be scaled.
    """
    method = recipe.method_for(None)
    sources = recipe.sources(method)
    rule = method.rule
    assert isinstance(rule, Linear)
    found = rule.coefficients(
        Gram(np.zeros((1, len(sources), len(sources)))), recipe.parameters_for(method, name, None)
    )
    weights = found.weights_GM[0].tolist()
    if not found.anchored:
        raise PlanError(
            f"the weights of {shown(name)} sum to {math.fsum(weights):g}, which would scale the base, too; with "
            "`output: adapter`, let them sum to 1, or take `normalize: true` or `merge_method: task_arithmetic`"
        )
    shares = [0.0] * num_sources
    for number, weight in zip(sources, [1.0 - math.fsum(weights), *weights], strict=True):
        shares[number] += weight
    return shares
