"""``stockflow extract``: adapters against singular values in float64, and read back as sources."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import Result

import stockflow
from tests import adapters, oracle, quantised, runs
from tests.checkpoints import LLAMA_CONFIG, write_checkpoint

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0"
LONG, WIDE, SMALL = f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.self_attn.q_proj.weight"
NORM, BIAS, EQUAL = "model.norm.weight", f"{LAYER}.self_attn.q_proj.bias", f"{LAYER}.self_attn.k_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {
    EMBEDDING: (90, 40), LONG: (1501, 211), WIDE: (90, 1600), SMALL: (40, 40), BIAS: (40,), EQUAL: (20, 40),
    NORM: (40,), HEAD: (90, 40),
}  # fmt: skip
"""One of several spans that end within rows, one wider than long, small ones."""
WORST = 1.02


def drawn(names: Mapping[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in names.items()}


def changed(base: Tensors, *names: str, rank: int | None = None) -> Tensors:
    """Return a tune that moved some tensors, most along few directions."""
    random, tuned = torch.Generator().manual_seed(9), {name: tensor.clone() for name, tensor in base.items()}
    for name in names:
        shape = base[name].shape
        noise = 0.02 * torch.randn(shape, generator=random)
        if len(shape) == 2:
            inner = rank or 6
            low = torch.randn(shape[0], inner, generator=random) @ torch.randn(inner, shape[1], generator=random)
            noise = 0.05 * low + (0 if rank else noise)
        tuned[name] = base[name] + noise
    return tuned


def write(folder: Path, base: Tensors, tuned: Tensors, dtype: torch.dtype = torch.float32, **config: Any) -> None:
    for name, tensors in (("base", base), ("tuned", tuned)):
        stored = {key: value if value.dtype == torch.float64 else value.to(dtype) for key, value in tensors.items()}
        write_checkpoint(folder / name, stored, num_shards=min(2, len(stored)), config=LLAMA_CONFIG | config)


def extract(folder: Path, *options: object) -> Result:
    places = folder / "base", folder / "tuned", folder / "out"
    result = runs.invoke("extract", *places, *options)
    assert "Traceback" not in result.output
    return result


def facts(folder: Path, *options: object) -> dict[str, Any]:
    result = extract(folder, "--json", "--quiet", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def with_adapter(folder: Path, dtype: str = "float32") -> dict[str, oracle.Stored]:
    """Return the base with the adapter, as the product reads them."""
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{folder / 'base'}+{folder / 'out'}"}],
        "dtype": dtype,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs.merge_here(folder / "recipe.yaml", folder / "merged", overwrite=True)
    return oracle.load_checkpoint(folder / "merged")


def product(folder: Path, name: str) -> tuple[np.ndarray, int]:
    """Return what the factors make of a matrix by their definition, and their rank."""
    held = load_file(folder / "out" / "adapter_model.safetensors")
    key = adapters.PREFIX + name.removesuffix(".weight")
    a, b = (held[f"{key}.lora_{part}.weight"].double().numpy() for part in "AB")
    return b @ a, len(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_are_as_near_as_any_of_their_rank(dtype: torch.dtype, tmp_path: Path) -> None:
    base = drawn(SHAPES)
    tuned = changed(base, LONG, WIDE, SMALL, HEAD)
    write(tmp_path, base, tuned, dtype)

    found = facts(tmp_path, "--rank", 4)

    rows = {row["name"]: row for row in found["tensors"]}
    assert rows.keys() == {LONG, WIDE, SMALL, HEAD}
    for name, row in rows.items():
        change = (tuned[name].to(dtype).double() - base[name].to(dtype).double()).numpy()
        made, rank = product(tmp_path, name)
        values = np.linalg.svd(change, compute_uv=False)
        error, least = np.linalg.norm(change - made), np.linalg.norm(values[4:])
        assert rank == row["rank"] == 4
        assert error <= WORST * least, (name, error / least)
        assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert 1 - row["energy"] == pytest.approx(error**2 / np.sum(values**2), rel=1e-5)


def test_the_least_rank_that_keeps_the_energy_is_written_for_each_matrix(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    tuned = changed(changed(base, LONG, rank=2), WIDE, rank=7)
    write(tmp_path, base, tuned)

    found = facts(tmp_path, "--rank", 5, "--energy", 0.999)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {row["name"]: row["rank"] for row in found["tensors"]} == {LONG: 2, WIDE: 5}
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^model\\.layers\\.0\\.mlp\\.up_proj": 2}
    assert config["target_modules"] == ["down_proj", "up_proj"]
    merged = with_adapter(tmp_path)
    for name in (LONG, WIDE):
        made, _ = product(tmp_path, name)
        expected = oracle.round_to("F32", base[name].double().numpy() + made)
        steps = oracle.ulp_distance("F32", oracle.round_to("F32", merged[name].array), expected)
        assert (steps <= 1).mean() > 0.999, name
    assert not np.array_equal(merged[LONG].array, base[LONG].numpy())
    np.testing.assert_array_equal(merged[EQUAL].array.reshape(20, 40), base[EQUAL].numpy())


def test_the_bytes_depend_neither_on_memory_nor_on_threads_nor_on_files(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    tuned = changed(base, LONG, SMALL)
    write(tmp_path, base, tuned)
    files = []
    for options in (["--workers", 1], ["--workers", 3, "--memory", "8GiB"], ["--workers", 2, "--overwrite"]):
        facts(tmp_path, "--rank", 8, "--overwrite" if files else "--quiet", *options)
        files.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
        write_checkpoint(tmp_path / "tuned", tuned, config=LLAMA_CONFIG)

    assert files[0] == files[1] == files[2]


def test_what_was_an_adapter_becomes_one_again(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    write(tmp_path, base, base)
    made = adapters.linear(SHAPES, ["up_proj", "q_proj"], r=3)
    adapters.write_adapter(tmp_path / "lora", made)
    places = tmp_path / "base", f"{tmp_path / 'base'}+{tmp_path / 'lora'}", tmp_path / "out"

    found = stockflow.extract(*places, rank=3)

    assert {tensor.name for tensor in found.tensors} == {LONG, SMALL}
    assert found.energy == pytest.approx(1.0, abs=1e-9)
    expected = made.of({name: base[name].double().numpy() for name in SHAPES})
    np.testing.assert_allclose(product(tmp_path, LONG)[0], expected[LONG] - base[LONG].numpy(), atol=1e-5)


def test_a_quantised_base_is_what_its_codes_stand_for(tmp_path: Path) -> None:
    base = drawn({SMALL: (256, 128)})
    held = quantised.fp8(base[SMALL], (128, 128))
    codes = {f"{LAYER}.self_attn.q_proj.{name}": tensor for name, tensor in held.tensors.items()}
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_checkpoint(tmp_path / "base", codes, config=LLAMA_CONFIG | {"quantization_config": method})
    write_checkpoint(tmp_path / "tuned", base)

    facts(tmp_path, "--rank", 128)

    made, _ = product(tmp_path, SMALL)
    np.testing.assert_allclose(held.values + made, base[SMALL].numpy(), atol=1e-5)


def test_what_was_only_rounded_to_the_dtype_of_the_tune_did_not_change(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    write_checkpoint(tmp_path / "base", base, config=LLAMA_CONFIG)
    tuned = {name: tensor.bfloat16() for name, tensor in changed(base, SMALL).items()}
    write_checkpoint(tmp_path / "tuned", tuned, config=LLAMA_CONFIG)

    found = facts(tmp_path, "--rank", 4)

    assert [row["name"] for row in found["tensors"]] == [SMALL]


def test_what_does_not_decompose_is_refused_by_name_or_written_whole(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    tuned = changed(base, SMALL, NORM, BIAS, EMBEDDING)
    write(tmp_path, base, tuned, torch.bfloat16)

    refused = extract(tmp_path, "--rank", 4)

    assert refused.exit_code == 2
    assert "3 tensors changed that no factors hold" in refused.output
    assert all(name in refused.output for name in (NORM, BIAS, EMBEDDING, "--keep-whole", "--embeddings"))
    assert not (tmp_path / "out").exists()
    found = facts(tmp_path, "--rank", 4, "--keep-whole")
    assert {row["name"]: row["held"] for row in found["tensors"]} == {
        EMBEDDING: "whole", SMALL: "factors", BIAS: "whole", NORM: "whole"
    }  # fmt: skip
    merged = with_adapter(tmp_path, "bfloat16")
    for name in (NORM, BIAS, EMBEDDING):
        expected = tuned[name].bfloat16().float().numpy()
        np.testing.assert_array_equal(merged[name].array.reshape(expected.shape), expected)


def test_embeddings_are_factored_on_request(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    tuned = changed(base, EMBEDDING, rank=3)
    write(tmp_path, base, tuned)

    facts(tmp_path, "--rank", 3, "--embeddings")

    merged = with_adapter(tmp_path)
    np.testing.assert_allclose(merged[EMBEDDING].array.reshape(90, 40), tuned[EMBEDDING].numpy(), atol=1e-4)
    np.testing.assert_array_equal(merged[HEAD].array.reshape(90, 40), base[HEAD].numpy())


def test_an_embedding_that_is_the_head_too_is_written_for_both(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != HEAD}
    base = drawn(shapes)
    tuned = changed(base, EMBEDDING, SMALL)
    write(tmp_path, base, tuned, tie_word_embeddings=True)

    refused = extract(tmp_path, "--rank", 4, "--embeddings")

    assert refused.exit_code == 2
    assert "the embedding is the head, too" in refused.output
    facts(tmp_path, "--rank", 4, "--keep-whole")
    merged = with_adapter(tmp_path)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(merged[name].array.reshape(90, 40), tuned[EMBEDDING].numpy())


def test_the_head_of_another_family_is_saved_under_its_own_name(tmp_path: Path) -> None:
    embedding, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    base = drawn({embedding: (90, 40), bias: (90,), SMALL: (40, 40)})
    said = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "tie_word_embeddings": True}
    write(tmp_path, base, changed(base, embedding, SMALL), **said)

    facts(tmp_path, "--rank", 4, "--keep-whole")

    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert set(saved) == {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}


def test_linear_layers_that_store_in_before_out_are_said_to(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    base = drawn({name: (24, 72)})
    write(tmp_path, base, changed(base, name, rank=2), model_type="gpt2")

    facts(tmp_path, "--rank", 2)

    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    made, _ = product(tmp_path, name)
    assert made.shape == (72, 24)
    merged = with_adapter(tmp_path)
    expected = changed(base, name, rank=2)[name].numpy()
    np.testing.assert_allclose(merged[name].array.reshape(24, 72), expected, atol=1e-5)


def test_experts_have_a_pair_of_factors_each(tmp_path: Path) -> None:
    names = {f"{LAYER}.mlp.experts.{number}.up_proj.weight": (24, 40) for number in range(3)}
    base = drawn({**names, f"{LAYER}.mlp.gate.weight": (3, 40)})
    write(tmp_path, base, changed(base, *list(names)[:2], rank=2))

    found = facts(tmp_path, "--rank", 2)

    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert {row["name"] for row in found["tensors"]} == set(list(names)[:2])
    assert targets == [f"{LAYER}.mlp.experts.{number}.up_proj" for number in range(2)]


GATE_UP, DOWN = f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("names", [[GATE_UP, DOWN], [GATE_UP], [DOWN, SMALL]])
def test_experts_in_one_tensor_have_factors_in_the_layout_of_parameters(
    names: list[str], family: str, tmp_path: Path
) -> None:
    base = drawn({GATE_UP: (3, 24, 24), DOWN: (3, 24, 12), SMALL: (40, 40)})
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name in names:
        tuned[name] = changed({name: base[name][1]}, name, rank=2)[name].expand_as(base[name]).clone()
        tuned[name][0] = base[name][0]
        if base[name].ndim == 2:
            tuned[name] = changed(base, name, rank=2)[name]
    write(tmp_path, base, tuned, model_type=family)

    found = facts(tmp_path, "--rank", 16)

    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {row["name"] for row in found["tensors"]} == set(names)
    assert said["target_parameters"] == [name for name in base if name in names and name != SMALL]
    merged = with_adapter(tmp_path)
    for name, tensor in tuned.items():
        least = np.linalg.svd((tensor - base[name]).double().numpy(), compute_uv=False)[..., 16:]
        error = np.linalg.norm(merged[name].array.reshape(tensor.shape) - tensor.numpy())
        assert error <= WORST * np.linalg.norm(least) + 1e-4, name
        assert np.linalg.norm(merged[name].array.reshape(tensor.shape) - base[name].numpy()) > 0 or name not in names


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (f"{LAYER}.mlp.experts.input_linear.weight", (3, 16, 20), "--keep-whole"),
        (f"{LAYER}.mlp.gate.weight", (3, 40), "--keep-whole"),
        (f"{LAYER}.conv.weight", (4, 1, 3), "--keep-whole"),
        (f"{LAYER}.self_attn.sinks", (4,), "neither adapts nor saves whole"),
        ("sigma", (), "neither adapts nor saves whole"),
    ],
)
def test_nothing_that_changed_is_left_out_in_silence(
    name: str, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    base = drawn({SMALL: (40, 40), name: shape})
    write(tmp_path, base, changed(base, SMALL, name))

    refused = extract(tmp_path, "--rank", 2)

    assert refused.exit_code == 2
    assert name in refused.output
    assert said in refused.output


def _with_rows(tensors: Tensors) -> Tensors:
    return {**tensors, EMBEDDING: torch.cat([tensors[EMBEDDING], torch.ones(3, 40)])}


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        (_with_rows, f"'{EMBEDDING}' is [90, 40] in "),
        (lambda base: {**base, "model.extra.weight": torch.ones(2)}, "1 tensor of"),
        (lambda base: {name: base[name] for name in base if name != NORM}, f"'{NORM}'"),
        (lambda base: base, "no matrix that factors hold differs"),
        (lambda base: {**base, SMALL: base[SMALL] * float("nan")}, "has NaN or infinity"),
        (lambda base: {**base, SMALL: base[SMALL] * 1e12}, "is beyond F16"),
        (lambda base: {**base, SMALL: base[SMALL].double() * 1e300}, "is beyond float32"),
    ],
)
def test_checkpoints_of_which_no_adapter_can_be_made_are_refused(tune: Any, said: str, tmp_path: Path) -> None:
    base = drawn(SHAPES)
    write(tmp_path, base, tune(base))

    refused = extract(tmp_path, "--rank", 2, "--dtype", "float16")

    assert refused.exit_code == 2
    assert said in refused.output
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_output_that_is_taken_is_left_as_it_is(tmp_path: Path) -> None:
    base = drawn(SHAPES)
    write(tmp_path, base, changed(base, SMALL))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")

    for options in ([], ["--overwrite"]):
        refused = extract(tmp_path, "--rank", 2, *options)
        assert refused.exit_code == 2
        assert "not empty" in refused.output

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    inside = runs.invoke("extract", *[tmp_path / each for each in ("base", "tuned", "tuned/out")])
    assert inside.exit_code == 2
    assert "lies in" in inside.output


@pytest.mark.parametrize("words", [["--rank", "0"], ["--energy", "1.5"], ["--energy", "nan"], ["--dtype", "int8"]])
def test_settings_that_cannot_be_are_refused(words: list[str], tmp_path: Path) -> None:
    assert extract(tmp_path, *words).exit_code == 2


_WITHIN = """
import re, sys
import stockflow
from stockflow.engine.process import peak_memory_bytes

def extracted(memory):
    stockflow.extract(*sys.argv[1:], rank=160, memory=memory, workers=2)

try:
    extracted("310MiB")
except stockflow.BudgetError as error:
    least = int(re.search(r"at least (\\d+) MiB", str(error))[1]) + 1
extracted(f"{least}MiB")
print(least, peak_memory_bytes() / 2**20)
"""


def test_memory_is_bounded_where_sketches_are_most_of_it(tmp_path: Path) -> None:
    """A fresh process, told the least memory that it takes; sketches of both sizes of the matrix are 80 MiB."""
    base = drawn({LONG: (4000, 900), NORM: (40,)})
    write(tmp_path, base, changed(base, LONG), torch.bfloat16)
    places = [str(tmp_path / name) for name in ("base", "tuned", "out")]

    ran = subprocess.run([sys.executable, "-c", _WITHIN, *places], capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
    least, peak = map(float, ran.stdout.split())
    print(f"FIGURES least {least:.0f}, peak {peak:.0f} MiB")
    assert least > 320
    assert peak <= least


def test_from_a_bucket_to_a_bucket(s3_endpoint: str, s3_bucket: str, tmp_path: Path) -> None:
    base = drawn(SHAPES)
    write(tmp_path, base, changed(base, LONG, SMALL))
    facts(tmp_path, "--rank", 3, "--dtype", "bfloat16")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in [path for name in ("base", "tuned") for path in (tmp_path / name).iterdir()]:
        client.upload_file(str(path), s3_bucket, f"{path.parent.name}/{path.name}")
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": "x/y"}],
        "stockflow": {"storage": {f"s3://{s3_bucket}": {"endpoint": s3_endpoint}}},
    }
    places = [f"s3://{s3_bucket}/{name}" for name in ("base", "tuned", "out")]

    found = stockflow.extract(*places, recipe=recipe, rank=3, dtype="bfloat16")

    here = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    there = client.get_object(Bucket=s3_bucket, Key="out/adapter_model.safetensors")["Body"].read()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_bucket, Prefix="out/")
    listed = {entry["Key"].removeprefix("out/") for page in pages for entry in page["Contents"]}
    assert here == there
    assert {*found.files, "manifest.json"} <= listed
    assert not [key for key in listed if "/factors/" in key], "nothing is left over"
    verified = stockflow.verify(places[2], recipe=recipe, inputs=True)
    assert (verified.findings, verified.num_files) == ((), 4)
