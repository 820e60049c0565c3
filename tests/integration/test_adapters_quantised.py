"""Adapters on quantised bases: three merged as the numbers that codes stand for, rounded once or coded again."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stockflow.recipe import load_recipe
from stockflow.run import places
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.executors.ray import RayOptions, connected
from stockflow.run.inputs import Inputs
from tests import adapters, oracle, quantised, runs
from tests.adapters import Adapter, write_adapter
from tests.checkpoints import write_checkpoint
from tests.quantised import FORMS, NVFP4, Quantised, Tensors, same_codes

SHAPE = (300, 416)
"""Ragged in every block; a third band of 44 rows."""
EXPERTS = "model.layers.0.mlp.experts"
FUSED = {"gate_up_proj": (3, 128, 96), "down_proj": (3, 96, 64)}
BLOCKS = {f"{EXPERTS}.{name}": name for name in FUSED}
LINEAR = {
    f"model.layers.0.self_attn.{name}_proj.weight": form
    for name, form in zip("qkvo", ("DeepSeek-V3", "by row", "Kimi-K2", "Kimi-K3"), strict=True)
}
WEIGHTS = (0.5, 0.3, -0.2)
LEAST_CORRECT = 0.9999


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def tuned(number: int, names: Mapping[str, str]) -> Adapter:
    """Return factors of every weight, each adapter of another rank; of experts in PEFT's layout."""
    made = adapters.linear(dict.fromkeys(names, SHAPE), ["q_proj", "k_proj", "v_proj", "o_proj"], seed=number)
    if names is LINEAR:
        experts = adapters.of_experts(EXPERTS, FUSED, list(FUSED), seed=number)
        made.tensors |= experts.tensors
        made.changes |= experts.changes
        made.config |= experts.config
    return made


class Models:
    """A base in codes of several formats, three adapters on it, and what its codes stand for."""

    def __init__(self, root: Path, names: Mapping[str, str]) -> None:
        self.root, self.names = root, names
        self.made = {name: FORMS[form][0](drawn(seed)) for seed, (name, form) in enumerate(names.items())}
        tensors = {key: t for name, made in self.made.items() for key, t in self.keyed(name, made).items()}
        if names is LINEAR:
            for name, own in BLOCKS.items():
                self.made[name] = quantised.mxfp4_blocks(drawn(9, FUSED[own]).double().numpy(), own)
                tensors |= self.keyed(name, self.made[name])
        tensors["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)
        said = {"quantization_config": {"quant_method": "x", "weight_block_size": [128, 128]}}
        config = {"model_type": "llama", "hidden_size": SHAPE[1], "text_config": said}
        write_checkpoint(root / "base", tensors, config=config, num_shards=2, side_files={})
        self.adapters = [tuned(number, names) for number in range(3)]
        for number, adapter in enumerate(self.adapters):
            write_adapter(root / f"lora{number}", adapter)

    def keyed(self, name: str, made: Quantised) -> Tensors:
        """Return the tensors of one weight by their keys in the base."""
        module = f"{name.rpartition('.')[0]}." if name in LINEAR or name in self.names else f"{EXPERTS}."
        return {f"{module}{own}": tensor for own, tensor in made.tensors.items()}

    def recipe(self, method: str, root: str | None = None, **top_level: Any) -> Path:
        """Write a recipe of the three adapters on their base."""
        place = root or str(self.root)
        models: list[dict[str, Any]] = [{"model": f"{place}/base+{place}/lora{number}"} for number in range(3)]
        for model, weight in zip(models if method == "task_arithmetic" else (), WEIGHTS, strict=False):
            model["parameters"] = {"weight": weight}
        recipe = {"merge_method": method, "base_model": f"{place}/base", "models": models, **top_level}
        path = self.root / f"{len(list(self.root.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def expected(self, method: str, name: str) -> oracle.Floats:
        """Return the merged weight in float64."""
        base = self.made[name].values
        sources = [adapter.changes[name](base) for adapter in self.adapters]
        if method == "task_arithmetic":
            return oracle.task_arithmetic(base, sources, WEIGHTS).out
        if name not in BLOCKS:
            return oracle.model_stock(base, sources).out
        merged, num = np.empty_like(base), 2 if "gate" in name else 1
        for first in range(num):  # gate and up are rows by turns
            own = [each[:, first::num] for each in (base, *sources)]
            merged[:, first::num] = oracle.model_stock(own[0], own[1:], scope="leading").out
        return merged

    def coded(self, name: str, values: oracle.Floats) -> Quantised:
        """Return numbers in the codes of the base's weight."""
        if name in BLOCKS:
            return quantised.mxfp4_blocks(values, BLOCKS[name])
        return FORMS[self.names[name]][0](torch.from_numpy(np.asarray(values, np.float32)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("coded"), LINEAR)


def share_correct(found: oracle.Stored, expected: oracle.Floats) -> float:
    right = oracle.widen(found.dtype, oracle.round_to(found.dtype, expected)).reshape(found.array.shape)
    return float((found.array == right).mean())


def check_rounded(models: Models, method: str, output: Path) -> None:
    found = oracle.load_checkpoint(output)
    assert found.keys() == {*models.made, "model.norm.weight"}
    for name in models.made:
        assert found[name].dtype == "BF16"
        expected = models.expected(method, name)
        expected = expected.swapaxes(1, 2) if name in BLOCKS else expected  # as plain numbers of that family are
        assert share_correct(found[name], expected) >= LEAST_CORRECT, name


def check_coded(models: Models, method: str, output: Path) -> None:
    found = {key: t for path in output.glob("*.safetensors") for key, t in load_file(path).items()}
    for name in models.made:
        again = models.coded(name, models.expected(method, name))
        for key, tensor in models.keyed(name, again).items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            if tensor.dtype == torch.float32:
                torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=0)
            else:
                is_f4 = models.names.get(name, "blocks") in ("Kimi-K3", "blocks")
                assert same_codes(found[key], tensor, is_f4=is_f4) >= 0.9995, key


@pytest.mark.parametrize("method", ["model_stock", "task_arithmetic"])
def test_adapters_change_the_numbers_that_codes_stand_for(method: str, models: Models, tmp_path: Path) -> None:
    runs.merge_here(models.recipe(method, dtype="bfloat16"), tmp_path / "rounded")
    runs.merge_here(models.recipe(method), tmp_path / "kept")

    check_rounded(models, method, tmp_path / "rounded")
    check_coded(models, method, tmp_path / "kept")


@pytest.mark.parametrize("form", NVFP4)
def test_adapters_change_the_numbers_of_codes_that_are_only_read(form: str, tmp_path: Path) -> None:
    models = Models(tmp_path, {"model.layers.0.self_attn.q_proj.weight": form})

    runs.merge_here(models.recipe("model_stock", dtype="bfloat16"), tmp_path / "out")

    check_rounded(models, "model_stock", tmp_path / "out")


@pytest.mark.slow
def test_adapters_on_codes_go_from_s3_to_s3_on_ray(
    models: Models, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket="coded")
    for path in (each for each in models.root.rglob("*") if each.is_file()):
        s3.put_object(Bucket="coded", Key=str(path.relative_to(models.root)), Body=path.read_bytes())
    said = {"storage": {"s3://coded/": {"endpoint": s3_endpoint, "region": "us-east-1"}}}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    options = RayOptions(num_workers=2)
    with connected(options, 2):
        for kind, check in (("bfloat16", check_rounded), ("keep", check_coded)):
            recipe = models.recipe("model_stock", "s3://coded", stockflow=said | {"output_format": kind})
            given = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", 200_000)
            on_ray = partial(places.on_ray, options=options)
            result = merge(Inputs.open(load_recipe(str(recipe))), f"s3://coded/{kind}", given, on_ray)
            assert len(result.plan.shards) > 2
            (tmp_path / kind).mkdir()
            for file in result.manifest.files:
                if "/" not in file:
                    body = s3.get_object(Bucket="coded", Key=f"{kind}/{file}")["Body"].read()
                    (tmp_path / kind / file).write_bytes(body)
            check(models, "model_stock", tmp_path / kind)
