"""Which value a parameter has for a tensor: the rule's, else the model's, else the recipe's, else the default."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from stockflow.errors import RecipeError
from stockflow.methods import METHODS
from stockflow.methods.parameters import Kind, Parameter, Parameters, Scalar
from stockflow.methods.protocol import Method
from stockflow.recipe.settings import Settings, as_kind, matches
from stockflow.storage import redact
from stockflow.text.strictjson import shown


class Stand(NamedTuple):
    """Where a tensor stands, as far as values depend on it."""

    depth: float = 0.0
    """from 0, of the first layer of its slice, to 1, of the last; 0 outside of layers"""
    own_names: Mapping[str, str] = MappingProxyType({})
    """its name in each model where it has another than in the output; filters of a model's values look at it"""


OUTSIDE = Stand()
"""Of tensors in no layer."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One value to find: a shared parameter, or a per-model parameter of one model."""

    parameter: Parameter
    model: str | None
    candidates: tuple[tuple[str | None, tuple[Scalar, ...]], ...]
    """filter and values over the layers, best first"""

    def value(self, tensor_name: str, depth: float) -> Scalar | None:
        """Return the value for a tensor, None if no filter matches its name."""
        found = next((values for text, values in self.candidates if matches(text, tensor_name)), None)
        return None if found is None else value_at(depth, found, self.parameter.kind)


def value_at(depth: float, values: Sequence[Scalar], kind: Kind) -> Scalar:
    """Return what values that are evenly spaced from depth 0 to 1 are in between, as mergekit does.

    Numbers are interpolated linearly; flags and words are those of the last place that is not deeper.
    """
    place = depth * (len(values) - 1)
    before = int(place)
    if kind in ("flag", "word") or len(values) == 1:
        return values[before]
    share = place - before
    after = min(before + 1, len(values) - 1)
    between = (1.0 - share) * float(values[before]) + share * float(values[after])
    return float(round(between)) if kind == "integer" else between


def find_slots(
    method: Method,
    *,
    fixed: Mapping[str, Scalar],
    rule: Settings,
    models: Sequence[tuple[str, Settings]],
    recipe: Settings,
) -> tuple[Slot, ...]:
    """Return the slots of a method, in the order of its parameters and then of the models.

    Args:
        method: whose parameters are to be found.
        fixed: values that are no parameters in a recipe, but reach the method as such.
        rule: settings that come first.
        models: location and settings of each model that the method counts.
        recipe: settings that come last, before the defaults.
    """
    slots: list[Slot] = []
    for parameter in method.parameters:
        if parameter.name in fixed:
            slots.append(Slot(parameter, None, ((None, (fixed[parameter.name],)),)))
        elif parameter.per_model:
            slots += [Slot(parameter, model, _candidates(parameter, (rule, own, recipe))) for model, own in models]
        else:
            slots.append(Slot(parameter, None, _candidates(parameter, (rule, recipe))))
    return tuple(slots)


def _candidates(
    parameter: Parameter, levels: tuple[Settings, ...]
) -> tuple[tuple[str | None, tuple[Scalar, ...]], ...]:
    given = [item for level in levels for item in level.get(parameter.name, ())]
    found = [
        (None if item.filter in ("", "*") else item.filter, tuple(as_kind(parameter, value) for value in item.value))
        for item in given
    ]
    default = [] if parameter.default is None else [(None, (parameter.default,))]
    return (*found, *default)


class Resolver:
    """Parameters of one method under one rule; tensors of one depth that match the same filters share one answer."""

    def __init__(self, method_name: str, slots: tuple[Slot, ...]) -> None:
        self._method_name = method_name
        self._slots = slots
        filters = dict.fromkeys(text for slot in slots for text, _ in slot.candidates)
        self._filters = tuple(text for text in filters if text is not None)
        self._has_gradient = any(len(values) > 1 for slot in slots for _, values in slot.candidates)
        self._by_matches: dict[tuple[float, ...], Parameters] = {}
        self._by_values: dict[tuple[Scalar, ...], Parameters] = {}

    def resolve(self, tensor_name: str, stand: Stand) -> Parameters:
        """Return the parameters of a tensor; the name is that in the output.

        Raises:
            RecipeError: a required value is missing for it, or its values do not go together.
        """
        key: tuple[float, ...] = self._matching(tensor_name)
        if self._has_gradient:
            key = (stand.depth, *key)
        for own_name in stand.own_names.values():
            key += self._matching(own_name)
        found = self._by_matches.get(key)
        if found is None:
            values = tuple(self._value(slot, tensor_name, stand) for slot in self._slots)
            found = self._by_values.setdefault(values, self._parameters(values))
            problem = METHODS[self._method_name].refuses(found)
            if problem:
                raise RecipeError(f"{problem}; so it is for the tensor {tensor_name!r}{self._deciding(tensor_name)}")
            self._by_matches[key] = found
        return found

    def _deciding(self, tensor_name: str) -> str:
        """Return, in words, the filters whose values a tensor gets."""
        found = (
            next((text for text, _ in slot.candidates if matches(text, tensor_name)), None) for slot in self._slots
        )
        texts = [shown(text) for text in dict.fromkeys(found) if text is not None]
        return f", by {'the filter' if len(texts) == 1 else 'the filters'} {', '.join(texts)}" if texts else ""

    def anywhere(self) -> Iterator[Parameters]:
        """Yield the parameters at every depth that a value is given for, nothing if they depend on names."""
        slots = [(slot.parameter.kind, *slot.candidates[0]) for slot in self._slots if slot.candidates]
        if len(slots) < len(self._slots) or any(text is not None for _, text, _ in slots):
            return
        lengths = {len(values) for *_, values in slots}
        depths = {number / (length - 1) for length in lengths - {1} for number in range(length)} | {0.0}
        for depth in sorted(depths):
            yield self._parameters(tuple(value_at(depth, values, kind) for kind, _, values in slots))

    def _matching(self, name: str) -> tuple[bool, ...]:
        return tuple([text in name for text in self._filters])

    def _value(self, slot: Slot, tensor_name: str, stand: Stand) -> Scalar:
        name = stand.own_names.get(slot.model, tensor_name) if slot.model else tensor_name
        value = slot.value(name, stand.depth)
        if value is not None:
            return value
        model = f" of the model {redact(slot.model)}" if slot.model else ""
        raise RecipeError(
            f"`{self._method_name}` needs the parameter `{slot.parameter.name}`{model} for the tensor "
            f"{tensor_name!r}, and no filter matches it; add a value with the filter '*'"
        )

    def _parameters(self, values: tuple[Scalar, ...]) -> Parameters:
        shared: dict[str, Scalar] = {}
        per_model: dict[str, tuple[float, ...]] = {}
        for slot, value in zip(self._slots, values, strict=True):
            name = slot.parameter.name
            if slot.model is None:
                shared[name] = int(value) if slot.parameter.kind == "integer" else value
            else:
                per_model[name] = (*per_model.get(name, ()), float(value))
        return Parameters(shared, per_model)
