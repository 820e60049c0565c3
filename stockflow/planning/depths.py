"""Depth of a tensor: where its layer stands among its like, for values that go over the layers."""

from collections.abc import Iterable, Mapping

from stockflow.checkpoints.naming import LayerNames, LayerPlace
from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.recipe import Recipe
from stockflow.storage import redact

_NUM_LAYERS, _NUM_BEYOND = "num_hidden_layers", "num_nextn_predict_layers"


def depths_of(recipe: Recipe, donor: Checkpoint) -> Mapping[str, float]:
    """Return the depth of every tensor that lies in a layer, by name; of none if nothing depends on it.

    Raises:
        PlanError: something depends on it, and no name tells a layer.
    """
    if not recipe.has_gradients:
        return {}
    names = LayerNames(recipe.around_layers)
    places = {name: place for name in donor.specs if (place := names.place(name))}
    if not places:
        raise PlanError(
            f"the recipe gives values over the layers, and no name in {redact(donor.url)} tells a layer; "
            "say how such names begin, as `stockflow: {layers: 'backbone.stage_{layer}.'}`, or give one value"
        )
    nums = num_layers(places.values(), donor.config)
    return {name: depth_of(place.number, nums[place.stack]) for name, place in places.items()}


def depth_of(number: int, num_layers: int) -> float:
    """Return 0 for the first layer and 1 for the last, and for an only one; what lies beyond the last is as deep."""
    return min(number / (num_layers - 1), 1.0) if num_layers > 1 else 1.0


def num_layers(places: Iterable[LayerPlace], config: Mapping[str, object] | None) -> dict[str, int]:
    """Return how many layers each tower has, by what stands before the number.

    Layers that predict further tokens, which a config counts apart, lie beyond the last.
    """
    nums: dict[str, int] = {}
    for place in places:
        nums[place.stack] = max(place.number + 1, nums.get(place.stack, 0))
    proper, beyond = ((config or {}).get(key) for key in (_NUM_LAYERS, _NUM_BEYOND))
    if isinstance(proper, int) and isinstance(beyond, int):
        nums = {stack: proper if num == proper + beyond else num for stack, num in nums.items()}
    return nums
