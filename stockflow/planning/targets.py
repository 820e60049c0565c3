"""Targets: the tensors of the output, each with what it is made from, in the order of the output.

Models that are merged whole keep the names and the order of the donor. Slices give their layers consecutive numbers;
what lies outside of layers comes from the first slice if it is an embedding, else from the last.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.naming import LayerNames
from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.planning.towers import Tower, comes_first, depth_of, num_layers, sides_of, tower_of
from stockflow.recipe import Recipe
from stockflow.recipe.resolve import OUTSIDE, Stand
from stockflow.recipe.slices import Slice, module_of, slices_of
from stockflow.storage import redact

MAX_SAID = 20
"""of ranges that go beyond the layers of a model"""


@dataclass(frozen=True)
class Stretch:
    """A run of layers of the output: how it is merged, and from which checkpoints."""

    recipe: Recipe
    numbers: tuple[int, ...]
    """of its checkpoints among all"""
    checkpoints: tuple[Checkpoint, ...]
    """in the order of its ``recipe.checkpoints``; the first gives names and dtypes"""

    @cached_property
    def sources(self) -> Mapping[str, tuple[int, ...]]:
        """Which of its checkpoints each method in use reads, by name of the method, its anchor first."""
        return {method.name: self.recipe.sources(method) for method in self.recipe.methods}

    def urls(self, indices: Iterable[int]) -> str:
        """Return the locations of some of its checkpoints."""
        return ", ".join(redact(self.checkpoints[index].url) for index in indices)


class OutputTensor(NamedTuple):
    """A tensor of the output."""

    stretch: Stretch
    spec: TensorSpec
    """as its donor has it, by its name in the output"""
    names: tuple[str, ...]
    """in each checkpoint of the stretch"""
    stand: Stand

    def source(self, index: int) -> TensorSpec:
        """Return what a checkpoint of the stretch has for it, by its name in the output."""
        found = self.stretch.checkpoints[index].specs[self.names[index]]
        return found if found.name == self.spec.name else found._replace(name=self.spec.name)

    def is_alike(self, indices: Iterable[int]) -> bool:
        """Return whether checkpoints have it in the dtype and shape of the donor."""
        checkpoints, names, spec = self.stretch.checkpoints, self.names, self.spec
        for index in indices:
            found = checkpoints[index].specs[names[index]]
            if found != spec and found[1:] != spec[1:]:  # mostly all is equal, the name too, and one object
                return False
        return True


class Unplanned(NamedTuple):
    """A tensor that checkpoints of a stretch have and its donor lacks."""

    stretch: Stretch
    spec: TensorSpec
    """by its name in the output"""
    holders: tuple[int, ...]


class LayerSource(NamedTuple):
    """Where a layer of the output comes from, as far as the config goes."""

    checkpoint: int
    layer: int


@dataclass(frozen=True)
class Stacking:
    """The layers of a tower of the output."""

    module: str
    stack: str
    """what stands before the number of a layer in names of the output"""
    layers: tuple[LayerSource, ...]
    num_layers: Mapping[int, int]
    """of each checkpoint, by number"""

    @property
    def side(self) -> str:
        """Whether it is an ``encoder`` or a ``decoder``; empty if names do not say so."""
        return next(iter(sides_of(self.stack)), "")


@dataclass
class Outline:
    """The output, as far as names go."""

    targets: list[OutputTensor] = field(default_factory=list)
    unplanned: list[Unplanned] = field(default_factory=list)
    stackings: list[Stacking] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """names that belong to no module of the recipe"""

    @property
    def givers(self) -> list[int]:
        """The checkpoints whose names and formats tensors of the output have."""
        return sorted({target.stretch.numbers[0] for target in self.targets})

    @property
    def is_stacked(self) -> bool:
        """Whether layers of the output are others than those of the same number."""
        return bool(self.stackings)


def outline_of(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> Outline:
    """Return the tensors of the output.

    Raises:
        PlanError: layers are asked for that a model lacks, or no name tells a layer; a module has no tensor.
    """
    outline = Outline()
    modules: dict[str, list[Slice]] = {}
    for each in slices_of(recipe):
        modules.setdefault(each.module, []).append(each)
    owners = {name: module_of(name, modules) for name in _all_names(checkpoints)} if recipe.modules else {}
    for module, slices in modules.items():
        _add_module(outline, _Module(recipe, module, slices, checkpoints, owners))
    outline.left_out = [name for name, owner in owners.items() if owner is None]
    return outline


def _all_names(checkpoints: Sequence[Checkpoint]) -> dict[str, None]:
    return dict.fromkeys(name for each in checkpoints for name in each.specs)


class _Module:
    """A part of the models, with the slices of its output."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        slices: Sequence[Slice],
        checkpoints: Sequence[Checkpoint],
        owners: Mapping[str, str | None],
    ) -> None:
        self.name = name
        self.slices = slices
        self.stretches = [_stretch(recipe, each, checkpoints) for each in slices]
        self._recipe, self._checkpoints, self._owners = recipe, checkpoints, owners
        self._towers: dict[int, Tower] = {}
        if owners and name not in owners.values():
            parts = dict.fromkeys(part for each in owners for part in each.split(".")[:3] if not part.isdigit())
            raise PlanError(
                f"no tensor belongs to the module {name!r}; a module is `default`, `text_decoder` or a part of names, "
                f"such as {', '.join(map(repr, list(parts)[:8]))}"
            )

    def specs(self, checkpoint: Checkpoint) -> Mapping[str, TensorSpec]:
        """Return its tensors in a checkpoint, in order."""
        if not self._owners:
            return checkpoint.specs
        return {name: spec for name, spec in checkpoint.specs.items() if self._owners[name] == self.name}

    def tower(self, number: int) -> Tower:
        """Return its layers in a checkpoint."""
        if number not in self._towers:
            checkpoint = self._checkpoints[number]
            self._towers[number] = tower_of(checkpoint, self.specs(checkpoint), LayerNames(self._recipe.around_layers))
        return self._towers[number]

    def sources(self) -> Iterator[tuple[Slice, int, Tower]]:
        """Yield the models that give a range of layers, each as its slice, its place there, and its layers."""
        for each, stretch in zip(self.slices, self.stretches, strict=True):
            locations = stretch.recipe.checkpoints
            for index, entry in enumerate(each.recipe.models if each.has_ranges else ()):
                yield each, index, self.tower(stretch.numbers[locations.index(entry.model)])

    def problems(self) -> Iterator[str]:
        """Yield which ranges go beyond the layers of their models."""
        for each, index, tower in self.sources():
            start, stop = each.layers(index)
            if stop > tower.num_layers:
                line = self._recipe.line(each.within(("models", index, "layer_range")))
                model, last = redact(each.recipe.models[index].model), tower.num_layers - 1
                yield (
                    f"line {line}: layer_range [{start}, {stop}] goes beyond the {tower.num_layers} layers of {model}, "
                    f"the last of which is {last}; a range ends behind its last layer"
                )

    @property
    def is_whole(self) -> bool:
        """Whether all layers of its models are merged, each with its like."""
        return len(self.slices) == 1 and all(
            each.layers(index) == (0, tower.num_layers) for each, index, tower in self.sources()
        )


def _stretch(recipe: Recipe, each: Slice, checkpoints: Sequence[Checkpoint]) -> Stretch:
    numbers = tuple(recipe.checkpoints.index(location) for location in each.recipe.checkpoints)
    return Stretch(each.recipe, numbers, tuple(checkpoints[number] for number in numbers))


def _add_module(outline: Outline, module: _Module) -> None:
    problems = list(module.problems())
    if problems:
        more = [f"... and {len(problems) - MAX_SAID} more"] if len(problems) > MAX_SAID else []
        raise PlanError("\n  ".join(["some layers are not there:", *problems[:MAX_SAID], *more]))
    if module.is_whole:
        _add_whole(outline, module, module.stretches[0])
    else:
        _Stacker(outline, module).add()


def _add_whole(outline: Outline, module: _Module, stretch: Stretch) -> None:
    stands, num = _stands(module, stretch), len(stretch.numbers)
    written = [module.specs(each) for each in stretch.checkpoints]
    outline.targets += [
        OutputTensor(stretch, spec, (name,) * num, stands.get(name, OUTSIDE)) for name, spec in written[0].items()
    ]
    _add_unplanned(outline, stretch, written)


def _stands(module: _Module, stretch: Stretch) -> Mapping[str, Stand]:
    """Where the tensors of layers stand, by name; nothing if no value depends on it."""
    if not stretch.recipe.has_gradients:
        return {}
    donor, layer_names = stretch.checkpoints[0], LayerNames(stretch.recipe.around_layers)
    places = {name: place for name in module.specs(donor) if (place := layer_names.place(name))}
    if not places:
        raise PlanError(
            f"the recipe gives values over the layers, and no name in {redact(donor.url)} tells a layer; "
            "say how such names begin, as `stockflow: {layers: 'backbone.stage_{layer}.'}`, or give one value"
        )
    nums = num_layers(places.values(), donor.config)
    return {name: Stand(depth_of(place.number, nums[place.stack])) for name, place in places.items()}


def _add_unplanned(outline: Outline, stretch: Stretch, written: Sequence[Mapping[str, TensorSpec]]) -> None:
    """Note what checkpoints have beside the donor, which is the first, by names in the output."""
    holders: dict[str, list[int]] = {}
    for index, names in enumerate(written):
        for name in names.keys() - written[0].keys():
            holders.setdefault(name, []).append(index)
    for name in sorted(holders):
        spec = written[holders[name][0]][name]._replace(name=name)
        outline.unplanned.append(Unplanned(stretch, spec, tuple(holders[name])))


class _Stacker:
    """Adds the tensors of a module whose layers are stacked."""

    def __init__(self, outline: Outline, module: _Module) -> None:
        self._outline, self._module = outline, module
        self._stack = module.tower(module.stretches[0].numbers[0]).stack

    def add(self) -> None:
        """Add the tensors before the layers, the layers of each slice, and what comes behind."""
        stretches, layers = self._module.stretches, list[LayerSource]()
        self._add_outside(stretches[0], comes_first)
        for each, stretch in zip(self._module.slices, stretches, strict=True):
            ranges = [each.layers_of(location) for location in stretch.recipe.checkpoints]
            (start, stop), *_ = ranges
            for step in range(stop - start):
                depth = depth_of(step, stop - start)
                self._add_layer(stretch, len(layers), [first + step for first, _ in ranges], depth)
                layers.append(LayerSource(stretch.numbers[0], start + step))
        self._add_beyond(stretches[-1], len(layers))
        self._add_outside(stretches[-1], lambda name: not comes_first(name))
        used = {0, *(number for each in stretches for number in each.numbers)}
        nums = {number: self._module.tower(number).num_layers for number in used}
        self._outline.stackings.append(Stacking(self._module.name, self._stack, tuple(layers), nums))

    def _add_layer(self, stretch: Stretch, number: int, layers: Sequence[int], depth: float) -> None:
        """Add a layer of the output, made from the layers that the checkpoints have under these numbers."""
        towers = [self._module.tower(each) for each in stretch.numbers]
        prefixes = [f"{tower.stack}{layer}" for tower, layer in zip(towers, layers, strict=True)]
        written = [
            {f"{self._stack}{number}{rest}": each.specs[prefix + rest] for rest in tower.layers.get(layer, ())}
            for each, tower, layer, prefix in zip(stretch.checkpoints, towers, layers, prefixes, strict=True)
        ]
        locations, cut = stretch.recipe.checkpoints, len(f"{self._stack}{number}")
        for name, spec in written[0].items():
            names = tuple([prefix + name[cut:] for prefix in prefixes])
            stand = Stand(depth, dict(zip(locations, names, strict=True)))
            self._outline.targets.append(OutputTensor(stretch, spec._replace(name=name), names, stand))
        _add_unplanned(self._outline, stretch, written)

    def _add_beyond(self, stretch: Stretch, num_layers: int) -> None:
        """Keep the layers beyond the last, which predict further tokens, behind the new last."""
        towers = [self._module.tower(each) for each in stretch.numbers]
        for step in range(towers[0].num_beyond):
            self._add_layer(stretch, num_layers + step, [tower.num_layers + step for tower in towers], 1.0)

    def _add_outside(self, stretch: Stretch, is_wanted: Callable[[str], bool]) -> None:
        """Add the tensors outside of layers that are wanted."""
        towers = [self._module.tower(each) for each in stretch.numbers]
        written = [
            {name: each.specs[name] for name in tower.outside if is_wanted(name)}
            for each, tower in zip(stretch.checkpoints, towers, strict=True)
        ]
        self._outline.targets += [
            OutputTensor(stretch, spec, (name,) * len(towers), OUTSIDE) for name, spec in written[0].items()
        ]
        _add_unplanned(self._outline, stretch, written)
