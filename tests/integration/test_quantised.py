"""Quantised models merged as the numbers they stand for: real files in the layouts of published families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stockflow.errors import PlanError
from stockflow.planning import file as plan_file
from tests import oracle, quantised, runs
from tests.checkpoints import write_checkpoint
from tests.quantised import FORMS, Quantised, Tensors

MODULE = "model.layers.0.mlp.up_proj"
SHAPE = (300, 416)
"""Ragged in every block; a third band of 44 rows."""
LEAST_CORRECT = 0.9999


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def inside(made: Quantised) -> Tensors:
    return {f"{MODULE}.{own}": tensor for own, tensor in made.tensors.items()}


def write_model(folder: Path, tensors: Tensors, said: dict[str, object] | None, num_shards: int = 1) -> Path:
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 416}
    if said is not None:
        config["text_config"] = {"quantization_config": {"quant_method": "x", **said}}
    plain = {"model.norm.weight": torch.ones(7, dtype=torch.bfloat16)}
    return write_checkpoint(folder, tensors | plain, config=config, num_shards=num_shards, side_files={})


def write_recipe(root: Path, models: list[Path], **top_level: Any) -> Path:
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | top_level))
    return path


def merged(root: Path, models: list[Path], **top_level: Any) -> dict[str, oracle.Stored]:
    runs.merge_here(write_recipe(root, models, **top_level), root / "out", memory_bytes=600 * runs.MIB)
    return oracle.load_checkpoint(root / "out")


def share_correct(found: oracle.Stored, expected: oracle.Floats) -> float:
    """Of elements; zeros of either sign are equal, as the oracle does not model signs."""
    right = oracle.widen(found.dtype, oracle.round_to(found.dtype, expected)).reshape(found.array.shape)
    return float((found.array == right).mean())


@pytest.mark.parametrize("form", FORMS)
def test_models_of_a_format_merge_as_the_numbers_that_its_definition_says(form: str, tmp_path: Path) -> None:
    make, said = FORMS[form]
    base = drawn(0)
    made = [make(base), *(make(base + 0.3 * drawn(seed)) for seed in (1, 2))]
    models = [write_model(tmp_path / f"m{n}", inside(each), said, 1 + n) for n, each in enumerate(made)]

    found = merged(tmp_path, models, dtype="bfloat16")

    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]])
    assert found.keys() == {f"{MODULE}.weight", "model.norm.weight"}
    assert found[f"{MODULE}.weight"].dtype == "BF16"
    assert share_correct(found[f"{MODULE}.weight"], expected.out) >= LEAST_CORRECT
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]


def test_one_decoded_model_has_the_bits_of_the_definition(tmp_path: Path) -> None:
    for number, (make, said) in enumerate(FORMS.values()):
        made, root = make(drawn(3)), tmp_path / str(number)
        model = write_model(root / "m", inside(made), said)

        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": "float32"}
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        runs.merge_here(root / "recipe.yaml", root / "out")

        found = oracle.load_checkpoint(root / "out")[f"{MODULE}.weight"]
        assert share_correct(found, made.values) == 1, list(FORMS)[number]


@pytest.mark.parametrize("columns", [203, 416])
def test_rows_of_codes_that_fill_no_container_are_as_long_as_their_shape_says(columns: int, tmp_path: Path) -> None:
    said: dict[str, object] = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
    made = [quantised.int4(drawn(seed, (90, columns)).double().numpy()) for seed in range(3)]
    models = [write_model(tmp_path / f"m{n}", inside(each), said) for n, each in enumerate(made)]

    found = merged(tmp_path, models, dtype="float32")[f"{MODULE}.weight"]

    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]])
    assert found.array.shape == (90, columns)
    assert share_correct(found, expected.out) >= LEAST_CORRECT


def test_experts_in_one_tensor_merge_one_by_one(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = [drawn(seed, (3, 40, 96)).double().numpy() for seed in range(3)]
    made = [quantised.mxfp4_blocks(each) for each in values]
    tensors = [{f"{name}{own.removeprefix('gate_up_proj')}": t for own, t in each.tensors.items()} for each in made]
    models = [write_model(tmp_path / f"m{n}", each, {}) for n, each in enumerate(tensors)]

    found = merged(tmp_path, models, dtype="bfloat16")[name]

    expected = oracle.model_stock(made[0].values, [each.values for each in made[1:]], scope="leading")
    assert found.array.shape == (3, 40, 96)
    assert share_correct(found, expected.out) >= LEAST_CORRECT


def test_formats_meet_and_the_plan_is_read_back_as_it_was(tmp_path: Path) -> None:
    base = drawn(0)
    made = [quantised.fp8(base, (128, 128)), quantised.int4((base + 0.3 * drawn(1)).double().numpy())]
    plain = base.bfloat16()
    models = [
        write_model(tmp_path / "fp8", inside(made[0]), {"weight_block_size": [128, 128]}),
        write_model(tmp_path / "int4", inside(made[1]), {"group_size": 32}),
        write_model(tmp_path / "plain", {f"{MODULE}.weight": plain}, None),
    ]

    found = merged(tmp_path, models, dtype="bfloat16")

    expected = oracle.model_stock(made[0].values, [made[1].values, plain.double().numpy()])
    assert share_correct(found[f"{MODULE}.weight"], expected.out) >= LEAST_CORRECT
    (path,) = (tmp_path / "out" / "_stockflow").glob("*/plan.json")
    recorded = plan_file.parse(path.read_bytes(), str(path))
    assert recorded.plan.plan_id == recorded.plan_id == recorded.digest
    assert recorded.plan.merge_id == recorded.merge_id == recorded.copies_digest
    assert runs.run("verify", tmp_path / "out", "--sample", "100%").returncode == 0


@pytest.mark.parametrize("memory", [340, 600, 1200])
def test_the_bytes_are_those_of_every_budget_and_number_of_threads(memory: int, tmp_path: Path) -> None:
    made = [quantised.fp8(drawn(seed, (1200, 2048)), (128, 128)) for seed in range(3)]
    models = [
        write_model(tmp_path / f"m{n}", inside(each), {"weight_block_size": [128, 128]}) for n, each in enumerate(made)
    ]
    recipe = write_recipe(tmp_path, models, dtype="bfloat16")

    digests = set()
    for threads in (1, 2):
        output = tmp_path / f"out{threads}"
        runs.merge_here(recipe, output, memory_bytes=memory * runs.MIB, num_threads=threads)
        digests.add((output / "model.safetensors").read_bytes())

    assert len(digests) == 1


def test_quantised_tunes_of_a_plain_base_are_refused_until_accepted(tmp_path: Path) -> None:
    base = drawn(0)
    models = [write_model(tmp_path / "base", {f"{MODULE}.weight": base.bfloat16()}, None)]
    for seed in (1, 2):
        made = quantised.fp8(base + drawn(seed), (128, 128))
        models.append(write_model(tmp_path / f"m{seed}", inside(made), {}))

    with pytest.raises(PlanError) as caught:
        merged(tmp_path, models)
    assert f"{models[1]} has 1 tensor such as {MODULE}.weight as codes, {models[0]} as plain numbers" in str(
        caught.value
    )
    assert "Give the 16-bit models that were quantised, or the base in the same codes" in str(caught.value)

    assert f"{MODULE}.weight" in merged(tmp_path, models, stockflow={"accept": ["quantised-tunes"]})
