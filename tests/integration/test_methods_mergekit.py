"""Every method against mergekit 0.1.5 in float32, in an environment of its own: ``make test-peers``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockflow import merge
from tests.benchmarks.peers import ENVIRONMENT, OFFLINE, installed
from tests.benchmarks.processes import run
from tests.checkpoints import LLAMA_CONFIG, Family, llama_shapes, make_family

pytestmark = pytest.mark.peers

CONFIG = LLAMA_CONFIG | {"num_hidden_layers": 4, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}
MIXTRAL = CONFIG | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2}
MIXTRAL |= {"num_local_experts": 4, "num_experts_per_tok": 2}
CLOSE = 5e-7
"""Worst distance of a tensor, relative to its norm: float32 and another order of additions."""
SMALL = {"epsilon": 0.004}
MANY = {"weight": 0.4, "density": 0.4, "gamma": 0.02}
Recipe = dict[str, Any]


def each(models: list[str], **values: list[Any]) -> list[Recipe]:
    """Return models with a value of each parameter."""
    pairs = enumerate(models)
    return [{"model": model, "parameters": {name: own[n] for name, own in values.items()}} for n, model in pairs]


def layers(model: str, start: int, stop: int, **parameters: Any) -> Recipe:
    return {"model": model, "layer_range": [start, stop], "parameters": parameters}


def from_base(method: str, models: list[str], num_tuned: int = 3, **parameters: Any) -> Recipe:
    tuned = [{"model": model} for model in models[1 : num_tuned + 1]]
    return {"merge_method": method, "base_model": models[0], "models": tuned, "parameters": parameters}


def without(recipe: Recipe) -> Recipe:
    return {name: value for name, value in recipe.items() if name != "base_model"}


def recipes(models: list[str]) -> dict[str, Recipe]:
    """Return a recipe for every method and rule of the language."""
    weights, densities = [0.2, 0.5, -0.4], [0.3, 0.5, 0.7]
    base, first, second, third = models
    columns = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    gradient = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.5}]
    return {
        "linear": {"merge_method": "linear", "models": each(models[1:], weight=[0.2, 0.5, 0.4])},
        "slerp": from_base("slerp", models, 1, t=gradient),
        "task_arithmetic": from_base("task_arithmetic", models, weight=0.4, **{"lambda": 0.8}),
        "ties": from_base("ties", models) | {"models": each(models[1:], weight=weights, density=densities)},
        "ties, rescaled": from_base("ties", models, weight=0.4, density=0.3, rescale=True, normalize=False),
        "breadcrumbs": from_base("breadcrumbs", models, **MANY),
        "breadcrumbs_ties": from_base("breadcrumbs_ties", models, rescale=True, normalize=True, **MANY),
        "model_stock": from_base("model_stock", models),
        "model_stock by rows": from_base("model_stock", models, 2, filter_wise=True),
        "nuslerp": without(from_base("nuslerp", models, 2, weight=0.5)),
        "nuslerp from a base": from_base("nuslerp", models, 2) | {"models": each(models[1:3], weight=[0.3, 0.6])},
        "nuslerp by columns": from_base("nuslerp", models, 2, weight=0.5, **columns),
        "multislerp": from_base("multislerp", models, weight=0.3),
        "karcher": without(from_base("karcher", models)),
        "nearswap": from_base("nearswap", models, 1, t=1e-4),
        "sce": from_base("sce", models),
        "sce of some": from_base("sce", models, select_topk=0.3),
        "ram": from_base("ram", models, **SMALL),
        "ramplus_tl": from_base("ramplus_tl", models, **SMALL),
        "dare_linear of all": from_base("dare_linear", models, weight=0.5, density=1.0),
        "della of all": from_base("della", models, weight=0.5, density=1.0),
        "values that fall through": from_base("task_arithmetic", models, 2, weight=0.5)
        | {"models": [*each([first], weight=[[{"filter": "mlp", "value": 0.9}]]), {"model": second}]},
        "slices": {
            "merge_method": "slerp",
            "base_model": base,
            "slices": [
                {"sources": [layers(base, 0, 2), layers(first, 1, 3)], "parameters": {"t": [0.1, 0.9]}},
                {"sources": [layers(base, 2, 4), layers(second, 2, 4)], "parameters": {"t": 0.4}},
            ],
        },
        "a base of its own": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "slices": [
                {"base_model": third, "sources": [layers(third, 0, 2), layers(first, 0, 2, weight=0.5)]},
                {"sources": [layers(base, 2, 4), layers(second, 2, 4, weight=[0.5, 0.8])]},
            ],
        },
        "a module": {
            "merge_method": "linear",
            "modules": {
                "default": {"models": each([first, second], weight=[[0.2, 0.9], 0.5])},
            },
        },
    }


@pytest.fixture(scope="module")
def mergekit() -> Path:
    return installed(ENVIRONMENT)


def drawn(folder: Path, config: Recipe, num_tuned: int) -> Family:
    shapes = llama_shapes(config)
    if "num_local_experts" in config:
        inner, hidden = config["intermediate_size"], config["hidden_size"]
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for layer in range(config["num_hidden_layers"]):
            stem = f"model.layers.{layer}.block_sparse_moe"
            shapes[f"{stem}.gate.weight"] = (4, hidden)
            for number in range(4):
                own = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
                shapes |= {f"{stem}.experts.{number}.{role}.weight": shape for role, shape in own.items()}
    return make_family(folder, num_tuned, shapes, torch.float32, buffers=False, config=config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    family = drawn(tmp_path_factory.mktemp("family"), CONFIG, 3)
    return [str(folder) for folder in (family.base, *family.tuned)]


def distances(mergekit: Path, recipe: Recipe, folder: Path, **stockflow: Any) -> Mapping[str, float]:
    """Merge by both, and return how far each tensor is from mergekit's."""
    folder.mkdir()
    recipe = recipe | {"dtype": "float32"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    theirs, ours = folder / "mergekit", folder / "stockflow"
    finished = run(
        [str(mergekit), str(folder / "recipe.yaml"), str(theirs), "--no-copy-tokenizer"], environment=OFFLINE
    )
    assert list(theirs.glob("*.safetensors")), finished.stderr
    merge(recipe | {"stockflow": stockflow}, str(ours))
    expected, found = (_tensors(each) for each in (theirs, ours))
    assert found.keys() == expected.keys()
    return {
        name: float((value.double() - expected[name].double()).norm() / expected[name].double().norm())
        for name, value in found.items()
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return tensors by the names that mergekit gives experts."""
    return {
        name.replace("block_sparse_moe", "mlp"): value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("name", recipes(["", "", "", ""]))
def test_every_method_is_within_float32_of_mergekit(
    name: str, mergekit: Path, models: list[str], tmp_path: Path
) -> None:
    found = distances(mergekit, recipes(models)[name], tmp_path / "out", on_negative="extrapolate")

    worst = max(found, key=lambda each: found[each])
    print(f"{name}: {found[worst]:.1e} ({worst})")
    assert found[worst] <= CLOSE


def test_arcee_fusion_differs_by_the_noise_of_its_divergences(
    mergekit: Path, models: list[str], tmp_path: Path
) -> None:
    """mergekit's float32 moves a few elements across the threshold."""
    found = distances(mergekit, from_base("arcee_fusion", models, 1), tmp_path / "out")

    assert max(found.values()) <= 5e-2


@pytest.mark.parametrize("method", ["model_stock", "ties", "sce", "breadcrumbs"])
def test_a_layer_of_experts_is_what_mergekit_makes_of_mixtral(method: str, mergekit: Path, tmp_path: Path) -> None:
    family = drawn(tmp_path / "family", MIXTRAL, 2)
    parameters = {"sce": {"select_topk": 0.4}, "ties": {"weight": 0.5, "density": 0.4}, "breadcrumbs": MANY}
    recipe = from_base(method, [str(family.base), *map(str, family.tuned)], 2, **parameters.get(method, {}))

    found = distances(mergekit, recipe, tmp_path / "out", scope="layer", experts="fused", on_negative="extrapolate")

    assert max(found.values()) <= CLOSE
