"""Adapters as sources against PEFT's own merge, installed beside this environment: ``make test-peers ARGS=-rP``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stockflow
from tests import oracle, runs
from tests.benchmarks.peers import ENVIRONMENT
from tests.checkpoints import write_checkpoint
from tests.peft_models import CASES, LOGITS
from tests.quantised import FORMS

pytestmark = pytest.mark.peers

REQUIREMENTS = ("peft==0.21.2", "accelerate", "psutil")
LEAST_EQUAL = 0.9999
"""Of the numbers that an adapter changes: of PEFT's merge in float32 rounded to BF16 once, and in float64 to F32."""
MOST_APART = 3e-6
"""Of the largest logit, between a merged model of F32, and base and adapter side by side in PEFT."""
JUDGES = {"BF16": ("bfloat16", "merged"), "F32": ("float32", "exact")}
"""By what is written here, what a recipe calls it and what PEFT made."""


def with_peft(*words: object) -> None:
    """Run ``tests.peft_models`` where PEFT can be imported."""
    library = ENVIRONMENT.parent / "peft"
    if not (library / "peft").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library)]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
    environment = os.environ | {"PYTHONPATH": f"{runs.REPOSITORY}:{library}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "tests.peft_models", *map(str, words)], check=True, env=environment)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, adapters and what PEFT makes of them, and what was merged of them here, with its logits."""
    folder = tmp_path_factory.mktemp("peft")
    with_peft("write", folder)
    for case in CASES:
        model = {"model": f"{folder / case}/base+{folder / case}/lora"}
        for dtype, (name, _) in JUDGES.items():
            recipe = {"merge_method": "passthrough", "models": [model], "dtype": name}
            stockflow.merge(recipe, folder / case / dtype)
    with_peft("forward", *(folder / case / "F32" for case in CASES))
    return folder


def share_equal(case: Path, dtype: str) -> float:
    """Return the share of what PEFT made, rounded, that was merged here, of all tensors that an adapter changes."""
    base, found, expected = (oracle.load_checkpoint(case / name) for name in ("base", dtype, JUDGES[dtype][1]))
    assert found.keys() == expected.keys()
    equal = total = 0
    for name, (_, values) in expected.items():
        right = oracle.widen(dtype, oracle.round_to(dtype, values)).reshape(values.shape)
        if name in base and np.array_equal(right, base[name].array):
            np.testing.assert_array_equal(found[name].array, right, err_msg=name)
        else:
            equal += int((found[name].array == right).sum())
            total += values.size
    return equal / total


def apart(found: Path, expected: Path) -> float:
    """Return how far logits are from others, of the largest of these."""
    ours, theirs = (np.load(folder / LOGITS) for folder in (found, expected))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_an_adapter_is_what_peft_makes_of_it(case: str, models: Path) -> None:
    shares = [share_equal(models / case, dtype) for dtype in JUDGES]
    error = apart(models / case / "F32", models / case / "merged")
    print(f"| {case} | {' | '.join(f'{share:.4%}' for share in shares)} | {error:.1e} |")

    assert min(shares) >= LEAST_EQUAL
    assert error <= MOST_APART


CODED = {"q_proj": "DeepSeek-V3", "o_proj": "Kimi-K2", "up_proj": "DeepSeek-V3", "down_proj": "by row"}
TOGETHER = ("plain", "rslora", "patterns")


def write_coded(plain: Path, folder: Path) -> None:
    """Write a model with codes in the place of some weights, and the numbers that these stand for in F32."""
    codes, numbers = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        form = CODED.get(module.rpartition(".")[2])
        made = FORMS[form][0](tensor.float()) if form else None
        codes |= {f"{module}.{key}": value for key, value in made.tensors.items()} if made else {name: tensor}
        numbers[name] = torch.from_numpy(made.values).float() if made else tensor.float()
    config = json.loads((plain / "config.json").read_text())
    said = {"quantization_config": {"quant_method": "x", "weight_block_size": [128, 128]}}
    write_checkpoint(folder / "coded", codes, config=config | said, side_files={})
    write_checkpoint(folder / "decoded", numbers, config=config | {"dtype": "float32"}, side_files={})


def test_adapters_on_codes_from_s3_to_s3_on_ray_are_what_peft_makes_of_the_numbers(
    models: Path, s3_endpoint: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_coded(models / "plain" / "base", tmp_path)
    adapters = [models / case / "lora" for case in TOGETHER]
    with_peft("together", tmp_path / "decoded", tmp_path / "merged", *adapters)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for place, name in ((tmp_path / "coded", "base"), *zip(adapters, TOGETHER, strict=True)):
        for path in place.iterdir():
            client.upload_file(str(path), s3_bucket, f"{name}/{path.name}")
    root = f"s3://{s3_bucket}"
    listed = [{"model": f"{root}/base+{root}/{name}", "parameters": {"weight": 1.0}} for name in TOGETHER]
    recipe = {"merge_method": "task_arithmetic", "base_model": f"{root}/base", "models": listed, "dtype": "bfloat16"}
    recipe["stockflow"] = {"storage": {root: {"endpoint": s3_endpoint}}, "output_format": "bfloat16"}

    stockflow.merge(recipe, f"{root}/out", executor="ray", workers=2, shard_size="100kB")

    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_bucket, Prefix="out/model")
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    assert len(keys) > 3
    (tmp_path / "BF16").mkdir()
    for key in keys:
        client.download_file(s3_bucket, key, str(tmp_path / "BF16" / key.rpartition("/")[2]))
    (tmp_path / "base").symlink_to(tmp_path / "decoded")
    share = share_equal(tmp_path, "BF16")
    print(f"| three adapters on codes | {share:.4%} |")
    assert share >= LEAST_EQUAL


def test_an_adapter_of_adapters_is_what_peft_makes_of_all(models: Path, tmp_path: Path) -> None:
    cases, weights = TOGETHER, (0.5, 0.2, 0.3)
    listed = [
        {"model": str(models / case / "lora"), "parameters": {"weight": weight}}
        for case, weight in zip(cases, weights, strict=True)
    ]
    recipe = {"merge_method": "linear", "models": listed, "stockflow": {"output": "adapter"}}
    stockflow.merge(recipe, tmp_path / "lora")
    by_hand = recipe | {"stockflow": {}, "dtype": "float32"}
    for each, case in zip(listed, cases, strict=True):
        each["model"] = f"{models / case}/base+{models / case}/lora"
    stockflow.merge(by_hand, tmp_path / "by-hand")

    with_peft("apply", models / "plain" / "base", tmp_path / "lora", tmp_path / "merged")
    with_peft("forward", tmp_path / "by-hand")

    merged, *own = (oracle.load_checkpoint(path / "merged") for path in (tmp_path, *(models / case for case in cases)))
    for name, (_, found) in merged.items():
        expected = sum(weight * each[name].array for weight, each in zip(weights, own, strict=True))
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)
    assert apart(tmp_path / "by-hand", tmp_path / "merged") <= MOST_APART
