"""Adapters as sources against PEFT's own merge, installed beside this environment: ``make test-peers ARGS=-rP``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stockflow
from tests import oracle, runs
from tests.benchmarks.peers import ENVIRONMENT
from tests.peft_models import CASES, LOGITS

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


def test_an_adapter_of_adapters_is_what_peft_makes_of_all(models: Path, tmp_path: Path) -> None:
    cases, weights = ("plain", "rslora", "patterns"), (0.5, 0.2, 0.3)
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
