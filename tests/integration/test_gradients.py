"""Values over the layers: the forms of published recipes, held against values that were worked out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import oracle, runs
from tests.checkpoints import LLAMA_CONFIG, llama_shapes, make_family

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
# Values have many digits where few would leave sums of BF16 numbers halfway between two others.
Merged = Callable[[str, int | None, list[oracle.Floats]], oracle.OracleResult]
"""What a tensor must be: from its name, its layer (None outside of layers), and the base's and the models' values."""


def slerp_by(values: dict[str, list[float]]) -> Merged:
    """The first part that a name has decides which values it takes, one per layer; outside of layers, the first."""

    def merged(name: str, layer: int | None, sources: list[oracle.Floats]) -> oracle.OracleResult:
        found = next(each for part, each in values.items() if part in name)
        return oracle.slerp(sources[0], sources[1], found[layer or 0])

    return merged


def ties_17(name: str, layer: int | None, sources: list[oracle.Floats]) -> oracle.OracleResult:
    densities = [[1.0, 0.8, 0.5, 0.1][layer or 0], 0.5, 0.33]
    weights = [1.0371, [0.0, 0.3137, 0.7291, 1.0173][layer or 0], 0.5153 if "mlp" in name else 0.0]
    return oracle.ties(sources[0], sources[1:], weights=weights, densities=densities, normalize=True)


def normalized_at_first(name: str, layer: int | None, sources: list[oracle.Floats]) -> oracle.OracleResult:
    del name
    return oracle.linear(sources[1:], [0.5153, 0.9371], normalize=layer in (None, 0, 1))


def levels(name: str, layer: int | None, sources: list[oracle.Floats]) -> oracle.OracleResult:
    """The model's filter decides for mlp, the recipe's values for the rest: they rise by a tenth per layer."""
    rising = [0.5153, 0.6153, 0.7153, 0.8153, 0.9153][layer or 0]
    weights = [[0.8371, 0.7371, 0.6371, 0.5371, 0.4371][layer or 0] if "mlp" in name else rising, rising]
    return oracle.task_arithmetic(sources[0], sources[1:], weights)


T_OF_SELF_ATTENTION = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "": [0.5] * 5}
FORMS: dict[str, tuple[int, int, dict[str, Any], Merged]] = {
    "slerp, five values over six layers": (
        6, 1, {"merge_method": "slerp", "parameters": {"t": [0.1, 0.3, 0.6, 0.3, 0.1]}},
        slerp_by({"": [0.1, 0.26, 0.48, 0.48, 0.26, 0.1]}),
    ),
    "slerp, a value per layer": (
        9, 1, {
            "merge_method": "slerp",
            "parameters": {"t": [{"value": [0.1, 0.15, 0.2, 0.4, 0.6, 0.4, 0.2, 0.15, 0.1]}]},
        },
        slerp_by({"": [0.1, 0.15, 0.2, 0.4, 0.6, 0.4, 0.2, 0.15, 0.1]}),
    ),
    "slerp, the form of tutorials": (
        5, 1, {
            "merge_method": "slerp",
            "parameters": {"t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]},
        },
        slerp_by(T_OF_SELF_ATTENTION),
    ),
    "slerp, filters of one value": (
        3, 1, {
            "merge_method": "slerp",
            "parameters": {"t": [
                {"filter": "lm_head", "value": [0.55]},
                {"filter": "embed_tokens", "value": [0.7]},
                {"filter": "self_attn", "value": [0.65, 0.35]},
                {"filter": "mlp", "value": [0.35, 0.65]},
                {"filter": "layernorm", "value": [0.4, 0.6]},
                {"filter": "modelnorm", "value": [0.6]},
                {"value": 0.5},
            ]},
        },
        slerp_by({
            "lm_head": [0.55], "embed_tokens": [0.7], "self_attn": [0.65, 0.5, 0.35], "mlp": [0.35, 0.5, 0.65],
            "layernorm": [0.4, 0.5, 0.6], "": [0.5],
        }),
    ),
    "slerp of an only layer, which is the last": (
        1, 1, {"merge_method": "slerp", "parameters": {"t": [0.2, 0.4, 0.9]}},
        lambda name, layer, sources: oracle.slerp(sources[0], sources[1], 0.2 if layer is None else 0.9),
    ),
    "ties, falling densities and rising weights": (
        4, 3, {"merge_method": "ties", "parameters": {"normalize": True, "int8_mask": True}}, ties_17,
    ),
    "linear, a flag over the layers": (
        3, 2, {"merge_method": "linear", "base_model": None, "parameters": {"normalize": [True, True, False]}},
        normalized_at_first,
    ),
    "task arithmetic, values of the recipe beside a model's filter": (
        5, 2, {"merge_method": "task_arithmetic", "parameters": {"weight": ["5.153e-1", 0.9153]}}, levels,
    ),
}  # fmt: skip
OF_MODELS: dict[str, list[dict[str, Any]]] = {
    "ties, falling densities and rising weights": [
        {"density": [1, 0.7, 0.1], "weight": 1.0371},
        {"density": 0.5, "weight": [0, 0.3137, 0.7291, 1.0173]},
        {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5153}, {"value": 0}]},
    ],
    "linear, a flag over the layers": [{"weight": 0.5153}, {"weight": [0.9371]}],
    "task arithmetic, values of the recipe beside a model's filter": [
        {"weight": [{"filter": "mlp", "value": [0.8371, 0.4371]}]}, {"weight": []},
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_values_over_the_layers_are_those_worked_out_by_hand(form: str, tmp_path: Path) -> None:
    num_layers, num_tuned, recipe, merged = FORMS[form]
    config = LLAMA_CONFIG | {"num_hidden_layers": num_layers}
    family = make_family(
        tmp_path, num_tuned, llama_shapes(config), torch.bfloat16, num_shards=2, buffers=False, config=config,
        delta_scale=0.01,
    )  # fmt: skip
    own = OF_MODELS.get(form, [{}] * num_tuned)
    models = [{"model": str(folder), "parameters": each} for folder, each in zip(family.tuned, own, strict=True)]
    text = yaml.safe_dump({"base_model": str(family.base), "models": models} | recipe)
    (tmp_path / "recipe.yaml").write_text(text)

    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    inputs = [oracle.load_checkpoint(folder) for folder in (family.base, *family.tuned)]
    found = oracle.load_checkpoint(tmp_path / "out")
    assert found.keys() == inputs[0].keys()
    num_wrong = num_elems = 0
    for name, stored in found.items():
        layer = None if name in OUTSIDE else int(name.split(".")[2])
        want = merged(name, layer, [each[name].array for each in inputs]).out
        num_wrong += np.count_nonzero(oracle.round_to("BF16", stored.array) != oracle.round_to("BF16", want))
        num_elems += stored.array.size
    print(f"FIGURES {form}: {num_wrong} of {num_elems} differ")
    assert num_wrong <= 1e-4 * num_elems
