"""Layers stacked from models that store them in several ways: a model that loads, with the right numbers, or none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockflow
from stockflow.errors import PlanError
from tests import oracle, quantised
from tests.checkpoints import write_checkpoint
from tests.expert_models import SMALL, models
from tests.token_files import tokenizer_json

SHAPE = (24, 16)
PART = "self_attn.q_proj"
OTHER = "self_attn.k_proj"


def stacked(root: Path, runs: list[tuple[Path, int, int]], **top_level: Any) -> dict[str, oracle.Stored]:
    slices = [{"sources": [{"model": str(model), "layer_range": [start, stop]}]} for model, start, stop in runs]
    recipe = {"merge_method": "passthrough", "slices": slices, **top_level}
    stockflow.merge(recipe, str(root / "out"), workers=1, device="cpu")
    return oracle.load_checkpoint(root / "out")


def written_config(root: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((root / "out" / "config.json").read_text())
    return config


def write_experts(root: Path, *layouts: str, **config: Any) -> list[Path]:
    made = models(len(layouts) - 1, dict(enumerate(layouts)))
    said = {"model_type": "qwen3_moe", "num_hidden_layers": SMALL.num_layers, **config}
    folders = [root / f"m{number}" for number in range(len(layouts))]
    return [write_checkpoint(folder, own, config=said) for folder, own in zip(folders, made, strict=True)]


@pytest.mark.parametrize("layouts", [("fused", "separate"), ("qwen_vl", "fused"), ("fused", "qwen_vl")])
def test_layers_with_experts_in_two_layouts_are_written_one_by_one_or_not_at_all(
    tmp_path: Path, layouts: tuple[str, str]
) -> None:
    one, two = write_experts(tmp_path, *layouts)
    runs = [(one, 0, 1), (two, 1, 2)]

    with pytest.raises(PlanError, match=r"say `stockflow: \{experts: separate\}`"):
        stacked(tmp_path, runs)
    found = stacked(tmp_path, runs, stockflow={"experts": "separate"})

    single = [dict(each) for each in models(1, "separate")]
    for layer in (0, 1):
        for name in (name for name in single[layer] if name.startswith(f"model.layers.{layer}.")):
            expected = single[layer][name].float().numpy()
            assert np.array_equal(found[name].array.astype(np.float32), expected), name


def test_one_by_one_is_how_layers_of_a_fused_model_follow_single_ones(tmp_path: Path) -> None:
    one, two = write_experts(tmp_path, "separate", "fused")

    found = stacked(tmp_path, [(one, 0, 1), (two, 1, 2)])

    assert not any(name.endswith("gate_up_proj") for name in found)
    expected = models(1, "separate")[1]["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert np.array_equal(
        found["model.layers.1.mlp.experts.2.up_proj.weight"].array.astype(np.float32), expected.float().numpy()
    )


def test_single_experts_of_several_models_are_not_stacked_into_fused_ones(tmp_path: Path) -> None:
    one, two = write_experts(tmp_path, "separate", "separate")

    with pytest.raises(PlanError, match="do not all store experts in tensors that hold all of a layer"):
        stacked(tmp_path, [(one, 0, 1), (two, 1, 2)], stockflow={"experts": "fused"})


def test_layers_beyond_those_of_the_donor_are_fused_as_they_are_there(tmp_path: Path) -> None:
    _, two = write_experts(tmp_path, "fused", "fused")
    of_short = {name: tensor for name, tensor in models(1, "fused")[0].items() if ".layers.1." not in name}
    short = write_checkpoint(tmp_path / "short", of_short, config={"model_type": "qwen3_moe", "num_hidden_layers": 1})

    found = stacked(tmp_path, [(short, 0, 1), (two, 1, 2)])

    expected = models(1, "fused")[1]["model.layers.1.mlp.experts.gate_up_proj"]
    assert np.array_equal(
        found["model.layers.1.mlp.experts.gate_up_proj"].array.astype(np.float32), expected.float().numpy()
    )


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.02


def write_coded(folder: Path, seed: int, coded: set[int], block: tuple[int, int] = (8, 8), **said: Any) -> Path:
    """Write a model of two layers, of which some are FP8; OTHER is plain in the others, and codes in these."""
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(16, dtype=torch.bfloat16)}
    for layer in (0, 1):
        for number, part in enumerate((PART, OTHER)):
            name, values = f"model.layers.{layer}.{part}", drawn(10 * seed + 2 * layer + number)
            made = quantised.fp8(values, block).tensors if layer in coded else {"weight": values.bfloat16()}
            tensors |= {f"{name}.{own}": tensor for own, tensor in made.items()}
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16}
    if coded:
        of_codes = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
        config["quantization_config"] = of_codes | said
    return write_checkpoint(folder, tensors, config=config, side_files={})


def test_a_config_names_the_plain_modules_of_the_layers_that_are_written(tmp_path: Path) -> None:
    listed = ["lm_head", f"model.layers.1.{PART}", f"model.layers.1.{OTHER}"]
    one = write_coded(tmp_path / "one", 0, {0}, modules_to_not_convert=listed)
    two = write_coded(tmp_path / "two", 1, {0}, modules_to_not_convert=listed)

    found = stacked(tmp_path, [(one, 1, 2), (two, 0, 2)])  # plain, codes, plain

    assert [found[f"model.layers.{layer}.{PART}.weight"].dtype for layer in range(3)] == ["BF16", "F8_E4M3", "BF16"]
    said = written_config(tmp_path)["quantization_config"]["modules_to_not_convert"]
    assert set(said) == {"lm_head", *(f"model.layers.{layer}.{part}" for layer in (0, 2) for part in (PART, OTHER))}


def test_modules_that_are_plain_in_every_layer_are_listed_in_the_new_ones_too(tmp_path: Path) -> None:
    """As Qwen lists its routers: a loader takes what is not listed for codes."""
    listed = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    models = []
    for number in range(2):
        folder = write_coded(tmp_path / str(number), number, {0, 1}, modules_to_not_convert=listed)
        gates = {f"{name}.weight": torch.ones(4, 16, dtype=torch.bfloat16) for name in listed}
        (path,) = folder.glob("*.safetensors")
        save_file(load_file(path) | gates, path, {"format": "pt"})
        models.append(folder)

    stacked(tmp_path, [(models[0], 0, 2), (models[1], 1, 2)])

    said = written_config(tmp_path)["quantization_config"]["modules_to_not_convert"]
    assert said == [f"model.layers.{layer}.mlp.gate" for layer in (0, 1, 2)]


def test_plain_layers_on_coded_ones_are_listed_as_such(tmp_path: Path) -> None:
    one, two = write_coded(tmp_path / "one", 0, {0, 1}), write_coded(tmp_path / "two", 1, set())

    stacked(tmp_path, [(one, 0, 2), (two, 1, 2)])

    said = written_config(tmp_path)["quantization_config"]["modules_to_not_convert"]
    assert set(said) == {f"model.layers.2.{PART}", f"model.layers.2.{OTHER}"}


@pytest.mark.parametrize(
    ("first", "block", "words"),
    [(set[int](), (8, 8), "FP8"), ({0, 1}, (16, 16), r"in blocks of \[16, 16\]")],
    ids=["the config knows of no codes", "blocks of another size"],
)
def test_layers_in_codes_that_the_config_does_not_speak_of_are_no_model(
    tmp_path: Path, first: set[int], block: tuple[int, int], words: str
) -> None:
    one, two = write_coded(tmp_path / "one", 0, first), write_coded(tmp_path / "two", 1, {0, 1}, block)
    runs = [(one, 0, 2), (two, 1, 2)]

    with pytest.raises(PlanError, match=rf"two gives layers in .*{words}.*output_format: bfloat16"):
        stacked(tmp_path, runs)
    found = stacked(tmp_path, runs, stockflow={"output_format": "bfloat16"})

    values = quantised.fp8(drawn(12), block).values
    written = found[f"model.layers.2.{PART}.weight"]
    assert written.dtype == "BF16"
    assert np.array_equal(written.array, oracle.widen("BF16", oracle.round_to("BF16", values)).reshape(SHAPE))
    assert "quantization_config" not in written_config(tmp_path)


def write_vocabularies(root: Path, *nums: int, tied: tuple[bool, ...] = (False, False)) -> list[Path]:
    """Write models with so many tokens, the first of which are the same; of one that is tied, no head."""
    found = []
    for number, (num, is_tied) in enumerate(zip(nums, tied, strict=True)):
        random = torch.Generator().manual_seed(number)
        names = {"model.embed_tokens.weight": (num, 4), "model.layers.0.mlp.up_proj.weight": (4, 4)}
        names |= {"model.layers.1.mlp.up_proj.weight": (4, 4)} | ({} if is_tied else {"lm_head.weight": (num, 4)})
        tensors = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in names.items()}
        config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": num, "tie_word_embeddings": is_tied}
        tokens = {"tokenizer.json": tokenizer_json([f"t{each}" for each in range(num)])}
        found.append(write_checkpoint(root / f"v{number}", tensors, config=config, side_files=tokens))
    return found


def test_a_stack_has_rows_for_one_vocabulary(tmp_path: Path) -> None:
    one, two = write_vocabularies(tmp_path, 9, 11)
    runs = [(one, 0, 1), (two, 1, 2)]

    with pytest.raises(PlanError, match=r"9 in 'model.embed_tokens.weight' and 11 in 'lm_head.weight'"):
        stacked(tmp_path, runs)
    found = stacked(tmp_path, runs, tokenizer_source="union")

    assert found["model.embed_tokens.weight"].array.shape == found["lm_head.weight"].array.shape == (11, 4)
    (told,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["remarks"]
    assert told["code"] == "tokens-missing"
    assert "2 tokens such as 't9' have a row of zeros in 'model.embed_tokens.weight'" in told["text"]
    assert not found["model.embed_tokens.weight"].array[9:].any()


def test_the_head_behind_the_layers_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    one, two = write_vocabularies(tmp_path, 9, 9, tied=(False, True))

    found = stacked(tmp_path, [(one, 0, 1), (two, 1, 2)])

    assert np.array_equal(found["lm_head.weight"].array, oracle.load_checkpoint(two)["model.embed_tokens.weight"].array)
    assert written_config(tmp_path)["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["remarks"] == []
