"""Adapters as sources against PEFT's own merge in float32, installed beside this environment: ``make test-peers``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import stockflow
from tests import oracle, runs
from tests.benchmarks.peers import ENVIRONMENT
from tests.peft_models import CASES

pytestmark = pytest.mark.peers

REQUIREMENTS = ("peft==0.21.2", "accelerate", "psutil")
LEAST_EQUAL = 0.9998
"""Of elements; PEFT adds in float32, and a model here has 10,000."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    with_peft("write", folder)
    return folder


def with_peft(*words: object) -> None:
    """Run ``tests.peft_models`` where PEFT can be imported."""
    library = ENVIRONMENT.parent / "peft"
    if not (library / "peft").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library)]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
    environment = os.environ | {"PYTHONPATH": f"{runs.REPOSITORY}:{library}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "tests.peft_models", *map(str, words)], check=True, env=environment)


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_an_adapter_is_what_peft_makes_of_it(case: str, models: Path, tmp_path: Path) -> None:
    model = f"{models / case}/base+{models / case}/lora"
    recipe = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "bfloat16"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs.merge_here(tmp_path / "recipe.yaml", tmp_path / "out")

    found, expected = (oracle.load_checkpoint(folder) for folder in (tmp_path / "out", models / case / "merged"))

    assert found.keys() == expected.keys()
    equal = total = 0
    for name, (_, values) in expected.items():
        right = oracle.widen("BF16", oracle.round_to("BF16", values)).reshape(values.shape)
        equal += int((found[name].array == right).sum())
        total += values.size
    assert equal >= LEAST_EQUAL * total
    base = oracle.load_checkpoint(models / case / "base")
    assert any((base[name].array != found[name].array).any() for name in base)


def test_an_adapter_of_adapters_is_what_peft_makes_of_all(models: Path, tmp_path: Path) -> None:
    cases, weights = ("plain", "rslora", "patterns"), (0.5, 0.2, 0.3)
    listed = [
        {"model": str(models / case / "lora"), "parameters": {"weight": weight}}
        for case, weight in zip(cases, weights, strict=True)
    ]
    recipe = {"merge_method": "linear", "models": listed, "stockflow": {"output": "adapter"}}
    stockflow.merge(recipe, tmp_path / "lora")

    with_peft("merge", models / "plain" / "base", tmp_path / "lora", tmp_path / "merged")

    merged, *own = (oracle.load_checkpoint(path / "merged") for path in (tmp_path, *(models / case for case in cases)))
    for name, (_, found) in merged.items():
        expected = sum(weight * each[name].array for weight, each in zip(weights, own, strict=True))
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)
