"""Towers: the layers of a model, and what lies outside of them, told from the names of its tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from stockflow.checkpoints.naming import LayerNames, LayerPlace, kind_of
from stockflow.checkpoints.opening import Checkpoint
from stockflow.errors import PlanError
from stockflow.storage import redact

NUM_LAYERS_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
"""What configs call the number of layers."""
OTHER_SIDE = {"encoder": "decoder", "decoder": "encoder"}
_NUM_BEYOND = "num_nextn_predict_layers"

Config = Mapping[str, object]


@dataclass(frozen=True)
class Tower:
    """One tower of a model."""

    stack: str
    """what stands before the number of a layer in its names"""
    num_layers: int
    layers: Mapping[int, tuple[str, ...]]
    """by number, those beyond the last too: what stands behind the number, in on-disk order"""
    outside: tuple[str, ...]
    """names of all other tensors, in on-disk order"""

    @property
    def num_beyond(self) -> int:
        """Layers beyond the last, which predict further tokens."""
        return max(self.layers) + 1 - self.num_layers


def tower_of(checkpoint: Checkpoint, names: Iterable[str], layer_names: LayerNames) -> Tower:
    """Return the tower among the tensors of a checkpoint that have these names.

    Raises:
        PlanError: no name tells a layer, or those of several towers do and the config does not say which is meant.
    """
    places = {name: layer_names.place(name) for name in names}
    found = num_layers(filter(None, places.values()), checkpoint.config)
    stack = _chosen(checkpoint, found)
    layers: dict[int, list[str]] = {}
    outside = []
    for name, place in places.items():
        if place is not None and place.stack == stack:
            layers.setdefault(place.number, []).append(place.rest)
        else:
            outside.append(name)
    return Tower(stack, found[stack], {number: tuple(rests) for number, rests in layers.items()}, tuple(outside))


def _chosen(checkpoint: Checkpoint, found: Mapping[str, int]) -> str:
    if len(found) == 1:
        return next(iter(found))
    url, advice = redact(checkpoint.url), "`stockflow: {layers: 'backbone.stage_{layer}.'}` says how their names begin"
    if not found:
        raise PlanError(f"the recipe speaks of layers, and no name in {url} tells one; {advice}")
    stated = set(stated_nums(checkpoint.config or {}))
    fitting = [stack for stack, num in found.items() if num in stated]
    if len(fitting) == 1:
        return fitting[0]
    towers = ", ".join(f"{num} of {stack + '*'!r}" for stack, num in found.items())
    raise PlanError(f"the recipe speaks of layers, and {url} has several kinds: {towers}; {advice}")


def stated_nums(config: Config) -> Iterator[int]:
    """Yield what a config says of the number of layers of its language model."""
    for section in (config, config.get("text_config"), config.get("language_config"), config.get("llm_config")):
        if isinstance(section, dict):
            yield from (num for key in NUM_LAYERS_KEYS if type(num := section.get(key)) is int)


def num_layers(places: Iterable[LayerPlace], config: Config | None) -> dict[str, int]:
    """Return how many layers each tower has, by what stands before the number.

    Layers that predict further tokens, which a config counts apart, lie beyond the last.
    """
    nums: dict[str, int] = {}
    for place in places:
        nums[place.stack] = max(place.number + 1, nums.get(place.stack, 0))
    proper, beyond = ((config or {}).get(key) for key in (NUM_LAYERS_KEYS[0], _NUM_BEYOND))
    if isinstance(proper, int) and isinstance(beyond, int):
        nums = {stack: proper if num == proper + beyond else num for stack, num in nums.items()}
    return nums


def sides_of(stack: str) -> list[str]:
    """Return which parts of names say that layers are of an ``encoder`` or a ``decoder``, the outer one first."""
    return [end for part in stack.split(".") if (end := part.rpartition("_")[2]) in OTHER_SIDE]


def side_of_count(key: str, config: Config, path: str = "") -> str:
    """Return whose layers a key of a section counts: where it speaks of two sides, what names none is the encoder's."""
    has_sides = config.get("is_encoder_decoder") is True or any(
        side in each for each in NUM_LAYERS_KEYS if each in config for side in OTHER_SIDE
    )
    named = [*(side for side in OTHER_SIDE if side in key), *sides_of(path.replace("_config", ""))]
    return named[0] if named else "encoder" if has_sides else ""


def depth_of(number: int, num_layers: int) -> float:
    """Return 0 for the first layer and 1 for the last, and for an only one; what lies beyond the last is as deep."""
    return min(number / (num_layers - 1), 1.0) if num_layers > 1 else 1.0


def comes_first(name: str) -> bool:
    """Return whether a tensor outside of layers comes before them, as embeddings do; heads and last norms do not."""
    kind = kind_of(name)
    return kind == "embedding" or ("embed" in name and kind != "head")
